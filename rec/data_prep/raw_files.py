"""A file of rows as it was received, and the table `raw` of its well-formed rows: what every source begins with."""

import csv
import difflib
import glob
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
from duckdb import DuckDBPyConnection as Connection

from rec.data_prep.write import note
from rec.errors import UserError

DELIMITERS = {".csv": ",", ".tsv": "\t", ".parquet": ""}
FRACTIONS = ("FLOAT", "DOUBLE", "DECIMAL")
ID = "case when regexp_matches({0}, '\\S') and not regexp_matches({0}, '[\\r\\n]') then {0} end"  # a vocabulary's line
SECONDS = "coalesce(try_cast(timestamp as double), epoch(try_cast(timestamp as timestamptz)))"
TIME = f"case when {SECONDS} between -62135596800 and 253402300799 then {SECONDS} end"  # the years 1 to 9999
RATING = "case when isfinite(try_cast(rating as float)) then cast(rating as float) end"
VALUES = {  # column of `interactions` -> its value, null if the text is malformed, and what is wrong then
    "user_id": (ID.format("user_id"), "is empty or holds a line break"),
    "item_id": (ID.format("item_id"), "is empty or holds a line break"),
    "timestamp": (
        TIME,
        "is neither seconds since 1970 (milliseconds are not taken) nor an ISO 8601 time",
    ),
    "rating": (RATING, "is not a number"),
}


@dataclass(frozen=True)
class RawFile:
    """A file as it was received, and how it is written."""

    path: Path
    delimiter: str  # "" for Parquet
    header: tuple[
        str, ...
    ] = ()  # column names of a file without quotes; none: the first line holds them

    @classmethod
    def of(cls, path: Path) -> "RawFile":
        """A user's file. Raises UserError if its extension does not tell the format, or it is empty or none."""
        if path.suffix.lower() not in DELIMITERS:
            raise UserError(
                f"{path}: the name must end in .csv, .tsv or .parquet, so that the format is known"
            )
        if not path.is_file() or not path.stat().st_size:
            raise UserError(f"{path} {'is empty' if path.is_file() else 'is not a file'}")
        return cls(path, DELIMITERS[path.suffix.lower()])

    def record(self, number: int, blank_too: bool = False) -> tuple[int, list[str]]:
        """The line on which a record begins, and its fields. The first is number 1, a CSV's header number 0."""
        if not self.delimiter or self.header:  # rows of Parquet, and files where a record is a line
            return number, []
        csv.field_size_limit(2**31 - 1)
        with open(self.path, encoding="utf-8-sig", errors="replace", newline="") as text:
            reader, line = csv.reader(text, delimiter=self.delimiter), 1
            for fields in reader:
                number -= bool(fields) or blank_too
                if number < 0:
                    return line, fields
                line = reader.line_num + 1
        return line, []

    def relation(self, con: Connection) -> duckdb.DuckDBPyRelation:
        """The rows, all columns of text files as text; those that cannot be read go to table `reject_errors`."""
        path = glob.escape(str(self.path))
        if not self.delimiter:
            return con.read_parquet(path)
        names = self.header or self.record(0)[1]
        if len({name.lower() for name in names}) < len(names):
            raise UserError(f"{self.path} cannot be read: two of its columns have the same name")
        quote, columns = "" if self.header else '"', dict.fromkeys(names, "VARCHAR")
        form: dict[str, Any] = {
            "sep": self.delimiter,
            "quotechar": quote,
            "escapechar": quote,
            "columns": columns,
        }
        return con.read_csv(
            path, header=not self.header, auto_detect=False, store_rejects=True, **form
        )


def read_rows(
    con: Connection, file: RawFile, columns: dict[str, str], skip: bool, features: bool = False
) -> int:
    """Creates table `raw` of a file's well-formed rows, numbered; returns how many are malformed.

    `columns`: a name in `raw` -> what the file calls that column, which is read as text. With `features` the other
    columns are added as they are, and no id may come twice.
    """
    try:
        source = file.relation(con)
        kinds = dict(zip(source.columns, map(str, source.types), strict=True))
        for name, column in columns.items():
            if column not in kinds:
                near = difflib.get_close_matches(column, kinds, 1)
                hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(kinds)}"
                raise UserError(f"{file.path} has no column {column}: {hint}")
            if name.endswith("_id") and (kind := kinds[column]).startswith(FRACTIONS):
                raise UserError(
                    f"{file.path}: column {column} holds fractions ({kind}); ids are text or whole numbers"
                )
            if features and name != column and name in map(str.lower, kinds):
                raise UserError(
                    f"{file.path} has a column {name} beside its id column {column}: rename one of them"
                )
        checks = [(name, f"{VALUES[name][0]} is null", VALUES[name][1]) for name in columns]
        if features:
            (key,) = columns
            checks.append(
                (
                    key,
                    f"row_number() over (partition by {key} order by source_row) > 1",
                    "came before",
                )
            )
        others = [quoted(name) for name in kinds if features and name not in columns.values()]
        texts = [f"cast({quoted(column)} as varchar) as {name}" for name, column in columns.items()]
        values = [f"{VALUES[name][0]} as {name}" for name in columns]
        bad = " ".join(
            f"when {wrong} then ['{at}', {name}]" for at, (name, wrong, _) in enumerate(checks)
        )
        numbered = source.project(
            ", ".join(["row_number() over () as source_row", *texts, *others])
        )
        numbered.project(
            ", ".join(["source_row", *values, *others, f"case {bad} end as bad_row"])
        ).create("raw")
    except duckdb.Error as error:
        hint = (
            "; all its lines must end alike, and quotes inside fields be doubled"
            if file.delimiter
            else ""
        )
        raise UserError(f"{file.path} cannot be read: {str(error).splitlines()[0]}{hint}") from None
    found = []  # of each kind of malformed rows: the line of the first, what is wrong with it, how many there are
    if file.delimiter:  # the rows that DuckDB could not read, and did not number
        first = "min(line), arg_min(lower(error_type), [line, column_idx])"
        row, reason, count = con.execute(
            f"select {first}, count(distinct line) from reject_errors"
        ).fetchall()[0]
        con.execute("drop table reject_errors; drop table reject_scans")
        if count:  # this row counts blank lines, and the header
            found.append((file.record(row - (not file.header), blank_too=True)[0], reason, count))
    first = "min(source_row), arg_min(bad_row, source_row)"
    row, bad, count = con.execute(
        f"select {first}, count(*) from raw where bad_row is not null"
    ).fetchall()[0]
    if count:  # its line is right if all rows before it were read; if not, it is beyond the line found above
        name, _, wrong = checks[int(bad[0])]
        found.append(
            (file.record(row)[0], f"{columns[name]} {(bad[1] or '')[:60]!r} {wrong}", count)
        )
    if not found and not len(con.table("raw")):
        raise UserError(f"{file.path} has no rows")
    con.execute("delete from raw where bad_row is not null; alter table raw drop bad_row")
    total = sum(count for *_, count in found)
    if found:
        line, reason, _ = min(found)
        if not skip:
            hint = f"{total:,} malformed row(s) in all; mend the file or drop them with --skip-bad-rows"
            raise UserError(f"{file.path}:{line}: {reason} ({hint})")
        note(f"{file.path}:{line}: {reason}; {total:,} malformed row(s) dropped")
    return total


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
