"""Numbered bundles and their aliases in a directory: `SAVEDMODELS/STAGE/VERSION/`.

A version is published by rename, never changed, and never numbered again. `aliases.json` beside the versions names some
of them; `latest` is always the highest number. Not covered here: choosing a version by a metric.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd

from rec.errors import UserError

STAGES = ("retrieval", "ranking", "recommender")
KNOWN_USERS = 1000  # user ids that a bundle tells, of all that it knows


def versions(stage_dir: Path) -> list[int]:
    """The published versions, ascending."""
    return sorted(int(p.name) for p in stage_dir.glob("*") if p.name.isdigit() and (p / "saved_model.pb").exists())


def resolve(stage_dir: Path, reference: str | int = "latest") -> Path:
    """The bundle that a version number or an alias names. Raises UserError if there is none."""
    found = versions(stage_dir)
    if not found:
        raise UserError(f"{stage_dir} holds no bundle: train one with python -m rec.train, or name a bundle directory")
    if str(reference) == "latest":
        return stage_dir / str(found[-1])
    aliases = _aliases(stage_dir)
    version = aliases.get(str(reference), reference)
    if not str(version).isdigit() or int(version) not in found:
        known = ", ".join(["latest", *aliases, *map(str, found)])
        raise UserError(f"{stage_dir} has no version or alias {str(reference)!r}; it has {known}")
    return stage_dir / str(version)


def _aliases(stage_dir: Path) -> dict[str, int]:
    path = stage_dir / "aliases.json"
    return json.loads(path.read_text()) if path.exists() else {}


def retrieval_of(ranking: Path) -> Path:
    """The retrieval bundle that a ranking bundle was trained for, beside it. Raises UserError if it is not there."""
    version = read_metadata(ranking, "ranking")["built_from"]["retrieval"]["version"]
    return resolve(ranking.absolute().parent.parent / "retrieval", version)


def latest_pair(savedmodels: Path) -> tuple[Path, Path | None]:
    """The latest ranking bundle and the retrieval bundle that it belongs to; or the latest retrieval bundle alone."""
    if not versions(savedmodels / "ranking"):
        return resolve(savedmodels / "retrieval"), None
    ranking = resolve(savedmodels / "ranking")
    return retrieval_of(ranking), ranking


def read_metadata(bundle: Path, stage: str | None = None) -> dict[str, Any]:
    """A bundle's metadata.json. Raises UserError if the directory is not a bundle, or not one of `stage`."""
    path = bundle / "metadata.json"
    if not path.exists():
        raise UserError(f"{bundle} is not a bundle: it has no metadata.json (a bundle is SAVEDMODELS/STAGE/VERSION)")
    try:
        metadata = json.loads(path.read_text())
        found = metadata["stage"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read: export the bundle again") from error
    if stage not in (None, found):
        raise UserError(f"{bundle} is a {found} bundle, not a {stage} bundle")
    return metadata


def check_pair(retrieval: dict[str, Any], ranking: dict[str, Any], where: Path | str) -> None:
    """Raises UserError if the ranking bundle was not trained for this retrieval bundle."""
    expected = ranking["built_from"]["retrieval"]
    if expected != {"version": retrieval["version"], "id": retrieval["id"]}:
        raise UserError(
            f"{where} was trained for retrieval version {expected['version']}, not for version "
            f"{retrieval['version']}: name a matching pair, or pass --allow-mismatch"
        )


def read_catalogue(retrieval: Path) -> tuple[pd.DataFrame, list[str]]:
    """A retrieval bundle's items.parquet, indexed by item_id, and some of the users that it knows.

    Raises:
      UserError: a file is missing or damaged.
    """
    try:
        items = pd.read_parquet(retrieval / "items.parquet").set_index("item_id")
        with open(retrieval / "assets" / "users.txt", encoding="utf-8", newline="\n") as lines:
            return items, [line.removesuffix("\n") for line in islice(lines, KNOWN_USERS)]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{retrieval}: items.parquet or users.txt is damaged: export the bundle again") from error


@contextmanager
def draft(stage_dir: Path) -> Iterator[Path]:
    """A directory to write a bundle into, removed when the block ends; `publish` makes it a version before that.

    A draft that a killed process left behind is cleared by the next one; its name is not a number, so that nothing
    ever takes it for a version.
    """
    stage_dir.mkdir(parents=True, exist_ok=True)
    for stale in stage_dir.glob("draft-*"):
        if not _is_running(stale):
            shutil.rmtree(stale, ignore_errors=True)
    directory = stage_dir / f"draft-{os.getpid()}-{uuid.uuid4().hex}"
    directory.mkdir()  # not by tempfile, which makes it private: TF Serving may run as another user
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def publish(directory: Path, stage_dir: Path, metadata: dict[str, Any]) -> int:
    """Writes metadata.json into a draft and makes it the next version, by rename.

    Adds to the metadata: version, the sha256 of every file, and an id (a hash of those).
    """
    files = file_digests(directory)
    identity = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]
    version = max(versions(stage_dir), default=0) + 1
    while True:
        content = {"stage": stage_dir.name, "version": version, "id": identity, **metadata, "files": files}
        (directory / "metadata.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        try:
            os.rename(directory, stage_dir / str(version))
            return version
        except OSError:  # another process has just published this number
            if not (stage_dir / str(version)).exists():
                raise
            version += 1


def _is_running(draft: Path) -> bool:
    try:
        os.kill(int(draft.name.split("-")[1]), 0)
    except OSError as error:
        return isinstance(error, PermissionError)  # it runs, as another user
    return True


def file_digests(directory: Path) -> dict[str, str]:
    """sha256 of every file below a directory, by its path in it."""
    digests = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        with open(path, "rb") as stream:  # a server reads this module, so it may not ask data_prep to do it
            digests[str(path.relative_to(directory))] = hashlib.file_digest(stream, "sha256").hexdigest()
    return digests
