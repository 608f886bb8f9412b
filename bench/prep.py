"""From a CSV of MovieLens 25M's shape to training batches: seconds and peak memory, rec beside pandas.

    python -m bench.prep                             25 million ratings, 4 minutes, 3 GB of disk
    python -m bench.prep --rows 1000000

1. Makes ratings.csv and movies.csv as GroupLens writes them, of made-up ratings: 162,541 users with at least 20 each,
   59,047 of 62,423 movies, both long-tailed, no pair twice, sorted by user. Fewer --rows have fewer users and movies.
2. `rec`: `python -m rec.data_prep.movielens --name 25m --source DIR --split temporal`.
3. `pandas`: the same steps as one would write them with pandas, in this file: read, drop pairs that come again, cut by
   time at 80 and 90 %, sort, features of movies, Parquet, sha256. Both must come to the same counts, or this fails.
4. `stream`: rec's Corpus from what 2. wrote, and one epoch of its training batches, which are thrown away. The Corpus
   lies in files that are mapped into memory; its peak counts what is mapped, which the system may take back.
5. `memory`: the same with the Corpus in the process's own memory, and shuffled all at once.

Each is a process of its own; a peak is the largest resident memory of that process. Seconds are those of the whole
process, its imports included; CPU seconds, which all its threads took together, say more where other work runs on the
machine. JSON: {"rows", "seconds", "cpu_seconds", "peak_mb", "pandas_seconds", "pandas_cpu_seconds", "pandas_peak_mb",
"stream_load_seconds", "stream_load_cpu_seconds", "stream_load_peak_mb", "stream_examples_per_second", "stream_peak_mb",
and the same with "memory_"}; examples are training interactions, and the last peak is that of loading and iterating.

The processes start from a small one, since Linux counts the parent's memory at a start into a child's peak.

Not covered: data that exceed the machine's memory, whose epochs are as fast as its disk reads at random.
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
import pandas as pd
import pyarrow as pa
import pyarrow.csv

from rec.errors import UserError, run_command

ROWS, USERS, RATED, MOVIES = 25_000_095, 162_541, 59_047, 62_423  # MovieLens 25M's own counts
FEWEST = 20  # ratings of a user
GENRES = [
    "Action",
    "Adventure",
    "Animation",
    "Children",
    "Comedy",
    "Crime",
    "Drama",
    "Fantasy",
    "Horror",
    "Romance",
]
FROM, TO = 789_652_004, 1_574_327_703  # its first and last second
YEAR = r"\s*\((\d{4})\)\s*$"


def make_csv(folder: Path, rows: int, seed: int) -> int:
    """Writes ratings.csv and movies.csv; returns the number of ratings, which is `rows` or a little less."""
    rng = np.random.default_rng(seed)
    share = min(1.0, rows / ROWS)
    users, rated, movies = (max(50, round(count * share**0.5)) for count in (USERS, RATED, MOVIES))
    users = min(users, rows // (2 * FEWEST))
    weight = rng.lognormal(0.0, 1.3, users)
    extra = rows * 1.15 - FEWEST * users  # pairs that come twice are dropped
    lengths = FEWEST + np.floor(weight / weight.sum() * extra).astype(np.int64)
    lengths = np.minimum(lengths, rated // 3)
    user = np.repeat(np.arange(1, users + 1), lengths)
    rank = 150 * ((rated + 150) / 150) ** rng.random(len(user)) - 150  # density 1 / (rank + 150)
    names = np.sort(
        rng.choice(np.arange(1, 3 * movies), movies, replace=False)
    )  # MovieLens' ids have gaps
    by_rank = rng.permutation(names)
    pairs = np.unique(user * (4 * movies) + by_rank[np.minimum(rank.astype(np.int64), rated - 1)])
    del user, rank
    if len(pairs) > rows:
        pairs = pairs[np.sort(rng.permutation(len(pairs))[:rows])]
    user, movie = pairs // (4 * movies), pairs % (4 * movies)
    begin = rng.integers(FROM, TO - 86_400, users + 1)
    stay = np.where(rng.random(users + 1) < 0.7, 1.0, 700.0)  # most rate for a day, some for years
    span = np.minimum(rng.exponential(86_400.0, users + 1) * stay, TO - begin)
    when = (begin[user] + span[user] * rng.random(len(user))).astype(np.int64)
    rating = np.clip(np.rint(2 * rng.normal(3.5, 1.05, len(user))) / 2, 0.5, 5.0)
    table = pa.table({"userId": user, "movieId": movie, "rating": rating, "timestamp": when})
    pyarrow.csv.write_csv(
        table, folder / "ratings.csv", pyarrow.csv.WriteOptions(quoting_style="none")
    )
    titles = [
        f"Film number {name} ({year})"
        for name, year in zip(names, rng.integers(1920, 2020, movies), strict=True)
    ]
    genres = [
        "|".join(rng.choice(GENRES, rng.integers(1, 4), replace=False)) for _ in range(movies)
    ]
    pyarrow.csv.write_csv(
        pa.table({"movieId": names, "title": titles, "genres": genres}), folder / "movies.csv"
    )
    return len(user)


def with_pandas(source: Path, target: Path) -> dict[str, int]:
    """What rec.data_prep.movielens does, in pandas; returns the rows of each part."""
    import hashlib

    strings = {"userId": "str", "movieId": "str", "rating": "float32", "timestamp": "int64"}
    ratings = pd.read_csv(source / "ratings.csv", dtype=strings)
    ratings = ratings.rename(columns={"userId": "user_id", "movieId": "item_id"})
    ratings = ratings.sort_values("timestamp", kind="stable").drop_duplicates(
        ["user_id", "item_id"]
    )
    movies = pd.read_csv(source / "movies.csv", dtype={"movieId": "str"}).rename(
        columns={"movieId": "item_id"}
    )
    movies["year"] = movies["title"].str.extract(YEAR, expand=False).astype("Int64")
    movies["title"] = movies["title"].str.replace(YEAR, "", regex=True)
    movies["genres"] = movies["genres"].str.split("|")
    times = ratings["timestamp"].to_numpy()  # sorted
    cuts = [int(times[int(np.ceil(share * len(times))) - 1]) + 1 for share in (0.8, 0.9)]
    part = np.searchsorted(cuts, times, side="right")
    target.mkdir()
    counts = {}
    for number, name in enumerate(("train", "val", "test")):
        rows = ratings[part == number]
        rows.to_parquet(target / f"{name}.parquet", index=False, row_group_size=2**17)
        counts[name] = len(rows)
    movies.sort_values("item_id").to_parquet(target / "items.parquet", index=False)
    ratings[["user_id"]].drop_duplicates().sort_values("user_id").to_parquet(
        target / "users.parquet", index=False
    )
    for file in target.iterdir():
        with open(file, "rb") as stream:
            hashlib.file_digest(stream, "sha256")
    return counts


def load(dataset: str, where: str) -> dict[str, Any]:
    """The Corpus and an epoch of batches. `where` the Corpus is: "stream" for rec's way, or "memory"."""
    from rec import corpus as corpus_module
    from rec import sequences
    from rec.batches import window_batches
    from rec.config import Features, Retrieval, with_data_defaults
    from rec.corpus import load_corpus
    from rec.data_prep.dataset import open_dataset

    if where == "memory":
        sequences.on_disk = corpus_module.on_disk = lambda n, dtype: np.zeros(n, dtype)
        sequences.BLOCK = 2**62
    before = peak_mb()
    start, cpu = time.perf_counter(), time.process_time()
    corpus = load_corpus(open_dataset(dataset), Features())
    loaded, load_peak, cpu = time.perf_counter(), peak_mb(), time.process_time() - cpu
    config = with_data_defaults(Retrieval(), corpus.facts)
    targets = sum(
        int(np.count_nonzero(batch["tokens"][:, 1:]))
        for batch in window_batches(corpus, config, corpus.train, 0, 0).as_numpy_iterator()
    )
    seconds = time.perf_counter() - loaded
    assert targets == len(corpus.train.items), "every training interaction is a target once"
    return {
        "imports_mb": before,
        f"{where}_load_seconds": round(loaded - start, 1),
        f"{where}_load_cpu_seconds": round(cpu, 1),
        f"{where}_load_peak_mb": load_peak,
        f"{where}_examples_per_second": round(targets / seconds),
    }


def peak_mb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def child(*command: str) -> tuple[dict[str, Any], dict[str, float]]:
    """Runs `python -m COMMAND`: the JSON on its last line, and what the process took."""
    print(f"python -m {' '.join(command)}", file=sys.stderr, flush=True)
    start = time.perf_counter()
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen([sys.executable, "-m", *command], stdout=out)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - start
        out.seek(0)
        lines = out.read().decode().splitlines()
    if process.returncode or not lines:
        raise UserError(f"python -m {' '.join(command)} ended with {process.returncode}")
    took = {"seconds": round(seconds, 1), "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1)}
    return json.loads(lines[-1]), took | {"peak_mb": usage.ru_maxrss // 1024}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=ROWS, help="default: %(default)s")
    parser.add_argument(
        "--directory", type=Path, help="where the temporary files go; default: the system's place"
    )
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--pandas", nargs=2, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--load", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        return print(json.dumps({"rows": make_csv(args.make, args.rows, args.seed)}))
    if args.pandas:
        return print(json.dumps(with_pandas(*args.pandas)))
    if args.load:
        return print(json.dumps(load(*args.load)))
    if args.rows < 10_000:
        raise UserError("--rows: 10,000 or more")
    with tempfile.TemporaryDirectory(dir=args.directory) as name:
        source, dataset = Path(name, "ml-25m"), Path(name, "dataset")
        source.mkdir()
        # A child starts with its parent's peak: this process must stay small.
        size = ["--rows", str(args.rows), "--seed", str(args.seed)]
        rows = child("bench.prep", "--make", str(source), *size)[0]["rows"]
        megabytes = (source / "ratings.csv").stat().st_size / 1e6
        print(f"{rows:,} ratings, {megabytes:.0f} MB of CSV", file=sys.stderr, flush=True)
        prepare = [
            "--name",
            "25m",
            "--source",
            str(source),
            "--split",
            "temporal",
            "--output-dir",
            str(dataset),
        ]
        written, took = child("rec.data_prep.movielens", *prepare)
        report = {"rows": rows, "csv_mb": round(megabytes), **took}
        print(json.dumps(report), file=sys.stderr, flush=True)
        counts, took = child("bench.prep", "--pandas", str(source), str(Path(name, "pandas")))
        if any(written[part] != count for part, count in counts.items()):
            raise UserError(f"pandas came to other counts, {counts}, than rec: {written}")
        report |= {f"pandas_{name}": value for name, value in took.items()} | counts
        print(json.dumps(report), file=sys.stderr, flush=True)
        for where in ("memory", "stream"):
            loaded, took = child("bench.prep", "--load", str(dataset), where)
            report |= loaded | {f"{where}_peak_mb": took["peak_mb"]}
        print(json.dumps(report))


if __name__ == "__main__":
    run_command(main)
