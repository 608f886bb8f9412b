"""How long must one train to be as good as EASE? rec's default retrieval beside tuned EASE, on validation data.

    python -m bench.time_to_quality --dataset data/ml-100k
    python -m bench.time_to_quality --dataset data/dummy --set retrieval.epochs=10
    python -m bench.time_to_quality --dataset data/ml-100k --checkpoint checkpoints/retrieval    a run that is there

`rec` is `python -m rec.train --stage retrieval` with the defaults; its seconds are those of the training epochs in
metrics.jsonl, without validation, whose NDCG@10 (full catalogue, seen items left out) each epoch ends with. `ease` is
fitted for each regularisation of rec.baselines and takes the best on the same validation users: its seconds are those
of the whole search, as rec's validation chooses its epoch.

JSON: {"dataset", "interactions", "ease": {"val/ndcg@10", "seconds"}, "rec": {"best", "best_epoch", "seconds_to_ease",
"seconds_to_95_percent", "seconds_to_best", "training_seconds", "command_seconds", "peak_mb", "curve": [[seconds,
ndcg@10], ...]}, "peak_mb"}; "seconds_to_ease" is null where EASE is never reached, and `ease` null where the catalogue
is too large for it. Not covered: the bundle's index, the ranker.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from rec import baselines
from rec.config import Features
from rec.corpus import Corpus, load_corpus
from rec.data_prep.dataset import open_dataset
from rec.errors import UserError, run_command
from rec.evaluation import Task
from rec.features import FIRST_ITEM

METRIC = "val/ndcg@10"


def ease(corpus: Corpus) -> dict[str, float] | None:
    """EASE's NDCG@10 on validation users, and the seconds of its search."""
    val = Task(corpus, "val")
    train = corpus.train.matrix(np.arange(corpus.users.rows), corpus.items.rows)[:, FIRST_ITEM:]
    start = time.perf_counter()
    try:
        value, _ = baselines.tune(baselines.EASE, train, val.known, val.seen, val.relevant, None)
    except UserError as error:
        print(f"ease is left out: {error}", file=sys.stderr)
        return None
    return {METRIC: round(value, 4), "seconds": round(time.perf_counter() - start, 1)}


def train(dataset: str, overrides: list[str], folder: Path) -> tuple[Path, dict[str, Any]]:
    """Trains in a process of its own: the checkpoint, the seconds of the command and its peak memory."""
    config = folder / "config.yaml"
    places = {name: str(folder / name) for name in ("checkpoints", "savedmodels")}
    config.write_text(json.dumps({"dataset": dataset, "output": places}))
    command = ["-m", "rec.train", "--stage", "retrieval", "--config", str(config)]
    command += [word for override in overrides for word in ("--set", override)]
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f"python {' '.join(command)} ended with {process.returncode}")
    seconds, peak = round(time.perf_counter() - start, 1), usage.ru_maxrss // 1024
    cpu = round(usage.ru_utime + usage.ru_stime, 1)
    return folder / "checkpoints" / "retrieval", {
        "command_seconds": seconds,
        "command_cpu_seconds": cpu,
        "peak_mb": peak,
    }


def read_curve(checkpoint: Path, interactions: int) -> list[tuple[float, float]]:
    """After each epoch of a run: the seconds of training so far, and NDCG@10."""
    curve: list[tuple[float, float]] = []
    for line in (checkpoint / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        if (
            "train/examples_per_second" in values
        ):  # the others are of steps, and of the final calibration
            before = curve[-1][0] if curve else 0.0
            curve.append(
                (before + interactions / values["train/examples_per_second"], values[METRIC])
            )
    if not curve:
        raise UserError(f"{checkpoint}/metrics.jsonl holds no epoch")
    return curve


def first(curve: list[tuple[float, float]], least: float) -> float | None:
    """The seconds after which the metric first is at least this."""
    return next((round(seconds, 1) for seconds, value in curve if value >= least), None)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dataset", default="data/ml-100k", metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument(
        "--checkpoint", type=Path, help="read this finished run instead of training"
    )
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="A.B=C")
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    corpus = load_corpus(open_dataset(args.dataset), Features({}, {}))
    interactions = len(corpus.train.items)
    baseline = ease(corpus)
    print(f"ease: {baseline}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as name:
        checkpoint, took = (
            (args.checkpoint, {})
            if args.checkpoint
            else train(args.dataset, args.overrides, Path(name))
        )
        curve = read_curve(checkpoint, interactions)
    best = max(value for _, value in curve)
    rec = {
        "best": round(best, 4),
        "best_epoch": 1 + [value for _, value in curve].index(best),
        "seconds_to_ease": first(curve, baseline[METRIC]) if baseline else None,
        "seconds_to_95_percent": first(curve, 0.95 * best),
        "seconds_to_best": first(curve, best),
        "training_seconds": round(curve[-1][0], 1),
        **took,
        "curve": [[round(seconds, 1), round(value, 4)] for seconds, value in curve],
    }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    report = {
        "dataset": args.dataset,
        "interactions": interactions,
        "ease": baseline,
        "rec": rec,
        "peak_mb": peak,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    run_command(main)
