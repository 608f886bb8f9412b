"""The rows of a raw file -> table `raw`: every line of the file is a row of it, or is counted as malformed.

- A malformed row (wrong number of columns, empty id, line break in an id, a time or rating that is no number) stops
  the command with file and line; --skip-bad-rows drops and counts it.
- The lines of a text file are counted a second time, without quotes and separators. If they are not as many as its
  rows, those that could not be read and the header, the file is refused: a quote that is never closed swallows lines.
- In a file of interactions, no field goes on to another line. In files of users and items it may, if its quote is
  closed; the first such line is printed.
"""

import difflib
import itertools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import duckdb
from duckdb import DuckDBPyConnection as Connection

from rec.data_prep.checks import time_hint
from rec.data_prep.engine import only_row
from rec.data_prep.raw_files import (
    SEPARATORS,
    RawFile,
    Record,
    check_kind,
    encoding_problem,
    literal,
    quoted,
)
from rec.errors import UserError, note

DATA = re.compile(r"[+-]?\d+([.,]\d+)?([eE][+-]?\d+)?|\d{4}-\d\d-\d\d([ T].*)?")  # numbers, times
BLOCK = 2**20  # characters that are read at once
ID_TYPES = r"U?(TINY|SMALL|BIG|HUGE)INT|U?INTEGER|VARCHAR|UUID|ENUM.*|DECIMAL\(\d+,0\)"
ID = "case when regexp_matches({0}, '\\S') and not regexp_matches({0}, '[\\r\\n]') then {0} end"  # a vocabulary's line
SECONDS = "coalesce(try_cast(timestamp as double), epoch(try_cast(timestamp as timestamptz)))"
IN_RANGE = "case when {0} between -62135596800 and 253402300799 then {0} end"  # the years 1 to 9999
NUMBER = "case when isfinite(try_cast({0} as float)) then cast({0} as float) end"
WEIGHT = f"case when try_cast(weight as float) >= 0 then {NUMBER.format('weight')} end"
VALUES = {  # column of `interactions` -> its value, null if the text is malformed, and what is wrong then
    "user_id": (ID.format("user_id"), "is empty or holds a line break"),
    "item_id": (ID.format("item_id"), "is empty or holds a line break"),
    "timestamp": (IN_RANGE.format(SECONDS), "is neither seconds since 1970 nor an ISO 8601 time"),
    "rating": (NUMBER.format("rating"), "is not a number"),
    "event": (ID.format("event"), "is empty or holds a line break"),
    "weight": (WEIGHT, "is not a number of at least 0"),
}
NUMBERS = ("timestamp", "rating", "weight")
SCALES = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}  # --timestamp-unit -> of them in a second
UNREADABLE = {  # DuckDB's type of error -> what is wrong with the line
    "MISSING COLUMNS": "has fewer fields than the file has columns",
    "TOO MANY COLUMNS": "has more fields than the file has columns",
    "UNQUOTED VALUE": "a quote opens a field, and does not close at its end",
    "LINE SIZE OVER MAXIMUM": "is longer than 2 MB",
}


class Problem(NamedTuple):
    """What is wrong with some rows: the first of them by its line, and their number."""

    line: int
    reason: str
    rows: int


@contextmanager
def in_a_sentence(file: RawFile) -> Iterator[None]:
    """Raises UserError for what DuckDB cannot do with a file. Full disks and memory pass: they are not the file's."""
    try:
        yield
    except (duckdb.IOException, duckdb.OutOfMemoryException):
        raise
    except duckdb.Error as error:
        raise UserError(f"{file} cannot be read: {str(error).splitlines()[0]}") from None


def read_rows(
    con: Connection, file: RawFile, columns: dict[str, str], features: bool = False
) -> int:
    """Creates table `raw` of a file's well-formed rows, numbered; returns the number of malformed ones.

    `columns`: a name in `raw` -> what the file calls that column, which is read as text. With `features` the other
    columns are added as they are, no id may come twice, and a field may go on to another line. Raises UserError for a
    file that cannot be read as a whole, and for a malformed row unless the file's are skipped.
    """
    check_kind(file)
    if file.is_text:
        file = file.separated(columns.values())
    try:
        _create_raw(con, file, columns, features)
    except duckdb.InvalidInputException as error:
        reason = f"{file} cannot be read: {str(error).splitlines()[0]}"
        raise UserError(_odd_line_end(file) or reason) from None
    problems = []
    if file.is_text:
        problems = _unreadable_rows(con, file)
        _check_lines(con, file, sum(problem.rows for problem in problems), features)
        con.execute("drop table reject_errors; drop table reject_scans")
    problems += _malformed_rows(con, file)
    con.execute("delete from raw where bad_row is not null")
    con.execute("alter table raw drop bad_row; alter table raw drop line_breaks")
    if not problems and not len(con.table("raw")):
        raise UserError(f"{file} has no rows")
    if not problems:
        return 0
    first = min(problems)
    total = sum(problem.rows for problem in problems)
    where = f"{file}:{first.line}: {first.reason}"
    if not file.skip_bad_rows:
        hint = "fix the file"
        if file.has_options:
            hint += ", or drop them with --skip-bad-rows"
        raise UserError(f"{where} ({total:,} malformed row(s) in all; {hint})")
    if not len(con.table("raw")):
        raise UserError(f"{where}, and no row is well-formed")
    note(f"{where}; {total:,} malformed row(s) dropped")
    return total


# ------------------------------------------------------------------------------------------------------------
# Columns and values


def _create_raw(con: Connection, file: RawFile, columns: dict[str, str], features: bool) -> None:
    """Creates `raw` of the rows that can be read: their number, values, and what makes them malformed if anything.

    `bad_row` is [the file's name of the column, the text that is wrong, what is wrong]; `line_breaks` is the number
    of line ends in its fields.
    """
    source = file.relation(con, columns.values(), features)
    types = dict(zip(source.columns, map(str, source.types), strict=True))
    _check_columns(file, columns, types, features)
    meaning = VALUES | {"timestamp": _meaning_of_times(file.times)}
    texts = []
    values = []
    cases = []
    if file.is_json:
        cases.append("when bad_json is not null then ['line', bad_json, 'is no JSON object']")
        texts.append("bad_json")
    for name, column in columns.items():
        text = f"cast({quoted(column)} as varchar)"
        if name in NUMBERS and file.decimal != ".":
            text = f"replace({text}, '{file.decimal}', '.')"
        texts.append(f"{text} as {name}")
        value, problem = meaning[name]
        values.append(f"{value} as {name}")
        bad_row = f"[{literal(column)}, {name}, {literal(problem)}]"
        cases.append(f"when {value} is null then {bad_row}")
    others = []
    line_breaks = "0"
    if features:
        used = (*columns.values(), "bad_json")
        others = [quoted(name) for name in types if name not in used]
        ((key, column),) = columns.items()
        nth = f"row_number() over (partition by {key} order by source_row)"
        cases.append(f"when {nth} > 1 then [{literal(column)}, {key}, 'came before']")
        if file.quote:
            fields = f"concat_ws(' ', {', '.join([*columns, *others])})"
            line_breaks = f"len(regexp_extract_all({fields}, '[\\r\\n]+'))"  # blank lines apart
    numbered = source.project(", ".join(["row_number() over () as source_row", *texts, *others]))
    facts = [f"{line_breaks} as line_breaks", f"case {' '.join(cases)} end as bad_row"]
    numbered.project(", ".join(["source_row", *values, *others, *facts])).create("raw")


def _meaning_of_times(form: str) -> tuple[str, str]:
    """What VALUES says of times, if they are written in this form or unit; "" for the usual one."""
    if form in SCALES:
        seconds = f"try_cast(timestamp as double) / {SCALES[form]}"
        return IN_RANGE.format(seconds), f"is not a number of {form} since 1970"
    if form:
        seconds = f"epoch(try_strptime(timestamp, {literal(form)}))"
        return seconds, f"is not a time written {form!r}"
    return VALUES["timestamp"]


def _check_columns(
    file: RawFile, columns: dict[str, str], types: dict[str, str], features: bool
) -> None:
    """Raises UserError if a column is missing, an id has a type that ids cannot have, or a name is taken."""
    for name, column in columns.items():
        if column not in types:
            raise UserError(f"{file} has no column {column}: {_hint(file, column, [*types])}")
        if name.endswith("_id") and not re.fullmatch(ID_TYPES, types[column]):
            problem = f"column {column} holds {types[column]}; ids are text or whole numbers"
            raise UserError(f"{file}: {problem}")
        if features and name != column and name in map(str.lower, types):
            problem = f"has a column {name} beside its id column {column}: rename one of them"
            raise UserError(f"{file} {problem}")
    if file.is_text and not file.header and any(map(DATA.fullmatch, columns.values())):
        taken = ", ".join(columns.values())
        note(
            f"{file}: the first line is taken as names of columns ({taken}); if it is data,"
            " this row is lost: put a line of names above it"
        )


def _hint(file: RawFile, column: str, names: list[str]) -> str:
    """Why a file seems to lack a column."""
    listed = f"it has {', '.join(names)}"
    if file.has_options and f'"{column}"' in names:
        return "its names are in quotes: use --quote '\"'"
    if file.is_text and len(names) == 1:
        for separator in SEPARATORS:
            if separator in names[0]:
                return f"{listed}, where fields seem to be separated by {separator!r}"
    if near := difflib.get_close_matches(column, names, 1):
        return f"did you mean {near[0]}?"
    if file.is_text and any(map(DATA.fullmatch, names)):
        return f"the first line seems to be data ({', '.join(names)}); put a line of names above it"
    return listed


# ------------------------------------------------------------------------------------------------------------
# Malformed rows, and lines that are no rows


def _malformed_rows(con: Connection, file: RawFile) -> list[Problem]:
    """The rows of `raw` with a value that cannot be, as one problem.

    Its line is right if all rows before it were read. If not, it is beyond that of an unreadable row.
    """
    first = "min(source_row), arg_min(bad_row, source_row), count(bad_row)"
    row, bad_row, count = only_row(con, f"select {first} from raw where bad_row is not null")
    if not count:
        return []
    column, text, problem = bad_row
    text = (text or "")[:60]
    reason = f"{column} {text!r} {problem}"
    if problem == VALUES["timestamp"][1] and file.has_options:
        reason += time_hint(text)
    return [Problem(file.line_of(row), reason, count)]


def _unreadable_rows(con: Connection, file: RawFile) -> list[Problem]:
    """The rows that DuckDB could not read and did not number, as one problem."""
    rejects = con.execute(
        "select line, error_type, count(*) over () from (select distinct on (line) * from"
        " reject_errors order by line, byte_position) order by line limit 1"
    ).fetchall()
    if not rejects:
        return []
    nth, kind, count = rejects[0]
    record = _nth_record(file, nth)
    reason = UNREADABLE.get(kind, str(kind).lower())
    if kind == "INVALID ENCODING":
        reason = encoding_problem(file, record)
    return [Problem(record.line, reason, count)]


def count_lines(file: RawFile) -> int:
    """The lines of a text file that are not blank, whatever its quotes are. Raises UserError for a NUL byte."""
    total = blank = 0
    last = "\n"
    with open(file.path, encoding="latin-1") as text:  # any bytes; every line end becomes \n
        while block := text.read(BLOCK):
            if "\0" in block:
                line = total + 1 + block[: block.index("\0")].count("\n")
                hint = "which no text has: export the file again"
                raise UserError(f"{file}:{line}: holds a NUL byte, {hint}")
            total += block.count("\n")
            if "\n\n" in last + block:
                blank += (last + block).split("\n")[1:-1].count("")
            last = block[-1]
    return total + (last != "\n") - blank


def _check_lines(con: Connection, file: RawFile, unreadable: int, features: bool) -> None:
    """Raises UserError unless each line of a text file is in `raw`, unreadable, blank or the header."""
    expected = count_lines(file)
    rows, line_breaks = only_row(con, "select count(*), sum(line_breaks) from raw")
    read = rows + int(line_breaks or 0) + unreadable + (not file.header)
    if read != expected:
        raise UserError(_why_lines_are_lost(con, file, features, expected - read))
    if line_breaks:
        first = next(each.line for each in file.records() if each.last_line > each.line)
        note(
            f"{file}:{first}: a field goes on to another line; {line_breaks:,} such line(s) in all"
        )


def _why_lines_are_lost(con: Connection, file: RawFile, features: bool, lost: int) -> str:
    """The sentence for a file with other lines than rows: the quote that swallows them, or an odd line end."""
    long_records = (each for each in file.records() if each.last_line > each.line)
    if features:  # those that DuckDB could not read
        swallows = "regexp_matches(csv_line, '[^\\r\\n][\\r\\n]')"
        rejects = con.execute(f"select line from reject_errors where {swallows} order by line")
        long_records = (_nth_record(file, nth) for (nth,) in rejects.fetchall())
    first = next(long_records, None)
    if not first:
        reason = f"{file} cannot be read: {abs(lost):,} of its lines are no rows of their own"
        return _odd_line_end(file) or reason
    rule = "and is not closed at the end of it" if features else "which no interaction may have"
    hint = "close the quote on its line, or remove it"
    if file.has_options:
        hint += "; --quote none takes quotes as plain characters"
    where = f"{file}:{first.line}"
    return f"{where}: a quote opens a field that goes on to another line, {rule}: {hint}"


def _nth_record(file: RawFile, nth: int) -> Record:
    """A row by its number, which counts the header and blank lines."""
    return next(itertools.islice(file.records(), nth - 1, None))


def _odd_line_end(file: RawFile) -> str:
    """The sentence for the first line that ends otherwise than the lines before it; "" if all end alike."""
    if not file.is_text:
        return ""
    usual = ""
    with open(file.path, encoding="latin-1", newline="") as text:
        for number, line in enumerate(text, 1):
            end = line[len(line.rstrip("\r\n")) :]
            usual = usual or end
            if end not in ("", usual):
                alike = f"those before it in {usual!r}: let all of them end alike"
                return f"{file}:{number}: the line ends in {end!r} and {alike}"
    return ""
