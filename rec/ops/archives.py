"""Zips that others publish: downloaded, resumed where an earlier run was cut off, and unpacked with care.

Every way in which a zip can be wrong is one sentence: cut off, damaged, encrypted, packed in a way that Python does not
know, too large, or another file altogether.
"""

import http.client
import lzma
import shutil
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path

from tqdm import tqdm

from rec.data_prep.raw_files import kind_of
from rec.errors import UserError
from rec.files import digest

# The most bytes that a file may unpack to. The largest of MovieLens, the ratings of 32m, has 0.9 GB.
UNPACKED_LIMIT = 4 * 2**30
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
DAMAGES = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError)
OTHER_METHODS = {9: "deflate64", 93: "zstd", 95: "xz", 98: "PPMd"}  # of those that Python lacks


def unpack(source: Path, member: str, folder: Path) -> Path:
    """A file of a zip, unpacked. Raises UserError, which says what the zip is, if that cannot be done."""
    kind = kind_of(source) or "text"
    if not kind.startswith("a zip"):
        hint = "name a zip or folder of GroupLens' with --source"
        raise UserError(f"{source} is no zip file, it seems to be {kind}: {hint}")
    try:
        with zipfile.ZipFile(source) as archive:
            if problem := _problem_of(archive, member):
                raise UserError(f"{source} {problem}")
            return Path(archive.extract(member, folder))
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
        return f"is refused: {member} would unpack to {size} that are allowed"
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
