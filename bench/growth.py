"""How do training and evaluation time grow? An epoch against interactions, an evaluation against users.

    python -m bench.growth                                           100k to 10 million interactions
    python -m bench.growth --interactions 100000 1000000 --users 1000 10000

`training`: seconds of one epoch of rec's default two_tower on dummy data (165 interactions a user, 3,706 items, as in
MovieLens 1M), read and batched as in a real training; the graph is traced before, on other batches.
`evaluation`: seconds to rank 100 of 20,000 items for that many users by exact search, without what they have seen, and
to compute all metrics with their intervals; the model is hardly trained, which costs the same.
Each "exponent" is the slope of log(seconds) over log(size) by least squares: 1 is linear.

JSON: {"training": {INTERACTIONS: seconds, .., "exponent": x}, "evaluation": {USERS: seconds, .., "exponent": x},
"peak_mb"}.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from rec import metrics
from rec.batches import window_batches
from rec.config import Features, Retrieval, with_data_defaults
from rec.corpus import Corpus, load_corpus
from rec.data_prep.dataset import open_dataset
from rec.errors import run_command
from rec.features import PAD
from rec.optimizer import LazyAdam
from rec.ranking.candidates import first_queries, mine
from rec.retrieval.model import RetrievalModel

import tensorflow as tf  # isort: skip  (rec goes first: it switches to Keras 2)

PER_USER, ITEMS = 165, 3_706  # MovieLens 1M's
FEW_PER_USER, MANY_ITEMS = 20, 20_000  # for evaluation


def dummy(users: int, items: int, per_user: int, seed: int) -> Corpus:
    """rec's dummy data of this size."""
    size = ["--users", str(users), "--items", str(items), "--interactions-per-user", str(per_user)]
    with tempfile.TemporaryDirectory() as folder:
        command = [
            "rec.data_prep.dummy",
            "--output-dir",
            f"{folder}/data",
            *size,
            "--seed",
            str(seed),
        ]
        print(f"python -m {' '.join(command)}", file=sys.stderr, flush=True)
        quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run([sys.executable, "-m", *command], check=True, **quiet)
        return load_corpus(open_dataset(Path(folder, "data")), Features({}, {}))


def epoch_seconds(corpus: Corpus, seed: int) -> float:
    """Seconds of one epoch of training."""
    config = with_data_defaults(Retrieval(arch="two_tower"), corpus.facts)
    model = RetrievalModel(config, corpus)
    model.compile(LazyAdam(config.learning_rate))
    model.fit(window_batches(corpus, config, corpus.train, seed, 1).take(5), verbose=0)
    start = time.perf_counter()
    model.fit(window_batches(corpus, config, corpus.train, seed, 0), verbose=0)
    return time.perf_counter() - start


def evaluation_seconds(model: RetrievalModel, corpus: Corpus, users: int) -> float:
    """Seconds to measure the model on the first so many users of val."""
    start = time.perf_counter()
    queries = first_queries(corpus.val).part(0, users)
    k = max(metrics.KS)
    lists = mine(model, corpus.train, corpus.val, queries, k, next_item=False)
    relevant = corpus.val.matrix(queries.user, corpus.items.rows)
    metrics.summarise(metrics.per_user(np.where(lists.items == PAD, -1, lists.items), relevant))
    return time.perf_counter() - start


def exponent(seconds: dict[int, float]) -> float | None:
    """The slope of log(seconds) over log(size)."""
    if len(seconds) < 2:
        return None
    return round(float(np.polyfit(np.log(list(seconds)), np.log(list(seconds.values())), 1)[0]), 3)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--interactions", type=int, nargs="*", default=[100_000, 1_000_000, 10_000_000]
    )
    parser.add_argument("--users", type=int, nargs="*", default=[1_000, 10_000, 100_000])
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    tf.keras.utils.set_random_seed(args.seed)
    training: dict[int, float] = {}
    evaluation: dict[int, float] = {}
    for wanted in sorted(args.interactions):
        corpus = dummy(max(10, round(wanted / PER_USER)), ITEMS, PER_USER, args.seed)
        size = len(corpus.train.items)
        training[size] = epoch_seconds(corpus, args.seed)
        print(
            f"training: {size:,} interactions {training[size]:.2f} s", file=sys.stderr, flush=True
        )
    if args.users:
        corpus = dummy(max(args.users), MANY_ITEMS, FEW_PER_USER, args.seed)
        model = RetrievalModel(
            with_data_defaults(Retrieval(arch="two_tower"), corpus.facts), corpus
        )
        evaluation_seconds(model, corpus, 300)  # traces the graph
        for users in sorted(args.users):
            evaluation[users] = evaluation_seconds(model, corpus, users)
            print(
                f"evaluation: {users:,} users {evaluation[users]:.2f} s",
                file=sys.stderr,
                flush=True,
            )
    report: dict[str, Any] = {}
    for name, seconds in (("training", training), ("evaluation", evaluation)):
        report[name] = {str(size): round(value, 2) for size, value in seconds.items()} | {
            "exponent": exponent(seconds)
        }
    print(
        json.dumps(report | {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024})
    )


if __name__ == "__main__":
    run_command(main)
