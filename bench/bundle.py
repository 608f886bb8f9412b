"""What does a bundle cost at scale? Exporting, loading, the first request, those after it, memory and disk.

    python -m rec.data_prep.dummy --users 1000000 --items 1000000 --interactions-per-user 6 --output-dir data/big
    python -m rec.train --stage retrieval --set dataset=data/big --set retrieval.arch=two_tower --set retrieval.epochs=1
    python -m bench.bundle --set dataset=data/big

Exports the checkpoint once more in a process of its own, as `python -m rec.export --stage retrieval` does: loads the
data, searches the index's settings, computes every user's query, writes. Another process then loads the bundle and asks
for known users, one at a time; the page cache still holds the files, as they were just written.

JSON: {"users", "items", "export_seconds", "export_peak_mb", "disk_mb": {FILE: .., "all": ..}, "load_seconds",
"first_request_ms", "p50_ms", "p99_ms", "loaded_mb"}.
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

from rec.bundles.recommender import load_bundle
from rec.config import add_config_arguments, load_config
from rec.data_prep.dataset import open_dataset
from rec.errors import UserError, run_command

import tensorflow as tf  # isort: skip  (rec goes first: it switches to Keras 2)


def peak_mb(who: int) -> int:
    return resource.getrusage(who).ru_maxrss // 1024


def ask(bundle: Path, users: list[str]) -> dict[str, float]:
    """Loads a bundle and asks for each user."""
    start = time.perf_counter()
    retrieve = load_bundle(bundle).signatures["serving_default"]
    loaded = time.perf_counter() - start
    took = []
    for user in users:
        start = time.perf_counter()
        retrieve(user_id=tf.constant([user]))
        took.append(1000 * (time.perf_counter() - start))
    rest = took[1:]
    return {
        "load_seconds": round(loaded, 2),
        "first_request_ms": round(took[0], 1),
        "p50_ms": round(float(np.percentile(rest, 50)), 3),
        "p99_ms": round(float(np.percentile(rest, 99)), 3),
        "loaded_mb": peak_mb(resource.RUSAGE_SELF),
    }


def run(*arguments: str) -> dict[str, Any]:
    """The JSON that a command ends with."""
    done = subprocess.run([sys.executable, "-m", *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"python -m {' '.join(arguments)} failed")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    add_config_arguments(parser)
    args = parser.parse_args()
    config = load_config(args.config, args.overrides)
    dataset = open_dataset(config.dataset)
    if args.load:
        ids = dataset.users()["user_id"].sample(args.requests, random_state=0, replace=True)
        print(json.dumps(ask(args.load, ids.tolist())))
        return
    told = ["--config", args.config, *(part for each in args.overrides for part in ("--set", each))]
    with tempfile.TemporaryDirectory(dir=".") as folder:
        start = time.perf_counter()
        export = run(
            "rec.export", "--stage", "retrieval", *told, "--set", f"output.savedmodels={folder}"
        )
        report: dict[str, Any] = {"users": len(dataset.users()), "items": len(dataset.items())}
        report |= {"export_seconds": round(time.perf_counter() - start, 1)}
        report |= {"export_peak_mb": peak_mb(resource.RUSAGE_CHILDREN)}
        bundle = Path(export["bundle"])
        files = {
            str(path.relative_to(bundle)): path.stat().st_size / 2**20
            for path in bundle.rglob("*")
            if path.is_file()
        }
        large = {name: round(size, 1) for name, size in sorted(files.items()) if size >= 1}
        report |= {"disk_mb": large | {"all": round(sum(files.values()), 1)}}
        report |= run(
            "bench.bundle", *told, "--requests", str(args.requests), "--load", str(bundle)
        )
    print(json.dumps(report))


if __name__ == "__main__":
    run_command(main)
