"""Does a training step cost more when the catalogue is larger? rec's default two_tower against the item table's size.

    python -m bench.step_scale                       10k to 5M items, some 5 minutes, 9 GB
    python -m bench.step_scale --sizes 10000 100000 --steps 40

The model, its optimiser (LazyAdam), batches and negatives are those of rec's defaults for data with timestamps: 64
dimensions, 64 windows of 50, a pool of 512 popular and 2,048 uniform negatives. Interactions are made up in memory,
as long-tailed as a catalogue's: the item of rank r is drawn with probability in proportion to 1 / (r + 20). Only the
step is timed; its batch is in memory, and is a new one every time, so that a larger table is read in more places.

- The sizes take turns, a few steps each, in an order drawn anew every round: what else the machine does hits all alike.
- `keras_adam` is the same step with Keras' Adam, which updates every row of the table; not above a million items.
- JSON: the median milliseconds a step by size, "ratio" (largest to smallest), "quartiles", "keras_adam" and "peak_mb".

Not covered: tables that do not fit into memory; time to assemble batches (bench/input_pipeline.py) and to validate.
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd

from rec.batches import window_batches
from rec.config import ResolvedRetrieval
from rec.corpus import Corpus
from rec.errors import UserError, run_command
from rec.features import FIRST_ITEM, FIRST_USER, Vocabulary
from rec.optimizer import LazyAdam
from rec.retrieval.model import RetrievalModel
from rec.sequences import Sequences

import tensorflow as tf  # isort: skip  (rec goes first: it switches to Keras 2)

SIZES = (10_000, 100_000, 1_000_000, 5_000_000)
ADAM_ITEMS = 1_000_000  # more would take 2 s a step and 4 GB
WARM_UP = 3  # steps that trace the graph and touch the optimiser's variables
TURN = 5  # steps of one size before the next has its turn


def synthetic_corpus(items: int, users: int, length: int, seed: int) -> Corpus:
    """A corpus of `users` x `length` interactions with a catalogue of `items`, all of them trained."""
    rng = np.random.default_rng(seed)
    # The inverse of the distribution function of 1 / (rank + 20), which a draw a user and position goes through.
    ranks = 20 * ((items + 20) / 20) ** rng.random((users, length)) - 20
    rows = FIRST_ITEM + np.minimum(ranks.astype(np.int64), items - 1)
    # UNKNOWN_USER comes first, and has no interactions.
    offsets = np.concatenate([[0], np.arange(users + 1) * length])
    times = np.sort(rng.integers(0, 10**8, (users, length)), 1).ravel()
    nothing = Sequences(np.zeros_like(offsets), np.zeros(0, np.int32), np.zeros(0, np.int64), None)
    ids = [np.arange(count).astype(str).astype(object) for count in (users, items)]
    return Corpus(
        "synthetic",
        True,
        "leave_one_out",
        Vocabulary(ids[0], FIRST_USER, users),
        Vocabulary(ids[1], FIRST_ITEM, items),
        pd.DataFrame({"user_id": ids[0]}),
        pd.DataFrame({"item_id": ids[1]}),
        (),
        (),
        Sequences(offsets, rows.astype(np.int32).ravel(), times, None),
        nothing,
        nothing,
    )


class Subject:
    """A model of one size with its optimiser, ready to step."""

    def __init__(
        self, items: int, steps: int, optimizer: Callable[[float], Any], seed: int
    ) -> None:
        config = ResolvedRetrieval(arch="two_tower")
        users = config.batch_size * (steps + WARM_UP + 1)
        corpus = synthetic_corpus(items, users, config.window, seed)
        model = RetrievalModel(config, corpus)
        model.compile(optimizer(config.learning_rate))
        self._step = tf.function(model.train_step, reduce_retracing=True)
        batches = list(window_batches(corpus, config, corpus.train, seed, 0))
        self._batches: Iterator[dict[str, tf.Tensor]] = iter(batches)
        self.milliseconds: list[float] = []
        for _ in range(WARM_UP):
            self._step(next(self._batches))

    def turn(self, steps: int) -> None:
        for _ in range(steps):
            batch = next(self._batches)
            start = time.perf_counter()
            float(self._step(batch)["loss"])  # waits for the step
            self.milliseconds.append(1000 * (time.perf_counter() - start))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="ITEMS")
    parser.add_argument("--steps", type=int, default=200, help="of each size; default: %(default)s")
    parser.add_argument(
        "--adam-steps", type=int, default=20, help="of each size with Keras' Adam; 0 = none"
    )
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    if args.steps < TURN or min(args.sizes) < 2_049:
        raise UserError(
            f"--steps: {TURN} or more; --sizes: 2,049 or more, as fewer items are no sampled negatives"
        )
    rng = np.random.default_rng(args.seed)

    def measured(
        sizes: list[int], steps: int, optimizer: Callable[[float], Any], name: str
    ) -> dict[int, np.ndarray]:
        subjects = {}
        for items in sizes:
            print(f"{name}: {items:,} items are being set up", file=sys.stderr, flush=True)
            subjects[items] = Subject(items, steps, optimizer, args.seed)
        for _ in range(steps // TURN):
            for items in rng.permutation(sizes).tolist():
                subjects[items].turn(TURN)
        found = {
            items: np.percentile(subject.milliseconds, [25, 50, 75])
            for items, subject in subjects.items()
        }
        for items, (low, middle, high) in found.items():
            print(
                f"{name}: {items:>9,} items {middle:7.1f} ms ({low:.1f} to {high:.1f})",
                file=sys.stderr,
                flush=True,
            )
        return found

    sizes = sorted(set(args.sizes))
    adam = {}
    if args.adam_steps:
        small = [items for items in sizes if items <= ADAM_ITEMS]
        adam = measured(small, max(TURN, args.adam_steps), tf.keras.optimizers.Adam, "keras_adam")
    lazy = measured(sizes, args.steps, LazyAdam, "rec")
    report: dict[str, Any] = {
        str(items): round(float(values[1]), 2) for items, values in lazy.items()
    }
    report["ratio"] = round(float(lazy[sizes[-1]][1] / lazy[sizes[0]][1]), 3)
    report["quartiles"] = {
        str(items): values[[0, 2]].round(2).tolist() for items, values in lazy.items()
    }
    report["keras_adam"] = {
        str(items): round(float(values[1]), 2) for items, values in adam.items()
    }
    report["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(json.dumps(report))


if __name__ == "__main__":
    run_command(main)
