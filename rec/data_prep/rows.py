"""The rows of a raw file -> table `raw`: every line of the file is a row of it, or is counted as malformed.

- A malformed row (wrong number of columns, empty id, line break in an id, a time or rating that is no number) stops
  the command with file and line; --skip-bad-rows drops and counts it.
- The lines of a text file are counted apart from DuckDB's parser. If they are not as many as its rows, those that it
  could not read and the header, the file is refused: a quote that is never closed swallows the lines after it.
- In a file of interactions, no field goes on to another line. In files of users and items it may, if its quote is
  closed; the first such line is printed.
"""

import difflib
import functools
import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar

import duckdb
from duckdb import DuckDBPyConnection as Connection

from rec.data_prep.checks import time_hint
from rec.data_prep.raw_files import (
    DATA,
    SEPARATORS,
    RawFile,
    check_kind,
    count_lines,
    encoding_problem,
    line_at,
    literal,
    quoted,
    shown,
)
from rec.errors import UserError, note

ID_TYPES = r"U?(TINY|SMALL|BIG|HUGE)INT|U?INTEGER|VARCHAR|UUID|ENUM.*|DECIMAL\(\d+,0\)"
ID = "case when regexp_matches({0}, '\\S') and not regexp_matches({0}, '[\\r\\n]') then {0} end"  # a vocabulary's line
SECONDS = "coalesce(try_cast(timestamp as double), epoch(try_cast(timestamp as timestamptz)))"
TIME = f"case when {SECONDS} between -62135596800 and 253402300799 then {SECONDS} end"  # the years 1 to 9999
RATING = "case when isfinite(try_cast(rating as float)) then cast(rating as float) end"
VALUES = {  # column of `interactions` -> its value, null if the text is malformed, and what is wrong then
    "user_id": (ID.format("user_id"), "is empty or holds a line break"),
    "item_id": (ID.format("item_id"), "is empty or holds a line break"),
    "timestamp": (TIME, "is neither seconds since 1970 nor an ISO 8601 time"),
    "rating": (RATING, "is not a number"),
}
UNREADABLE = {  # DuckDB's type of error -> what is wrong with the line
    "MISSING COLUMNS": "has fewer fields than the file has columns",
    "TOO MANY COLUMNS": "has more fields than the file has columns",
    "UNQUOTED VALUE": "a quote opens a field, and does not close at its end",
    "LINE SIZE OVER MAXIMUM": "is longer than 2 MB",
}

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Load = Callable[Concatenate[Connection, RawFile, Arguments], Result]


class Check(NamedTuple):
    """A condition of SQL that makes a row malformed."""

    column: str
    condition: str
    problem: str


class Problem(NamedTuple):
    """What is wrong with some rows: the first of them by its line, and their number."""

    line: int
    reason: str
    rows: int


@contextmanager
def duckdb_in_a_sentence(file: RawFile) -> Iterator[None]:
    """Raises UserError for what DuckDB cannot do with a file. Full disks and memory pass: they are not the file's."""
    try:
        yield
    except (duckdb.IOException, duckdb.OutOfMemoryException):
        raise
    except duckdb.Error as error:
        raise UserError(f"{file} cannot be read: {str(error).splitlines()[0]}") from None


def in_a_sentence(load: Load[Arguments, Result]) -> Load[Arguments, Result]:
    """A function that loads a file, with every error of DuckDB's as a UserError that names the file."""

    @functools.wraps(load)
    def guarded(
        con: Connection, file: RawFile, *args: Arguments.args, **options: Arguments.kwargs
    ) -> Result:
        with duckdb_in_a_sentence(file):
            return load(con, file, *args, **options)

    return guarded


def read_rows(
    con: Connection,
    file: RawFile,
    columns: dict[str, str],
    skip: bool,
    features: bool = False,
    time_format: str | None = None,
) -> int:
    """Creates table `raw` of a file's well-formed rows, numbered; returns the number of malformed ones.

    `columns`: a name in `raw` -> what the file calls that column, which is read as text. With `features` the other
    columns are added as they are, no id may come twice, and a field may go on to another line. `time_format` is how
    times are written, for strptime. Raises UserError for a file that cannot be read as a whole, and for a malformed
    row unless `skip`.
    """
    check_kind(file)
    if file.is_text:
        file = file.separated(columns.values())
    try:
        checks = _create_raw(con, file, columns, features, _values(time_format))
    except duckdb.InvalidInputException as error:
        raise UserError(_why_refused(file, str(error).splitlines()[0])) from None
    problems = []
    if file.is_text:
        problems = _unreadable_rows(con, file)
        _check_lines(con, file, sum(problem.rows for problem in problems), features)
        con.execute("drop table reject_errors; drop table reject_scans")
    problems += _malformed_rows(con, file, columns, checks)
    if not problems and not len(con.table("raw")):
        raise UserError(f"{file} has no rows")
    con.execute("delete from raw where bad_row is not null")
    con.execute("alter table raw drop bad_row; alter table raw drop line_breaks")
    if skip and problems and not len(con.table("raw")):
        raise UserError(
            f"{file}:{min(problems).line}: {min(problems).reason}, and no row is well-formed"
        )
    return _report(file, problems, skip)


def _values(time_format: str | None) -> dict[str, tuple[str, str]]:
    """VALUES, with times that are written in a format of strptime if one is given."""
    if time_format is None:
        return VALUES
    seconds = f"epoch(try_strptime(timestamp, {literal(time_format)}))"
    return VALUES | {"timestamp": (seconds, f"is not a time written {time_format!r}")}


def _create_raw(
    con: Connection,
    file: RawFile,
    columns: dict[str, str],
    features: bool,
    meaning: dict[str, tuple[str, str]],
) -> list[Check]:
    """Creates `raw` of the rows that can be read: their number, values, and what makes them malformed if anything.

    `bad_row` is [position of the check that it fails, the text that is wrong]; `line_breaks` is the number of line
    ends in its fields. `meaning` is VALUES, or like it. Returns the checks.
    """
    source = file.relation(con)
    types = dict(zip(source.columns, map(str, source.types), strict=True))
    _check_columns(file, columns, types, features)
    checks = _checks(columns, features, meaning)
    others = [quoted(name) for name in types if features and name not in columns.values()]
    texts = [f"cast({quoted(column)} as varchar) as {name}" for name, column in columns.items()]
    cases = [
        f"when {check.condition} then ['{at}', {check.column}]" for at, check in enumerate(checks)
    ]
    fields = [*columns, *others]
    line_breaks = _count_line_breaks(file, fields) if features and file.quote else "0"
    numbered = source.project(", ".join(["row_number() over () as source_row", *texts, *others]))
    values = [f"{meaning[name][0]} as {name}" for name in columns]
    facts = [f"{line_breaks} as line_breaks", f"case {' '.join(cases)} end as bad_row"]
    numbered.project(", ".join(["source_row", *values, *others, *facts])).create("raw")
    return checks


def _checks(
    columns: dict[str, str], features: bool, meaning: dict[str, tuple[str, str]]
) -> list[Check]:
    """What makes a row malformed, in the order in which it is looked for."""
    checks = [Check(name, f"{meaning[name][0]} is null", meaning[name][1]) for name in columns]
    if features:
        (key,) = columns
        comes_again = f"row_number() over (partition by {key} order by source_row) > 1"
        checks.append(Check(key, comes_again, "came before"))
    return checks


def _count_line_breaks(file: RawFile, fields: list[str]) -> str:
    """The SQL for the number of lines that a row has beyond its first. Blank lines count if they are rows."""
    line_end = r"\r\n|[\r\n]" if file.has_one_column() else r"[\r\n]+"
    return f"len(regexp_extract_all(concat_ws(' ', {', '.join(fields)}), '{line_end}'))"


def _check_columns(
    file: RawFile, columns: dict[str, str], types: dict[str, str], features: bool
) -> None:
    """Raises UserError if a column is missing, an id has a type that ids cannot have, or a name is taken."""
    for name, column in columns.items():
        if column not in types:
            raise UserError(f"{file} has no column {column}: {_hint(file, column, [*types])}")
        if name.endswith("_id") and not re.fullmatch(ID_TYPES, types[column]):
            raise UserError(
                f"{file}: column {column} holds {types[column]}; ids are text or whole numbers"
            )
        if features and name != column and name in map(str.lower, types):
            raise UserError(
                f"{file} has a column {name} beside its id column {column}: rename one of them"
            )
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
                return f"{listed}, where fields seem to be separated by {shown(separator)}"
    if near := difflib.get_close_matches(column, names, 1):
        return f"did you mean {near[0]}?"
    if file.is_text and any(map(DATA.fullmatch, names)):
        return f"the first line seems to be data ({', '.join(names)}); put a line of names above it"
    return listed


def _malformed_rows(
    con: Connection, file: RawFile, columns: dict[str, str], checks: list[Check]
) -> list[Problem]:
    """The rows of `raw` with a value that cannot be, as one problem.

    Its line is right if all rows before it were read. If not, it is beyond that of an unreadable row.
    """
    row, bad, count = con.execute(
        "select min(source_row), arg_min(bad_row, source_row), count(*) from raw"
        " where bad_row is not null"
    ).fetchall()[0]
    if not count:
        return []
    check = checks[int(bad[0])]
    text = (bad[1] or "")[:60]
    reason = f"{columns[check.column]} {text!r} {check.problem}"
    if check.problem == VALUES["timestamp"][1] and file.has_options:
        reason += time_hint(text)
    return [Problem(file.line_of(row), reason, count)]


def _unreadable_rows(con: Connection, file: RawFile) -> list[Problem]:
    """The rows that DuckDB could not read and did not number, as one problem."""
    (count,) = con.execute(
        "select count(distinct line_byte_position) from reject_errors"
    ).fetchall()[0]
    if not count:
        return []
    byte, kind = con.execute(
        "select line_byte_position, error_type from reject_errors order by all limit 1"
    ).fetchall()[0]
    line, content = line_at(file.path, byte - 1)
    reason = UNREADABLE.get(kind, str(kind).lower())
    if kind == "INVALID ENCODING":
        reason = encoding_problem(content)
    return [Problem(line, reason, count)]


def _check_lines(con: Connection, file: RawFile, unreadable: int, features: bool) -> None:
    """Raises UserError unless each line of a text file is in `raw`, unreadable, blank or the header."""
    lines = count_lines(file)
    expected = lines.total if file.has_one_column() else lines.total - lines.blank
    rows, line_breaks = con.execute("select count(*), sum(line_breaks) from raw").fetchall()[0]
    read = rows + int(line_breaks or 0) + unreadable + (not file.header)
    if read != expected:
        raise UserError(_why_lines_are_lost(con, file, features, expected - read))
    if line_breaks:
        where = ":".join(map(str, [file, *_long_records(file)]))
        note(f"{where}: a field goes on to another line; {line_breaks:,} such line(s) in all")


def _why_lines_are_lost(con: Connection, file: RawFile, features: bool, lost: int) -> str:
    """The sentence for a file with other lines than rows: the quote that swallows them, or an odd line end."""
    line = _line_of_swallowing_quote(con, file, features)
    if line is None:
        return _odd_line_end(file) or (
            f"{file} cannot be read: {abs(lost):,} of its lines are no rows of their own"
        )
    rule = "and is not closed at the end of it" if features else "which no interaction may have"
    hint = "close the quote on its line, or remove it"
    if file.has_options:
        hint += "; --quote none takes quotes as plain characters"
    return f"{file}:{line}: a quote opens a field that goes on to another line, {rule}: {hint}"


def _line_of_swallowing_quote(con: Connection, file: RawFile, features: bool) -> int | None:
    """The first row that is longer than a line. With `features`, the first of those that DuckDB could not read."""
    (byte,) = con.execute(
        "select min(line_byte_position) from reject_errors"
        " where regexp_matches(csv_line, '[\\r\\n]')"
    ).fetchall()[0]
    lines = [] if byte is None else [line_at(file.path, byte - 1)[0]]
    if not features:
        lines += _long_records(file)
    return min(lines, default=None)


def _long_records(file: RawFile) -> list[int]:
    """The line of the first row that goes on to another line, if any."""
    lines = (record.line for record in file.records() if record.last_line > record.line)
    return list(itertools.islice(lines, 1))


def _why_refused(file: RawFile, error: str) -> str:
    """The sentence for a file that DuckDB refuses as a whole."""
    if file.is_text and (sentence := _odd_line_end(file)):
        return sentence
    return f"{file} cannot be read: {error}"


def _odd_line_end(file: RawFile) -> str:
    """The sentence for the first row that ends otherwise than the rows before it; "" if all end alike."""
    usual = ""
    with open(file.path, encoding="utf-8", errors="replace", newline="") as text:
        lines = enumerate(text, 1)
        for record in file.records():
            line = next(line for number, line in lines if number == record.last_line)
            end = line[len(line.rstrip("\r\n")) :]
            usual = usual or end
            if end not in ("", usual):
                return (
                    f"{file}:{record.last_line}: the line ends in {end!r} and those before"
                    f" it in {usual!r}: let all of them end alike"
                )
    return ""


def _report(file: RawFile, problems: list[Problem], skip: bool) -> int:
    """Prints the first of the malformed rows if they may be skipped; returns their number. Raises UserError if not."""
    if not problems:
        return 0
    first = min(problems)
    total = sum(problem.rows for problem in problems)
    where = f"{file}:{first.line}: {first.reason}"
    if skip:
        note(f"{where}; {total:,} malformed row(s) dropped")
        return total
    hint = "fix the file, or drop them with --skip-bad-rows" if file.has_options else "fix the file"
    raise UserError(f"{where} ({total:,} malformed row(s) in all; {hint})")
