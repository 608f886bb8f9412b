"""Numbered bundles, and what they are called: in a directory, or as W&B's artifacts.

    SAVEDMODELS/STAGE/VERSION/       published by rename, never changed
    SAVEDMODELS/STAGE/.last_version  the highest number so far: the number of a deleted version is not used again
    SAVEDMODELS/STAGE/aliases.json   {alias: version}; `latest` is always the highest number
    SAVEDMODELS/history.jsonl        who moved which alias, when, from what to what and why
    SAVEDMODELS/models.config        what TF Serving should load: `stable` is production, `canary` the alias canary

The last three kinds are links into SAVEDMODELS/.promotions/current, itself a link, to a directory with a copy of each.
A move of aliases writes such a directory, then renames the one link: it happens to all stages at once, or not at all.
A missing aliases.json or history.jsonl is read from there; one that is a plain file (written by hand, or by a copy that
followed the links) is read instead, and the next move takes it over.

`LocalStore` and `WandbStore` answer the same questions of either place; rec.promote asks them. At W&B a stage's bundles
are the versions of the artifact STAGE_bundle, and an alias of several stages cannot move in one step.
"""

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd

from rec.errors import UserError
from rec.files import digest, is_locked, lock, replace_directory, sole_writer, writing

STAGES = ("retrieval", "ranking", "recommender")
KNOWN_USERS = 1000  # user ids that a bundle tells, of all that it knows
IN_TF_SERVING = "/models"  # where its images find SAVEDMODELS
STATES = ".promotions"  # in SAVEDMODELS
KEPT_STATES = 20  # of the aliases: somebody may just be reading an older one
ALIAS = r"(?!latest$|v\d+$|id-)[A-Za-z][A-Za-z0-9._-]*"  # W&B reads v3 as a version; id-... tags a bundle there
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
    is_alias = str(reference) != "latest" and not str(reference).isdigit()
    aliases = _read_aliases(stage_dir) if is_alias else {}
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
    for name, expected in metadata["files"].items():
        if not (bundle / name).exists():
            raise UserError(f"{bundle} lacks {name}: export the bundle again")
        if digest(bundle / name) != expected:
            raise UserError(
                f"{bundle}/{name} has changed since the export: export the bundle again"
            )
    return metadata


def _is_whole(bundle: Path, stage: str) -> bool:
    try:
        verify(bundle, stage)
    except UserError:
        return False
    return True


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

    The values keep Arrow's types: pandas' own would turn whole numbers with gaps into floating point.

    Raises:
      UserError: a file is missing or damaged.
    """
    try:
        path = retrieval / "items.parquet"
        items = pd.read_parquet(path, dtype_backend="pyarrow").set_index("item_id")
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
            numbers += _parse_aliases(path).values()
    for path in [root / "history.jsonl", *root.glob(f"{STATES}/*/history.jsonl")]:
        with suppress(OSError, UserError):
            for entry in _parse_history(path):
                named = [entry.get(side, {}) for side in ("from", "to")]
                numbers += [each[stage] for each in named if stage in each]
    return max(numbers, default=0)


def _replace_text(path: Path, text: str) -> None:
    """Writes a file that is replaced in one step."""
    beside = path.with_name(f"{path.name}.new")
    beside.write_text(text)
    os.replace(beside, path)


# ------------------------------------------------------------------------------------------------------------
# Who is called what


class LocalStore:
    """A directory SAVEDMODELS. What is described here is what `WandbStore` does too."""

    def __init__(self, savedmodels: Path) -> None:
        self._root, self._states = savedmodels, savedmodels / STATES

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
        if not path.exists():
            raise UserError(f"{stage} {version} is gone: there is no {path}")
        verify(path, stage)
        return path

    def writing(self) -> AbstractContextManager[None]:
        """Waits for another process that promotes; a killed one holds nobody off."""
        return sole_writer(self._states, wait=True)

    def move(self, alias: str, to: Versions, entry: Entry) -> None:
        """Gives the alias to just these versions, takes it from all others, and adds the entry to the history."""
        aliases, history = self._all_aliases(), self.history()
        links = {
            self._root / stage / "aliases.json": f"../{STATES}/current/{stage}.json"
            for stage in STAGES
        }
        links |= {
            self._root / name: f"{STATES}/current/{name}"
            for name in ("history.jsonl", "models.config")
        }
        missing = {
            path: link
            for path, link in links.items()
            if path.parent.is_dir() and not path.is_symlink()
        }
        if missing:  # a link always leads to a state, which has taken over what a plain file says
            self._become(aliases, history)
        for path, link in missing.items():
            _link(path, link)
        for stage, named in aliases.items():
            named.pop(alias, None)
            if stage in to:
                named[alias] = to[stage]
        self._become(aliases, [*history, entry])

    def history(self) -> list[Entry]:
        """All entries, the oldest first."""
        path = _source(self._root / "history.jsonl", self._root, "history.jsonl")
        return [] if path is None else _parse_history(path)

    def _all_aliases(self) -> dict[str, dict[str, int]]:
        """By stage, all from one state."""
        current = self._states / "current"
        state = current.resolve()
        found = {stage: _read_aliases(self._root / stage) for stage in STAGES}
        return found if state == current.resolve() else self._all_aliases()

    def _become(self, aliases: dict[str, dict[str, int]], history: list[dict[str, Any]]) -> None:
        """Writes a state beside the current one, then takes its place in one step."""
        current, new = self._states / "current", self._states / "new"
        shutil.rmtree(new, ignore_errors=True)  # what a killed process left
        new.mkdir(parents=True)
        for stage, named in aliases.items():
            (new / f"{stage}.json").write_text(json.dumps(named, indent=1) + "\n")
        (new / "history.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in history))
        (new / "models.config").write_text(_models_config(aliases))
        numbers = _state_numbers(self._root)
        number = 1 + max(numbers, default=0)
        if not numbers and not current.exists():
            _link(
                current, str(number)
            )  # before the first state: states without the link are an error
        new.rename(self._states / str(number))
        if current.is_dir() and not current.is_symlink():  # made by a copy that followed the link
            current.rename(self._states / f"copied-{number}")
        _link(current, str(number))
        for old in numbers:
            if old <= number - KEPT_STATES:
                shutil.rmtree(self._states / str(old), ignore_errors=True)


def check_alias(alias: str) -> None:
    """Raises UserError unless an alias may be given to versions."""
    if not re.fullmatch(ALIAS, alias):
        raise UserError(
            f"{alias!r} cannot be an alias: it needs letters, digits, '.', '_' and '-' after a letter, and is neither "
            "latest (always the highest version), nor like v3 (a version at W&B), nor like id-1f (a bundle there)"
        )


def _read_aliases(stage_dir: Path) -> dict[str, int]:
    """The versions of a stage that have aliases. Raises UserError if the file is damaged, or a link leads nowhere."""
    path = _source(stage_dir / "aliases.json", stage_dir.parent, f"{stage_dir.name}.json")
    return {} if path is None or not path.exists() else _parse_aliases(path)


def _source(path: Path, root: Path, name: str) -> Path | None:
    """The file to read for `path`: itself if it is a plain file, else the current state's file `name`, if there is one.

    Raises:
      UserError: the state is missing that `path`, or the states that are there, should lead to.
    """
    if path.exists() and not path.is_symlink():
        return path
    state = (root / STATES / "current").resolve()
    if state.is_dir():
        return state / name
    if numbers := _state_numbers(root):
        raise UserError(
            f"{root}/{STATES}/current should be a link to the newest state beside it, and a copy seems to have left it "
            f"out: run ln -sfn {max(numbers)} {root}/{STATES}/current"
        )
    if path.is_symlink():
        raise UserError(
            f"{path} is a link into {root}/{STATES}, which is missing: copy that too, or remove the link to go on "
            "without aliases and history"
        )
    return None


def _state_numbers(root: Path) -> list[int]:
    return [int(path.name) for path in (root / STATES).glob("*") if path.name.isdigit()]


def _parse_aliases(path: Path) -> dict[str, int]:
    try:
        named = json.loads(path.read_text())
        if all(type(version) is int for version in named.values()):
            return named
    except (ValueError, AttributeError):
        pass
    raise UserError(
        f"{path} is damaged: it should be {{ALIAS: VERSION, ..}}; correct it, or restore it from a copy"
    )


def _parse_history(path: Path) -> list[Entry]:
    entries = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            entries.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            hint = "remove the line, or restore the file from a copy"
            raise UserError(f"{path}, line {number} is damaged: {hint}") from None
    return entries


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

            settings = wandb.Settings()
            settings.update_from_system_settings()
            settings.update_from_env_vars(dict(os.environ))
            if settings.mode in ("offline", "dryrun"):
                raise UserError(
                    "W&B is offline here, by WANDB_MODE or by `wandb offline`, and cannot read or promote artifacts: "
                    "set WANDB_MODE=online, or run `wandb online`"
                )
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
        if _is_whole(place, stage):
            return place
        with sole_writer(place, wait=True):
            if _is_whole(place, stage):  # another process has just brought it
                return place
            with draft(place.parent) as beside, self._asking(artifact.name):
                artifact.download(root=str(beside), skip_cache=True)
                verify(beside, stage)
                replace_directory(beside, place)
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
