"""Numbered bundles in a directory: found, read, verified, written and published.

    SAVEDMODELS/STAGE/VERSION/       published by rename, never changed
    SAVEDMODELS/STAGE/.last_version  the highest number so far: the number of a deleted version is not used again
    SAVEDMODELS/STAGE/aliases.json   {alias: version}; `latest` is always the highest number

Promotion (ops/registry.py) makes aliases.json a link into SAVEDMODELS/.promotions/current, itself a link, to a
directory with the aliases of all stages. A missing aliases.json is read from there. A plain file, written by hand or by
a copy that followed the links, is read instead.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd

from rec.errors import UserError
from rec.files import digest, is_locked, lock, sole_writer, writing
from rec.tables import read_table

STAGES = ("retrieval", "ranking", "recommender")
KNOWN_USERS = 1000  # user ids that a bundle tells, of all that it knows
STATES = ".promotions"  # in SAVEDMODELS: what each move of aliases left

Metadata = dict[str, Any]  # a bundle's metadata.json
Entry = dict[str, Any]  # of the history of aliases
Versions = dict[str, int]  # of a bundle of each stage, where there is one
Pair = tuple[Path, Path | None]  # the directories of a retrieval and a ranking bundle


# ------------------------------------------------------------------------------------------------------------
# Found


def versions(stage_dir: Path) -> list[int]:
    """The published versions, ascending."""
    return sorted(
        int(p.name)
        for p in stage_dir.glob("*")
        if p.name.isdigit() and (p / "saved_model.pb").exists()
    )


def resolve(stage_dir: Path, reference: str | int = "latest") -> Path:
    """The bundle that a version number or an alias names. Raises UserError if there is none."""
    is_alias = str(reference) != "latest" and not str(reference).isdigit()
    aliases = read_aliases(stage_dir) if is_alias else {}
    return stage_dir / str(pick(versions(stage_dir), aliases, reference, str(stage_dir)))


def pick(found: list[int], aliases: dict[str, int], reference: str | int, where: str) -> int:
    """The version, of those found in a place called `where`, that a number or an alias names; else a UserError."""
    if not found:
        raise UserError(
            f"{where} holds no bundle: train one with python -m rec.train, or name a bundle directory"
        )
    named = {**aliases, "latest": max(found)}.get(str(reference))
    if named is not None and named not in found:
        raise UserError(
            f"{where}: the alias {str(reference)!r} names version {named}, which is gone: put it back, or give the "
            "alias to another version with python -m rec.promote"
        )
    version = reference if named is None else named
    if not str(version).isdigit() or int(version) not in found:
        known = ", ".join(["latest", *aliases, *map(str, found)])
        raise UserError(f"{where} has no version or alias {str(reference)!r}; it has {known}")
    return int(version)


def retrieval_of(ranking: Path) -> Path:
    """The retrieval bundle that a ranking bundle was trained for, beside it. Raises UserError if it is not there."""
    version = read_metadata(ranking, "ranking")["built_from"]["retrieval"]["version"]
    return resolve(ranking.absolute().parent.parent / "retrieval", version)


def find_pair(savedmodels: Path, alias: str = "latest") -> Pair:
    """The retrieval and the ranking bundle that an alias names; the retrieval bundle alone if there is no other.

    `latest` is the latest ranking bundle and the retrieval bundle that it belongs to.
    """
    if alias == "latest":
        if not versions(savedmodels / "ranking"):
            return resolve(savedmodels / "retrieval"), None
        ranking = resolve(savedmodels / "ranking")
        return retrieval_of(ranking), ranking
    named = versions_named(savedmodels, alias)
    if "retrieval" not in named:
        raise UserError(f"{savedmodels} has no alias {alias!r}: python -m rec.promote gives it")
    retrieval = resolve(savedmodels / "retrieval", named["retrieval"])
    if "ranking" not in named:
        return retrieval, None
    return retrieval, resolve(savedmodels / "ranking", named["ranking"])


# ------------------------------------------------------------------------------------------------------------
# Read and written


def read_metadata(bundle: Path, stage: str | None = None) -> Metadata:
    """A bundle's metadata.json.

    Raises:
      UserError: the directory is not a bundle, or not one of `stage`, or the file has changed since the export.
    """
    path = bundle / "metadata.json"
    if not path.exists():
        raise UserError(
            f"{bundle} is not a bundle: it has no metadata.json (a bundle is SAVEDMODELS/STAGE/VERSION)"
        )
    try:
        metadata = json.loads(path.read_text())
        found = metadata["stage"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read: export the bundle again") from error
    if metadata.get("checksum") != checksum(metadata):
        raise UserError(f"{path} has changed since the export: export the bundle again")
    if stage not in (None, found):
        raise UserError(f"{bundle} is a {found} bundle, not a {stage} bundle")
    return metadata


def verify(bundle: Path, stage: str | None = None) -> Metadata:
    """A bundle's metadata, once every file in it has proved to be what was exported.

    Raises:
      UserError: the directory is not a bundle, or not of that stage, or a file of it is missing or has changed.
    """
    metadata = read_metadata(bundle, stage)
    for name, expected in metadata["files"].items():
        if not (bundle / name).exists():
            raise UserError(f"{bundle} lacks {name}: export the bundle again")
        if digest(bundle / name) != expected:
            raise UserError(
                f"{bundle}/{name} has changed since the export: export the bundle again"
            )
    return metadata


def checksum(metadata: Metadata) -> str:
    """Of all that the metadata say but this."""
    content = {key: value for key, value in metadata.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_pair(retrieval: Metadata, ranking: Metadata, where: Path | str) -> None:
    """Raises UserError if the ranking bundle was not trained for this retrieval bundle."""
    expected = ranking["built_from"]["retrieval"]
    if expected != {"version": retrieval["version"], "id": retrieval["id"]}:
        trained = f"was trained for retrieval version {expected['version']}, not for version {retrieval['version']}"
        raise UserError(f"{where} {trained}: name a matching pair, or pass --allow-mismatch")


def read_catalogue(retrieval: Path) -> tuple[pd.DataFrame, list[str]]:
    """A retrieval bundle's items.parquet, indexed by item_id, and some of the users that it knows.

    Raises:
      UserError: a file is missing or damaged.
    """
    try:
        items = read_table(retrieval / "items.parquet").set_index("item_id")
        with open(retrieval / "assets" / "users.txt", encoding="utf-8", newline="\n") as lines:
            return items, [line.removesuffix("\n") for line in islice(lines, KNOWN_USERS)]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{retrieval}: items.parquet or users.txt is damaged: export the bundle again"
        ) from error


@contextmanager
def draft(stage_dir: Path) -> Iterator[Path]:
    """A directory to write a bundle into, removed when the block ends; `publish` makes it a version before that.

    A draft that a killed process left behind is cleared by the next one. A living process holds its draft's lock, on
    whatever machine or in whatever container it runs. A draft's name is no number, so that it is no version.
    Raises UserError if the disk is full.
    """
    with ExitStack() as until_the_end:
        with sole_writer(stage_dir, wait=True):
            stage_dir.mkdir(exist_ok=True)
            for other in stage_dir.glob("draft-*"):
                if not is_locked(other / "lock"):
                    shutil.rmtree(other, ignore_errors=True)
            place = stage_dir / f"draft-{uuid.uuid4().hex}"
            place.mkdir()  # not by tempfile, which makes it private: TF Serving may run as another user
            until_the_end.callback(shutil.rmtree, place, ignore_errors=True)
            until_the_end.enter_context(lock(place / "lock", place))
        directory = place / "new"
        directory.mkdir()
        until_the_end.enter_context(writing(stage_dir))
        yield directory


def publish(directory: Path, stage_dir: Path, metadata: Metadata) -> int:
    """Writes metadata.json into a draft and makes it the next version, by rename.

    Adds to the metadata: version, the sha256 of every file, an id (a hash of those), and a checksum of the metadata.
    """
    paths = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    files = {str(path.relative_to(directory)): digest(path) for path in paths}
    identity = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]
    with sole_writer(stage_dir, wait=True):
        version = 1 + _last_version(stage_dir)
        content = {
            "stage": stage_dir.name,
            "version": version,
            "id": identity,
            **metadata,
            "files": files,
        }
        content["checksum"] = checksum(content)
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        (directory / "metadata.json").write_text(text)
        _replace_text(stage_dir / ".last_version", f"{version}\n")
        os.rename(directory, stage_dir / str(version))
    return version


def _last_version(stage_dir: Path) -> int:
    """The highest number that a version has, or had before it was deleted; 0 if there was none.

    Without .last_version, as in a store of rec 0.1, the numbers that any alias has ever named count.
    """
    numbers = [int(path.name) for path in stage_dir.iterdir() if path.name.isdigit()]
    with suppress(OSError, ValueError):  # missing or damaged
        return max([*numbers, int((stage_dir / ".last_version").read_text())])
    root, stage = stage_dir.parent, stage_dir.name
    for path in [stage_dir / "aliases.json", *root.glob(f"{STATES}/*/{stage}.json")]:
        with suppress(OSError, UserError):
            numbers += parse_aliases(path).values()
    for path in [root / "history.jsonl", *root.glob(f"{STATES}/*/history.jsonl")]:
        with suppress(OSError, UserError):
            for entry in parse_history(path):
                named = [entry.get(side, {}) for side in ("from", "to")]
                numbers += [each[stage] for each in named if stage in each]
    return max(numbers, default=0)


def _replace_text(path: Path, text: str) -> None:
    """Writes a file that is replaced in one step."""
    beside = path.with_name(f"{path.name}.new")
    beside.write_text(text)
    os.replace(beside, path)


# ------------------------------------------------------------------------------------------------------------
# Aliases


def versions_named(savedmodels: Path, alias: str) -> Versions:
    """The versions that have an alias, by stage."""
    aliases = read_all_aliases(savedmodels)
    return {stage: named[alias] for stage, named in aliases.items() if alias in named}


def read_all_aliases(savedmodels: Path) -> dict[str, dict[str, int]]:
    """{alias: version} by stage, all from one state."""
    current = savedmodels / STATES / "current"
    before = current.resolve()
    aliases = {stage: read_aliases(savedmodels / stage) for stage in STAGES}
    return aliases if before == current.resolve() else read_all_aliases(savedmodels)


def read_aliases(stage_dir: Path) -> dict[str, int]:
    """The versions of a stage that have aliases. Raises UserError if the file is damaged, or a link leads nowhere."""
    path = alias_file(stage_dir / "aliases.json", stage_dir.parent, f"{stage_dir.name}.json")
    return {} if path is None or not path.exists() else parse_aliases(path)


def alias_file(path: Path, root: Path, name: str) -> Path | None:
    """The file to read for `path`: itself if it is a plain file, else the current state's file `name`, if there is one.

    Raises:
      UserError: the state is missing that `path`, or the states that are there, should lead to.
    """
    is_link = path.is_symlink()  # asked before the state: a link is made only when there is one
    if path.exists() and not is_link:
        return path
    state = (root / STATES / "current").resolve()
    if state.is_dir():
        return state / name
    if numbers := state_numbers(root):
        raise UserError(
            f"{root}/{STATES}/current should be a link to the newest state beside it, and a copy seems to have left it "
            f"out: run ln -sfn {max(numbers)} {root}/{STATES}/current"
        )
    if is_link:
        raise UserError(
            f"{path} is a link into {root}/{STATES}, which is missing: copy that too, or remove the link to go on "
            "without aliases and history"
        )
    return None


def state_numbers(root: Path) -> list[int]:
    return [int(path.name) for path in (root / STATES).glob("*") if path.name.isdigit()]


def parse_aliases(path: Path) -> dict[str, int]:
    try:
        named = json.loads(path.read_text())
        if all(type(version) is int for version in named.values()):
            return named
    except (ValueError, AttributeError):
        pass
    raise UserError(
        f"{path} is damaged: it should be {{ALIAS: VERSION, ..}}; correct it, or restore it from a copy"
    )


def parse_history(path: Path) -> list[Entry]:
    entries = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            entries.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            hint = "remove the line, or restore the file from a copy"
            raise UserError(f"{path}, line {number} is damaged: {hint}") from None
    return entries
