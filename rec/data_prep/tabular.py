"""Your own CSV, TSV, JSON lines or Parquet files -> a dataset directory.

    python -m rec.data_prep.tabular --interactions clicks.csv --user-col user --item-col product \\
        --timestamp-col time --items products.csv --list-col tags --output-dir data/mine
    python -m rec.data_prep.tabular --interactions 'logs/*.jsonl.gz' --user-col user.id --item-col item.id \\
        --timestamp-col ts --timestamp-unit ms --event-col type --event-weights view=1,cart=3,purchase=10,skip=1 \\
        --negative-events skip --target-events purchase --repeats keep --since 2024-01-01 --output-dir data/mine
    python -m rec.data_prep.tabular --interactions export.csv --delimiter ';' --decimal , --encoding cp1252 \\
        --min-interactions 5 --min-item-interactions 5 --split leave_one_out --output-dir data/mine

- Ids are strings exactly as written: leading zeros, commas, quotes and any alphabet are kept.
- Times are seconds since 1970 or ISO 8601, in UTC unless they name a zone, or as --timestamp-format or
  --timestamp-unit says. A range that ends before 1990 or starts after tomorrow is refused, unless --allow-any-time.
- A malformed row (wrong number of columns, empty id, line break in an id, time or rating that is no number) stops
  the command with file and line; --skip-bad-rows drops and counts it.
- Every line of a text file is a row, the header, blank, or counted as malformed. A quote that swallows lines is
  refused with its line. No field of interactions goes on to another line; one of users or items may.
- --delimiter names the separator. If the one that the extension tells is not in the first line, and another gives
  all the columns, that one is taken and printed. In a .tsv, and with --quote none, quotes are plain characters.
- --header names the columns of interactions without a first line of names.
- Names that end in .gz or .zst are compressed. Text is UTF-8, or as --encoding says. --interactions, --train, --val and
  --test may be patterns. A field inside another of a JSON line is named by a dotted path.
- A column without a name, such as pandas' index, is left out and printed.
- A feature column of a CSV is int64 or double if all its values are written as such (02139 is not: it is a zip
  code), a list if --list-col names it, otherwise a string. An empty field is null. What decided is printed.
- A file of items or users without a single id of the interactions is refused, with one id of each side.
- With --event-weights every event must have a weight; 0 drops it. Another event of a user and an item is no repeat.

Not covered: quotes escaped otherwise than by doubling them, numbers with separators of thousands.
"""

import argparse
import difflib
import functools
import glob
import itertools
from collections.abc import Sequence
from pathlib import Path

import duckdb
from duckdb import DuckDBPyConnection as Connection

from rec.data_prep.checks import check_times
from rec.data_prep.columns import ListColumns, type_columns
from rec.data_prep.events import Events, parse_names, parse_weights, weigh_events
from rec.data_prep.raw_files import RawFile, delimiter_of, literal, quoted
from rec.data_prep.rows import SCALES, SECONDS, VALUES, in_a_sentence, read_rows
from rec.data_prep.split import SPLITS, STRATEGIES, Filters
from rec.data_prep.write import output_parser, prepare
from rec.errors import UserError, note, run_command
from rec.ops.spark import ENGINES

KEYS = {"users": "user_id", "items": "item_id"}  # tables of features -> their ids
# Options, in the order of VALUES.
COLUMNS = ("user_col", "item_col", "timestamp_col", "rating_col", "event_col", "weight_col")
NEEDS = {  # option -> the one without which it has no effect
    "min_rating": "rating_col",
    "allow_any_time": "timestamp_col",
    "timestamp_format": "timestamp_col",
    "timestamp_unit": "timestamp_col",
    "list_separator": "list_col",
    "since": "timestamp_col",
    "until": "timestamp_col",
    "event_weights": "event_col",
    "negative_events": "event_col",
    "target_events": "event_col",
}
NO_LISTS = ListColumns()


def load_interactions(
    con: Connection, file: RawFile, columns: Sequence[str | None], split: str | None = None
) -> int:
    """Adds a file's rows to table `interactions`, under `split` if given; returns how many malformed ones it skipped.

    `columns` is what the file calls the user id, item id, time, rating, event and weight, None for what it lacks.
    Raises UserError for a missing column, or a malformed row unless the file's are skipped.
    """
    named = {name: column for name, column in zip(VALUES, columns, strict=False) if column}
    part = f", '{split}' as split" if split else ""
    rows = f"select * replace (source_row + {{}} as source_row){part} from raw"
    with in_a_sentence(file):
        skipped = read_rows(con, file, named)
        con.execute(f"create table if not exists interactions as {rows.format(0)} limit 0")
        last = "select coalesce(max(source_row), 0) from interactions"
        con.execute(f"insert into interactions {rows.format(f'({last})')}; drop table raw")
    return skipped


def load_features(
    con: Connection, file: RawFile, table: str, column: str, lists: ListColumns = NO_LISTS
) -> int:
    """Creates table `users` or `items` from a file; returns how many malformed rows it skipped.

    `column` is what the file calls the id. Each other column has a comment in the database: what decided its type.
    Raises UserError for no column of ids, a malformed row (an id that comes again is one) unless the file's are
    skipped, or a list column that has nothing to split.
    """
    key = KEYS[table]
    with in_a_sentence(file):
        skipped = read_rows(con, file, {key: column}, features=True)
        typed = type_columns(con, file, lists)
        values = [key, *(f"{each.value} as {quoted(name)}" for name, each in typed.items())]
        con.execute(f"create table {table} as select {', '.join(values)} from raw; drop table raw")
        for name, each in typed.items():
            con.execute(f"comment on column {table}.{quoted(name)} is {literal(each.why)}")
    if not typed:
        note(f"{file} has no column beside {column}, so it adds no features")
    return skipped


def check_options(args: argparse.Namespace) -> None:
    """Raises UserError for an option that needs another one, or could have no effect."""
    for option, other in NEEDS.items():
        if getattr(args, option) not in (None, False, ()) and not getattr(args, other):
            raise UserError(f"{_flag(option)} needs {_flag(other)}")
    if args.timestamp_format and args.timestamp_unit:
        raise UserError("--timestamp-format and --timestamp-unit exclude each other: use one")
    if args.timestamp_format:
        _check_time_format(args.timestamp_format)
    for option in ("min_interactions", "min_item_interactions"):
        least = getattr(args, option)
        if least < 1:
            raise UserError(f"{_flag(option)} must be at least 1, not {least}")
    columns = {option: getattr(args, option) for option in COLUMNS if getattr(args, option)}
    for (one, name), (other, same) in itertools.combinations(columns.items(), 2):
        if name == same:
            raise UserError(f"{_flag(one)} and {_flag(other)} name the same column, {name}")


def _check_time_format(form: str) -> None:
    """Raises UserError for a format that strptime cannot read times by."""
    where = f"--timestamp-format {form!r}"
    if "%" not in form:
        raise UserError(f"{where} has no %: write YYYYMMDD as '%Y%m%d', for example")
    try:
        duckdb.execute(f"select try_strptime('', {literal(form)})")
    except duckdb.Error as error:
        raise UserError(f"{where}: {str(error).splitlines()[0]}") from None


def _flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"


def file_parser() -> argparse.ArgumentParser:
    """The parser of the command."""
    parser = output_parser("rec.data_prep.tabular", __doc__)
    add = parser.add_argument
    files = functools.partial(add, type=Path, default=[])
    names = functools.partial(add, type=parse_names, default=())
    files("--interactions", nargs="+", help="all interactions, to be split")
    files("--train", nargs="+", help="interactions that are split already; needs --test")
    files("--val", nargs="+", help="default: a tenth of --train, chosen as --test was")
    files("--test", nargs="+")
    add("--user-col", default="user_id", help="its name in every file that has it")
    add("--item-col", default="item_id", help="its name in every file that has it")
    add("--timestamp-col", help="without it the data are unordered")
    add("--timestamp-format", help="for strptime: '%%Y%%m%%d'; default: seconds or ISO 8601")
    add("--timestamp-unit", choices=list(SCALES), help="of times that are numbers; default: s")
    add("--allow-any-time", action="store_true", help="take times before 1990 or after tomorrow")
    add("--rating-col", help="a number")
    add("--min-rating", type=float, help="drop interactions rated lower")
    add("--min-interactions", type=int, default=1, help="drop users with fewer, before the split")
    add("--min-item-interactions", type=int, default=1, help="the same for items, until both hold")
    add("--since", help="drop interactions before this date, such as 2024-01-31, or second")
    add("--until", help="drop interactions at this date or second, and later ones")
    add("--repeats", choices=["first", "last", "keep"], default="first", help="default: first")
    add("--event-col", help="what a user did, such as view or purchase")
    add("--event-weights", help="view=1,cart=3,purchase=10: for all events; 0 drops one")
    add("--weight-col", help="a number per interaction, which its event's weight multiplies")
    names("--negative-events", help="dislike,skip: events that say what a user does not want")
    names("--target-events", help="purchase: what val and test ask for; the others are history")
    files("--users", nargs=1, help="features of users; users without interactions are left out")
    files("--items", nargs=1, help="features of items; all of them make up the catalogue")
    add("--list-col", action="append", default=[], help='a text like "a|b|c"; repeatable')
    add("--list-separator", help="of --list-col; default: |, else what is found, and printed")
    add("--split", choices=list(STRATEGIES), help="default: temporal; given if there is --train")
    add("--delimiter", help="separates the fields of text files; default: by the extension")
    add("--quote", choices=["none", '"'], help='opens fields; default: ", none in a .tsv')
    names("--header", help="user,item,time: columns of interactions without a first line of names")
    add("--encoding", default="", help="of text files, such as cp1252 or utf-16; default: UTF-8")
    add("--decimal", choices=[".", ","], help="before the fraction of a number; default: .")
    add("--seed", type=int, help="of what is drawn if data without times are split; default: 42")
    add("--skip-bad-rows", action="store_true", help="drop and count malformed rows")
    return parser


def prepare_files(args: argparse.Namespace, name: str = "", source: str = "") -> None:
    """Writes the dataset that options of `file_parser` describe.

    `name` and `source` are what dataset.json says of it; "": the names of its files.
    """
    strategy = _strategy(args)
    check_options(args)
    files = _open_files(args)
    every = [file for group in files.values() for file in group]
    is_drawn = not (args.val if strategy == "given" else args.timestamp_col)
    if args.seed is not None and not is_drawn:
        note(f"--seed {args.seed} has no effect: this split draws nothing at random")
    events = Events(
        weights=parse_weights(args.event_weights) if args.event_weights else {},
        negatives=args.negative_events,
        targets=args.target_events,
    )
    prepare(
        args.output_dir,
        lambda con, scratch: _load(con, scratch, args, files, events),
        name=name or every[0].path.name.partition(".")[0],
        source=source or ", ".join(file.path.name for file in every),
        strategy=strategy,
        seed=42 if args.seed is None else args.seed,
        filters=Filters(
            args.min_rating,
            args.min_interactions,
            args.min_item_interactions,
            since=_seconds(args.since),
            until=_seconds(args.until),
            repeats=args.repeats,
        ),
        events=events,
        engine=ENGINES[args.engine],
        wait=args.wait,
    )


def _strategy(args: argparse.Namespace) -> str:
    """How to split. Raises UserError if the files do not fit it."""
    is_given = bool(args.train or args.val or args.test)
    strategy: str = args.split or ("given" if is_given else "temporal")
    if is_given == bool(args.interactions) or is_given != (strategy == "given"):
        raise UserError("name --interactions, or --train and --test where the split is `given`")
    if is_given and not (args.train and args.test):
        missing = "--test" if args.train else "--train"
        raise UserError(f"{missing} is missing: a given split needs --train and --test")
    return strategy


def _open_files(args: argparse.Namespace) -> dict[str, list[RawFile]]:
    """The files by their options. Raises UserError if one cannot be, or no file is of a kind that an option is for."""
    delimiter = None if args.delimiter is None else delimiter_of(args.delimiter)
    quote = "" if args.quote == "none" else args.quote
    form = {
        "decimal": args.decimal or ".",
        "encoding": args.encoding,
        "times": args.timestamp_format or args.timestamp_unit or "",
        "skip_bad_rows": args.skip_bad_rows,
    }
    files: dict[str, list[RawFile]] = {}
    for role in ("interactions", *SPLITS, *KEYS):
        form["header"] = () if role in KEYS else args.header
        paths = [path for pattern in getattr(args, role) for path in _matching(pattern)]
        if paths:
            files[role] = [RawFile.of(path, delimiter, quote, **form) for path in paths]
    every = [file for group in files.values() for file in group]
    text_options = ("delimiter", "quote", "decimal", "header")
    used = [option for option in text_options if getattr(args, option)]
    if used and all(file.is_json or not file.is_text for file in every):
        raise UserError(f"{_flag(used[0])} is for CSV and TSV, and no file is one")
    if args.encoding and not any(file.is_text for file in every):
        raise UserError("--encoding is for text files, and all files are Parquet")
    return files


def _matching(path: Path) -> list[Path]:
    """The files that a pattern such as logs/*.csv matches, in order of names; a file that exists is no pattern."""
    if path.exists() or not glob.has_magic(str(path)):
        return [path]
    paths = sorted(map(Path, glob.glob(str(path))))
    if not paths:
        raise UserError(f"no file matches {path}")
    return paths


def _seconds(text: str | None) -> float | None:
    """Seconds since 1970 of a text that is written as times are. Raises UserError for another one."""
    if text is None:
        return None
    select = f"set TimeZone = 'UTC'; select {SECONDS} from (select {literal(text)} as timestamp)"
    ((seconds,),) = duckdb.execute(select).fetchall()
    if seconds is None:
        hint = "write 2024-01-31, 2024-01-31T12:00:00, or seconds since 1970"
        raise UserError(f"{text!r} is no time for --since or --until: {hint}")
    return float(seconds)


def _load(
    con: Connection,
    scratch: Path,
    args: argparse.Namespace,
    files: dict[str, list[RawFile]],
    events: Events,
) -> dict[str, int]:
    """Creates the tables of all files, which are by their options; returns the number of rows dropped, by reason."""
    bad_rows = 0
    features = []
    columns = [getattr(args, option) for option in COLUMNS]
    for name in [name for name in files if name not in KEYS]:
        for file in files[name]:
            note(f"reading {file}")
            split = name if name in SPLITS else None
            bad_rows += load_interactions(con, file.plain(scratch), columns, split)
    if args.timestamp_col and not args.allow_any_time:
        check_times(con)
    lists = ListColumns(args.list_col, args.list_separator)
    for table in [name for name in KEYS if name in files]:
        key = args.user_col if table == "users" else args.item_col
        (file, *others) = files[table]
        if others:
            raise UserError(f"--{table} names {len(others) + 1} files: name one")
        bad_rows += load_features(con, file.plain(scratch), table, key, lists)
        features += con.table(table).columns[1:]  # without the id
    for name in set(args.list_col) - set(features):
        near = difflib.get_close_matches(name, features, 1)
        hint = f": did you mean {near[0]}?" if near else ""
        raise UserError(f"--list-col {name}: neither --users nor --items has such a feature{hint}")
    dropped = {"bad_rows": bad_rows}
    if args.event_weights or args.weight_col or args.event_col:
        dropped["of_weight_0"] = weigh_events(con, events)
    return dropped


def main() -> None:
    """The command."""
    prepare_files(file_parser().parse_args())


if __name__ == "__main__":
    run_command(main)
