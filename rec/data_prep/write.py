"""Writing a dataset directory from tables: what every source in this folder ends with.

- Renamed when whole: a kill leaves nothing half-made under the name, and the next run removes what it did leave.
- One writer per directory (files.py): a second command ends with an error, or waits with --wait.
- Out of core: the engine spills to disk, and Parquet is written a row group at a time.

Apart from dataset.py, since DuckDB warns of leaks when it shares a process with TensorFlow, which opens datasets.
"""

import argparse
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq

from rec.data_prep.checks import check_tables
from rec.data_prep.dataset import FORMAT_VERSION, open_dataset
from rec.data_prep.engine import Engine
from rec.data_prep.events import Events
from rec.data_prep.report import write_report
from rec.data_prep.split import SPLITS, Filters, filter_interactions, split_interactions
from rec.errors import UserError, command_parser, note, warn
from rec.files import add_wait_argument, digest, replace_directory, sole_writer
from rec.tables import ColumnLine, describe_columns

GROUP_ROWS = 2**17  # rows a row group: what a streaming reader holds at a time
SHARDS = {
    "max_rows_per_file": 2**20,
    "min_rows_per_group": GROUP_ROWS,
    "max_rows_per_group": GROUP_ROWS,
}
SETTINGS = """
    set memory_limit = '2GB';  -- beyond this it spills to disk: a laptop prepares what a server does
    set TimeZone = 'UTC';
    set enable_progress_bar = false"""
REASONS = {
    "bad_rows": "malformed rows",
    "below_min_rating": "interactions rated below --min-rating",
    "of_weight_0": "interactions of weight 0",
    "before_since": "interactions before --since",
    "after_until": "interactions at --until or later",
    "duplicates": "duplicate interactions (the same user and item again: see --repeats)",
    "of_inactive_users": "interactions of users with fewer than --min-interactions",
    "of_rare_items": "interactions of items with fewer than --min-item-interactions",
}
# Users are those who occur; items make up the catalogue, whether anybody has met them or not.
JOINS = {"users": "left", "items": "full"}
CASTS = {
    "timestamp": "cast(floor(timestamp) as bigint)",
    "rating": "cast(rating as float)",
    "weight": "cast(weight as float)",
}

ALL = Filters()  # of the interactions
NO_EVENTS = Events()
Load = Callable[[duckdb.DuckDBPyConnection, Path], dict[str, int]]


def output_parser(module: str, text: str | None) -> argparse.ArgumentParser:
    """The parser of a command that ends in `prepare`, with the options that all of them have."""
    parser = command_parser(module, text)
    add = parser.add_argument
    add("--output-dir", required=True, type=Path, help="the dataset directory to write")
    engine = "filters, splits, sorts; default: duckdb"
    add("--engine", choices=("duckdb", "spark"), default="duckdb", help=engine)
    add_wait_argument(parser)
    return parser


def prepare(
    output_dir: Path,
    load: Load,
    name: str,
    source: str,
    strategy: str,
    seed: int,
    filters: Filters = ALL,
    engine: type[Engine] = Engine,
    events: Events = NO_EVENTS,
    *,
    wait: bool = False,
) -> None:
    """Writes a dataset directory, and prints the counts and the JSON line that end every command.

    `load` gets a database of DuckDB's and a directory for temporary files. It creates table `interactions` (user_id,
    item_id, source_row, and timestamp in seconds, rating, event, weight and split where the source has them), and
    `users` and `items` (id, features) where the source has them. It returns what it dropped: reason -> rows. `engine`
    does the rest.

    Raises:
      UserError: bad rows, an impossible split, an engine that does not start, an output directory that holds something
        else, or, unless `wait` is true, one that another command is writing.
    """
    manifest: dict[str, Any] = {"format_version": FORMAT_VERSION, "name": name, "source": source}
    manifest["filters"] = dataclasses.asdict(filters)
    manifest["repeats"] = manifest["filters"].pop("repeats")
    with staging(output_dir, wait=wait) as directory:
        scratch = directory.parent
        try:
            with duckdb.connect(scratch / "work.duckdb") as con:
                con.execute(SETTINGS)
                dropped = load(con, scratch)
                check_tables(con)
                reasons = _comments(con)
                db = engine(con, scratch)
                note("filtering and splitting")
                dropped |= filter_interactions(db, filters)
                manifest |= events.facts(db)
                manifest["split"] = split_interactions(db, strategy, seed, events.is_label)
                if events.targets:
                    _report_labels(db, events)
                note("writing")
                manifest |= {"counts": {}, "columns": {}}
                lines = {
                    table: _write_features(db, directory, table, reasons, manifest)
                    for table in JOINS
                }
                _write_interactions(db, directory, manifest)
                said = {REASONS[reason]: count for reason, count in dropped.items() if count}
                write_report(con, directory, manifest, said, lines)
        except (duckdb.IOException, duckdb.OutOfMemoryException) as error:  # the disk is full, say
            reason = str(error).splitlines()[0]
            raise UserError(f"preparing {output_dir} failed: {reason}") from None
        parts = directory.rglob("*.parquet")
        in_order = sorted(parts, key=lambda file: (len(file.name), file))  # 00009 before 000010
        manifest["files"] = {str(part.relative_to(directory)): digest(part) for part in in_order}
        text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
        (directory / "dataset.json").write_text(text, encoding="utf-8")
    for reason, count in said.items():
        note(f"dropped: {count:,} {reason}")
    note(f"{output_dir}: {name}, {manifest['split']}")
    counts = manifest["counts"]
    for part, count in counts.items():
        note(f"  {part:<6}{count:>12,}")
    note(f"{output_dir / 'dataset.md'} describes it")
    facts = {"dataset": str(output_dir), "id": open_dataset(output_dir).id}
    print(json.dumps({**facts, **counts, "dropped": dropped}))


@contextmanager
def staging(output_dir: Path, *, wait: bool = False) -> Iterator[Path]:
    """A new directory that replaces `output_dir` when the block ends without an exception; its parent is for scratch.

    Raises UserError if `output_dir` holds something that is not a dataset, or if another command is writing it; with
    `wait`, waits for that one instead.
    """
    final = output_dir.resolve()  # a link stays a link
    temporary = final.with_name(f".{final.name}.tmp")
    with sole_writer(final, wait=wait):
        shutil.rmtree(temporary, ignore_errors=True)  # left by a command that was killed
        is_dataset = (final / "dataset.json").is_file()
        is_empty = final.is_dir() and not any(final.iterdir())
        if final.exists() and not is_dataset and not is_empty:
            hint = "remove it, or choose another --output-dir"
            raise UserError(f"{output_dir} exists and is no dataset: {hint}")
        new = temporary / "new"
        new.mkdir(parents=True)
        try:
            yield new
            replace_directory(new, final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _report_labels(engine: Engine, events: Events) -> None:
    for part in ("val", "test"):
        total = engine.count(f"split = '{part}'")
        labels = engine.count(f"split = '{part}' and {events.is_label}")
        asked = ", ".join(events.targets)
        note(f"{part} asks for {labels:,} of its {total:,} interactions ({asked})")


def _comments(con: duckdb.DuckDBPyConnection) -> dict[tuple[str, str], str]:
    """What decided the type of a column, where a source says it: (table, column) -> the column's comment."""
    rows = con.execute(
        "select table_name, column_name, comment from duckdb_columns() where comment is not null"
    ).fetchall()
    return {(table, column): comment for table, column, comment in rows}


def _write_features(
    engine: Engine,
    directory: Path,
    table: str,
    reasons: dict[tuple[str, str], str],
    manifest: dict[str, Any],
) -> list[ColumnLine]:
    """Writes users or items as Parquet, adds their count and types to the manifest, and prints a line per column.

    `reasons` is why a column has its type: (table, column) -> a few words.
    """
    key = f"{table[:-1]}_id"
    occurring = f"(select distinct {key} from interactions) as occurring"
    select = f"select * from {occurring} {JOINS[table]} join {table} using ({key}) order by {key}"
    rows = engine.reader(select, GROUP_ROWS).read_all().combine_chunks()
    pq.write_table(rows, directory / f"{table}.parquet")
    manifest["counts"][table] = len(rows)
    manifest["columns"][table] = _types(rows.schema)
    features = [name for name in rows.column_names if name != key]
    lines = [
        _describe_column(name, rows[name], reasons.get((table, name), "")) for name in features
    ]
    describe_columns(f"{table}: columns of {len(rows):,} rows", lines)
    for line in lines:
        if not line.filled:
            warn(f"{table}: column {line.name} is empty in all {len(rows):,} rows")
    return lines


def _write_interactions(engine: Engine, directory: Path, manifest: dict[str, Any]) -> None:
    """Writes the splits as Parquet, and adds their counts and types to the manifest."""
    has = [name for name in engine.columns if name not in ("source_row", "split")]
    selected = ", ".join(f"{CASTS.get(name, name)} as {name}" for name in has)
    order = "interactions.timestamp, source_row" if "timestamp" in has else "source_row"
    for part in SPLITS:
        select = f"select {selected} from interactions where split = '{part}' order by {order}"
        reader = engine.reader(select, GROUP_ROWS)  # its batches end wherever the threads did
        folder = directory / "interactions" / part
        names = {"format": "parquet", "basename_template": "0000{i}.parquet"}
        pyarrow.dataset.write_dataset(reader, folder, preserve_order=True, **names, **SHARDS)
        rows = sum(pq.read_metadata(file).num_rows for file in folder.iterdir())
        manifest["counts"][part] = rows
        manifest["columns"]["interactions"] = _types(reader.schema)


def _types(schema: pa.Schema) -> dict[str, str]:
    return {field.name: _type_name(field.type) for field in schema}


def _describe_column(name: str, values: pa.ChunkedArray, why: str) -> ColumnLine:
    """Of a feature column as it is written; an empty list is no value."""
    is_filled = pc.is_valid(values)
    if pa.types.is_list(values.type):
        is_filled = pc.greater(pc.fill_null(pc.list_value_length(values), 0), 0)
    first = pc.index(is_filled, True).as_py()
    filled = pc.mean(is_filled).as_py() or 0.0
    example = values[first].as_py() if first >= 0 else None
    return ColumnLine(name, _type_name(values.type), filled, example, why)


def _type_name(kind: pa.DataType) -> str:
    return str(kind).replace("list<l: ", "list<")
