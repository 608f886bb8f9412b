"""The dataset directory: open it, verify it. (write.py makes it.)

    dataset.json           format version, name, source, filters, split, counts, columns, sha256 of every file
    interactions/{train,val,test}/00000.parquet ..   user_id, item_id, [timestamp], [rating], [event], [weight]
                                                     sorted by time
    users.parquet  items.parquet                     one row an id, sorted by id; feature columns
    dataset.md             counts, columns and warnings, for a person; nothing reads it

The same input and flags give the same bytes, so dataset.json's own sha256 is the dataset's id. Column types are few:
string, int64, bool, float (32 bits), double, list<string>, list<float> (vectors); times are seconds since 1970 (UTC).
Files are read with `partitioning=None`, since a folder above them that is named `a=b` adds no column.
"""

import hashlib
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from rec.errors import UserError
from rec.files import digest
from rec.tables import read_table

FORMAT_VERSION = 1
# What an answer says of an item beside its columns; a column of such a name would be overwritten or hidden.
RESERVED = ("popularity", "score", "explain", "retrieval_rank", "retrieval_score", "ranking_score")


@dataclass(frozen=True)
class Dataset:
    """An opened dataset directory."""

    path: Path
    manifest: dict[str, Any]  # dataset.json
    id: str  # sha256 of dataset.json's bytes
    ordered: bool  # whether interactions have timestamps; if not, their order means nothing
    has_ratings: bool
    split_strategy: str  # temporal, leave_one_out or given

    @property
    def columns(self) -> dict[str, str]:
        """The types of the columns of interactions."""
        columns: dict[str, str] = self.manifest["columns"]["interactions"]
        return columns

    @property
    def positive_events(self) -> list[str] | None:
        """The events that are not negative; None if all interactions are positive."""
        negatives = self.manifest.get("negative_events")
        if not negatives:
            return None
        return [name for name in self.manifest["events"] if name not in negatives]

    @property
    def keeps_repeats(self) -> bool:
        """Whether it was prepared with --repeats keep."""
        return self.manifest.get("repeats") == "keep"

    @property
    def history_events(self) -> tuple[str, ...] | None:
        """The events that are not negative, by name; None if interactions have no kinds."""
        names = self.positive_events or self.manifest.get("events")
        return None if names is None else tuple(names)

    @property
    def has_repeats(self) -> bool:
        """Whether a user may interact with an item more than once."""
        return self.keeps_repeats or len(self.manifest.get("events", [])) > 1

    @property
    def label_events(self) -> list[str] | None:
        """What val and test ask for; None for all interactions. The others there are history, or negative."""
        return self.manifest.get("target_events") or self.positive_events

    def files(self, split: str) -> list[Path]:
        """The Parquet files of train, val or test, in their order."""
        return [
            self.path / name
            for name in self.manifest["files"]
            if name.startswith(f"interactions/{split}/")
        ]

    def batches(self, split: str, events: Collection[str] | None = None) -> Iterator[pd.DataFrame]:
        """The interactions in order, a row group at a time; only those of `events` if given. They are sorted by time.

        Columns: user_id, item_id, [timestamp], [rating], [event], [weight]. The strings are pandas' categories: each is
        in memory once. Times are int64 seconds, ratings and weights float32.
        """
        strings = [name for name, kind in self.columns.items() if kind == "string"]
        for file in self.files(split):
            reader = pq.ParquetFile(file, read_dictionary=strings)
            for group in range(reader.num_row_groups):
                rows = reader.read_row_group(group).to_pandas()
                yield rows if events is None else rows[rows["event"].isin(events)]

    def interactions(self, split: str) -> pd.DataFrame:
        """All of them at once, with ids as strings."""
        return pd.concat(self.batches(split), ignore_index=True).astype(
            {"user_id": object, "item_id": object}
        )

    def counts(self, split: str, column: str, events: Collection[str] | None = None) -> pd.Series:
        """How many interactions (of `events`) each user_id or item_id has, in order of ids; a file at a time."""
        rows = None if events is None else [("event", "in", events)]
        tables = (
            pq.read_table(file, columns=[column], filters=rows, partitioning=None)
            for file in self.files(split)
        )
        found = pa.concat_tables(
            [table.group_by(column).aggregate([([], "count_all")]) for table in tables]
        )
        return found.to_pandas().groupby(column)["count_all"].sum()

    def users(self) -> pd.DataFrame:
        """A row per user of any split, in order of ids: user_id and features, null where unknown.

        Whole numbers are pandas' Int64, booleans `boolean`.
        """
        return read_table(self.path / "users.parquet")

    def items(self) -> pd.DataFrame:
        """A row per item of the catalogue, whether anybody has met it or not: item_id and features."""
        return read_table(self.path / "items.parquet")


def open_dataset(path: str | Path) -> Dataset:
    """Opens a dataset directory. Raises UserError if it is none, is of another format version, or lacks a file."""
    file = Path(path) / "dataset.json"
    if not file.is_file():
        command = f"python -m rec.data_prep.dummy --output-dir {path}"
        hint = f"run `{command}` first, or movielens or tabular in place of dummy"
        raise UserError(f"{path} is not a dataset directory, it has no dataset.json: {hint}")
    content = file.read_bytes()
    try:
        manifest = json.loads(content)
        if manifest["format_version"] != FORMAT_VERSION:
            raise UserError(
                f"{file} is not of format version {FORMAT_VERSION}: prepare the dataset again"
            )
        for name in manifest["files"]:
            if not (file.parent / name).is_file():
                raise UserError(f"{file.parent / name} is missing: prepare the dataset again")
        columns, strategy = manifest["columns"]["interactions"], manifest["split"]["strategy"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise UserError(f"{file} is damaged: prepare the dataset again") from None
    identity = hashlib.sha256(content).hexdigest()
    return Dataset(
        file.parent, manifest, identity, "timestamp" in columns, "rating" in columns, strategy
    )


def verify(dataset: Dataset) -> None:
    """Compares every file with the manifest's sha256. Raises UserError that names a missing or damaged file."""
    check_unchanged(dataset)
    for name, expected in dataset.manifest["files"].items():
        if digest(dataset.path / name) != expected:
            raise UserError(
                f"{dataset.path / name} is damaged (its sha256 differs): prepare the dataset again"
            )


def check_unchanged(dataset: Dataset) -> None:
    """Raises UserError if another data set has taken the directory since this one was opened."""
    if open_dataset(dataset.path).id != dataset.id:
        raise UserError(f"{dataset.path} was replaced while it was read: run the command again")
