"""MovieLens, each in GroupLens' own file format -> a dataset directory.

    python -m rec.data_prep.movielens --name 100k --output-dir data/ml-100k

- 100k (tabs, genre flags, Latin-1), 1m and 10m (`::`), 20m, 25m, 32m and latest-small (CSV).
- Downloads the zip beside the output directory, resuming where an earlier run was cut off, and compares the md5 that
  GroupLens publishes; `--source` takes a zip or a folder that you have.
- Items: title (without the year), year, genres. Users (100k and 1m): age, gender, occupation.

The data may be used for research; read GroupLens' README of each. Not covered: tags, the tag genome, links.
Source: F. M. Harper and J. A. Konstan, The MovieLens Datasets: History and Context, https://doi.org/10.1145/2827872
"""

import argparse
import dataclasses
import functools
import http.client
import re
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path

import duckdb
from tqdm import tqdm

from rec.data_prep.dataset import digest
from rec.data_prep.tabular import RawFile, load_features, load_interactions
from rec.data_prep.write import note, prepare
from rec.errors import UserError, run_command

BASE_URL = "https://files.grouplens.org/datasets/movielens"
RATINGS = ("userId", "movieId", "rating", "timestamp")
MOVIES = ("movieId", "title", "genres")
PEOPLE = ("userId", "age", "gender", "occupation", "zip")
FLAGS = ["Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy"]
FLAGS += ["Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"]
FLAGGED = ("movieId", "title", "date", "video", "url", "unknown", *FLAGS)
# "Toy Story (1995)", "Land Before Time III (1995) (V)", "Fawlty Towers (1975-1979)"; "Babylon 5" has none
YEAR = r"\s*\((\d{4})(?:[-–]\d{0,4})?\)\s*(?:\(V\))?\s*$"


def _raw(name: str, delimiter: str, header: tuple[str, ...], encoding: str = "utf-8") -> RawFile:
    return RawFile(Path(name), delimiter, header, "", encoding)


CSV = [RawFile(Path("ratings.csv"), ","), RawFile(Path("movies.csv"), ",")]
LAYOUTS = {  # name -> the folder in its zip; the files of ratings, movies and, if any, users
    "100k": (
        "ml-100k",
        [_raw("u.data", "\t", RATINGS), _raw("u.item", "|", FLAGGED, "latin-1"), _raw("u.user", "|", PEOPLE)],
    ),
    "1m": (
        "ml-1m",
        [
            _raw("ratings.dat", "::", RATINGS),
            _raw("movies.dat", "::", MOVIES, "latin-1"),
            _raw("users.dat", "::", ("userId", "gender", "age", "occupation", "zip")),
        ],
    ),
    "10m": ("ml-10M100K", [_raw("ratings.dat", "::", RATINGS), _raw("movies.dat", "::", MOVIES)]),
} | {name: (f"ml-{name}", CSV) for name in ("20m", "25m", "32m", "latest-small")}


def load(con: duckdb.DuckDBPyConnection, scratch: Path, name: str, source: Path) -> dict[str, int]:
    """Creates the tables `interactions`, `items` and, where there are any, `users`, from a zip or a folder.

    Raises:
        UserError: the source does not hold the files of this dataset, or they are damaged.
    """
    note(f"reading {source}")
    folder, layout = LAYOUTS[name]
    files = [dataclasses.replace(file, path=_find(source, folder, file.path.name, scratch)) for file in layout]
    load_interactions(con, files[0], ("userId", "movieId", "timestamp", "rating"))
    load_features(con, files[1], "items", "movieId", ["genres"])
    genres = "list_filter(genres, lambda genre: genre <> '(no genres listed)')"
    if "Western" in files[1].header:
        flags = ", ".join(f"""case when "{flag}" = 1 then '{flag.replace("'", "''")}' end""" for flag in FLAGS)
        genres = f"list_filter([{flags}], lambda genre: genre is not null)"
    con.execute(f"""
        create or replace table items as select item_id, trim(regexp_replace(title, '{YEAR}', '')) as title,
            try_cast(regexp_extract(title, '{YEAR}', 1) as bigint) as year, {genres} as genres from items""")
    if len(files) > 2:
        load_features(con, files[2], "users", "userId")
        con.execute("alter table users drop zip")
        con.execute("alter table users alter occupation type varchar")  # 1m numbers them
    return {}


def _find(source: Path, folder: str, name: str, scratch: Path) -> Path:
    """One file of the source, unpacked if that is a zip."""
    if source.is_dir():
        for path in (source / name, source / folder / name):
            if path.is_file():
                return path
    else:
        try:
            with zipfile.ZipFile(source) as archive:
                if f"{folder}/{name}" in archive.namelist():
                    note(f"unpacking {name}")
                    archive.extract(f"{folder}/{name}", scratch)
                    return scratch / folder / name
        except (zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{source} is no intact zip file ({error}): delete it and run the command again") from None
    raise UserError(f"{source} holds no {name}: is it really {folder}?")


def download(url: str, target: Path) -> None:
    """Fetches `url` to `target`, through `target`.part which the next run continues if this one is cut off.

    Raises:
        UserError: no connection, one that breaks, or a file whose md5 is not the one published at `url`.md5.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    try:
        _receive(url, part)
        try:
            with urllib.request.urlopen(f"{url}.md5", timeout=30) as response:  # "MD5 (ml-1m.zip) = c4d9eecf..."
                published = re.search(r"\b[0-9a-f]{32}\b", response.read().decode())
        except urllib.error.HTTPError as error:
            if error.code != 404:
                raise
            published = None
    except (OSError, http.client.HTTPException) as error:  # no connection and timeouts are OSErrors
        raise UserError(
            f"the download of {url} failed ({error}): run the command again to resume, or fetch it yourself and "
            "name it with --source"
        ) from None
    if not published:
        note(f"{url} has no published checksum: relying on the zip's own")
    elif digest(part, "md5") != published.group():
        part.unlink()
        raise UserError(f"{url} arrived damaged (its md5 is not {published.group()}): run the command again")
    part.rename(target)


def _receive(url: str, part: Path) -> None:
    """Appends to `part` what it lacks of `url`. Raises OSError or HTTPException if it still lacks some."""
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        if error.headers.get("Content-Range") != f"bytes */{have}":  # longer than the file is now: begin again
            part.unlink()
            _receive(url, part)
        return
    with response:
        have = have if response.status == 206 else 0  # a server without ranges sends all of it
        total = have + int(response.headers.get("Content-Length") or 0)
        with open(part, "ab" if have else "wb") as file:
            with tqdm(desc=part.stem, initial=have, total=total, unit="B", unit_scale=True) as progress:
                while block := response.read(2**16):
                    progress.update(file.write(block))
                    have += len(block)
    if have < total:
        raise OSError(f"broken off after {have:,} of {total:,} bytes")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description="Makes a dataset from MovieLens.",
        epilog="example: python -m rec.data_prep.movielens --name 100k --output-dir data/ml-100k --split leave_one_out",
    )
    parser.add_argument("--name", required=True, choices=list(LAYOUTS))
    parser.add_argument("--output-dir", required=True, type=Path, help="the dataset directory to write")
    parser.add_argument("--source", type=Path, help="a zip or folder of GroupLens', instead of a download")
    parser.add_argument("--split", choices=["temporal", "leave_one_out"], default="temporal")
    parser.add_argument("--min-rating", type=float, help="keep only ratings of at least this as interactions")
    parser.add_argument("--base-url", default=BASE_URL, help="where the zip and its .md5 lie")
    args = parser.parse_args()

    archive = f"ml-{args.name}.zip"
    source = args.source or args.output_dir.parent / archive
    if args.source and not source.exists():
        raise UserError(f"--source {source} does not exist")
    if not source.exists():
        download(f"{args.base_url}/{archive}", source)
    where = f"MovieLens {args.name}, https://grouplens.org/datasets/movielens/"
    reader = functools.partial(load, name=args.name, source=source)
    prepare(args.output_dir, reader, f"ml-{args.name}", where, args.split, 0, args.min_rating)


if __name__ == "__main__":
    run_command(main)
