"""MovieLens, each in GroupLens' own file format -> a dataset directory.

    python -m rec.data_prep.movielens --name 100k --split leave_one_out --output-dir data/ml-100k

- 100k (tabs, genre flags, Latin-1), 1m and 10m (`::`), 20m, 25m, 32m and latest-small (CSV).
- Downloads the zip beside the output directory, resuming where an earlier run was cut off, and compares the md5 that
  GroupLens publishes; `--source` takes a zip or a folder that you have.
- Items: title (without the year), year, genres. Users (100k and 1m): age, gender, occupation.

The data may be used for research; read GroupLens' README of each. Not covered: tags, the tag genome, links.
Source: F. M. Harper and J. A. Konstan, The MovieLens Datasets: History and Context, https://doi.org/10.1145/2827872
"""

import functools
import http.client
import re
import shutil
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path

from duckdb import DuckDBPyConnection as Connection
from tqdm import tqdm

from rec.data_prep.dataset import digest
from rec.data_prep.raw_files import RawFile
from rec.data_prep.tabular import load_features, load_interactions
from rec.data_prep.write import note, output_parser, prepare
from rec.errors import UserError, run_command

BASE_URL = "https://files.grouplens.org/datasets/movielens"
FLAGS = [
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
]
FLAGS += [
    "Film-Noir",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
]
FORMATS = {  # file -> its delimiter and columns; a CSV names them in its first line
    "u.data": ("\t", "userId movieId rating timestamp"),
    "u.item": ("|", f"movieId title date video url unknown {' '.join(FLAGS)}"),
    "u.user": ("|", "userId age gender occupation zip"),
    "ratings.dat": ("::", "userId movieId rating timestamp"),
    "movies.dat": ("::", "movieId title genres"),
    "users.dat": ("::", "userId gender age occupation zip"),
    "ratings.csv": (",", ""),
    "movies.csv": (",", ""),
}
FILES = {  # name -> its files of ratings, movies and, if any, users
    "100k": ["u.data", "u.item", "u.user"],
    "1m": ["ratings.dat", "movies.dat", "users.dat"],
    "10m": ["ratings.dat", "movies.dat"],
} | dict.fromkeys(["20m", "25m", "32m", "latest-small"], ["ratings.csv", "movies.csv"])
# "Toy Story (1995)", "Land Before Time III (1995) (V)", "Fawlty Towers (1975-1979)"; "Babylon 5" has none
YEAR = r"\s*\((\d{4})(?:[-–]\d{0,4})?\)\s*(?:\(V\))?\s*$"


def load(con: Connection, scratch: Path, name: str, source: Path) -> dict[str, int]:
    """Creates the tables `interactions`, `items` and, where there are any, `users`, from a zip or a folder.

    Raises UserError if the source does not hold the files of this dataset, or they are damaged.
    """
    note(f"reading {source}")
    ratings, movies, *people = (_find(name, file, source, scratch) for file in FILES[name])
    load_interactions(con, ratings, ("userId", "movieId", "timestamp", "rating"))
    load_features(con, movies, "items", "movieId", ["genres"])
    genres = "list_filter(genres, lambda genre: genre <> '(no genres listed)')"
    if name == "100k":
        flags = ", ".join(
            f"""case when "{flag}" = 1 then '{flag.replace("'", "''")}' end""" for flag in FLAGS
        )
        genres = f"list_filter([{flags}], lambda genre: genre is not null)"
    con.execute(f"""
        create or replace table items as select item_id, trim(regexp_replace(title, '{YEAR}', '')) as title,
            try_cast(regexp_extract(title, '{YEAR}', 1) as bigint) as year, {genres} as genres from items""")
    for file in people:
        load_features(con, file, "users", "userId")
        con.execute(
            "alter table users drop zip; alter table users alter occupation type varchar"
        )  # 1m numbers them
    return {}


def _find(name: str, file: str, source: Path, scratch: Path) -> RawFile:
    """One file of the source: unpacked to `scratch` if that is a zip, and there in UTF-8, which DuckDB reads."""
    folder = "ml-10M100K" if name == "10m" else f"ml-{name}"  # in the zip
    found = [path for path in (source / file, source / folder / file) if path.is_file()]
    try:
        if source.is_file():
            with zipfile.ZipFile(source) as archive:
                member = f"{folder}/{file}"
                found = [
                    Path(archive.extract(member, scratch))
                    for each in archive.namelist()
                    if each == member
                ]
    except (zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"{source} is no intact zip file ({error}): delete it and run the command again"
        ) from None
    if not found:
        raise UserError(f"{source} holds no {file}: is it really {folder}?")
    path, (delimiter, columns) = found[0], FORMATS[file]
    if file == "u.item" or (name, file) == ("1m", "movies.dat"):  # titles in Latin-1
        text = path.read_text("latin-1")
        path = scratch / file
        path.write_text(text, "utf-8")
    quote = "" if columns else '"'
    return RawFile(path, delimiter, quote, tuple(columns.split()))


def download(url: str, target: Path) -> None:
    """Fetches `url` to `target`, through `target`.part which the next run continues if this one is cut off.

    Raises UserError for no connection, one that breaks, or a file whose md5 is not the one published at `url`.md5.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    try:
        _receive(url, part)
        with urllib.request.urlopen(
            f"{url}.md5", timeout=30
        ) as response:  # "MD5 (ml-1m.zip) = c4d9eecf..."
            published = re.findall(r"\b[0-9a-f]{32}\b", response.read().decode())
    except (OSError, http.client.HTTPException) as error:  # no connection and timeouts are OSErrors
        if not (isinstance(error, urllib.error.HTTPError) and error.code == 404 and part.is_file()):
            hint = "run the command again to resume, or fetch it yourself and name it with --source"
            raise UserError(f"the download of {url} failed ({error}): {hint}") from None
        note(f"{url} has no published checksum: relying on the zip's own")
        published = []
    if published and digest(part, "md5") != published[0]:
        part.unlink()
        raise UserError(
            f"{url} arrived damaged (its md5 is not {published[0]}): run the command again"
        )
    part.rename(target)


def _receive(url: str, part: Path) -> None:
    """Appends to `part` what it lacks of `url`. Raises OSError or HTTPException if it still lacks some."""
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # there is no more than we have
            return
        raise
    with (
        response,
        open(part, "ab" if response.status == 206 else "wb") as file,
    ):  # a server may not know ranges
        total = file.tell() + int(response.headers.get("Content-Length") or 0)
        with tqdm.wrapattr(
            response, "read", desc=part.stem, initial=file.tell(), total=total
        ) as received:
            shutil.copyfileobj(received, file)
        if file.tell() < total:
            raise OSError(f"broken off after {file.tell():,} of {total:,} bytes")


def main() -> None:
    """The command."""
    parser = output_parser("rec.data_prep.movielens", __doc__)
    add = parser.add_argument
    add("--name", required=True, choices=list(FILES))
    add("--source", type=Path, help="a zip or folder of GroupLens', instead of a download")
    add("--split", choices=["temporal", "leave_one_out"], default="temporal")
    add("--min-rating", type=float, help="keep only ratings of at least this as interactions")
    add("--base-url", default=BASE_URL, help="where the zip and its .md5 lie")
    args = parser.parse_args()

    archive = f"ml-{args.name}.zip"
    source = args.source or args.output_dir.parent / archive
    if args.source and not source.exists():
        raise UserError(f"--source {source} does not exist")
    if not source.exists():
        download(f"{args.base_url}/{archive}", source)
    where = f"MovieLens {args.name}, https://grouplens.org/datasets/movielens/"
    reader = functools.partial(load, name=args.name, source=source)
    prepare(
        args.output_dir,
        reader,
        f"ml-{args.name}",
        where,
        args.split,
        0,
        (args.min_rating, 1),
        args.engine,
    )


if __name__ == "__main__":
    run_command(main)
