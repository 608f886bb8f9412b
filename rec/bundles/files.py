"""Numbered bundles in a directory: finds, writes and publishes them.

    SAVEDMODELS/STAGE/VERSION/       published by rename, never changed
    SAVEDMODELS/STAGE/.last_version  the highest number so far: the number of a deleted version is not used again

Not covered: aliases (aliases.py), and promotion, which moves them (ops/registry.py).
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd

from rec.bundles.aliases import STATES, Aliases, parse_aliases, read_alias, read_aliases
from rec.bundles.metadata import (
    BundleMetadata,
    PairMetadata,
    check_pair,
    read_metadata,
    write_metadata,
)
from rec.errors import UserError
from rec.files import digest, is_locked, lock, sole_writer, writing
from rec.tables import read_table

MAX_USERS = 1000  # ids of known users that `read_catalogue` reads
VECTORS = "item_vectors.npy"  # in a retrieval bundle: [items, d] float32 of length 1, in the order of items.parquet
Pair = tuple[Path, Path | None]  # the directories of a retrieval and a ranking bundle


# ------------------------------------------------------------------------------------------------------------
# Which bundle?


def versions(stage_dir: Path) -> list[int]:
    """The published versions, ascending."""
    return sorted(
        int(path.name)
        for path in stage_dir.glob("*")
        if path.name.isdigit() and (path / "saved_model.pb").exists()
    )


def resolve(stage_dir: Path, reference: str | int = "latest") -> Path:
    """The bundle that a version number or an alias names. Raises UserError if there is none."""
    is_alias = str(reference) != "latest" and not str(reference).isdigit()
    aliases = read_aliases(stage_dir) if is_alias else {}
    version = pick(versions(stage_dir), aliases, reference, str(stage_dir))
    return stage_dir / str(version)


def pick(published: list[int], aliases: Aliases, reference: str | int, where: str) -> int:
    """The version that a number or an alias names.

    Args:
      published: the versions that there are.
      where: the name of the place that holds them, for the error.

    Raises:
      UserError: there is no such version.
    """
    if not published:
        raise UserError(
            f"{where} holds no bundle: train one with python -m rec.train, or name a bundle directory"
        )
    name = str(reference)
    targets = {**aliases, "latest": max(published)}
    if name in targets:
        if targets[name] in published:
            return targets[name]
        raise UserError(
            f"{where}: the alias {name!r} names version {targets[name]}, which is gone: put it back, or give the "
            "alias to another version with python -m rec.promote"
        )
    if name.isdigit() and int(name) in published:
        return int(name)
    known = ", ".join(["latest", *aliases, *map(str, published)])
    raise UserError(f"{where} has no version or alias {name!r}; it has {known}")


def retrieval_of(ranking: Path) -> Path:
    """The retrieval bundle beside it that a ranking bundle was trained for. Raises UserError if it is not there."""
    source = read_metadata(ranking, "ranking").built_from["retrieval"]
    return resolve(ranking.absolute().parent.parent / "retrieval", source.version)


def find_pair(savedmodels: Path, alias: str = "latest") -> Pair:
    """The retrieval and the ranking bundle that an alias names; the retrieval bundle alone if there is no other.

    `latest` is the latest ranking bundle and the retrieval bundle that it belongs to.
    """
    if alias == "latest":
        if not versions(savedmodels / "ranking"):
            return resolve(savedmodels / "retrieval"), None
        ranking = resolve(savedmodels / "ranking")
        return retrieval_of(ranking), ranking
    targets = read_alias(savedmodels, alias)
    if "retrieval" not in targets:
        raise UserError(f"{savedmodels} has no alias {alias!r}: python -m rec.promote gives it")
    retrieval = resolve(savedmodels / "retrieval", targets["retrieval"])
    if "ranking" not in targets:
        return retrieval, None
    return retrieval, resolve(savedmodels / "ranking", targets["ranking"])


# ------------------------------------------------------------------------------------------------------------
# Reading


def read_pair(
    retrieval: Path, ranking: Path | None = None, allow_mismatch: bool = False
) -> PairMetadata:
    """The metadata of two bundles that belong together, or of a retrieval bundle alone.

    Raises:
      UserError: a directory is not a bundle of its stage; or the ranking bundle was trained for another retrieval
        bundle, and `allow_mismatch` is false.
    """
    first = read_metadata(retrieval, "retrieval")
    if ranking is None:
        return PairMetadata(first)
    second = read_metadata(ranking, "ranking")
    if not allow_mismatch:
        check_pair(first, second, ranking)
    return PairMetadata(first, second)


def user_file(retrieval: Path) -> Path:
    """The ids of all users that a retrieval bundle knows, one per line."""
    return retrieval / "assets" / "users.txt"


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a text file, which may be larger than the memory. Only a line feed ends a line."""
    with open(path, encoding="utf-8", newline="\n") as lines:
        for line in lines:
            yield line.removesuffix("\n")


def read_catalogue(retrieval: Path) -> tuple[pd.DataFrame, list[str], np.ndarray]:
    """A retrieval bundle's items.parquet, indexed by item_id, some of the users that it knows, and the items' vectors.

    Raises:
      UserError: a file is missing or damaged.
    """
    try:
        items = read_table(retrieval / "items.parquet").set_index("item_id")
        users = list(islice(read_lines(user_file(retrieval)), MAX_USERS))
        return items, users, np.load(retrieval / VECTORS, mmap_mode="r")
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise UserError(
            f"{retrieval}: items.parquet, users.txt or {VECTORS} is missing or damaged: export the bundle again"
        ) from error


# ------------------------------------------------------------------------------------------------------------
# Publishing


@contextmanager
def draft(stage_dir: Path) -> Iterator[Path]:
    """A directory to write a bundle into. `publish` makes it a version; otherwise it is removed when the block ends.

    The next draft clears what a killed process left behind. A live process holds its draft's lock, also on another
    machine or in another container. A draft's name is not a number, so it is not a version.
    Raises UserError if the disk is full.
    """
    with ExitStack() as stack:
        with sole_writer(stage_dir, wait=True):
            stage_dir.mkdir(exist_ok=True)
            _clear_drafts(stage_dir)
            place = stage_dir / f"draft-{uuid.uuid4().hex}"
            place.mkdir()  # not by tempfile, which makes it private: TF Serving may run as another user
            stack.callback(shutil.rmtree, place, ignore_errors=True)
            stack.enter_context(lock(place / "lock", place))
        directory = place / "new"
        directory.mkdir()
        stack.enter_context(writing(stage_dir))
        yield directory


def _clear_drafts(stage_dir: Path) -> None:
    for other in stage_dir.glob("draft-*"):
        if not is_locked(other / "lock"):
            shutil.rmtree(other, ignore_errors=True)


def publish(directory: Path, stage_dir: Path, metadata: BundleMetadata) -> int:
    """Writes metadata.json into a draft and makes it the next version, by rename. Returns the version.

    Sets the metadata's version, the sha256 of every file, and the id, a hash of those.
    """
    paths = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    sums = {str(path.relative_to(directory)): digest(path) for path in paths}
    text = json.dumps(sums, sort_keys=True)
    identity = hashlib.sha256(text.encode()).hexdigest()[:16]
    with sole_writer(stage_dir, wait=True):
        version = 1 + _last_version(stage_dir)
        complete = replace(metadata, version=version, id=identity, files=sums)
        write_metadata(directory, complete)
        (stage_dir / ".last_version.new").write_text(f"{version}\n")
        os.replace(stage_dir / ".last_version.new", stage_dir / ".last_version")
        os.rename(directory, stage_dir / str(version))
    return version


def _last_version(stage_dir: Path) -> int:
    """The highest number that a version has, or had before it was deleted; 0 if there was none.

    Without .last_version, as in a directory of rec 0.1, it is the highest that any alias has ever named.
    """
    numbers = [int(path.name) for path in stage_dir.iterdir() if path.name.isdigit()]
    with suppress(OSError, ValueError):  # missing or damaged
        return max([*numbers, int((stage_dir / ".last_version").read_text())])
    return max([*numbers, *_promoted_versions(stage_dir)], default=0)


def _promoted_versions(stage_dir: Path) -> Iterator[int]:
    """The versions that aliases name or have named, as far as the files can be read."""
    root = stage_dir.parent
    stage = stage_dir.name
    for path in [stage_dir / "aliases.json", *root.glob(f"{STATES}/*/{stage}.json")]:
        with suppress(OSError, UserError):
            yield from parse_aliases(path).values()
    for path in [root / "history.jsonl", *root.glob(f"{STATES}/*/history.jsonl")]:
        with suppress(OSError, ValueError, LookupError):
            for line in path.read_text().splitlines():
                yield json.loads(line)["to"].get(stage, 0)
