"""Your own CSV, TSV or Parquet files -> a dataset directory.

    python -m rec.data_prep.tabular --interactions clicks.csv --user-col user --item-col product \\
        --timestamp-col time --items products.csv --list-col tags --output-dir data/mine

- Ids are strings exactly as written: leading zeros, commas, quotes and any alphabet are kept.
- Times are seconds since 1970 or ISO 8601, in UTC unless they name a zone; nothing is guessed.
- A malformed row (wrong number of columns, empty id, line break in an id, time or rating that is no number) stops
  the command with file and line; --skip-bad-rows drops and counts it.
- A feature column of a CSV is int64 or double if all its values are written as such (02139 is not: it is a zip
  code), a list if --list-col names it, otherwise a string. An empty field is null.

Not covered: compressed CSV, quotes escaped otherwise than by doubling them.
"""

import csv
import difflib
import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
from duckdb import DuckDBPyConnection as Connection

from rec.data_prep.split import SPLITS, STRATEGIES
from rec.data_prep.write import note, output_parser, prepare
from rec.errors import UserError, run_command

DELIMITERS = {".csv": ",", ".tsv": "\t", ".parquet": ""}
WHOLE, NUMBER = "-?(0|[1-9][0-9]{0,17})", "-?(0|[1-9][0-9]*)([.][0-9]+)?([eE][+-]?[0-9]{1,2})?"
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


def load_interactions(
    con: Connection,
    file: RawFile,
    columns: Sequence[str | None],
    split: str | None = None,
    skip: bool = False,
) -> int:
    """Adds a file's rows to table `interactions`, under `split` if given; returns how many malformed ones it skipped.

    `columns` is what the file calls the user id, item id, time and rating; None for what it does not have. Raises
    UserError for a missing column, or a malformed row unless `skip`.
    """
    skipped = _read(
        con,
        file,
        {name: column for name, column in zip(VALUES, columns, strict=True) if column},
        skip,
    )
    rows = f"select *, '{split}' as split from raw" if split else "from raw"
    con.execute(
        f"create table if not exists interactions as {rows} limit 0; insert into interactions {rows}"
    )
    con.execute("drop table raw")
    return skipped


def load_features(
    con: Connection,
    file: RawFile,
    table: str,
    column: str,
    lists: Sequence[str] = (),
    skip: bool = False,
) -> int:
    """Creates table `users` or `items` from a file; returns how many malformed rows it skipped.

    `column` is what the file calls the id; `lists` are columns of text that hold several values, separated by "|".
    Raises UserError for no column of ids, or a malformed row (an id that comes again is one) unless `skip`.
    """
    key = {"users": "user_id", "items": "item_id"}[table]
    skipped = _read(con, file, {key: column}, skip, features=True)
    values, raw = [key], con.table("raw")
    for name, kind in zip(
        raw.columns[2:], map(str, raw.types[2:]), strict=True
    ):  # after source_row and the key
        text = _quoted(name)
        if file.delimiter:
            fits = ", ".join(
                f"bool_and(regexp_full_match({text}, '{pattern}'))" for pattern in (WHOLE, NUMBER)
            )
            whole, number = raw.aggregate(fits).fetchall()[0]
            kind = "BIGINT" if whole else "DOUBLE" if number else "VARCHAR"
        if kind.endswith("[]"):
            value = f"cast({text} as varchar[])"
        elif name in lists:
            parts = f"string_split_regex(trim(cast({text} as varchar)), ' *[|] *')"
            value = f"list_filter(coalesce({parts}, []), lambda part: part <> '')"
        elif kind.startswith(("DATE", "TIMESTAMP")):
            value = f"cast(floor(epoch(cast({text} as timestamptz))) as bigint)"
        else:
            whole, number = kind.endswith(("INT", "INTEGER")), kind.startswith(FRACTIONS)
            value = f"cast({text} as {'bigint' if whole else 'double' if number else 'varchar'})"
        values.append(f"{value} as {text}")
    con.execute(f"create table {table} as select {', '.join(values)} from raw; drop table raw")
    return skipped


def _read(
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
        others = [_quoted(name) for name in kinds if features and name not in columns.values()]
        texts = [
            f"cast({_quoted(column)} as varchar) as {name}" for name, column in columns.items()
        ]
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


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def main() -> None:
    """The command."""
    parser = output_parser("rec.data_prep.tabular", __doc__)
    add = parser.add_argument
    add("--interactions", type=Path, help="all interactions, to be split")
    add("--train", type=Path, help="interactions that are split already; needs --test")
    add(
        "--val",
        type=Path,
        help="default: a tenth of --train, the latest if --test is later, else drawn",
    )
    add("--test", type=Path)
    add("--user-col", default="user_id", help="its name in every file that has it")
    add("--item-col", default="item_id", help="its name in every file that has it")
    add(
        "--timestamp-col", help="seconds since 1970, or ISO 8601; without it the data are unordered"
    )
    add("--rating-col", help="a number")
    add("--min-rating", type=float, help="drop interactions rated lower")
    add("--min-interactions", type=int, default=1, help="drop users with fewer, before the split")
    add("--users", type=Path, help="features of users; users without interactions are left out")
    add("--items", type=Path, help="features of items; all of them make up the catalogue")
    add(
        "--list-col",
        action="append",
        default=[],
        help='a text feature with several values, "a|b|c"; repeatable',
    )
    add(
        "--split",
        choices=list(STRATEGIES),
        help="default: temporal, or given where there is --train",
    )
    add("--seed", type=int, default=42, help="of what is drawn where data without times are split")
    add("--skip-bad-rows", dest="skip", action="store_true", help="drop and count malformed rows")
    args = parser.parse_args()

    strategy, given = (
        args.split or ("temporal" if args.interactions else "given"),
        args.train or args.val or args.test,
    )
    if bool(given) == bool(args.interactions) or bool(given) != (strategy == "given"):
        raise UserError("name --interactions, or --train and --test where the split is `given`")
    if given and not (args.train and args.test):
        raise UserError(
            f"--{'test' if args.train else 'train'} is missing: a given split needs --train and --test"
        )
    if args.min_rating is not None and not args.rating_col:
        raise UserError("--min-rating needs --rating-col")
    files = {
        part: RawFile.of(path)
        for part in ("interactions", *SPLITS)
        if (path := getattr(args, part))
    }
    features = {
        table: RawFile.of(path) for table in ("users", "items") if (path := getattr(args, table))
    }

    def load(con: Connection, scratch: Path) -> dict[str, int]:
        bad_rows, known = 0, []
        columns = (args.user_col, args.item_col, args.timestamp_col, args.rating_col)
        for part, file in files.items():
            note(f"reading {file.path}")
            bad_rows += load_interactions(con, file, columns, part if given else None, args.skip)
        for table, file in features.items():
            key = args.user_col if table == "users" else args.item_col
            bad_rows += load_features(con, file, table, key, args.list_col, args.skip)
            known += con.table(table).columns
        for name in set(args.list_col) - set(known):
            near = "".join(
                f": did you mean {near}?" for near in difflib.get_close_matches(name, known, 1)
            )
            raise UserError(
                f"--list-col {name}: neither --users nor --items has such a column{near}"
            )
        return {"bad_rows": bad_rows}

    every = [file.path for file in (*files.values(), *features.values())]
    source, filters = (
        ", ".join(path.name for path in every),
        (args.min_rating, args.min_interactions),
    )
    prepare(args.output_dir, load, every[0].stem, source, strategy, args.seed, filters, args.engine)


if __name__ == "__main__":
    run_command(main)
