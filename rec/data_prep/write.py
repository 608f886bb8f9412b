"""Writing a dataset directory from a database: what every source in this folder ends with.

- Written under a temporary name and renamed when whole: a kill leaves nothing half-made, and the next run removes
  what it did leave.
- Out of core: DuckDB spills to disk, and Parquet is written a row group at a time.

It stands apart from dataset.py so that training opens a data set without DuckDB, which warns of leaks when it shares
a process with TensorFlow.
"""

import contextlib
import fcntl
import glob
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from rec.data_prep.dataset import FORMAT_VERSION, digest, open_dataset
from rec.data_prep.split import SPLITS, columns_of, count_rows, filter_interactions, quoted, split_interactions
from rec.errors import UserError

SHARD_ROWS = 2**20  # rows a Parquet file
GROUP_ROWS = 2**17  # rows a row group: what a streaming reader holds at a time
MEMORY = "2GB"  # DuckDB spills to disk beyond this, so that a laptop prepares what a server does
REASONS = {
    "bad_rows": "malformed rows",
    "below_min_rating": "interactions rated below --min-rating",
    "duplicates": "duplicate interactions (the same user and item again: the earliest is kept)",
    "of_inactive_users": "interactions of users with fewer than --min-interactions",
}


def note(line: str) -> None:
    """Progress for a person, on stderr."""
    print(line, file=sys.stderr, flush=True)


Load = Callable[[duckdb.DuckDBPyConnection, Path], dict[str, int]]


def prepare(
    output_dir: Path,
    load: Load,
    name: str,
    source: str,
    strategy: str,
    seed: int,
    min_rating: float | None = None,
    min_interactions: int = 1,
) -> None:
    """Writes a dataset directory, and prints the counts and the JSON line that end every command.

    Args:
        load: gets a database and a directory for temporary files. It creates table `interactions` (user_id, item_id,
            source_row, and timestamp in seconds, rating and split where the source has them), and `users` and
            `items` (id, features) where the source has them. It returns what it dropped: reason -> rows.

    Raises:
        UserError: bad rows, an impossible split, or an output directory that holds something else.
    """
    with staging(output_dir) as directory:
        scratch = directory / "scratch"
        scratch.mkdir()
        try:
            with duckdb.connect(scratch / "work.duckdb") as con:
                con.execute(f"set memory_limit = '{MEMORY}'; set TimeZone = 'UTC'; set enable_progress_bar = false")
                dropped = load(con, scratch)
                note("filtering and splitting")
                dropped |= filter_interactions(con, min_rating, min_interactions)
                split = split_interactions(con, strategy, seed)
                known = "split = 'test' and user_id in (select user_id from splits where split = 'train')"
                if not count_rows(con, "splits", known):
                    note("warning: no user of test occurs in train, so all of them are new")
                note("writing")
                counts, columns = _write_tables(con, directory)
        except (duckdb.IOException, duckdb.OutOfMemoryException) as error:  # above all: no space left on the disk
            raise UserError(f"preparing {output_dir} failed: {str(error).splitlines()[0]}") from None
        shutil.rmtree(scratch)
        files = {str(file.relative_to(directory)): digest(file) for file in sorted(directory.rglob("*.parquet"))}
        filters = {"min_rating": min_rating, "min_interactions": min_interactions}
        manifest = {"format_version": FORMAT_VERSION, "name": name, "source": source, "filters": filters}
        manifest |= {"split": split, "counts": counts, "columns": columns, "files": files}
        text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
        (directory / "dataset.json").write_text(text, encoding="utf-8")
    for reason, count in dropped.items():
        if count:
            note(f"dropped: {count:,} {REASONS[reason]}")
    note(f"{output_dir}: {name}, {split}")
    for part, count in counts.items():
        note(f"  {part:<6}{count:>12,}")
    print(json.dumps({"dataset": str(output_dir), "id": open_dataset(output_dir).id, **counts, "dropped": dropped}))


@contextlib.contextmanager
def staging(output_dir: Path) -> Iterator[Path]:
    """A temporary sibling directory that replaces `output_dir` when the block ends without an exception.

    Raises:
        UserError: `output_dir` holds something that is not a dataset.
    """
    final = output_dir.resolve()  # a link stays a link
    if final.exists() and not (final / "dataset.json").is_file() and not (final.is_dir() and not any(final.iterdir())):
        raise UserError(f"{output_dir} exists and is no dataset: remove it, or choose another --output-dir")
    final.parent.mkdir(parents=True, exist_ok=True)
    for leftover in final.parent.glob(f".{glob.escape(final.name)}.*.tmp"):
        with _lock(leftover) as is_mine:  # the lock of a killed process is free
            if is_mine:
                shutil.rmtree(leftover)
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    old = final.with_name(f".{final.name}.{os.getpid()}.old.tmp")
    temporary.mkdir()
    with _lock(temporary):
        try:
            yield temporary
            if final.exists():  # a kill between the two renames loses the old one, and leaves no half of either
                final.rename(old)
            temporary.rename(final)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _lock(directory: Path) -> Iterator[bool]:
    """Locks a directory while the block runs; gives False if another process has."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(handle)


def _write_tables(con: duckdb.DuckDBPyConnection, directory: Path) -> tuple[dict[str, int], dict[str, Any]]:
    """Writes the tables `splits`, `users` and `items` as Parquet; returns the counts of rows and the columns."""
    counts: dict[str, int] = {}
    schemas: dict[str, pa.Schema] = {}
    for table, key in (("users", "user_id"), ("items", "item_id")):
        features = [quoted(name) for name in columns_of(con, table) if name != key]
        unmet = f"union select {key} from {table}" if features and table == "items" else ""
        join = f"left join {table} using ({key})" if features else ""
        ids = f"(select {key} from splits union select {key} from splits {unmet}) as ids"
        rows = con.sql(f"select {', '.join([key, *features])} from {ids} {join} order by {key}").to_arrow_table()
        pq.write_table(rows, directory / f"{table}.parquet")
        counts[table], schemas[table] = len(rows), rows.schema
    has = columns_of(con, "splits")
    time = ", cast(floor(timestamp) as bigint) as timestamp" if "timestamp" in has else ""
    selected = f"user_id, item_id{time}" + (", cast(rating as float) as rating" if "rating" in has else "")
    order = "splits.timestamp, source_row" if time else "source_row"
    for part in SPLITS:
        folder = directory / "interactions" / part
        folder.mkdir(parents=True)
        query = f"select {selected} from splits where split = '{part}' order by {order}"
        reader = con.sql(query).to_arrow_reader(GROUP_ROWS)
        counts[part], schemas["interactions"] = 0, reader.schema
        for number, shard in enumerate(_shards(reader)):
            pq.write_table(shard, folder / f"{number:05d}.parquet", row_group_size=GROUP_ROWS)
            counts[part] += len(shard)
    columns = {
        table: {field.name: str(field.type).replace("list<l: ", "list<") for field in schema}
        for table, schema in schemas.items()
    }
    return counts, columns


def _shards(reader: pa.RecordBatchReader) -> Iterator[pa.Table]:
    """Cuts a stream into tables of SHARD_ROWS rows, wherever its batches end (which depends on the threads)."""
    rows = reader.schema.empty_table()
    for batch in reader:
        rows = pa.concat_tables([rows, pa.Table.from_batches([batch])])
        while len(rows) >= SHARD_ROWS:
            yield rows.slice(0, SHARD_ROWS).combine_chunks()
            rows = rows.slice(SHARD_ROWS)
    if len(rows):
        yield rows.combine_chunks()
