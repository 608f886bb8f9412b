"""Measures the published bundles on held-out interactions, next to baselines on the same split.

    python -m rec.evaluate --config config/dummy/dummy_small.yaml
    python -m rec.evaluate --split val --baselines

- Systems: `popularity`; `retrieval` (the towers, exact search), `retrieval_ann` (through the bundle's index),
  `recommender` (retrieved, then ranked); with --baselines also recent popularity, iALS, EASE, tuned on validation.
- Every system ranks the full catalogue without what the user has interacted with in earlier splits.
- The bundles answer from the histories given here, so that --split val hides the validation items from them.

Tables go to stderr; the last line of stdout is JSON: {"dataset", "split", "users", "systems": {name: {"ndcg@10": x,
"ndcg@10_ci": [low, high], ...}}}.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import tensorflow as tf
from tqdm import tqdm

from rec import baselines, metrics, registry
from rec.config import Config, Features, add_config_arguments, load_config
from rec.data_prep.dataset import open_dataset
from rec.errors import UserError, run_command
from rec.features import FIRST_ITEM, PAD
from rec.pipeline import Corpus, Sequences, load_corpus
from rec.recommender import Recommender

K = max(metrics.KS)
BATCH = 256  # users a call
SHOWN = ("ndcg@10", "recall@10", "recall@100", "mrr", "coverage@10")


@dataclass(frozen=True)
class Task:
    """Who is asked about, what was known of them, and what they did next. Columns are catalogue rows, from 0."""

    corpus: Corpus
    held: Sequences
    history: Sequences
    users: np.ndarray  # [U] user rows with held-out items

    @classmethod
    def of(cls, corpus: Corpus, split: str) -> "Task":
        held = corpus.val if split == "val" else corpus.test
        users = np.flatnonzero(held.lengths).astype(np.int32)
        if not len(users):
            raise UserError(f"the {split} split holds no interactions: there is nothing to measure")
        task = cls(corpus, held, corpus.history(split), users)
        metrics.check_no_overlap(task.seen, task.relevant)
        return task

    @property
    def relevant(self) -> sp.csr_matrix:
        return self.held.matrix(self.users, self.corpus.items.rows)[:, FIRST_ITEM:]

    @property
    def seen(self) -> sp.csr_matrix:
        return self.history.matrix(self.users, self.corpus.items.rows)[:, FIRST_ITEM:]

    def requests(self) -> Iterator[tuple[tf.Tensor, tf.Tensor, tf.Tensor]]:
        """Batches of user_id [B], history [B, S] and request time [B], as a bundle takes them."""
        by_row = np.concatenate([np.full(FIRST_ITEM, "", object), self.corpus.items.ids])
        for begin in tqdm(range(0, len(self.users), BATCH), desc="evaluating", unit="batch", leave=False):
            users = self.users[begin : begin + BATCH]
            history = by_row[self.history.last(users, self.history.longest(users))]
            # The time of the first held-out interaction; without timestamps, any time does.
            times = np.zeros(len(users)) if self.held.times is None else self.held.times[self.held.offsets[users]]
            ids = self.corpus.users.ids[users - self.corpus.users.first]
            history = tf.reshape(tf.constant(history.tolist(), tf.string), history.shape)
            yield tf.constant(ids.tolist(), tf.string), history, tf.constant(times, tf.int64)

    def ranked(self, ask: Any) -> np.ndarray:
        """[U, K] catalogue rows that a bundle's function returns, -1 behind."""
        parts = [ask(users, history, history, times)["item_id"].numpy() for users, history, times in self.requests()]
        ids: Any = np.concatenate(parts).astype(bytes)[:, :K]
        rows = self.corpus.items.encode(np.char.decode(ids, "utf-8").astype(object).ravel(), PAD)
        rows = np.where(rows == PAD, -1, rows - FIRST_ITEM).reshape(ids.shape)
        return np.pad(rows, [(0, 0), (0, K - rows.shape[1])], constant_values=-1)


def evaluate(
    config: Config, split: str, with_baselines: bool = False, pair: Recommender | None = None
) -> dict[str, Any]:
    """The command's JSON document (see the module).

    Args:
      split: "val" or "test".
      with_baselines: also fit and tune the baselines that take time.
      pair: the bundles to measure; by default the latest of each stage, without ranking where there is none.
    """
    dataset = open_dataset(config.dataset)
    corpus = load_corpus(dataset, Features({}, {}))
    task = Task.of(corpus, split)
    pair = pair or load_latest(config)
    trained_on = pair.metadata["retrieval"]["dataset"]
    if trained_on != dataset.id:
        raise UserError(
            f"{config.output.savedmodels}/retrieval was trained on another data set than {config.dataset}: train on it "
            "first, or name another output.savedmodels"
        )
    ranked = _baselines(task, corpus, config.seed, with_baselines)
    ranked["retrieval"] = task.ranked(pair.module.retrieval.retrieve_exactly)
    ranked["retrieval_ann"] = task.ranked(pair.module.retrieval.retrieve)
    if pair.module.ranking is not None:
        ranked["recommender"] = task.ranked(pair.module.recommend_from)
    relevant = task.relevant
    systems = {}
    for name, rows in ranked.items():
        systems[name] = metrics.summarise(metrics.per_user(rows, relevant), config.seed)
        systems[name] |= {f"coverage@{k}": metrics.coverage(rows, k, relevant.shape[1]) for k in metrics.KS}
    return {"dataset": str(config.dataset), "split": split, "users": len(task.users), "systems": systems}


def _baselines(task: Task, corpus: Corpus, seed: int, all_of_them: bool) -> dict[str, np.ndarray]:
    """[U, K] ranked rows of each baseline, fitted on the training data and tuned on the validation data."""
    everyone = np.arange(corpus.users.rows)
    train = corpus.train.matrix(everyone, corpus.items.rows)[:, FIRST_ITEM:]
    if not all_of_them:
        popularity = baselines.Popularity()
        popularity.fit(train)
        return {"popularity": baselines.rank(popularity, task.seen, task.seen, K)}
    val = Task.of(corpus, "val")
    found = {}
    for name, grid in baselines.grids(seed, corpus.ordered).items():
        try:
            tuned = baselines.tune(grid, train, val.seen, val.seen, val.relevant, timestamps=corpus.train.times)
        except UserError as error:  # a catalogue too large for it
            print(f"{name} is left out: {error}", file=sys.stderr)
            continue
        found[name] = baselines.rank(tuned.baseline, task.seen, task.seen, K)
    return found


def load_latest(config: Config) -> Recommender:
    """The latest ranking bundle with the retrieval bundle it belongs to; or the latest retrieval bundle alone."""
    return Recommender.load(*registry.latest_pair(Path(config.output.savedmodels)))


def show_systems(report: dict[str, Any]) -> None:
    """Prints the systems as a table on stderr."""
    print(f"\n{report['dataset']}, {report['split']}, {report['users']:,} users", file=sys.stderr)
    print(f"{'':20}" + "".join(f"{name:>12}" for name in SHOWN) + f"{'95 % of ndcg@10':>22}", file=sys.stderr)
    for name, values in report["systems"].items():
        low, high = values["ndcg@10_ci"]
        cells = "".join(f"{values[metric]:12.4f}" for metric in SHOWN)
        print(f"{name:20}{cells}{f'{low:.4f} to {high:.4f}':>22}", file=sys.stderr)


def show_recommendations(config: Config, users: int = 3, k: int = 5) -> None:
    """Prints, for the first users of the data set, the end of their history and what they are recommended."""
    pair = load_latest(config)
    ids = open_dataset(config.dataset).interactions("test")["user_id"].drop_duplicates().head(users).tolist()
    answer = pair.answer(ids, [None] * len(ids), [[]] * len(ids))
    for user, stored, rows, scores in zip(ids, pair.histories(ids), answer["rows"], answer["scores"], strict=True):
        print(f"\nuser {user}, after {', '.join(_title(pair, item) for item in stored[-3:])}", file=sys.stderr)
        for item, score in zip(pair.items.index[rows[:k]], scores[:k], strict=True):
            print(f"  {score:8.3f}  {_title(pair, item)}", file=sys.stderr)


def _title(pair: Recommender, item: str) -> str:
    return str(pair.items.loc[item].get("title", item)) if item in pair.items.index else item


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m rec.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("--baselines", action="store_true", help="also tune recent popularity, iALS and EASE")
    add_config_arguments(parser)
    args = parser.parse_args()
    report = evaluate(load_config(args.config, args.overrides), args.split, args.baselines)
    show_systems(report)
    print(json.dumps(report))


if __name__ == "__main__":
    run_command(main)
