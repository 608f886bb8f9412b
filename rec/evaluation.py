"""What the published bundles are worth on held-out interactions, next to baselines on the same split.

    report = evaluate(config, "test")

- Every system ranks the full catalogue, without what the user has interacted with in earlier splits if the bundles
  exclude it (`index.exclude_seen`).
- The bundles answer from the histories given here, so that measuring on val hides the validation items from them.

`python -m rec.evaluate` is the command; it lists the systems.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from scipy.sparse import csr_matrix
from tqdm import tqdm

from rec import baselines, metrics
from rec.bundles import files
from rec.bundles.recommender import Recommender
from rec.config import Config, Features
from rec.corpus import Corpus, load_corpus
from rec.data_prep.dataset import Dataset, open_dataset
from rec.errors import UserError, note
from rec.features import FIRST_ITEM, PAD
from rec.sequences import Sequences

K = max(metrics.KS)
BATCH = 256  # users per call
# Users x items, a minute or two per system. Beyond that, a random sample of the users is evaluated,
MOST_SCORES = 10**10
FEWEST_USERS = 1_000  # but never fewer than these.
FEW = 5  # training interactions, below which an item is rare
SHOWN = ("ndcg@10", "recall@10", "recall@100", "mrr", "coverage@10", "popularity@10", "distance@10")
SHOWN_BY_SEGMENT = ("ndcg@10", "recall@10", "recall@100")

Report = dict[str, Any]  # plain values, for JSON
Values = dict[str, np.ndarray]  # metric -> [U], one per user


class Requests(NamedTuple):
    """A batch of users, as a bundle takes it."""

    users: np.ndarray  # [B] rows
    user_id: tf.Tensor  # [B] string
    history: tf.Tensor  # [B, H] string, oldest first, "" for PAD
    barred: tf.Tensor  # [B, S] string, what must not be recommended
    time: tf.Tensor  # [B] int64 seconds


class Task:
    """Who is asked about, what was known of them, and what they did next. Columns are catalogue rows, from 0.

    Attributes:
      users: [U] rows of users with held-out items, ascending; out_of: how many there are, of whom these are a sample.
      history: what was known; barred: what must not be recommended; held: what came next.
      known, seen, relevant: the same as matrices [U, catalogue].
    """

    def __init__(self, corpus: Corpus, split: str) -> None:
        """Raises UserError if the split is empty, or holds what is in a user's history."""
        self.corpus = corpus
        self.history = corpus.history(split)
        self.barred = corpus.barred(self.history, split)
        self.held = corpus.val if split == "val" else corpus.test
        users = np.flatnonzero(self.held.lengths).astype(np.int32)
        if not len(users):
            raise UserError(f"the {split} split holds no interactions: there is nothing to measure")
        self.out_of = len(users)
        most = max(FEWEST_USERS, MOST_SCORES // len(corpus.items.ids))
        self.users = np.sort(np.random.default_rng(0).permutation(users)[:most])
        if len(users) > most:
            self.held = self.held.select(np.isin(self.held.users, self.users))
        self.relevant = self._matrix(self.held)
        self.known = self._matrix(self.history)
        self.seen = self._matrix(self.barred)
        if not corpus.has_repeats:
            metrics.check_no_overlap(self.seen, self.relevant)

    def _matrix(self, sequences: Sequences) -> csr_matrix:
        return sequences.matrix(self.users, self.corpus.items.rows)[:, FIRST_ITEM:]

    @property
    def facts(self) -> Report:
        """What the report says about who is asked, and under which rule."""
        return {
            "users": len(self.users),
            "out_of_users": self.out_of,
            "exclude_seen": self.corpus.exclude_seen,
        }

    def segments(self) -> dict[str, np.ndarray]:
        """[U] bool masks: all users; those without a history, with one up to the median length, with a longer one."""
        lengths = self.history.lengths[self.users]
        median = np.median(lengths[lengths > 0]) if lengths.any() else 0
        masks = {
            "all": lengths >= 0,
            "cold": lengths == 0,
            "light": (lengths > 0) & (lengths <= median),
            "heavy": lengths > median,
        }
        return {name: mask for name, mask in masks.items() if mask.any()}

    def item_segments(self) -> dict[str, np.ndarray]:
        """[catalogue] bool masks: items that nobody has met in training, and those with fewer than FEW interactions."""
        met = self.corpus.popularity[FIRST_ITEM:]
        return {"new": met == 0, "rare": (met > 0) & (met < FEW)}

    def requests(self) -> Iterator[Requests]:
        """All users, in batches."""
        begins = range(0, len(self.users), BATCH)
        for begin in tqdm(begins, desc="evaluating", unit="batch", leave=False):
            users = self.users[begin : begin + BATCH]
            ids = self.corpus.users.ids[users - self.corpus.users.first]
            yield Requests(
                users=users,
                user_id=tf.constant(ids.tolist()),
                history=self.item_ids(self.history.last(users)),
                barred=self.item_ids(self.barred.last(users)),
                time=tf.constant(self._times(users), tf.int64),
            )

    def _times(self, users: np.ndarray) -> np.ndarray:
        """The time of each user's first held-out interaction. Without timestamps, any time does."""
        if self.held.times is None:
            return np.zeros(len(users))
        return self.held.times[self.held.offsets[users]]

    def item_ids(self, rows: np.ndarray) -> tf.Tensor:
        """Item rows -> their ids, "" for PAD."""
        by_row = np.concatenate([np.full(FIRST_ITEM, "", object), self.corpus.items.ids])
        return tf.constant(by_row[rows], tf.string)

    def ranked(self, function: Callable[..., dict[str, tf.Tensor]]) -> np.ndarray:
        """[U, K] catalogue rows that a bundle's function recommends, -1 behind."""
        parts: list[np.ndarray] = []
        for batch in self.requests():
            answer = function(batch.user_id, batch.history, batch.barred, batch.time)
            parts.append(answer["item_id"].numpy())
        items: Any = np.concatenate(parts)
        ids = np.char.decode(items[:, :K].astype(bytes), "utf-8").astype(object)
        rows = self.corpus.items.encode(ids.ravel(), PAD)
        rows = np.where(rows == PAD, -1, rows - FIRST_ITEM).reshape(ids.shape)
        return np.pad(rows, [(0, 0), (0, K - ids.shape[1])], constant_values=-1)


def task_of(dataset: Dataset, split: str, pair: Recommender) -> Task:
    """What a pair of bundles is asked, under its own rule of `index.exclude_seen`. Raises UserError as Task does."""
    corpus = load_corpus(dataset, Features({}, {}))
    return Task(corpus.under(pair.metadata.retrieval.excludes_seen), split)


def no_more(task: Task, pair: Recommender) -> Report:
    return {}


def evaluate(
    config: Config,
    split: str,
    *,
    with_baselines: bool = False,
    pair: Recommender | None = None,
    more: Callable[[Task, Recommender], Report] = no_more,
) -> Report:
    """Measures a pair of bundles; returns the JSON document of `python -m rec.evaluate`.

    Args:
      split: "val" or "test".
      with_baselines: also fit and tune the baselines that take time.
      pair: the bundles to measure; by default the latest of each stage, without ranking if there is none.
      more: what else to measure; its entries are added to the report.
    """
    dataset = open_dataset(config.dataset)
    pair = pair or load_latest(config)
    _check_dataset(pair, dataset, config)
    task = task_of(dataset, split, pair)
    by_baselines = _tuned_baselines(task) if with_baselines else _popularity(task)
    ranked = by_baselines | _ranked_by(pair, task)
    values = {name: metrics.per_user(rows, task.relevant) for name, rows in ranked.items()}
    best = max(by_baselines, key=lambda name: values[name]["ndcg@10"].mean())
    systems = {
        name: _summary(task, pair, rows, values[name], values[best], config.seed)
        for name, rows in ranked.items()
    }
    return {
        "dataset": str(config.dataset),
        "split": split,
        **task.facts,
        "best_baseline": best,
        "systems": systems,
        "segments": _segments(task, values, config.seed),
        "items": _items(task, ranked),
        **more(task, pair),
    }


def _check_dataset(pair: Recommender, dataset: Dataset, config: Config) -> None:
    if pair.metadata.retrieval.dataset != dataset.id:
        raise UserError(
            f"{config.output.savedmodels}/retrieval was trained on another data set than {config.dataset}: "
            "train on it first, or name another output.savedmodels"
        )


def _ranked_by(pair: Recommender, task: Task) -> dict[str, np.ndarray]:
    """[U, K] ranked rows of each stage, and of retrieval with and without its index."""
    ranked = {
        "retrieval": task.ranked(pair.module.retrieval.retrieve_exactly),
        "retrieval_ann": task.ranked(pair.module.retrieval.retrieve),
    }
    if pair.module.ranking is not None:
        ranked["recommender"] = task.ranked(pair.module.recommend_from)
    return ranked


def _summary(
    task: Task, pair: Recommender, rows: np.ndarray, values: Values, baseline: Values, seed: int
) -> Report:
    """What the report says about one system, next to the best baseline."""
    summary = metrics.summarise(values, seed)
    for k in metrics.KS:
        summary[f"coverage@{k}"] = metrics.coverage(rows, k, task.relevant.shape[1])
    top = rows[:, :10]
    popularity = task.corpus.popularity[FIRST_ITEM:][top[top >= 0]]
    summary["popularity@10"] = float(popularity.mean()) if len(popularity) else 0.0
    summary["distance@10"] = metrics.intra_list_distance(rows, pair.vectors, 10)
    summary["ndcg@10_vs_best_baseline"] = metrics.paired_bootstrap(
        values["ndcg@10"], baseline["ndcg@10"], seed
    )
    return summary


def _segments(task: Task, values: dict[str, Values], seed: int) -> dict[str, Report]:
    return {name: _segment(values, mask, seed) for name, mask in task.segments().items()}


def _segment(values: dict[str, Values], mask: np.ndarray, seed: int) -> Report:
    """Where quality is won or lost among the users of `mask` [U]: each system, the index, the ranker."""
    segment: Report = {"users": int(mask.sum()), "systems": {}}
    for name, system in values.items():
        means = {metric: float(system[metric][mask].mean()) for metric in SHOWN_BY_SEGMENT}
        segment["systems"][name] = means
    ndcg = {name: system["ndcg@10"][mask] for name, system in values.items()}
    through_index = ndcg["retrieval_ann"]
    segment["index_cost"] = metrics.paired_bootstrap(ndcg["retrieval"], through_index, seed)
    can_help = values["retrieval_ann"]["recall@100"][mask] > 0  # the ranker can help nobody else
    if "recommender" in ndcg and can_help.any():
        gain = metrics.paired_bootstrap(
            ndcg["recommender"][can_help], through_index[can_help], seed
        )
        segment["ranking_gain"] = gain | {"users": int(can_help.sum())}
    return segment


def _items(task: Task, ranked: dict[str, np.ndarray]) -> dict[str, Report]:
    return {name: _of_items(task, ranked, mask) for name, mask in task.item_segments().items()}


def _of_items(task: Task, ranked: dict[str, np.ndarray], mask: np.ndarray) -> Report:
    """How often items of `mask` [catalogue] are found among what users met next, and recommended at all."""
    systems = {}
    for name, rows in ranked.items():
        top = rows[:, :10]
        shown = mask[top[top >= 0]]
        systems[name] = {
            "recall@10": metrics.recall_of_items(rows, task.relevant, mask, 10),
            "recall@100": metrics.recall_of_items(rows, task.relevant, mask, 100),
            "share@10": float(shown.mean()) if len(shown) else 0.0,
        }
    held_out = int(mask[task.relevant.indices].sum())
    return {"items": int(mask.sum()), "held_out": held_out, "systems": systems}


def _popularity(task: Task) -> dict[str, np.ndarray]:
    popularity = baselines.Popularity()
    popularity.fit(_train_matrix(task.corpus))
    return {"popularity": baselines.rank(popularity, task.known, task.seen, K)}


def _tuned_baselines(task: Task) -> dict[str, np.ndarray]:
    """[U, K] ranked rows of each baseline, fitted on the training data and tuned on the validation data."""
    corpus = task.corpus
    train = _train_matrix(corpus)
    val = Task(corpus, "val")
    ranked = {}
    for make in baselines.GRIDS:
        try:
            _, best = baselines.tune(
                make, train, val.known, val.seen, val.relevant, corpus.train.times
            )
        except UserError as error:  # a catalogue too large for it, or no timestamps
            note(f"{make.name} is left out: {error}")
            continue
        ranked[make.name] = baselines.rank(best, task.known, task.seen, K)
    return ranked


def _train_matrix(corpus: Corpus) -> csr_matrix:
    users = np.arange(corpus.users.rows)
    return corpus.train.matrix(users, corpus.items.rows)[:, FIRST_ITEM:]


def load_latest(config: Config) -> Recommender:
    """The latest ranking bundle with the retrieval bundle it belongs to; or the latest retrieval bundle alone."""
    return Recommender.load(*files.find_pair(Path(config.output.savedmodels)))


# ----------------------------------------------------------------------------------------------------------------
# Tables on stderr


def show_systems(report: Report) -> None:
    """Prints the systems as tables: all users, then where quality is won or lost."""
    users = f"{report['users']:,} users"
    if report["users"] < report["out_of_users"]:
        users += f", drawn from {report['out_of_users']:,}"
    rule = "without" if report["exclude_seen"] else "with"
    note(f"\n{report['dataset']}, {report['split']}, {users}, {rule} what each has met before")
    names = "".join(f"{name:>14}" for name in SHOWN)
    note(f"{'':20}{names}{'95 % of ndcg@10':>18}{'less ' + report['best_baseline']:>22}")
    for name, values in report["systems"].items():
        low, high = values["ndcg@10_ci"]
        least, most = values["ndcg@10_vs_best_baseline"]["ci"]
        cells = "".join(f"{values[metric]:14.4f}" for metric in SHOWN)
        note(f"{name:20}{cells}{f'{low:.4f} - {high:.4f}':>18}{f'{least:+.4f} {most:+.4f}':>22}")
    for name, segment in report["segments"].items():
        note(f"\n{name}, {segment['users']:,} users")
        _show_segment(segment, with_systems=name != "all")
    for name, items in report["items"].items():
        if items["held_out"]:
            note(f"\n{name} items: {items['items']:,}, and {items['held_out']:,} of what users met")
            _show_systems(items["systems"])


def _show_segment(segment: Report, with_systems: bool) -> None:
    if with_systems:
        _show_systems(segment["systems"])
    for name in ("index_cost", "ranking_gain"):
        if name in segment:
            difference = segment[name]["difference"]
            low, high = segment[name]["ci"]
            note(f"  {name:18}{difference:+.4f} of ndcg@10, 95 % {low:+.4f} {high:+.4f}")


def _show_systems(systems: dict[str, dict[str, float]]) -> None:
    for name, values in systems.items():
        cells = "".join(f"{metric:>12} {value:.4f}" for metric, value in values.items())
        note(f"  {name:18}{cells}")
