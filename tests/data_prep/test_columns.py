"""What becomes of the columns of users and items files: of each type of Parquet, and of each way to write a text."""

import datetime as dt
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rec.data_prep.columns import ListColumns
from rec.data_prep.raw_files import RawFile
from rec.data_prep.tabular import load_features
from rec.errors import UserError

Load = Callable[..., duckdb.DuckDBPyConnection]
NOON = dt.datetime(2021, 4, 17, 12)
SECONDS = 1_618_660_800


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Table `items` of a Parquet file with a column `x`, or of a CSV with the text given."""

    def load(
        values: pa.Array | str, names: tuple[str, ...] = (), separator: str | None = None
    ) -> duckdb.DuckDBPyConnection:
        if isinstance(values, str):
            path = tmp_path / "items.csv"
            path.write_text(values)
        else:
            path = tmp_path / "items.parquet"
            ids = [str(number) for number in range(len(values))]
            pq.write_table(pa.table({"item_id": ids, "x": values}), path)
        con = duckdb.connect()
        con.execute("set TimeZone = 'UTC'")
        load_features(con, RawFile.of(path), "items", "item_id", ListColumns(names, separator))
        return con

    return load


def column(con: duckdb.DuckDBPyConnection) -> tuple[str, list[Any]]:
    """The type of column x, and its values in the order of the file."""
    table = con.table("items")
    values = con.execute("select x from items order by cast(item_id as int)").fetchall()
    return str(table.select("x").types[0]), [value for (value,) in values]


def why(con: duckdb.DuckDBPyConnection) -> str:
    (comment,) = con.execute(
        "select comment from duckdb_columns() where column_name = 'x'"
    ).fetchall()[0]
    return comment


# ------------------------------------------------------------------------------------------------------------
# Parquet


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        (pa.array([True, None, False]), "BOOLEAN", [True, None, False]),
        (pa.array([-1, None], pa.int8()), "BIGINT", [-1, None]),
        (pa.array([255, None], pa.uint8()), "BIGINT", [255, None]),
        (pa.array([2**32 - 1, None], pa.uint32()), "BIGINT", [2**32 - 1, None]),
        (pa.array([2**63 - 1, None], pa.uint64()), "BIGINT", [2**63 - 1, None]),
        (pa.array([2**64 - 1, 1], pa.uint64()), "VARCHAR", [str(2**64 - 1), "1"]),
        (pa.array([123_456_789_012_345_678, None]), "BIGINT", [123_456_789_012_345_678, None]),
        (pa.array([1.5, None], pa.float16()), "DOUBLE", [1.5, None]),
        (pa.array([1.5, float("nan")], pa.float32()), "DOUBLE", [1.5, None]),
        (pa.array([Decimal("1.50"), None], pa.decimal128(10, 2)), "DOUBLE", [1.5, None]),
        (pa.array([Decimal(10**17), None], pa.decimal128(38, 0)), "BIGINT", [10**17, None]),
        (pa.array([Decimal(10**37), None], pa.decimal128(38, 0)), "VARCHAR", [str(10**37), None]),
        (pa.array([NOON.date(), None]), "BIGINT", [SECONDS - 43_200, None]),
        (pa.array([NOON, None], pa.timestamp("ns")), "BIGINT", [SECONDS, None]),
        (pa.array([NOON, None], pa.timestamp("ms", "Europe/Oslo")), "BIGINT", [SECONDS, None]),
        (pa.array([dt.time(1, 2, 3), None], pa.time32("ms")), "BIGINT", [3723, None]),
        (pa.array([3_723_000_000_000, None], pa.time64("ns")), "BIGINT", [3723, None]),
        # A duration is a whole number for DuckDB, in the unit of the file.
        (pa.array([dt.timedelta(seconds=2), None], pa.duration("ms")), "BIGINT", [2000, None]),
        (pa.array(["ä", None], pa.large_string()), "VARCHAR", ["ä", None]),
        (pa.array(["a", None, "a"]).dictionary_encode(), "VARCHAR", ["a", None, "a"]),
        (pa.array(["ä".encode(), None], pa.binary()), "VARCHAR", ["ä", None]),
        (pa.array([b"abcd", None], pa.binary(4)), "VARCHAR", ["abcd", None]),
        (pa.nulls(2), "VARCHAR", [None, None]),
        (pa.array([["a", None, "", "b"], None]), "VARCHAR[]", [["a", "b"], None]),
        (pa.array([[1, 2], []], pa.list_(pa.int32())), "VARCHAR[]", [["1", "2"], []]),
        (pa.array([[0.5, 1], None], pa.list_(pa.float32(), 2)), "FLOAT[]", [[0.5, 1.0], None]),
        (pa.array([[0.5, 1], [], None], pa.list_(pa.float64())), "FLOAT[]", [[0.5, 1], None, None]),
        (pa.array([[0.5], None], pa.large_list(pa.float16())), "FLOAT[]", [[0.5], None]),
        (pa.array([[], None], pa.list_(pa.float32())), "FLOAT[]", [None, None]),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
def test_each_type_of_parquet_becomes_a_type_of_a_dataset(
    load: Load, values: pa.Array, kind: str, expected: list[Any]
) -> None:
    assert column(load(values)) == (kind, expected)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (pa.array([b"\xff\xfe", None], pa.binary()), "1 of its values are bytes that are not text"),
        (pa.array([{"w": 1}, None]), "it holds STRUCT"),
        (pa.array([[("a", 1)], None], pa.map_(pa.string(), pa.int32())), "it holds MAP"),
        (pa.array([[[1]], None]), "it holds BIGINT[][]"),
        (pa.array([[{"w": 1}], None]), "it holds STRUCT(w BIGINT)[]"),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
def test_what_has_no_form_in_a_dataset_is_left_out_and_said(
    load: Load, capsys: pytest.CaptureFixture[str], values: pa.Array, reason: str
) -> None:
    assert load(values).table("items").columns == ["item_id"]
    lines = capsys.readouterr().err.splitlines()
    assert "items.parquet: column x is left out: " in lines[0]
    assert reason in lines[0]
    assert "has no column beside item_id, so it adds no features" in lines[1]


def test_what_decided_a_type_is_the_columns_comment(load: Load) -> None:
    assert why(load(pa.array([2**64 - 1], pa.uint64()))) == f"{2**64 - 1} does not fit into int64"
    assert why(load(pa.array([[5]]))) == "Parquet holds BIGINT[]: each number is read as a word"
    assert why(load(pa.array([[0.5, 1.5]]))) == "Parquet holds DOUBLE[]: vectors of 2 numbers"
    assert why(load(pa.nulls(1))) == "it is empty"


@pytest.mark.parametrize(
    ("third", "problem"),
    [
        ([1.0], "1 numbers, 1 of them finite"),
        ([1.0, 2.0, 3.0], "3 numbers, 3 of them finite"),
        ([1.0, float("nan")], "2 numbers, 1 of them finite"),
        ([None, 1.0], "2 numbers, 1 of them finite"),
        ([1e300, 1.0], "2 numbers, 1 of them finite"),
        ([1.0, 2.0, float("inf")], "3 numbers, 2 of them finite"),
    ],
)
def test_a_vector_of_another_width_or_not_finite_is_refused_with_its_row(
    load: Load, third: list[float | None], problem: str
) -> None:
    values = pa.array([None, [0.5, 1.5], third, [1.0]], pa.list_(pa.float64()))
    with pytest.raises(UserError, match=f"items.parquet:3: column x has {problem}: .* needs 2,"):
        load(values)


# ------------------------------------------------------------------------------------------------------------
# Text files


@pytest.mark.parametrize(
    ("cells", "kind", "reason"),
    [
        (["1", "-5", ""], "BIGINT", "all values are whole numbers"),
        (["1", "2.5", "2e3"], "DOUBLE", "'2.5' is not whole"),
        (["1999", "02139"], "VARCHAR", "'02139' on line 3 is not a number"),
        (["1", str(2**63)], "VARCHAR", f"'{2**63}' on line 3 is not a number"),
        ([str(2**63 - 1)], "BIGINT", "all values are whole numbers"),
        (["1.5", "9" * 400 + ".5"], "VARCHAR", f"'{'9' * 60}' on line 3 is not a number"),
        (["", ""], "VARCHAR", "it is empty"),
        (["True", "False"], "VARCHAR", "'True' on line 2 is not a number"),
    ],
)
def test_a_csv_column_names_the_cell_that_decided(
    load: Load, cells: list[str], kind: str, reason: str
) -> None:
    rows = "".join(f"{number},{cell}\n" for number, cell in enumerate(cells))
    con = load(f"item_id,x\n{rows}")
    assert (column(con)[0], why(con)) == (kind, reason)


def test_a_column_of_numbers_but_for_a_few_cells_is_said_with_the_first(
    load: Load, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = ["1990", *["Unknown", "1991"], *["1992"] * 30, "n/a"]
    rows = "".join(f"{number},{cell}\n" for number, cell in enumerate(cells))
    con = load(f"item_id,x\n{rows}")
    assert column(con)[0] == "VARCHAR"
    assert (
        "column x is all numbers but for 2 of 34 values, the first 'Unknown' on line 3. So it is text"
        in capsys.readouterr().err
    )
    load("item_id,x\n1,a\n2,b\n3,1\n")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("cell", "looks"),
    [
        ('"1,99"', "numbers with a decimal comma"),
        ("2021-04-17", "dates"),
        ("2021-04-17T10:00:00Z", "dates"),
        ('"[0.1, -2e-3, 3.0, 4]"', "vectors"),
        ("0.1 0.2 0.3 0.4", "vectors"),
        ("Action|Comedy", "lists: name the column with --list-col"),
        ("\"['Action', 'Comedy']\"", "lists"),
        ("A title", ""),
    ],
)
def test_a_text_that_looks_like_something_else_is_said(load: Load, cell: str, looks: str) -> None:
    reason = why(load(f"item_id,x\n1,{cell}\n2,{cell}\n3,\n"))
    assert ("looks like" in reason) == bool(looks)
    assert looks in reason


# ------------------------------------------------------------------------------------------------------------
# Lists in one text


@pytest.mark.parametrize(
    ("cell", "separator", "expected"),
    [
        ("Action|Comedy", None, ["Action", "Comedy"]),
        (" Action | | Comedy|", None, ["Action", "Comedy"]),
        ("Action, Comedy", None, ["Action", "Comedy"]),
        ("Action; Comedy, dark", ";", ["Action", "Comedy, dark"]),
        ("Action ; Comedy", None, ["Action", "Comedy"]),
        ("Sci-Fi/Drama", "/", ["Sci-Fi", "Drama"]),
        ("['Action', 'Comedy']", None, ["Action", "Comedy"]),
        ("['Action' 'Comedy']", None, ["Action", "Comedy"]),  # as NumPy prints it
        ("['It\\'s', 'a, b']", None, ["It's", "a, b"]),
        ('["Action", "Comedy"]', None, ["Action", "Comedy"]),
        ("[Action, Sci Fi]", None, ["Action", "Sci Fi"]),
        ("{'Action'}", None, ["Action"]),
    ],
)
def test_a_list_column_is_split_and_one_value_is_printed(
    load: Load,
    capsys: pytest.CaptureFixture[str],
    cell: str,
    separator: str | None,
    expected: list[str],
) -> None:
    quoted = cell.replace('"', '""')
    con = load(f'item_id,x\n0,"{quoted}"\n1,\n', ("x",), separator)
    assert column(con) == ("VARCHAR[]", [expected, []])
    assert f"{cell!r} becomes {expected}" in capsys.readouterr().err


def test_the_separator_of_most_values_is_taken(load: Load) -> None:
    con = load('item_id,x\n0,"a, b"\n1,a; b\n2,"c, d"\n', ("x",))
    assert column(con)[1] == [["a", "b"], ["a; b"], ["c", "d"]]


@pytest.mark.parametrize(
    ("separator", "missing"), [(None, "'|'"), (";", "';'")], ids=["found", "given"]
)
def test_a_list_column_that_splits_nothing_is_said_with_a_value(
    load: Load, capsys: pytest.CaptureFixture[str], separator: str | None, missing: str
) -> None:
    con = load("item_id,x\n0,Action/Comedy\n1,Drama\n", ("x",), separator)
    assert column(con)[1] == [["Action/Comedy"], ["Drama"]]
    said = capsys.readouterr().err
    assert "--list-col x splits nothing: no value of " in said
    assert f"holds {missing}, such as 'Action/Comedy'. Name what separates" in said


def test_a_list_column_that_is_a_list_already_is_said_and_numbers_are_refused(
    load: Load, capsys: pytest.CaptureFixture[str]
) -> None:
    assert column(load(pa.array([["a"], []]), ("x",)))[1] == [["a"], []]
    assert "--list-col x has no effect: " in capsys.readouterr().err
    with pytest.raises(UserError, match="holds BIGINT there, such as 1999, which has nothing to"):
        load(pa.array([1999, 2000]), ("x",))
