"""MovieLens, each in GroupLens' own file format -> a dataset directory.

    python -m rec.data_prep.movielens --name 100k --split leave_one_out --output-dir data/ml-100k

- 100k (tabs, genre flags, Latin-1), 1m and 10m (`::`), 20m, 25m, 32m and latest-small (CSV).
- Downloads the zip beside the output directory, resuming where an earlier run was cut off, and compares its sha256
  with the one below; `--source` takes a zip or a folder that you have, whatever its sha256 is.
- Items: title (without the year), year, genres. Users (100k and 1m): age, gender, occupation.

The data may be used for research; read GroupLens' README of each. Not covered: tags, the tag genome, links.
Source: F. M. Harper and J. A. Konstan, The MovieLens Datasets: History and Context, https://doi.org/10.1145/2827872
"""

import functools
import http.client
import lzma
import shutil
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path

from duckdb import DuckDBPyConnection as Connection
from tqdm import tqdm

from rec.data_prep.columns import ListColumns
from rec.data_prep.raw_files import RawFile, kind_of, literal, quoted
from rec.data_prep.rows import in_a_sentence
from rec.data_prep.split import Filters
from rec.data_prep.tabular import load_features, load_interactions
from rec.data_prep.write import output_parser, prepare
from rec.errors import UserError, note, run_command
from rec.files import digest, sole_writer

BASE_URL = "https://files.grouplens.org/datasets/movielens"
FLAGS = """Action Adventure Animation Children's Comedy Crime Documentary Drama Fantasy Film-Noir Horror Musical
    Mystery Romance Sci-Fi Thriller War Western"""
FORMATS = {  # file -> its delimiter and columns; a CSV names them in its first line
    "u.data": ("\t", "userId movieId rating timestamp"),
    "u.item": ("|", f"movieId title date video url unknown {FLAGS}"),
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
# sha256 of GroupLens' own zips. They do not change, but for latest-small, which GroupLens may replace.
DIGESTS = {
    "100k": "50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229",
    "1m": "a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20",
    "10m": "813c411ccb6122564edfe752e7f80c4dcc5aa25fa94c93622f6877a7ba252862",
    "20m": "96f243c338a8665f6bcc89c53edf6ee39162a846940de6b7c8c48aeada765ff3",
    "25m": "8b21cfb7eb1706b4ec0aac894368d90acf26ebdfb6aced3ebd4ad5bd1eb9c6aa",
    "32m": "e4a68655d7386b8f95f2f2424b2ff975dfdd15ffd59e0d864a14dca43e99d6ee",
    "latest-small": "696d65a3dfceac7c45750ad32df2c259311949efec81f0f144fdfb91ebc9e436",
}
# The most bytes that a file of a zip may unpack to. The largest, the ratings of 32m, has 0.9 GB.
UNPACKED_LIMIT = 4 * 2**30
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
DAMAGES = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError)
OTHER_METHODS = {9: "deflate64", 93: "zstd", 95: "xz", 98: "PPMd"}  # of those that Python lacks
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
        flags = [f"case when {quoted(flag)} = 1 then {literal(flag)} end" for flag in FLAGS.split()]
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
        path = _unpack(source, f"{folder}/{file}", scratch)
    else:
        places = [source / file, source / folder / file]
        path = next((place for place in places if place.is_file()), source)
        title = str(path)
        if path is source:
            raise UserError(f"{source} holds no {file}: is it really {folder}?")
    if file == "u.item" or (name, file) == ("1m", "movies.dat"):  # titles in Latin-1
        text = path.read_text("latin-1")
        path = scratch / file
        path.write_text(text, "utf-8")
    delimiter, columns = FORMATS[file]
    quote = "" if columns else '"'
    return RawFile(path, delimiter, quote, tuple(columns.split()), title=title)


def _unpack(source: Path, member: str, scratch: Path) -> Path:
    """A file of a zip, unpacked. Raises UserError, which says what the zip is, if that cannot be done."""
    kind = kind_of(source) or "text"
    if not kind.startswith("a zip"):
        hint = "name a zip or folder of GroupLens' with --source"
        raise UserError(f"{source} is no zip file, it seems to be {kind}: {hint}")
    try:
        with zipfile.ZipFile(source) as archive:
            if problem := _problem_of(archive, member):
                raise UserError(f"{source} {problem}")
            return Path(archive.extract(member, scratch))
    except (*DAMAGES, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # the disk is full, say
            raise
        hint = "delete it, then run the command again or fetch it yourself"
        raise UserError(f"{source} is no intact zip file ({error}): {hint}") from None


def _problem_of(archive: zipfile.ZipFile, member: str) -> str:
    """Why a file of a zip cannot be unpacked: it is missing, encrypted, too large, or packed in a way unknown here."""
    if member not in archive.namelist():
        folder, _, file = member.partition("/")
        others = sorted({name.partition("/")[0] for name in archive.namelist()})
        listed = ", ".join(others[:3]) or "nothing"
        return f"holds no {file} of {folder}: is it really {folder}? It holds {listed}"
    info = archive.getinfo(member)
    hint = "unpack it yourself and name the folder with --source"
    if info.flag_bits & 1:
        return f"is an encrypted zip, as GroupLens' are not: {hint}"
    if info.compress_type not in METHODS:
        method = OTHER_METHODS.get(info.compress_type, f"method {info.compress_type}")
        return f"is a zip packed by {method}, which Python cannot unpack: {hint}"
    if info.file_size > UNPACKED_LIMIT:
        size = f"{info.file_size:,} bytes, more than the {UNPACKED_LIMIT:,}"
        return f"is no MovieLens: {member} would unpack to {size} that any file of it needs"
    return ""


def download(url: str, target: Path, sha256: str) -> None:
    """Fetches `url` to `target`, through `target`.part which the next run continues if this one is cut off.

    Raises UserError for no connection, one that breaks, or a file with another sha256.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    try:
        _receive(url, part)
    except (OSError, http.client.HTTPException) as error:  # no connection and timeouts are OSErrors
        hint = "run the command again to resume, or fetch it yourself and name it with --source"
        raise UserError(f"the download of {url} failed ({error}): {hint}") from None
    received = digest(part)
    if received != sha256:
        part.unlink()
        raise UserError(
            f"{url} arrived damaged, or is not the file that is known here (its sha256 is"
            f" {received}, not {sha256}): run the command again, or fetch the file yourself and, if"
            " you trust it, name it with --source"
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
    mode = "ab" if response.status == 206 else "wb"  # a server may not know ranges
    with response, open(part, mode) as file:
        start = file.tell()
        total = start + int(response.headers.get("Content-Length") or 0)
        bar = tqdm.wrapattr(response, "read", desc=part.stem, initial=start, total=total)
        with bar as received:
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
        engine=args.engine,
        wait=args.wait,
    )


if __name__ == "__main__":
    run_command(main)
