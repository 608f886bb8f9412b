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

import argparse
import csv
import difflib
import glob
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb

from rec.data_prep.split import SPLITS, STRATEGIES, columns_of, count_rows, quoted
from rec.data_prep.write import note, prepare
from rec.errors import UserError, run_command

DELIMITERS = {".csv": ",", ".tsv": "\t", ".parquet": ""}
TIMES = "between -62135596800 and 253402300799"  # the years 1 to 9999: beyond them, these are not seconds
FRACTIONS = ("FLOAT", "DOUBLE")
WRITTEN = {"bigint": "-?(0|[1-9][0-9]{0,17})", "double": "-?(0|[1-9][0-9]*)([.][0-9]+)?([eE][+-]?[0-9]{1,2})?"}


@dataclass(frozen=True)
class RawFile:
    """A file as it was received, and how it is written."""

    path: Path
    delimiter: str  # "" for Parquet
    header: tuple[str, ...] = ()  # column names; none: the first line holds them
    quote: str = '"'
    encoding: str = "utf-8"

    @classmethod
    def of(cls, path: Path) -> "RawFile":
        """A user's file, whose extension tells the format. Raises UserError if it tells none, or the file is empty."""
        if path.suffix.lower() not in DELIMITERS:
            raise UserError(f"{path}: the name must end in .csv, .tsv or .parquet, so that the format is known")
        if not path.is_file() or not path.stat().st_size:
            raise UserError(f"{path} {'is empty' if path.is_file() else 'is not a file'}")
        return cls(path, DELIMITERS[path.suffix.lower()])

    def records(self) -> Iterator[tuple[int, list[str]]]:
        """The records of a text file, its header included, and the line on which each begins."""
        encoding = "utf-8-sig" if self.encoding == "utf-8" else self.encoding
        with open(self.path, encoding=encoding, errors="replace", newline="") as text:
            if not self.quote:
                yield from ((line, row.rstrip("\r\n").split(self.delimiter)) for line, row in enumerate(text, 1))
                return
            csv.field_size_limit(2**31 - 1)
            reader, line = csv.reader(text, delimiter=self.delimiter, quotechar=self.quote), 1
            for record in reader:
                if record:
                    yield line, record
                line = reader.line_num + 1


@dataclass(frozen=True)
class Check:
    """What makes a row of a table bad: an SQL condition, the column it is about, and what is wrong with the value."""

    condition: str
    column: str
    reason: str


def load_interactions(
    con: duckdb.DuckDBPyConnection,
    file: RawFile,
    columns: tuple[str, str, str | None, str | None],
    split: str | None = None,
    skip_bad_rows: bool = False,
) -> int:
    """Adds a file's rows to table `interactions`, under `split` if given; returns how many malformed ones it dropped.

    Args:
        columns: what the file calls the user id, item id, time and rating; None for what it does not have.

    Raises:
        UserError: a missing column, or a malformed row unless `skip_bad_rows`.
    """
    user, item, time, rating = columns
    unread = _read(con, file, [name for name in columns if name], features=False)
    checks = [_id_check(con, file, user), _id_check(con, file, item)]
    selected = [f"{_text(user)} as user_id", f"{_text(item)} as item_id", "source_row"]
    if time:
        seconds = f"coalesce(try_cast({_text(time)} as double), epoch(try_cast({_text(time)} as timestamptz)))"
        selected.append(f"{seconds} as timestamp")
        reason = "is neither seconds since 1970 (milliseconds are not taken) nor an ISO 8601 time"
        checks.append(Check(f"not coalesce({seconds} {TIMES}, false)", time, reason))
    if rating:
        number = f"try_cast({_text(rating)} as float)"
        selected.append(f"{number} as rating")
        checks.append(Check(f"not coalesce(isfinite({number}), false)", rating, "is not a number"))
    if split:
        selected.append(f"'{split}' as split")
    dropped = _drop_bad_rows(con, file, checks, unread, skip_bad_rows)
    target = "insert into interactions" if columns_of(con, "interactions") else "create table interactions as"
    con.execute(f"{target} select {', '.join(selected)} from raw")
    con.execute("drop table raw")
    return dropped


def load_features(
    con: duckdb.DuckDBPyConnection,
    file: RawFile,
    table: str,
    column: str,
    lists: Sequence[str] = (),
    skip_bad_rows: bool = False,
) -> int:
    """Creates table `users` or `items` from a file; returns how many malformed rows it dropped.

    Args:
        column: what the file calls the id.
        lists: text columns that hold several values, separated by "|".

    Raises:
        UserError: no column of ids, or a malformed row (an id that comes again is one) unless `skip_bad_rows`.
    """
    key = {"users": "user_id", "items": "item_id"}[table]
    unread = _read(con, file, [column], features=True)
    types = {name: kind for name, kind in columns_of(con, "raw").items() if name not in ("source_row", column)}
    if key in (name.lower() for name in types):
        raise UserError(f"{file.path} has a column {key} beside its id column {column}: rename one of them")
    again = f"""source_row in (select source_row from (
        select source_row, row_number() over (partition by {quoted(column)} order by source_row) as nth from raw)
        where nth > 1)"""
    checks = [_id_check(con, file, column), Check(again, column, "came before")]
    dropped = _drop_bad_rows(con, file, checks, unread, skip_bad_rows)
    features = [f"{_feature(con, file, name, kind, name in lists)} as {quoted(name)}" for name, kind in types.items()]
    con.execute(f"create table {table} as select {', '.join([f'{_text(column)} as {key}', *features])} from raw")
    con.execute("drop table raw")
    return dropped


Bad = tuple[int, int, str]  # bad rows of a file: how many, the line (or row) of the first, what is wrong with it


def _read(con: duckdb.DuckDBPyConnection, file: RawFile, needed: Sequence[str], features: bool) -> Bad:
    """Creates table `raw` of the needed columns, or all, and `source_row`. Returns the rows that could not be read."""
    location = _literal(glob.escape(str(file.path)))
    try:
        if file.delimiter:
            names = list(file.header) or next((record for _, record in file.records()), [])
            types = ", ".join(f"{_literal(name)}: 'VARCHAR'" for name in names)
            quote = f"quote = {_literal(file.quote)}, escape = {_literal(file.quote)}, encoding = '{file.encoding}'"
            options = f"header = {not file.header}, delim = {_literal(file.delimiter)}, {quote}, columns = {{{types}}}"
            source = f"read_csv({location}, auto_detect = false, store_rejects = true, {options})"
        else:
            source = f"read_parquet({location})"
            names = [row[0] for row in con.execute(f"describe from {source}").fetchall()]
        for name in needed:
            if name not in names:
                near = difflib.get_close_matches(name, names, 1)
                hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(names)}"
                raise UserError(f"{file.path} has no column {name}: {hint}")
        selected = ", ".join(map(quoted, names if features else dict.fromkeys(needed)))
        con.execute(f"create table raw as select row_number() over () as source_row, {selected} from {source}")
    except duckdb.Error as error:
        hint = "; all its lines must end alike, and quotes inside fields be doubled" if file.delimiter else ""
        raise UserError(f"{file.path} cannot be read: {str(error).splitlines()[0]}{hint}") from None
    rejected = []
    if file.delimiter:
        query = "select line_byte_position, lower(error_type) from reject_errors order by 1, column_idx"
        rejected = con.execute(query).fetchall()
        con.execute("drop table reject_errors")
        con.execute("drop table reject_scans")
    if not rejected:
        if not count_rows(con, "raw"):
            raise UserError(f"{file.path} has no rows")
        return 0, 0, ""
    line, left = 1, rejected[0][0] - 1  # DuckDB counts records, which may hold line breaks; people count lines
    with open(file.path, "rb") as stream:
        while block := stream.read(min(left, 2**20)):
            line, left = line + block.count(b"\n"), left - len(block)
    return len({row[0] for row in rejected}), line, rejected[0][1]


def _drop_bad_rows(con: duckdb.DuckDBPyConnection, file: RawFile, checks: list[Check], unread: Bad, skip: bool) -> int:
    """Deletes the rows of `raw` that fail a check; returns their number and that of the unread ones.

    Raises:
        UserError: there are such rows, and they are not to be skipped.
    """
    wrong = " or ".join(check.condition for check in checks)
    found = [bad for bad in (unread, _failures(con, file, checks, wrong)) if bad[0]]
    total = sum(bad[0] for bad in found)
    if found:
        _, line, reason = min(found, key=lambda bad: bad[1])
        if not skip:
            hint = f"{total:,} malformed row(s) in all; mend the file or drop them with --skip-bad-rows"
            raise UserError(f"{file.path}:{line}: {reason} ({hint})")
        note(f"{file.path}:{line}: {reason}; {total:,} malformed row(s) dropped")
        con.execute(f"delete from raw where {wrong}")
    return total


def _failures(con: duckdb.DuckDBPyConnection, file: RawFile, checks: list[Check], wrong: str) -> Bad:
    """The rows of `raw` that fail a check."""
    count = count_rows(con, "raw", wrong)
    if not count:
        return 0, 0, ""
    which = " ".join(f"when {check.condition} then {number}" for number, check in enumerate(checks))
    first = f"select case {which} end, * from raw where {wrong} order by source_row limit 1"
    failed, *row = con.execute(first).fetchall()[0]
    values = dict(zip(columns_of(con, "raw"), row, strict=True))
    line = values.pop("source_row")
    check = checks[failed]
    reason = f"{check.column} {str(values[check.column] or '')[:60]!r} {check.reason}"
    if file.delimiter:  # the record's line: that of the nth one with these fields, as far as Python's reader sees it
        same = " and ".join(f"{quoted(name)} is not distinct from ?" for name in values)
        nth = con.execute(f"select count(*) from raw where source_row <= ? and {same}", [line, *values.values()])
        names = list(file.header) or next(record for _, record in file.records())
        wanted = [(names.index(name), value or "") for name, value in values.items()]
        same_lines = (
            number
            for number, record in file.records()
            if len(record) == len(names) and all(record[place] == value for place, value in wanted)
        )
        line = next(itertools.islice(same_lines, nth.fetchall()[0][0] - 1, None), 0)
    return count, line, reason


def _id_check(con: duckdb.DuckDBPyConnection, file: RawFile, column: str) -> Check:
    kind = columns_of(con, "raw")[column]
    if kind in FRACTIONS or kind.startswith("DECIMAL"):
        raise UserError(f"{file.path}: column {column} holds fractions ({kind}); ids are text or whole numbers")
    text = f"coalesce({_text(column)}, '')"  # vocabularies are files of lines, hence no line breaks
    return Check(f"regexp_matches({text}, '^\\s*$|[\\r\\n]')", column, "is empty or holds a line break")


def _feature(con: duckdb.DuckDBPyConnection, file: RawFile, name: str, kind: str, is_list: bool) -> str:
    """The SQL that turns a column of `raw` into one of the few types of a dataset."""
    if kind.endswith("[]"):
        return f"cast({quoted(name)} as varchar[])"
    if is_list:
        parts = f"list_transform(string_split(coalesce({_text(name)}, ''), '|'), lambda part: trim(part))"
        return f"list_filter({parts}, lambda part: part <> '')"
    if kind == "DATE" or kind.startswith("TIMESTAMP"):
        return f"cast(floor(epoch(cast({quoted(name)} as timestamptz))) as bigint)"
    fits = {"bigint": kind.endswith(("INT", "INTEGER")), "double": kind in FRACTIONS or kind.startswith("DECIMAL")}
    for target, pattern in WRITTEN.items():
        if file.delimiter:
            query = f"select bool_and(regexp_full_match({quoted(name)}, '{pattern}')) from raw"
            fits[target] = con.execute(query).fetchall()[0][0]
        if fits[target]:
            return f"cast({quoted(name)} as {target})"
    return _text(name)


def _text(column: str) -> str:
    return f"cast({quoted(column)} as varchar)"


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description="Makes a dataset from your own CSV, TSV or Parquet files.",
        epilog="example: python -m rec.data_prep.tabular --interactions clicks.csv --user-col user --item-col product "
        "--timestamp-col time --items products.csv --output-dir data/mine",
    )
    add = parser.add_argument
    add("--output-dir", required=True, type=Path, help="the dataset directory to write")
    add("--interactions", type=Path, help="all interactions, to be split")
    add("--train", type=Path, help="interactions that are split already; needs --test")
    add("--val", type=Path, help="default: a tenth of --train, the latest, or drawn if there are no times")
    add("--test", type=Path)
    add("--user-col", default="user_id", help="its name in every file that has it")
    add("--item-col", default="item_id", help="its name in every file that has it")
    add("--timestamp-col", help="seconds since 1970, or ISO 8601; without it the data are unordered")
    add("--rating-col", help="a number")
    add("--min-rating", type=float, help="drop interactions rated lower")
    add("--min-interactions", type=int, default=1, help="drop users with fewer, before the split")
    add("--users", type=Path, help="features of users; users without interactions are left out")
    add("--items", type=Path, help="features of items; all of them make up the catalogue")
    add("--list-col", action="append", default=[], help='a text feature with several values, "a|b|c"; repeatable')
    add("--split", choices=STRATEGIES, help="default: temporal, or given where there is --train")
    add("--seed", type=int, default=42, help="of what is drawn where data without times are split")
    add("--skip-bad-rows", action="store_true", help="drop and count malformed rows")
    args = parser.parse_args()

    files = {split: RawFile.of(path) for split in SPLITS if (path := getattr(args, split))}
    strategy = args.split or ("given" if files else "temporal")
    if (strategy == "given") != bool(files) or bool(args.interactions) == bool(files):
        raise UserError("name --interactions, or --train and --test where the split is `given`")
    if files and not (args.train and args.test):
        raise UserError(f"--{'test' if args.train else 'train'} is missing: a given split needs --train and --test")
    if args.min_rating is not None and not args.rating_col:
        raise UserError("--min-rating needs --rating-col")
    if args.interactions:
        files = {"": RawFile.of(args.interactions)}
    features = {table: RawFile.of(path) for table in ("users", "items") if (path := getattr(args, table))}

    def load(con: duckdb.DuckDBPyConnection, scratch: Path) -> dict[str, int]:
        bad_rows, known = 0, []
        columns = (args.user_col, args.item_col, args.timestamp_col, args.rating_col)
        for split, file in files.items():
            note(f"reading {file.path}")
            bad_rows += load_interactions(con, file, columns, split or None, args.skip_bad_rows)
        for table, file in features.items():
            column = args.user_col if table == "users" else args.item_col
            bad_rows += load_features(con, file, table, column, args.list_col, args.skip_bad_rows)
            known += list(columns_of(con, table))
        for name in set(args.list_col) - set(known):
            near = "".join(f": did you mean {near}?" for near in difflib.get_close_matches(name, known, 1))
            raise UserError(f"--list-col {name}: neither --users nor --items has such a column{near}")
        return {"bad_rows": bad_rows}

    every = [*files.values(), *features.values()]
    source, filters = ", ".join(file.path.name for file in every), (args.min_rating, args.min_interactions)
    prepare(args.output_dir, load, every[0].path.stem, source, strategy, args.seed, *filters)


if __name__ == "__main__":
    run_command(main)
