"""Where bundles and their aliases are: a directory, or W&B.

    SAVEDMODELS/STAGE/aliases.json   {alias: version}; `latest` is always the highest number
    SAVEDMODELS/history.jsonl        who moved which alias, when, from what to what and why
    SAVEDMODELS/models.config        what TF Serving should load: `stable` is production, `canary` the alias canary

All three are links into SAVEDMODELS/.promotions/current. That is itself a link, to a directory with a copy of each. A
move of an alias writes such a directory, then renames the one link: it happens to all stages at once, or not at all. A
plain file (written by hand, or by a copy that followed the links) is read instead, and the next move takes it over.

`LocalStore` is a directory and `WandbStore` is W&B; ops/promotion.py works with both. At W&B a stage's bundles are the
versions of the artifact STAGE_bundle, and an alias of several stages cannot move in one step.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from google.protobuf import text_format
from tensorflow_serving.config.model_server_config_pb2 import ModelServerConfig

from rec.bundles.aliases import (
    STAGES,
    STATES,
    Aliases,
    Versions,
    find_state_file,
    read_alias,
    read_all_aliases,
    state_numbers,
)
from rec.bundles.files import Pair, draft, pick, versions
from rec.bundles.metadata import BundleMetadata, parse_metadata, read_metadata, verify
from rec.errors import UserError
from rec.files import replace_directory, sole_writer
from rec.ops.history import Move, parse_history

if TYPE_CHECKING:
    from wandb import Artifact

IN_TF_SERVING = "/models"  # where its images find SAVEDMODELS
MAX_STATES = 20  # of the aliases: another process may be reading an older one
ALIAS = r"(?!latest$|v\d+$|id-)[A-Za-z][A-Za-z0-9._-]*"  # W&B reads v3 as a version; id-... tags a bundle there
PROJECT = "rec"  # the W&B project if WANDB_PROJECT names no other
CACHE = Path("~/.cache/rec/bundles")  # downloaded artifacts, by digest


class LocalStore:
    """A directory SAVEDMODELS. `WandbStore` has the same methods."""

    def __init__(self, savedmodels: Path) -> None:
        self._root = savedmodels
        self._states = savedmodels / STATES

    def bundles(self, stage: str) -> Mapping[int, BundleMetadata]:
        """The bundles of a stage by version, ascending."""
        stage_dir = self._root / stage
        return {
            version: read_metadata(stage_dir / str(version), stage)
            for version in versions(stage_dir)
        }

    def aliases(self, stage: str) -> Aliases:
        return read_all_aliases(self._root)[stage]

    def versions_of(self, alias: str) -> Versions:
        """The versions that have the alias."""
        return read_alias(self._root, alias)

    def directory(self, stage: str, version: int) -> Path:
        """A version's files, verified. Raises UserError if one is missing or has changed."""
        path = self._root / stage / str(version)
        if not path.exists():
            raise UserError(f"{stage} {version} is gone: there is no {path}")
        verify(path, stage)
        return path

    def writing(self) -> AbstractContextManager[None]:
        """Waits for another process that promotes. A killed process does not block others."""
        return sole_writer(self._states, wait=True)

    def move(self, move: Move, to: Versions) -> None:
        """Gives the alias to exactly the versions `to`, and adds the move to the history."""
        aliases = read_all_aliases(self._root)
        history = self.history()
        missing = self._missing_links()
        if (
            missing
        ):  # a link always leads to a state, and the first state has what the plain files say
            self._write_state(aliases, history)
        for path, target in missing.items():
            _link(path, target)
        for stage, targets in aliases.items():
            targets.pop(move.alias, None)
            if stage in to:
                targets[move.alias] = to[stage]
        self._write_state(aliases, [*history, move])

    def _missing_links(self) -> dict[Path, str]:
        """The links into the current state that are to be made, and their targets."""
        links = {}
        for stage in STAGES:
            links[self._root / stage / "aliases.json"] = f"../{STATES}/current/{stage}.json"
        for name in ("history.jsonl", "models.config"):
            links[self._root / name] = f"{STATES}/current/{name}"
        return {
            path: target
            for path, target in links.items()
            if path.parent.is_dir() and not path.is_symlink()
        }

    def history(self) -> list[Move]:
        """All moves, the oldest first."""
        path = find_state_file(self._root / "history.jsonl", self._root, "history.jsonl")
        return [] if path is None else parse_history(path)

    def _write_state(self, aliases: dict[str, Aliases], history: list[Move]) -> None:
        """Writes a state beside the current one, then makes it the current one in one step."""
        current = self._states / "current"
        new = self._states / "new"
        shutil.rmtree(new, ignore_errors=True)  # of a killed process
        new.mkdir(parents=True)
        for stage, targets in aliases.items():
            (new / f"{stage}.json").write_text(json.dumps(targets, indent=1) + "\n")
        lines = "".join(f"{move.model_dump_json()}\n" for move in history)
        (new / "history.jsonl").write_text(lines)
        (new / "models.config").write_text(_models_config(aliases))
        numbers = state_numbers(self._root)
        number = 1 + max(numbers, default=0)
        if not numbers and not current.exists():
            # The link comes before the first state: states without the link are an error.
            _link(current, str(number))
        new.rename(self._states / str(number))
        if current.is_dir() and not current.is_symlink():  # made by a copy that followed the link
            current.rename(self._states / f"copied-{number}")
        _link(current, str(number))
        for old in numbers:
            if old <= number - MAX_STATES:
                shutil.rmtree(self._states / str(old), ignore_errors=True)


def check_alias(alias: str) -> None:
    """Raises UserError unless an alias may be given to versions."""
    if not re.fullmatch(ALIAS, alias):
        raise UserError(
            f"{alias!r} cannot be an alias: it needs letters, digits, '.', '_' and '-' after a letter, and is neither "
            "latest (always the highest version), nor like v3 (a version at W&B), nor like id-1f (a bundle there)"
        )


def _link(path: Path, target: str) -> None:
    """Makes `path` a symbolic link, and replaces what was there."""
    beside = path.with_name(f"{path.name}.new")
    beside.unlink(missing_ok=True)
    beside.symlink_to(target)
    os.replace(beside, path)


def _models_config(aliases: dict[str, Aliases]) -> str:
    """TF Serving's ModelServerConfig as text: the labelled versions of each stage, and their labels."""
    config = ModelServerConfig()
    for stage, targets in aliases.items():
        stable = targets.get("production", targets.get("canary"))
        if stable is not None:
            model = config.model_config_list.config.add(name=stage, model_platform="tensorflow")
            model.base_path = f"{IN_TF_SERVING}/{stage}"
            model.version_labels.update(stable=stable, canary=targets.get("canary", stable))
            labelled = sorted(set(model.version_labels.values()))
            model.model_version_policy.specific.versions.extend(labelled)
    return text_format.MessageToString(config)


def _is_complete(bundle: Path, stage: str) -> bool:
    try:
        verify(bundle, stage)
    except UserError:
        return False
    return True


class WandbStore:
    """The artifacts STAGE_bundle of a W&B project. A version is W&B's: 3 is v3."""

    def __init__(self, project: str = "") -> None:
        """`project`: ENTITY/PROJECT, or PROJECT of the default entity; by default WANDB_PROJECT or `rec`."""
        self._project = project or os.environ.get("WANDB_PROJECT", PROJECT)
        import wandb  # if it is not installed, the command's error says what to install

        with _wandb_errors(self._project):
            settings = wandb.Settings()
            settings.update_from_system_settings()
            settings.update_from_env_vars(dict(os.environ))
            if settings.mode in ("offline", "dryrun"):
                raise UserError(
                    "W&B is offline here, by WANDB_MODE or by `wandb offline`, and cannot read or promote artifacts: "
                    "set WANDB_MODE=online, or run `wandb online`"
                )
            self._api = wandb.Api(timeout=30)

    def bundles(self, stage: str) -> Mapping[int, BundleMetadata]:
        return {
            version: parse_metadata(artifact.metadata, f"W&B's {stage}_bundle:v{version}")
            for version, artifact in self._artifacts(stage).items()
        }

    def aliases(self, stage: str) -> Aliases:
        return {
            alias: version
            for version, artifact in self._artifacts(stage).items()
            for alias in artifact.aliases
        }

    def versions_of(self, alias: str) -> Versions:
        aliases = {stage: self.aliases(stage) for stage in STAGES}
        return {stage: targets[alias] for stage, targets in aliases.items() if alias in targets}

    def directory(self, stage: str, version: int) -> Path:
        artifact = self._artifacts(stage)[version]
        place = CACHE.expanduser() / artifact.digest
        if _is_complete(place, stage):
            return place
        with sole_writer(place, wait=True):
            if _is_complete(place, stage):  # another process has downloaded it in the meantime
                return place
            with draft(place.parent) as beside, _wandb_errors(artifact.name):
                artifact.download(root=str(beside), skip_cache=True)
                verify(beside, stage)
                replace_directory(beside, place)
        return place

    writing = nullcontext  # W&B has no lock against other writers

    def move(self, move: Move, to: Versions) -> None:
        artifacts = {stage: self._artifacts(stage) for stage in STAGES}
        with _wandb_errors(self._project):
            last_stage = max(move.to, key=STAGES.index)
            noted = artifacts[last_stage][move.to[last_stage]]
            noted.metadata["promotions"] = [
                *noted.metadata.get("promotions", []),
                move.model_dump(),
            ]
            noted.save()
            for stage, by_version in artifacts.items():
                for version, artifact in by_version.items():
                    _set_alias(artifact, move.alias, to.get(stage) == version)

    def history(self) -> list[Move]:
        """The moves are in the metadata of the artifacts."""
        moves = [
            Move.model_validate(content)
            for stage in STAGES
            for artifact in self._artifacts(stage).values()
            for content in artifact.metadata.get("promotions", [])
        ]
        return sorted(moves, key=lambda move: move.time)

    def _artifacts(self, stage: str) -> dict[int, "Artifact"]:
        """By version, ascending; none if the project has no such artifact."""
        with _wandb_errors(self._project):
            try:
                artifacts = list(self._api.artifacts("model", f"{self._project}/{stage}_bundle"))
            except ValueError:
                artifacts = []
            return {int(each.version.removeprefix("v")): each for each in reversed(artifacts)}

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
        published = list(store._artifacts(stage))
        name = version.removeprefix("v") or "latest"
        return store, pick(published, store.aliases(stage), name, f"W&B's {path}")


def _set_alias(artifact: "Artifact", alias: str, is_wanted: bool) -> None:
    if is_wanted == (alias in artifact.aliases):
        return
    if is_wanted:
        artifact.aliases.append(alias)
    else:
        artifact.aliases.remove(alias)
    artifact.save()


@contextmanager
def _wandb_errors(what: str) -> Iterator[None]:
    """Turns the errors of W&B into one sentence."""
    try:
        yield
    except UserError:
        raise
    except (
        Exception
    ) as error:  # the client raises its own errors, those of requests, and ValueError
        raise UserError(f"W&B, {what}: {' '.join(str(error).split())}") from error


# ------------------------------------------------------------------------------------------------------------
# Versions that belong together

Store = LocalStore | WandbStore


def built_from(store: Store, stage: str, version: int) -> Versions:
    """The versions that a version was built from, as the store counts. Raises UserError if one is gone."""
    sources = {}
    for part, source in store.bundles(stage)[version].built_from.items():
        same = [number for number, each in store.bundles(part).items() if each.id == source.id]
        if not same:
            raise UserError(
                f"{stage} {version} was built from {part} {source.version}, which is gone"
            )
        sources[part] = source.version if source.version in same else max(same)
    return sources


def together(store: Store, stage: str, version: int, current: Versions) -> Versions:
    """The versions that will have an alias once `version` of `stage` has it. Now `current` have it."""
    if stage == "recommender":
        return built_from(store, stage, version) | {stage: version}
    others = {name: number for name, number in current.items() if name != "recommender"}
    return others | {stage: version}


def directories(store: Store, chosen: Versions) -> Pair:
    """The directories of a retrieval and a ranking version, verified."""
    ranking = store.directory("ranking", chosen["ranking"]) if "ranking" in chosen else None
    return store.directory("retrieval", chosen["retrieval"]), ranking
