"""Your own CSV, TSV or Parquet files -> a dataset directory.

    python -m rec.data_prep.tabular --interactions clicks.csv --user-col user --item-col product \\
        --timestamp-col time --items products.csv --list-col tags --output-dir data/mine

- Ids are strings exactly as written: leading zeros, commas, quotes and any alphabet are kept.
- Times are seconds since 1970 or ISO 8601, in UTC unless they name a zone; nothing is guessed.
- A malformed row (wrong number of columns, empty id, line break in an id, time or rating that is no number) stops
  the command with file and line; --skip-bad-rows drops and counts it.
- Every line of a text file is a row, the header, blank, or counted as malformed. A quote that swallows lines is
  refused with its line. No field of interactions goes on to another line; one of users or items may.
- --delimiter names the separator. If the one that the extension tells is not in the first line, and another gives
  all the columns, that one is taken and printed. In a .tsv, and with --quote none, quotes are plain characters.
- Text is UTF-8. A column without a name, such as pandas' index, is left out and printed.
- A feature column of a CSV is int64 or double if all its values are written as such (02139 is not: it is a zip
  code), a list if --list-col names it, otherwise a string. An empty field is null.

Not covered: compressed CSV, quotes escaped otherwise than by doubling them.
"""

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path

from duckdb import DuckDBPyConnection as Connection

from rec.data_prep.raw_files import RawFile, delimiter_of, quoted
from rec.data_prep.rows import VALUES, in_a_sentence, read_rows
from rec.data_prep.split import SPLITS, STRATEGIES
from rec.data_prep.write import note, output_parser, prepare
from rec.errors import UserError, run_command

FRACTIONS = ("FLOAT", "DOUBLE", "DECIMAL")
WHOLE, NUMBER = "-?(0|[1-9][0-9]{0,17})", "-?(0|[1-9][0-9]*)([.][0-9]+)?([eE][+-]?[0-9]{1,2})?"


@in_a_sentence
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
    skipped = read_rows(
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


@in_a_sentence
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
    skipped = read_rows(con, file, {key: column}, skip, features=True)
    values, raw = [key], con.table("raw")
    for name, kind in zip(
        raw.columns[2:], map(str, raw.types[2:]), strict=True
    ):  # after source_row and the key
        text = quoted(name)
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


def _raw_files(args: argparse.Namespace, names: Sequence[str]) -> dict[str, RawFile]:
    """The files that options name, by the options."""
    delimiter = None if args.delimiter is None else delimiter_of(args.delimiter)
    quote = "" if args.quote == "none" else args.quote
    paths = {name: path for name in names if (path := getattr(args, name))}
    return {name: RawFile.of(path, delimiter, quote) for name, path in paths.items()}


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
    add("--delimiter", help="separates the fields of text files; default: by the extension")
    add(
        "--quote",
        choices=["none", '"'],
        help='opens fields of text files that may hold separators; default: ", none in a .tsv',
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
    files = _raw_files(args, ("interactions", *SPLITS))
    features = _raw_files(args, ("users", "items"))
    if (args.delimiter or args.quote) and not any(
        file.is_text for file in (*files.values(), *features.values())
    ):
        raise UserError("--delimiter and --quote are for text files, and all files are Parquet")

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
