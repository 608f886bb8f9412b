"""Measures the published bundles on held-out interactions, next to baselines on the same split.

    python -m rec.evaluate --config config/dummy/dummy_small.yaml
    python -m rec.evaluate --split val --baselines

- Systems: `popularity`; `retrieval` (the towers, exact search), `retrieval_ann` (through the bundle's index),
  `recommender` (retrieved, then ranked); with --baselines also recent popularity, iALS, EASE, tuned on validation.
- Every system ranks the full catalogue without what the user has interacted with in earlier splits.
- The bundles answer from the histories given here, so that --split val hides the validation items from them.

If users x items exceeds 10 billion, a random sample of the users is evaluated; the report holds both numbers.

Tables go to stderr; the last line of stdout is JSON: {"dataset", "split", "users", "out_of_users", "systems": {name:
{"ndcg@10": x, "ndcg@10_ci": [low, high], ...}}}.
"""

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from rec import baselines, metrics
from rec.bundles import files
from rec.bundles.recommender import Recommender
from rec.config import Config, Features, add_config_arguments, load_config
from rec.corpus import Corpus, load_corpus
from rec.data_prep.dataset import Dataset, open_dataset
from rec.errors import UserError, command_parser, run_command
from rec.features import FIRST_ITEM, PAD
from rec.ops.rating_baselines import rating_baselines
from rec.recommend import recommend, show

K = max(metrics.KS)
BATCH = 256  # users a call
# Users x items, a minute or two per system. Beyond that, a random sample of the users is evaluated,
MOST_SCORES = 10**10
FEWEST_USERS = 1_000  # but never fewer than these.
Report = dict[str, Any]  # plain values, for JSON
SHOWN = ("ndcg@10", "recall@10", "recall@100", "mrr", "coverage@10", "popularity@10")


class Task:
    """Who is asked about, what was known of them, and what they did next. Columns are catalogue rows, from 0."""

    def __init__(self, corpus: Corpus, split: str) -> None:
        """Raises UserError where the split is empty, or holds what is in a user's history."""
        self.corpus, self.history = corpus, corpus.history(split)
        held = corpus.val if split == "val" else corpus.test
        users = np.flatnonzero(held.lengths).astype(np.int32)
        if not len(users):
            raise UserError(f"the {split} split holds no interactions: there is nothing to measure")
        most = max(FEWEST_USERS, MOST_SCORES // len(corpus.items.ids))
        self.users = np.sort(
            np.random.default_rng(0).permutation(users)[:most]
        )  # [U] user rows with held-out items
        self.out_of = len(users)
        self.held = held if len(users) <= most else held.select(np.isin(held.users, self.users))
        matrices = (
            part.matrix(self.users, corpus.items.rows) for part in (self.held, self.history)
        )
        self.relevant, self.seen = (
            matrix[:, FIRST_ITEM:] for matrix in matrices
        )  # [U, catalogue] each
        metrics.check_no_overlap(self.seen, self.relevant)

    def segments(self) -> dict[str, np.ndarray]:
        """[U] bool masks: all users; those without a history, with one up to the median length, with a longer one."""
        lengths = self.history.lengths[self.users]
        median = np.median(lengths[lengths > 0]) if lengths.any() else 0
        masks = {"all": lengths >= 0, "cold": lengths == 0}
        masks |= {"light": (lengths > 0) & (lengths <= median), "heavy": lengths > median}
        return {name: mask for name, mask in masks.items() if mask.any()}

    def requests(self) -> Iterator[tuple[np.ndarray, tf.Tensor, tf.Tensor, tf.Tensor]]:
        """Batches of user rows [B], and, as a bundle takes them, of user_id [B], history [B, S], request time [B]."""
        for begin in tqdm(
            range(0, len(self.users), BATCH), desc="evaluating", unit="batch", leave=False
        ):
            users = self.users[begin : begin + BATCH]
            # The time of the first held-out interaction; without timestamps, any time does.
            times = (
                np.zeros(len(users))
                if self.held.times is None
                else self.held.times[self.held.offsets[users]]
            )
            ids = self.corpus.users.ids[users - self.corpus.users.first]
            yield (
                users,
                tf.constant(ids.tolist()),
                self._ids(self.history.last(users)),
                tf.constant(times, tf.int64),
            )

    def _ids(self, rows: np.ndarray) -> tf.Tensor:
        """Item rows -> their ids, "" for PAD."""
        by_row = np.concatenate([np.full(FIRST_ITEM, "", object), self.corpus.items.ids])
        return tf.constant(by_row[rows], tf.string)

    def ranked(self, ask: Callable[..., dict[str, tf.Tensor]]) -> np.ndarray:
        """[U, K] catalogue rows that a bundle's function returns, -1 behind."""
        parts = [
            ask(ids, past, past, times)["item_id"].numpy()
            for _, ids, past, times in self.requests()
        ]
        items: Any = np.concatenate(parts).astype(bytes)[:, :K]
        rows = self.corpus.items.encode(np.char.decode(items, "utf-8").astype(object).ravel(), PAD)
        rows = np.where(rows == PAD, -1, rows - FIRST_ITEM).reshape(items.shape)
        return np.pad(rows, [(0, 0), (0, K - rows.shape[1])], constant_values=-1)

    def predicted_ratings(self, pair: Recommender) -> np.ndarray:
        """The ranking bundle's predictions of all held-out ratings, in the order of `held`."""
        ranking = pair.module.ranking
        assert ranking is not None
        parts = []
        for users, ids, past, times in self.requests():
            rows = self.held.last(users)
            scores = ranking.score_at(ids, past, self._ids(rows), times)["score"]
            parts.append(scores.numpy()[rows != PAD])
        return np.concatenate(parts)


def evaluate(
    config: Config, split: str, with_baselines: bool = False, pair: Recommender | None = None
) -> Report:
    """The command's JSON document (see the module).

    Args:
      split: "val" or "test".
      with_baselines: also fit and tune the baselines that take time.
      pair: the bundles to measure; by default the latest of each stage, without ranking where there is none.
    """
    dataset = open_dataset(config.dataset)
    task = Task(load_corpus(dataset, Features({}, {})), split)
    pair = pair or load_latest(config)
    if pair.metadata.retrieval.dataset != dataset.id:
        other = f"{config.output.savedmodels}/retrieval was trained on another data set than {config.dataset}"
        raise UserError(f"{other}: train on it first, or name another output.savedmodels")
    ranked = _baselines(task, with_baselines)
    named = list(ranked)
    ranked["retrieval"] = task.ranked(pair.module.retrieval.retrieve_exactly)
    ranked["retrieval_ann"] = task.ranked(pair.module.retrieval.retrieve)
    if pair.module.ranking is not None:
        ranked["recommender"] = task.ranked(pair.module.recommend_from)
    values = {name: metrics.per_user(rows, task.relevant) for name, rows in ranked.items()}
    best = max(named, key=lambda name: values[name]["ndcg@10"].mean())
    report: Report = {"dataset": str(config.dataset), "split": split, "users": len(task.users)}
    report |= {"out_of_users": task.out_of, "best_baseline": best}
    report["systems"] = {
        name: _summary(task, rows, values[name], config.seed) for name, rows in ranked.items()
    }
    for name, of in values.items():
        difference = metrics.paired_bootstrap(of["ndcg@10"], values[best]["ndcg@10"], config.seed)
        report["systems"][name]["ndcg@10_vs_best_baseline"] = difference
    report["segments"] = {
        name: _where(values, mask, config.seed) for name, mask in task.segments().items()
    }
    if pair.metadata.predicts_ratings:
        report["ratings"] = _rating_errors(task, pair)
    return report


def compare(config: Config, candidate: files.Pair, current: files.Pair | None = None) -> Report:
    """A pair beside the one in production, on the test data that belong to the candidate.

    Returns:
      data: where they are; users; index_recall, index_recall_ci: how much of the k best by exact search the
      candidate's index finds for them; index_recall_target; metric: "ndcg@10", or "squared error" where both predict
      ratings; candidate: its value; where something is in production: production, difference, ci (paired), worse.

    Raises:
      UserError: the data set that the candidate was trained on is not at hand, or a bundle is damaged.
    """
    pair = Recommender.load(*candidate)
    dataset = data_of(pair, config)
    task = Task(load_corpus(dataset, Features({}, {})), "test")
    retrieval = pair.module.retrieval
    found, exact = (task.ranked(ask) for ask in (retrieval.retrieve, retrieval.retrieve_exactly))
    shares = [
        np.isin(best[best >= 0], row).mean()
        for row, best in zip(found, exact, strict=True)
        if best[0] >= 0
    ]
    of_index = metrics.summarise({"index_recall": np.array(shares)}, config.seed)
    pairs = {"candidate": pair} | ({"production": Recommender.load(*current)} if current else {})
    by_ratings = all(each.metadata.predicts_ratings for each in pairs.values())
    values = {name: _quality(task, each, by_ratings) for name, each in pairs.items()}
    report: Report = {"data": str(dataset.path), "users": len(task.users), **of_index}
    report["index_recall_target"] = pair.metadata.retrieval.config.index.recall_target
    report["metric"] = "squared error" if by_ratings else "ndcg@10"
    report |= {name: float(each.mean()) for name, each in values.items()}
    if current:
        report |= metrics.paired_bootstrap(values["candidate"], values["production"], config.seed)
        low, high = report["ci"]
        report["worse"] = low > 0 if by_ratings else high < 0
    return report


def data_of(pair: Recommender, config: Config) -> Dataset:
    """The data set that a pair was trained on: the config's, or where the pair says that it was. Else a UserError."""
    trained_on = pair.metadata.retrieval.dataset
    places = (config.dataset, pair.metadata.retrieval.config.dataset)
    for place in filter(lambda each: (Path(each) / "dataset.json").exists(), places):
        dataset = open_dataset(place)
        if dataset.id == trained_on:
            return dataset
    raise UserError(
        f"the data set of the candidate is neither {' nor '.join(places)}: name it by --set dataset=DIR"
    )


def _quality(task: Task, pair: Recommender, by_ratings: bool) -> np.ndarray:
    """The squared error of every held-out rating, or the NDCG@10 of every user's answer."""
    if by_ratings:
        assert task.held.ratings is not None
        return (task.predicted_ratings(pair) - task.held.ratings) ** 2
    return metrics.per_user(task.ranked(pair.module.recommend_from), task.relevant)["ndcg@10"]


def _summary(task: Task, rows: np.ndarray, values: dict[str, np.ndarray], seed: int) -> Report:
    """What the report says of one system."""
    coverage = {
        f"coverage@{k}": metrics.coverage(rows, k, task.relevant.shape[1]) for k in metrics.KS
    }
    top = rows[:, :10]
    popularity = task.corpus.popularity[FIRST_ITEM:][top[top >= 0]]
    mean = float(popularity.mean()) if len(popularity) else 0.0
    return metrics.summarise(values, seed) | coverage | {"popularity@10": mean}


def _where(values: dict[str, dict[str, np.ndarray]], mask: np.ndarray, seed: int) -> Report:
    """Where quality is won or lost among the users of `mask` [U]: each system, the index, the ranker."""
    shown = ("ndcg@10", "recall@10", "recall@100")
    part: Report = {"users": int(mask.sum())}
    part["systems"] = {
        name: {at: float(of[at][mask].mean()) for at in shown} for name, of in values.items()
    }
    ndcg = {name: of["ndcg@10"][mask] for name, of in values.items()}
    part["index_cost"] = metrics.paired_bootstrap(ndcg["retrieval"], ndcg["retrieval_ann"], seed)
    if "recommender" in ndcg:
        found = values["retrieval_ann"]["recall@100"][mask] > 0  # whom the ranker can help at all
        if found.any():
            gain = metrics.paired_bootstrap(
                ndcg["recommender"][found], ndcg["retrieval_ann"][found], seed
            )
            part["ranking_gain"] = gain | {"users": int(found.sum())}
    return part


def _rating_errors(task: Task, pair: Recommender) -> dict[str, dict[str, float]]:
    """RMSE of the ranker and of rating baselines on the held-out ratings."""
    corpus, held, ratings = task.corpus, task.held, task.held.ratings
    assert ratings is not None
    fitted = rating_baselines(corpus.train, corpus.val, corpus.items.rows)
    predicted = {
        name: baseline.predict(held.users, held.items) for name, baseline in fitted.items()
    }
    predicted["recommender"] = task.predicted_ratings(pair)
    return {name: {"rmse": metrics.rmse(values, ratings)} for name, values in predicted.items()}


def _baselines(task: Task, all_of_them: bool) -> dict[str, np.ndarray]:
    """[U, K] ranked rows of each baseline, fitted on the training data and tuned on the validation data."""
    corpus = task.corpus
    train = corpus.train.matrix(np.arange(corpus.users.rows), corpus.items.rows)[:, FIRST_ITEM:]
    if not all_of_them:
        popularity = baselines.Popularity()
        popularity.fit(train)
        return {"popularity": baselines.rank(popularity, task.seen, task.seen, K)}
    val = Task(corpus, "val")
    found = {}
    for make in baselines.GRIDS:
        try:
            _, best = baselines.tune(make, train, val.seen, val.relevant, corpus.train.times)
        except UserError as error:  # a catalogue too large for it, or no timestamps
            print(f"{make.name} is left out: {error}", file=sys.stderr)
            continue
        found[make.name] = baselines.rank(best, task.seen, task.seen, K)
    return found


def load_latest(config: Config) -> Recommender:
    """The latest ranking bundle with the retrieval bundle it belongs to; or the latest retrieval bundle alone."""
    return Recommender.load(*files.find_pair(Path(config.output.savedmodels)))


def show_systems(report: Report) -> None:
    """Prints the systems as tables on stderr: all users, then where quality is won or lost."""
    say = partial(print, file=sys.stderr)
    drawn = (
        f", drawn from {report['out_of_users']:,}"
        if report["users"] < report["out_of_users"]
        else ""
    )
    say(f"\n{report['dataset']}, {report['split']}, {report['users']:,} users{drawn}")
    against = f"{'less ' + report['best_baseline']:>22}"
    say(f"{'':20}" + "".join(f"{name:>14}" for name in SHOWN) + f"{'95 % of ndcg@10':>18}{against}")
    for name, values in report["systems"].items():
        (low, high), (least, most) = values["ndcg@10_ci"], values["ndcg@10_vs_best_baseline"]["ci"]
        cells = "".join(f"{values[metric]:14.4f}" for metric in SHOWN)
        say(f"{name:20}{cells}{f'{low:.4f} - {high:.4f}':>18}{f'{least:+.4f} {most:+.4f}':>22}")
    for segment, part in report["segments"].items():
        say(f"\n{segment}, {part['users']:,} users")
        for name, values in part["systems"].items() if segment != "all" else ():
            say(
                f"  {name:18}"
                + "".join(f"{metric:>12} {value:.4f}" for metric, value in values.items())
            )
        for name in ("index_cost", "ranking_gain"):
            if name in part:
                low, high = part[name]["ci"]
                say(
                    f"  {name:18}{part[name]['difference']:+.4f} of ndcg@10, 95 % {low:+.4f} {high:+.4f}"
                )
    for name, values in report.get("ratings", {}).items():
        say(f"{name:20}{'rmse':>12} {values['rmse']:.4f}")


def show_recommendations(config: Config, users: int = 3, k: int = 5) -> None:
    """Prints, for the first users of the test data, the end of their history and their recommendations."""
    pair = load_latest(config)
    k = min(k, pair.metadata.retrieval.config.index.k)
    interactions = open_dataset(config.dataset).interactions("test")
    for user_id in interactions["user_id"].drop_duplicates().head(users):
        show(pair, recommend(pair, user_id, None, k), pair.histories([user_id])[0])


def main() -> None:
    parser = command_parser("rec.evaluate", __doc__)
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument(
        "--baselines", action="store_true", help="also tune recent popularity, iALS and EASE"
    )
    add_config_arguments(parser)
    args = parser.parse_args()
    report = evaluate(load_config(args.config, args.overrides), args.split, args.baselines)
    show_systems(report)
    print(json.dumps(report))


if __name__ == "__main__":
    run_command(main)
