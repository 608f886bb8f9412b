"""Values of items keep their type from the file to the bundle and to what a server reads from it."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rec.bundles.files import read_catalogue
from rec.config import Features
from rec.corpus import load_corpus
from rec.data_prep.dataset import RESERVED, open_dataset
from rec.errors import UserError
from rec.tables import ColumnLine, describe_columns, read_table, shorten
from tests.conftest import Trained, run_here

LONG = 123_456_789_012_345_678  # that floating point rounds
TYPED: dict[str, list[Any]] = {
    "count": [46, None, LONG],
    "active": [True, None, False],
    "height": [1.5, None, 46.0],
    "tags": [["a", "b"], None, []],
}
VECTORS = [[0.5, 1.5], None, [0.0, -2.0]]


def test_a_table_is_read_without_a_change_of_types(tmp_path: Path) -> None:
    table = pa.table(TYPED)
    pq.write_table(table, tmp_path / "a.parquet")
    frame = read_table(tmp_path / "a.parquet")
    assert frame["count"].tolist() == [46, pd.NA, LONG]
    assert frame["active"].tolist() == [True, pd.NA, False]
    frame.to_parquet(tmp_path / "b.parquet", index=False)
    assert pq.read_table(tmp_path / "b.parquet").to_pydict() == TYPED
    assert pq.read_schema(tmp_path / "b.parquet").types == table.schema.types


def test_columns_are_described_in_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        ColumnLine("title", "string", 0.975, "A title that is much too long to be shown", "words"),
        ColumnLine("n", "int64", 0.0, None, ""),
    ]
    describe_columns("items:", lines)
    assert capsys.readouterr().err.splitlines() == [
        "items:",
        "  column  kind    filled  example                           why",
        "  title   string  98%     'A title that is much too long..  words",
        "  n       int64   0%      -",
    ]
    describe_columns("users:", [])
    assert capsys.readouterr().err == ""
    assert shorten(pd.Series([1.5]).iloc[0]) == "1.5"


def prepare(folder: Path, dataset: Path, **columns: list[Any]) -> Path:
    """The interactions of a dataset again, with further columns for the first of its items."""
    source = open_dataset(dataset)
    interactions = pd.concat(source.interactions(split) for split in ("train", "val", "test"))
    interactions.to_parquet(folder / "clicks.parquet", index=False)
    items = pq.read_table(dataset / "items.parquet")
    for name, values in columns.items():
        filled = pa.array(values + [None] * (len(items) - len(values)))
        items = items.append_column(name, filled)
    pq.write_table(items, folder / "items.parquet")
    arguments = ["--interactions", folder / "clicks.parquet", "--timestamp-col", "timestamp"]
    arguments += ["--users", dataset / "users.parquet", "--items", folder / "items.parquet"]
    arguments += ["--rating-col", "rating", "--split", "leave_one_out"]
    done = run_here("rec.data_prep.tabular", *arguments, "--output-dir", folder / "dataset")
    assert done.returncode == 0, done.stderr
    return folder / "dataset"


def test_types_survive_from_the_file_to_the_bundle(tmp_path: Path, trained: Trained) -> None:
    dataset = prepare(tmp_path, trained.dataset, **TYPED, image=VECTORS)
    items = pq.read_table(dataset / "items.parquet")
    assert items["image"].to_pylist()[:3] == VECTORS
    assert open_dataset(dataset).manifest["columns"]["items"]["image"] == "list<float>"
    first = items["item_id"].to_pylist()[:3]
    arguments = ["--stage", "retrieval", "--config", trained.config, "--set", f"dataset={dataset}"]
    arguments += ["--set", f"output.savedmodels={tmp_path}/savedmodels"]
    done = run_here("rec.export", *arguments)
    assert done.returncode == 0, done.stderr
    bundle = Path(json.loads(done.stdout.splitlines()[-1])["bundle"])

    written = pq.read_table(bundle / "items.parquet")
    assert "image" not in written.column_names  # an answer has no vectors
    kinds = {name: str(written.schema.field(name).type) for name in TYPED}
    assert kinds == {
        "count": "int64",
        "active": "bool",
        "height": "double",
        "tags": "list<element: string>",
    }
    items, *_ = read_catalogue(bundle)
    shown = pa.Table.from_pandas(items.loc[first, list(TYPED)], preserve_index=False).to_pydict()
    assert shown == TYPED


def test_a_dataset_whose_items_have_a_reserved_name_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: Trained
) -> None:
    dataset = open_dataset(trained.dataset)
    items = dataset.items().assign(**{RESERVED[0]: 1})
    monkeypatch.setattr(type(dataset), "items", lambda _: items)
    with pytest.raises(UserError, match=f"the items have a column {RESERVED[0]}, .*prepare the"):
        load_corpus(dataset, Features({}, {}))
