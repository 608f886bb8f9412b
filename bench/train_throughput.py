"""Training throughput on one dataset: rec's two_tower beside the TFRS basic-retrieval tutorial's way of training.

    python -m bench.train_throughput --dataset data/ml-100k

What the tutorial does (https://www.tensorflow.org/recommenders/examples/basic_retrieval), and so does this file:
two towers of `StringLookup(vocabulary, mask_token=None)` and `Embedding(len(vocabulary) + 1, 32)`, on the user id and
the item (there its title, here its id), vocabularies over the whole data; `tfrs.tasks.Retrieval` with
`FactorizedTopK(candidates=items.batch(128).map(item_model))`, computed in every training step;
`train.shuffle(100_000).batch(8192).cache()`; `Adagrad(0.1)`; 3 epochs. There is no logQ correction, no temperature, no
removal of accidental hits, no validation. `tutorial_best` is the same with what its text or a first profile suggests:
metrics off in training (`compute_metrics=not training`) and batches of 1,024. Nothing else is tuned.

`implicit_bpr` is BayesianPersonalizedRanking of the implicit package, 32 factors, otherwise its defaults, on all cores:
its epoch draws as many triples as there are interactions.

`rec` is the two_tower retrieval model on ids alone (of users too) and with 32 dimensions, as the tutorial's, with 64
negatives of the batch and 64 uniform ones, 6,400 interactions a step (--batch-size 128, in windows of 50), validated
after every epoch.

- Throughput: training interactions a second over epochs 2 to 3 (`rec`: all epochs but the first; `implicit_bpr`: all);
  epoch 1, which traces the graph and fills the cache, is left out, and so is validation.
- Quality: NDCG@10 on test, full catalogue, seen items excluded: after the tutorial's 3 epochs, and after the epoch
  with the best NDCG@10 on val out of --tutorial-epochs (the epochs after the third run with metrics off, which only
  observe: the weights are the same and it takes a fifth of the time); after all of `implicit_bpr`'s epochs; after the
  best of rec's by val.

Not covered: GPUs, and data that does not fit into memory.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from implicit.cpu.bpr import BayesianPersonalizedRanking
from scipy.sparse import csr_matrix

from rec.baselines import top_k
from rec.batches import window_batches
from rec.config import Features, ResolvedRetrieval
from rec.corpus import Corpus, load_corpus
from rec.data_prep.dataset import Dataset, open_dataset
from rec.errors import UserError, run_command
from rec.features import PAD
from rec.metrics import per_user
from rec.optimizer import LazyAdam
from rec.ranking.candidates import first_queries, mine
from rec.retrieval.model import RetrievalModel

import tensorflow as tf  # isort: skip  (rec goes first: it switches to Keras 2)
import tensorflow_recommenders as tfrs  # isort: skip

TUTORIAL_EPOCHS = 3
DIMENSION = 32


@dataclass(frozen=True)
class Trained:
    """What a run leaves behind; a row of an embedding table belongs to the same row of the dataset's table."""

    interactions_per_second: float
    users: list[np.ndarray]  # after each epoch: [users, 32]
    items: list[np.ndarray]  # after each epoch: [items, 32]


class TutorialModel(tfrs.Model):
    """The tutorial's MovielensModel."""

    def __init__(
        self, user_ids: np.ndarray, item_ids: np.ndarray, metrics_in_training: bool
    ) -> None:
        super().__init__()
        self.user_model, self.item_model = _tower(user_ids), _tower(item_ids)
        self.metrics_in_training = metrics_in_training
        candidates = tf.data.Dataset.from_tensor_slices(item_ids).batch(128).map(self.item_model)
        self.task = tfrs.tasks.Retrieval(metrics=tfrs.metrics.FactorizedTopK(candidates=candidates))

    def compute_loss(self, features: dict[str, tf.Tensor], training: bool = False) -> tf.Tensor:
        users, items = self.user_model(features["user_id"]), self.item_model(features["item_id"])
        return self.task(users, items, compute_metrics=self.metrics_in_training or not training)


def _tower(ids: np.ndarray) -> tf.keras.Model:
    lookup = tf.keras.layers.StringLookup(vocabulary=ids, mask_token=None)
    return tf.keras.Sequential([lookup, tf.keras.layers.Embedding(len(ids) + 1, DIMENSION)])


class _Epochs(tf.keras.callbacks.Callback):
    """Times every epoch and keeps the embeddings after it."""

    def __init__(self, user_ids: np.ndarray, item_ids: np.ndarray) -> None:
        super().__init__()
        self.ids = tf.constant(user_ids), tf.constant(item_ids)
        self.seconds: list[float] = []
        self.users: list[np.ndarray] = []
        self.items: list[np.ndarray] = []

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        self.seconds.append(time.perf_counter() - self.start)
        self.users.append(self.model.user_model(self.ids[0]).numpy())
        self.items.append(self.model.item_model(self.ids[1]).numpy())
        print(f"  epoch {len(self.seconds)}: {self.seconds[-1]:.1f} s", file=sys.stderr)


def train_tutorial(
    dataset: Dataset, batch_size: int, metrics_in_training: bool, epochs: int, seed: int
) -> Trained:
    """Trains the tutorial's model for `epochs`, of which the first 3 are timed, all but the first."""
    tf.keras.utils.set_random_seed(seed)
    user_ids = dataset.users()["user_id"].to_numpy(str)
    item_ids = dataset.items()["item_id"].to_numpy(str)
    frame = dataset.interactions("train")
    features = {name: frame[name].to_numpy(str) for name in ("user_id", "item_id")}
    train = tf.data.Dataset.from_tensor_slices(features).shuffle(100_000).batch(batch_size).cache()
    model = TutorialModel(user_ids, item_ids, metrics_in_training)
    optimizer = tf.keras.optimizers.Adagrad(0.1)
    run = _Epochs(user_ids, item_ids)
    model.compile(optimizer=optimizer)
    model.fit(train, epochs=TUTORIAL_EPOCHS, callbacks=[run], verbose=0)
    rate = len(frame) * (TUTORIAL_EPOCHS - 1) / sum(run.seconds[1:])
    if epochs > TUTORIAL_EPOCHS:
        model.metrics_in_training = False
        model.compile(optimizer=optimizer)  # traces the step anew; the optimizer keeps its state
        model.fit(train, epochs=epochs - TUTORIAL_EPOCHS, callbacks=[run], verbose=0)
    return Trained(rate, run.users, run.items)


def train_bpr(dataset: Dataset, seed: int) -> dict[str, Any]:
    """Trains implicit's BPR; returns its JSON."""
    _, train = ground_truth(dataset, "val")
    model = BayesianPersonalizedRanking(factors=DIMENSION, random_state=seed)
    start = time.perf_counter()
    model.fit(csr_matrix(train, dtype=np.float32), show_progress=False)
    rate = train.nnz * model.iterations / (time.perf_counter() - start)
    ndcg = ndcg_at_10(model.user_factors, model.item_factors, *ground_truth(dataset, "test"))
    return {"interactions_per_second": round(rate), "ndcg@10": ndcg, "epochs": model.iterations}


def train_rec(dataset: Dataset, epochs: int, batch_size: int, seed: int) -> dict[str, Any]:
    """Trains rec's two_tower on ids; returns the JSON of the epoch with the best NDCG@10 on val."""
    config = ResolvedRetrieval(
        arch="two_tower",
        embedding_dim=DIMENSION,
        window=50,
        learning_rate=0.01,
        dropout=0.0,
        user_id=True,
        batch_size=batch_size,
        in_batch_negatives=64,
        uniform_negatives=64,
    )
    corpus = load_corpus(dataset, Features({}, {}))
    tf.keras.utils.set_random_seed(seed)
    model = RetrievalModel(config, corpus)
    model.compile(LazyAdam(config.learning_rate))
    seconds, ndcg = [], []
    for epoch in range(epochs):
        start = time.perf_counter()
        model.fit(window_batches(corpus, config, corpus.train, seed, epoch), verbose=0)
        seconds.append(time.perf_counter() - start)
        ndcg.append([_rec_ndcg_at_10(model, corpus, split) for split in ("val", "test")])
    best = int(np.argmax([val for val, _ in ndcg]))
    return {
        "interactions_per_second": round(len(corpus.train.items) * (epochs - 1) / sum(seconds[1:])),
        "ndcg@10": ndcg[best][1],
        "best_epoch": best + 1,
    }


def _rec_ndcg_at_10(model: RetrievalModel, corpus: Corpus, split: str) -> float:
    held = corpus.val if split == "val" else corpus.test
    lists = mine(model, corpus.history(split), held, first_queries(held), 10, next_item=False)
    relevant = held.matrix(lists.user, corpus.items.rows)
    return float(
        per_user(np.where(lists.items == PAD, -1, lists.items), relevant, ks=(10,))[
            "ndcg@10"
        ].mean()
    )


def ground_truth(dataset: Dataset, split: str) -> tuple[csr_matrix, csr_matrix]:
    """What each user has in `split`, and in the splits before it: both [users, items], rows as in the tables."""
    user_index, item_index = (
        pd.Index(dataset.users()["user_id"]),
        pd.Index(dataset.items()["item_id"]),
    )

    def matrix(*names: str) -> csr_matrix:
        frame = pd.concat([dataset.interactions(name) for name in names])
        rows, columns = (
            user_index.get_indexer(frame["user_id"]),
            item_index.get_indexer(frame["item_id"]),
        )
        return csr_matrix(
            (np.ones(len(frame)), (rows, columns)), shape=(len(user_index), len(item_index))
        )

    relevant = matrix(split)
    if not relevant.nnz:
        raise UserError(
            f"{dataset.path}: {split} is empty, so there is nothing to measure quality on"
        )
    return relevant, matrix("train") if split == "val" else matrix("train", "val")


def ndcg_at_10(
    users: np.ndarray, items: np.ndarray, relevant: csr_matrix, seen: csr_matrix
) -> float:
    """NDCG@10 of `users @ items.T` over the users with relevant items; what they have seen is excluded."""
    rows = np.flatnonzero(np.diff(relevant.indptr))
    slices = [rows[start : start + 4096] for start in range(0, len(rows), 4096)]
    ranked = np.concatenate([top_k(users[part] @ items.T, seen[part], 10) for part in slices])
    return float(per_user(ranked, relevant[rows], ks=(10,))["ndcg@10"].mean())


def report(dataset: Dataset, trained: Trained) -> dict[str, Any]:
    """The JSON of one way of training."""
    epochs = list(zip(trained.users, trained.items, strict=True))
    val, test = ground_truth(dataset, "val"), ground_truth(dataset, "test")
    best = int(np.argmax([ndcg_at_10(*tables, *val) for tables in epochs]))
    return {
        "interactions_per_second": round(trained.interactions_per_second),
        "ndcg@10": ndcg_at_10(*epochs[TUTORIAL_EPOCHS - 1], *test),
        "best_epoch": best + 1,
        "best_epoch_ndcg@10": ndcg_at_10(*epochs[best], *test),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Measures training throughput.", epilog=__doc__.splitlines()[2]
    )
    parser.add_argument(
        "--dataset", default="data/ml-100k", metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument(
        "--tutorial-epochs", type=int, default=TUTORIAL_EPOCHS, metavar="N", help="at least 3"
    )
    parser.add_argument(
        "--epochs", type=int, default=20, metavar="N", help="of rec; default: %(default)s"
    )
    parser.add_argument(
        "--batch-size", type=int, default=128, metavar="N", help="of rec; default: %(default)s"
    )
    parser.add_argument("--seed", type=int, default=42)
    names = ("tutorial_as_written", "tutorial_best", "implicit_bpr", "rec")
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names)
    )
    args = parser.parse_args()
    if args.tutorial_epochs < TUTORIAL_EPOCHS:
        raise UserError(
            f"--tutorial-epochs: must be {TUTORIAL_EPOCHS} or more, not {args.tutorial_epochs}"
        )
    dataset = open_dataset(args.dataset)
    results: dict[str, dict[str, Any]] = {}
    for name, batch_size, metrics in (
        ("tutorial_as_written", 8192, True),
        ("tutorial_best", 1024, False),
    ):
        if name not in args.only:
            continue
        print(name, file=sys.stderr)
        trained = train_tutorial(dataset, batch_size, metrics, args.tutorial_epochs, args.seed)
        results[name] = report(dataset, trained)
        print("  " + json.dumps(results[name]), file=sys.stderr)
    if "implicit_bpr" in args.only:
        results["implicit_bpr"] = train_bpr(dataset, args.seed)
        print(f"implicit_bpr\n  {json.dumps(results['implicit_bpr'])}", file=sys.stderr)
    if "rec" in args.only:
        print("rec", file=sys.stderr)
        results["rec"] = train_rec(dataset, args.epochs, args.batch_size, args.seed)
    rates = {name: each["interactions_per_second"] for name, each in results.items()}
    own = rates.pop("rec", 0)
    ratios = {f"ratio_to_{name}": round(own / rate, 2) for name, rate in rates.items() if own}
    print(json.dumps(results | ratios))


if __name__ == "__main__":
    run_command(main)
