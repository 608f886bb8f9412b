"""Numbered bundles, and what they are called: in a directory, or as W&B's artifacts.

    SAVEDMODELS/STAGE/VERSION/       published by rename, never changed, never numbered again
    SAVEDMODELS/STAGE/aliases.json   {alias: version}; `latest` is always the highest number
    SAVEDMODELS/history.jsonl        who moved which alias, when, from what to what and why
    SAVEDMODELS/models.config        what TF Serving should load: `stable` is production, `canary` the alias canary

The last three kinds are links into SAVEDMODELS/.promotions/current, itself a link, to a directory with a copy of each.
A move of aliases writes such a directory, then renames the one link: it happens to all stages at once, or not at all.

`LocalStore` and `WandbStore` answer the same questions of either place; rec.promote asks them. At W&B a stage's bundles
are the versions of the artifact STAGE_bundle, and an alias of several stages cannot move in one step.
"""

import fcntl
import hashlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd

from rec.errors import UserError
from rec.tables import read_table

STAGES = ("retrieval", "ranking", "recommender")
KNOWN_USERS = 1000  # user ids that a bundle tells, of all that it knows
IN_TF_SERVING = "/models"  # where its images find SAVEDMODELS
KEPT_STATES = 20  # of the aliases: somebody may just be reading an older one
PROJECT = "rec"  # of W&B, where WANDB_PROJECT names no other
CACHE = Path("~/.cache/rec/bundles")  # downloaded artifacts, by digest

Metadata = dict[str, Any]  # a bundle's metadata.json
Entry = dict[str, Any]  # of the history
Versions = dict[str, int]  # of a bundle of each stage, where there is one
Pair = tuple[Path, Path | None]  # the directories of a retrieval and a ranking bundle


def versions(stage_dir: Path) -> list[int]:
    """The published versions, ascending."""
    return sorted(
        int(p.name)
        for p in stage_dir.glob("*")
        if p.name.isdigit() and (p / "saved_model.pb").exists()
    )


def resolve(stage_dir: Path, reference: str | int = "latest") -> Path:
    """The bundle that a version number or an alias names. Raises UserError if there is none."""
    path = stage_dir / "aliases.json"
    aliases = json.loads(path.read_text()) if path.exists() else {}
    return stage_dir / str(pick(versions(stage_dir), aliases, reference, str(stage_dir)))


def pick(found: list[int], aliases: dict[str, int], reference: str | int, where: str) -> int:
    """The version, of those found in a place called `where`, that a number or an alias names; else a UserError."""
    if not found:
        raise UserError(
            f"{where} holds no bundle: train one with python -m rec.train, or name a bundle directory"
        )
    version = {**aliases, "latest": max(found)}.get(str(reference), reference)
    if not str(version).isdigit() or int(version) not in found:
        known = ", ".join(["latest", *aliases, *map(str, found)])
        raise UserError(f"{where} has no version or alias {str(reference)!r}; it has {known}")
    return int(version)


def retrieval_of(ranking: Path) -> Path:
    """The retrieval bundle that a ranking bundle was trained for, beside it. Raises UserError if it is not there."""
    version = read_metadata(ranking, "ranking")["built_from"]["retrieval"]["version"]
    return resolve(ranking.absolute().parent.parent / "retrieval", version)


def find_pair(savedmodels: Path, alias: str = "latest") -> Pair:
    """The retrieval and the ranking bundle that an alias names; the retrieval bundle alone where there is no other.

    `latest` is the latest ranking bundle and the retrieval bundle that it belongs to.
    """
    if alias == "latest":
        if not versions(savedmodels / "ranking"):
            return resolve(savedmodels / "retrieval"), None
        ranking = resolve(savedmodels / "ranking")
        return retrieval_of(ranking), ranking
    named = LocalStore(savedmodels).named(alias)  # both from one state of the aliases
    if "retrieval" not in named:
        raise UserError(f"{savedmodels} has no alias {alias!r}: python -m rec.promote gives it")
    retrieval = resolve(savedmodels / "retrieval", named["retrieval"])
    return retrieval, resolve(
        savedmodels / "ranking", named["ranking"]
    ) if "ranking" in named else None


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
    for name, digest in metadata["files"].items():
        if not (bundle / name).exists():
            raise UserError(f"{bundle} lacks {name}: export the bundle again")
        if file_digest(bundle / name) != digest:
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

    A draft that a killed process left behind is cleared by the next one; its name is not a number, so that nothing
    ever takes it for a version.
    """
    stage_dir.mkdir(parents=True, exist_ok=True)
    for stale in stage_dir.glob("draft-*"):
        if not Path("/proc", stale.name.split("-")[1]).exists():  # its process has ended
            shutil.rmtree(stale, ignore_errors=True)
    directory = stage_dir / f"draft-{os.getpid()}-{uuid.uuid4().hex}"
    directory.mkdir()  # not by tempfile, which makes it private: TF Serving may run as another user
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def publish(directory: Path, stage_dir: Path, metadata: Metadata) -> int:
    """Writes metadata.json into a draft and makes it the next version, by rename.

    Adds to the metadata: version, the sha256 of every file, an id (a hash of those), and a checksum of the metadata.
    """
    paths = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    files = {str(path.relative_to(directory)): file_digest(path) for path in paths}
    identity = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]
    version = max(versions(stage_dir), default=0) + 1
    while True:
        content = {
            "stage": stage_dir.name,
            "version": version,
            "id": identity,
            **metadata,
            "files": files,
        }
        content["checksum"] = checksum(content)
        (directory / "metadata.json").write_text(
            json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        )
        try:
            os.rename(directory, stage_dir / str(version))
            return version
        except OSError:  # another process has just published this number
            if not (stage_dir / str(version)).exists():
                raise
            version += 1


def file_digest(path: Path) -> str:
    """The sha256 of a file's bytes."""
    with open(
        path, "rb"
    ) as stream:  # a server reads this module, so it may not ask data_prep to do it
        return hashlib.file_digest(stream, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------------------
# Who is called what


class LocalStore:
    """A directory SAVEDMODELS. What is described here is what `WandbStore` does too."""

    def __init__(self, savedmodels: Path) -> None:
        self._root, self._states = savedmodels, savedmodels / ".promotions"

    def metadata(self, stage: str) -> dict[int, Metadata]:
        """What the versions of a stage say of themselves, by version, ascending."""
        stage_dir = self._root / stage
        return {
            version: read_metadata(stage_dir / str(version), stage)
            for version in versions(stage_dir)
        }

    def aliases(self, stage: str) -> dict[str, int]:
        return self._all_aliases()[stage]

    def named(self, alias: str) -> Versions:
        """The versions that the alias names."""
        return {
            stage: named[alias] for stage, named in self._all_aliases().items() if alias in named
        }

    def directory(self, stage: str, version: int) -> Path:
        """A version's files, verified. Raises UserError if one is missing or has changed."""
        path = self._root / stage / str(version)
        verify(path, stage)
        return path

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Waits for another process that promotes; a killed one holds nobody off."""
        self._states.mkdir(parents=True, exist_ok=True)
        with open(self._states / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another promotion in {self._root}", file=sys.stderr)
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def move(self, alias: str, to: Versions, entry: Entry) -> None:
        """Gives the alias to just these versions, takes it from all others, and adds the entry to the history."""
        aliases, history = self._all_aliases(), self.history()
        links = {
            self._root / stage / "aliases.json": f"../.promotions/current/{stage}.json"
            for stage in STAGES
        }
        links |= {
            self._root / name: f".promotions/current/{name}"
            for name in ("history.jsonl", "models.config")
        }
        missing = {
            path: link
            for path, link in links.items()
            if path.parent.is_dir() and not path.is_symlink()
        }
        if any(path.exists() for path in missing):
            self._become(
                aliases, history
            )  # what was written by hand moves in before a link takes its place
        for path, link in missing.items():
            _link(path, link)
        for stage, named in aliases.items():
            named.pop(alias, None)
            if stage in to:
                named[alias] = to[stage]
        self._become(aliases, [*history, entry])

    def history(self) -> list[Entry]:
        """All entries, the oldest first."""
        path = self._root / "history.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def _all_aliases(self) -> dict[str, dict[str, int]]:
        """By stage, all from one state."""
        state, found = (self._states / "current").resolve(), {}
        for stage in STAGES:
            path = self._root / stage / "aliases.json"
            path = state / f"{stage}.json" if path.is_symlink() else path
            found[stage] = json.loads(path.read_text()) if path.exists() else {}
        return found if state == (self._states / "current").resolve() else self._all_aliases()

    def _become(self, aliases: dict[str, dict[str, int]], history: list[dict[str, Any]]) -> None:
        """Writes a state beside the current one, then takes its place in one step."""
        current = self._states / "current"
        number = 1 + int(current.resolve().name) if current.exists() else 1
        new = self._states / str(number)
        shutil.rmtree(new, ignore_errors=True)  # what a killed process left
        new.mkdir()
        for stage, named in aliases.items():
            (new / f"{stage}.json").write_text(json.dumps(named, indent=1) + "\n")
        (new / "history.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in history))
        (new / "models.config").write_text(_models_config(aliases))
        _link(current, new.name)
        shutil.rmtree(self._states / str(number - KEPT_STATES), ignore_errors=True)


def _link(path: Path, target: str) -> None:
    """Makes `path` a symbolic link, in the place of what it was."""
    beside = path.with_name(f"{path.name}.new")
    beside.unlink(missing_ok=True)
    beside.symlink_to(target)
    os.replace(beside, path)


def _models_config(aliases: dict[str, dict[str, int]]) -> str:
    """TF Serving's ModelServerConfig as text: of each stage the versions with a label, and their labels."""
    blocks = []
    for stage, named in aliases.items():
        stable = named.get("production", named.get("canary"))
        if stable is None:
            continue
        labels = {"stable": stable, "canary": named.get("canary", stable)}
        chosen = " ".join(f"versions: {version}" for version in sorted(set(labels.values())))
        told = "\n".join(
            f'    version_labels {{ key: "{label}" value: {n} }}' for label, n in labels.items()
        )
        blocks.append(
            f'  config {{\n    name: "{stage}"\n    base_path: "{IN_TF_SERVING}/{stage}"\n'
            f'    model_platform: "tensorflow"\n    model_version_policy {{ specific {{ {chosen} }} }}\n{told}\n  }}\n'
        )
    return f"model_config_list {{\n{''.join(blocks)}}}\n"


class WandbStore:
    """The artifacts STAGE_bundle of a W&B project. A version is W&B's: 3 is v3."""

    def __init__(self, project: str = "") -> None:
        """`project`: ENTITY/PROJECT, or PROJECT of the default entity; by default WANDB_PROJECT or `rec`."""
        self._project = project or os.environ.get("WANDB_PROJECT", PROJECT)
        with self._asking(self._project):
            import wandb

            self._api = wandb.Api(timeout=30)

    def metadata(self, stage: str) -> dict[int, Metadata]:
        return {
            version: dict(artifact.metadata) for version, artifact in self._artifacts(stage).items()
        }

    def aliases(self, stage: str) -> dict[str, int]:
        return {
            alias: version
            for version, found in self._artifacts(stage).items()
            for alias in found.aliases
        }

    def named(self, alias: str) -> Versions:
        return {stage: named[alias] for stage in STAGES if alias in (named := self.aliases(stage))}

    def directory(self, stage: str, version: int) -> Path:
        artifact = self._artifacts(stage)[version]
        place = CACHE.expanduser() / artifact.digest
        if place.exists():
            with suppress(UserError):
                verify(place, stage)
                return place
            shutil.rmtree(place)
        with draft(place.parent) as beside, self._asking(artifact.name):
            artifact.download(root=str(beside), skip_cache=True)
            verify(beside, stage)
            with suppress(OSError):  # another process has just brought the same
                os.rename(beside, place)
        return place

    writing = nullcontext  # nothing holds off other writers here

    def move(self, alias: str, to: Versions, entry: Entry) -> None:
        artifacts = {stage: self._artifacts(stage) for stage in STAGES}
        with self._asking(self._project):
            stage, version = max(entry["to"].items(), key=lambda each: STAGES.index(each[0]))
            told = artifacts[stage][version]
            told.metadata["promotions"] = [*told.metadata.get("promotions", []), entry]
            told.save()
            for stage, found in artifacts.items():
                for version, artifact in found.items():
                    is_named, has_alias = to.get(stage) == version, alias in artifact.aliases
                    if is_named != has_alias:
                        (artifact.aliases.append if is_named else artifact.aliases.remove)(alias)
                        artifact.save()

    def history(self) -> list[Entry]:
        told = [
            each.get("promotions", []) for stage in STAGES for each in self.metadata(stage).values()
        ]
        return sorted(sum(told, []), key=lambda entry: entry["time"])

    def _artifacts(self, stage: str) -> dict[int, Any]:
        """By version, ascending; none where the project has no such artifact."""

        with self._asking(self._project):
            try:
                found = list(self._api.artifacts("model", f"{self._project}/{stage}_bundle"))
            except ValueError:
                found = []
            return {int(each.version.removeprefix("v")): each for each in reversed(found)}

    @classmethod
    def find(cls, reference: str, stage: str) -> tuple["WandbStore", int]:
        """The store and the version that ENTITY/PROJECT/STAGE_bundle:VERSION_OR_ALIAS names.

        Raises:
          UserError: it names no artifact of that stage, or W&B has none, or cannot be reached.
        """
        path, _, version = reference.partition(":")
        project, _, name = path.rpartition("/")
        if name != f"{stage}_bundle":
            raise UserError(f"{reference} is not [ENTITY/PROJECT/]{stage}_bundle:VERSION_OR_ALIAS")
        store = cls(project)
        found, aliases = store._artifacts(stage), store.aliases(stage)
        return store, pick(
            list(found), aliases, version.removeprefix("v") or "latest", f"W&B's {path}"
        )

    @contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        """Tells what W&B says as one sentence."""
        try:
            yield
        except UserError:
            raise
        except (
            Exception
        ) as error:  # its client raises its own errors, those of requests, and ValueError
            raise UserError(f"W&B, {what}: {' '.join(str(error).split())}") from error


# ------------------------------------------------------------------------------------------------------------
# Versions that belong together

Store = LocalStore | WandbStore


def built_from(store: Store, stage: str, version: int) -> Versions:
    """The versions that a version was built from, by W&B's numbers there. Raises UserError if one is gone."""
    found = {}
    for part, wanted in store.metadata(stage)[version]["built_from"].items():
        same = [
            number
            for number, metadata in store.metadata(part).items()
            if metadata["id"] == wanted["id"]
        ]
        if not same:
            raise UserError(
                f"{stage} {version} was built from {part} {wanted['version']}, which is gone"
            )
        found[part] = wanted["version"] if wanted["version"] in same else max(same)
    return found


def together(store: Store, stage: str, version: int, current: Versions) -> Versions:
    """The versions that have the alias once `version` of `stage` has it, which `current` have now."""
    if stage == "recommender":
        return built_from(store, stage, version) | {stage: version}
    return {name: number for name, number in current.items() if name != "recommender"} | {
        stage: version
    }


def bundles(store: Store, of: Versions) -> Pair:
    """The directories of a retrieval and a ranking version, verified."""
    ranking = store.directory("ranking", of["ranking"]) if "ranking" in of else None
    return store.directory("retrieval", of["retrieval"]), ranking
