"""Does it help to weigh purchases more than views? A made-up shop, trained with weights and without, on the same data.

    python -m bench.shop [--seeds 3] [--epochs 8]

Each seed makes a shop (`rec.data_prep.dummy --shop`) and trains the two towers twice. Test asks for purchases. The
differences are NDCG@10 with weights less without, over the users of all seeds, with a 95 % paired bootstrap interval.

Not covered: the ranker, and weights other than those of `rec.data_prep.dummy`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from rec import baselines, metrics
from rec.config import Config, Features, Output, Retrieval
from rec.corpus import Corpus, load_corpus
from rec.data_prep.dataset import open_dataset
from rec.errors import run_command
from rec.evaluation import Task
from rec.features import FIRST_ITEM, PAD
from rec.ranking.candidates import first_queries, mine
from rec.retrieval.train import train_retrieval

K = 10
BASELINES = (baselines.Popularity(), baselines.IALS(), baselines.ItemKNN(100, 10.0))
Values = dict[str, np.ndarray]  # system -> NDCG@10 of each user


def make_shop(folder: Path, seed: int) -> Corpus:
    command = ["-m", "rec.data_prep.dummy", "--shop", "--seed", str(seed), "--users", "1000"]
    subprocess.run([sys.executable, *command, "--output-dir", str(folder)], check=True)
    return load_corpus(open_dataset(folder), Features())


def without_weights(corpus: Corpus) -> Corpus:
    assert corpus.met_in_val is not None
    return replace(
        corpus,
        train=replace(corpus.train, weights=None),
        met_in_val=replace(corpus.met_in_val, weights=None),
    )


def measure(corpus: Corpus, folder: Path, seed: int, epochs: int) -> Values:
    """NDCG@10 of each test user, of the two towers and of baselines."""
    task = Task(corpus, "test")
    config = Config(
        dataset="",
        seed=seed,
        retrieval=Retrieval(epochs=epochs, embedding_dim=32),
        output=Output(checkpoints=str(folder)),
    )
    model = train_retrieval(config, corpus).model
    queries = first_queries(corpus.test)
    lists = mine(model, corpus.history("test"), corpus.test, queries, K, next_item=False)
    ranked = {"retrieval": np.where(lists.items == PAD, -1, lists.items - FIRST_ITEM)}
    users = np.arange(corpus.users.rows)
    train = corpus.train.matrix(users, corpus.items.rows)[:, FIRST_ITEM:]
    for baseline in BASELINES:
        baseline.fit(train)
        ranked[baseline.name] = baselines.rank(baseline, task.known, task.seen, K)
    return {
        name: metrics.per_user(rows, task.relevant, (K,))["ndcg@10"]
        for name, rows in ranked.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    args = parser.parse_args()
    parts: list[tuple[Values, Values]] = []
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as folder:
            corpus = make_shop(Path(folder, "data"), seed)
            weighed = measure(corpus, Path(folder, "weighed"), seed, args.epochs)
            plain = measure(without_weights(corpus), Path(folder, "plain"), seed, args.epochs)
            parts.append((weighed, plain))
    report = {}
    print(f"{'':14}{'weights':>10}{'none':>10}{'difference':>12}{'95 %':>20}{'by seed':>27}")
    for name in parts[0][0]:
        by_seed = [float((weighed[name] - plain[name]).mean()) for weighed, plain in parts]
        with_weights = np.concatenate([weighed[name] for weighed, _ in parts])
        without = np.concatenate([plain[name] for _, plain in parts])
        gain = metrics.paired_bootstrap(with_weights, without)
        low, high = gain["ci"]
        means = f"{with_weights.mean():10.4f}{without.mean():10.4f}"
        seeds = " ".join(f"{value:+.4f}" for value in by_seed)
        print(f"{name:14}{means}{gain['difference']:+12.4f}{low:+11.4f} {high:+.4f}  {seeds}")
        report[name] = gain | {"by_seed": by_seed}
    print(json.dumps(report))


if __name__ == "__main__":
    run_command(main)
