"""MovieLens, each in GroupLens' own file format -> a dataset directory.

    python -m rec.data_prep.movielens --name 100k --split leave_one_out --output-dir data/ml-100k

- 100k (tabs, genre flags, Latin-1), 1m and 10m (`::`), 20m, 25m, 32m and latest-small (CSV).
- Downloads the zip beside the output directory, resuming where an earlier run was cut off, and compares its sha256
  with the one in movielens.yaml; `--source` takes a zip or a folder that you have, whatever its sha256 is.
- Items: title (without the year), year, genres. Users (100k and 1m): age, gender, occupation.

The data may be used for research; read GroupLens' README of each. Not covered: tags, the tag genome, links.
Source: F. M. Harper and J. A. Konstan, The MovieLens Datasets: History and Context, https://doi.org/10.1145/2827872
"""

import functools
from pathlib import Path

import yaml
from duckdb import DuckDBPyConnection as Connection

from rec.data_prep.columns import ListColumns
from rec.data_prep.raw_files import RawFile, literal, quoted
from rec.data_prep.rows import in_a_sentence
from rec.data_prep.split import Filters
from rec.data_prep.tabular import load_features, load_interactions
from rec.data_prep.write import output_parser, prepare
from rec.errors import UserError, note, run_command
from rec.files import sole_writer
from rec.ops.archives import download, unpack
from rec.ops.spark import ENGINES

BASE_URL = "https://files.grouplens.org/datasets/movielens"
KNOWN = yaml.safe_load(Path(__file__).with_name("movielens.yaml").read_text(encoding="utf-8"))
FORMATS: dict[str, list[str]] = KNOWN["formats"]
FILES: dict[str, list[str]] = KNOWN["files"]
DIGESTS: dict[str, str] = KNOWN["digests"]
# "Toy Story (1995)", "Land Before Time III (1995) (V)", "Fawlty Towers (1975-1979)"; "Babylon 5" has none
YEAR = r"\s*\((\d{4})(?:[-–]\d{0,4})?\)\s*(?:\(V\))?\s*$"


def load(con: Connection, scratch: Path, name: str, source: Path) -> dict[str, int]:
    """Creates the tables `interactions`, `items` and, where there are any, `users`, from a zip or a folder.

    Raises UserError if the source does not hold the files of this dataset, or they are damaged.
    """
    note(f"reading {source}")
    ratings, movies, *people = (_find(name, file, source, scratch) for file in FILES[name])
    load_interactions(con, ratings, ("userId", "movieId", "timestamp", "rating"))
    load_features(con, movies, "items", "movieId", ListColumns(["genres"], "|"))
    genres = "list_filter(genres, lambda genre: genre <> '(no genres listed)')"
    if name == "100k":
        genre_columns = movies.header[movies.header.index("unknown") + 1 :]
        flags = [f"case when {quoted(flag)} = 1 then {literal(flag)} end" for flag in genre_columns]
        genres = f"list_filter([{', '.join(flags)}], lambda genre: genre is not null)"
    with in_a_sentence(movies):
        con.execute(f"""
            create or replace table items as
            select item_id, trim(regexp_replace(title, '{YEAR}', '')) as title,
                try_cast(regexp_extract(title, '{YEAR}', 1) as bigint) as year, {genres} as genres
            from items""")
    for file in people:
        load_features(con, file, "users", "userId")
        with in_a_sentence(file):  # 1m numbers the occupations
            con.execute("alter table users drop zip")
            con.execute("alter table users alter occupation type varchar")
    return {}


def _find(name: str, file: str, source: Path, scratch: Path) -> RawFile:
    """One file of the source: unpacked to `scratch` if that is a zip, and there in UTF-8, which DuckDB reads."""
    folder = "ml-10M100K" if name == "10m" else f"ml-{name}"  # in the zip
    title = f"{source}/{folder}/{file}"
    if source.is_file():
        path = unpack(source, f"{folder}/{file}", scratch)
    else:
        places = [source / file, source / folder / file]
        path = next((place for place in places if place.is_file()), source)
        title = str(path)
        if path is source:
            raise UserError(f"{source} holds no {file}: is it really {folder}?")
    delimiter, columns = FORMATS[file]
    quote = "" if columns else '"'
    is_latin = file == "u.item" or (name, file) == ("1m", "movies.dat")
    encoding = "latin-1" if is_latin else ""
    header = tuple(columns.split())
    found = RawFile(path, delimiter, quote, header, title=title, encoding=encoding)
    return found.plain(scratch)


def main() -> None:
    """The command."""
    parser = output_parser("rec.data_prep.movielens", __doc__)
    add = parser.add_argument
    add("--name", required=True, choices=list(FILES))
    add("--source", type=Path, help="a zip or folder of GroupLens', instead of a download")
    add("--split", choices=["temporal", "leave_one_out"], default="temporal")
    add("--min-rating", type=float, help="keep only ratings of at least this as interactions")
    add("--base-url", default=BASE_URL, help="where the zip lies")
    args = parser.parse_args()

    archive = f"ml-{args.name}.zip"
    source = args.source or args.output_dir.parent / archive
    if args.source and not source.exists():
        raise UserError(f"--source {source} does not exist")
    if not args.source:
        with sole_writer(source, wait=args.wait):
            if not source.exists():
                download(f"{args.base_url}/{archive}", source, DIGESTS[args.name])
    prepare(
        args.output_dir,
        functools.partial(load, name=args.name, source=source),
        name=f"ml-{args.name}",
        source=f"MovieLens {args.name}, https://grouplens.org/datasets/movielens/",
        strategy=args.split,
        seed=0,
        filters=Filters(min_rating=args.min_rating),
        engine=ENGINES[args.engine],
        wait=args.wait,
    )


if __name__ == "__main__":
    run_command(main)
