"""Nothing of a file is lost in silence: random text files, and the counting of their lines."""

import csv
import io
import re
from pathlib import Path

import duckdb
import pytest
from duckdb import DuckDBPyConnection as Connection
from hypothesis import given, settings
from hypothesis import strategies as st

from rec.data_prep import rows as rows_module
from rec.data_prep.raw_files import RawFile
from rec.data_prep.rows import count_lines, read_rows
from rec.data_prep.tabular import load_features, load_interactions
from rec.errors import UserError

DELIMITERS = {"csv": ",", "tsv": "\t"}
LINE_ENDS = ("\n", "\r\n", "\r")
FIELDS = [
    "u",
    "i7",
    "5",
    "é",
    "",
    " ",
    '"',
    '"u',
    'i"',
    'x"y',
    '"a b"',
    '"a,b"',
    "a;b",
    "'u",
    ' "q"',
]
ENCODINGS = ("utf-8", "utf-8", "utf-8", "utf-8-sig", "latin-1", "utf-16")
# Text of any letters but those that no CSV has: lone surrogates, NUL.
LETTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


def connected() -> Connection:
    return duckdb.connect(config={"threads": 1})


@st.composite
def noise(draw: st.DrawFn, delimiter: str) -> str:
    """Lines of mostly three fields, with quotes anywhere and line ends that are mostly alike."""
    usual = draw(st.sampled_from(LINE_ENDS))
    lines = draw(st.lists(st.lists(st.sampled_from(FIELDS), min_size=3, max_size=3), max_size=6))
    if draw(st.integers(0, 3)) == 0:
        lines += draw(st.lists(st.lists(st.sampled_from(FIELDS), max_size=5), max_size=3))
    ends = [usual] * len(lines)
    if ends and draw(st.integers(0, 3)) == 0:
        ends[draw(st.integers(0, len(ends) - 1))] = draw(st.sampled_from(["", *LINE_ENDS]))
    header = delimiter.join(["user_id", "item_id", "n"]) + usual
    return header + "".join(
        delimiter.join(line) + end for line, end in zip(lines, ends, strict=True)
    )


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    data=st.data(),
    kind=st.sampled_from(["csv", "tsv"]),
    quote=st.sampled_from([None, '"', ""]),
    encoding=st.sampled_from(ENCODINGS),
    table=st.sampled_from(["interactions", "items"]),
)
def test_every_line_is_a_row_or_counted_or_the_file_is_refused(
    folder: Path, data: st.DataObject, kind: str, quote: str | None, encoding: str, table: str
) -> None:
    content = data.draw(noise(DELIMITERS[kind])).encode(encoding)
    path = folder / f"noise.{kind}"
    path.write_bytes(content)
    con = connected()
    try:
        file = RawFile.of(path, quote=quote, skip_bad_rows=True)
        if table == "items":
            bad = load_features(con, file, table, "item_id")
        else:
            bad = load_interactions(con, file, ("user_id", "item_id", None, None))
    except UserError as error:
        assert re.fullmatch(f"{re.escape(str(path))}.+", str(error))  # one line
        return
    lines = sum(1 for line in re.split(b"\r\n|\r|\n", content) if line)
    more = 0
    if table == "items":  # fields that go on to another line, blank lines in them apart
        fields = "concat_ws(' ', user_id, item_id, n)"
        runs = f"coalesce(sum(len(regexp_extract_all({fields}, '[\\r\\n]+'))), 0)"
        (more,) = con.execute(f"select {runs} from items").fetchall()[0]
    assert len(con.table(table)) + bad + 1 + more == lines


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.lists(
        st.tuples(st.text(LETTERS, max_size=6), st.text(LETTERS, max_size=6)), min_size=1
    ),
    line_end=st.sampled_from(LINE_ENDS),
    kind=st.sampled_from(["csv", "tsv"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig"]),
    ends=st.booleans(),
)
def test_a_table_that_is_written_well_is_read_as_it_was(
    folder: Path, rows: list[tuple[str, str]], line_end: str, kind: str, encoding: str, ends: bool
) -> None:
    buffer = io.StringIO()
    needs_quotes = any(re.search("[\r\n]", field) for row in rows for field in row)
    writer = csv.writer(
        buffer,
        delimiter=DELIMITERS[kind],
        lineterminator=line_end,
        quoting=csv.QUOTE_ALL if needs_quotes else csv.QUOTE_MINIMAL,
    )
    writer.writerow(["item_id", "one", "two"])
    writer.writerows((f"i{at}", *row) for at, row in enumerate(rows))
    text = buffer.getvalue()
    path = folder / f"table.{kind}"
    path.write_bytes((text if ends else text.removesuffix(line_end)).encode(encoding))
    con = connected()
    file = RawFile.of(path, quote='"')
    assert read_rows(con, file, {"item_id": "item_id"}, features=True) == 0
    read = con.execute("select one, two from raw order by source_row").fetchall()
    assert read == [(one or None, two or None) for one, two in rows]


@given(st.binary(max_size=40).map(lambda data: data.translate(bytes([10, 13, 97, 98] * 64))))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_lines_are_counted_in_blocks_as_python_splits_them(folder: Path, content: bytes) -> None:
    path = folder / "lines.csv"
    path.write_bytes(content)
    lines = content.splitlines()
    expected = len(lines) - lines.count(b"")
    with pytest.MonkeyPatch.context() as patch:
        for size in (1, 2, 3, 100):
            patch.setattr(rows_module, "BLOCK", size)
            assert count_lines(RawFile(path, delimiter=",")) == expected


def test_blank_lines_are_no_rows_of_a_file_of_one_column(folder: Path) -> None:
    path = folder / "u.csv"
    path.write_text('user_id\na\n\n"b"\n\n')
    con = connected()
    assert load_features(con, RawFile.of(path), "users", "user_id") == 0
    assert con.execute("from users").fetchall() == [("a",), ("b",)]
    path.write_text('user_id\na\n\n""\n')
    with pytest.raises(UserError, match=r"u.csv:4: user_id '' is empty .*1 malformed row"):
        load_features(connected(), RawFile.of(path), "users", "user_id")
