"""What bundles are called: aliases such as `production`, in a directory or at W&B.

    SAVEDMODELS/STAGE/aliases.json   {alias: version}; `latest` is always the highest number
    SAVEDMODELS/history.jsonl        who moved which alias, when, from what to what and why
    SAVEDMODELS/models.config        what TF Serving should load: `stable` is production, `canary` the alias canary

All three are links into SAVEDMODELS/.promotions/current, itself a link, to a directory with a copy of each. A move of
aliases writes such a directory, then renames the one link: it happens to all stages at once, or not at all. A plain
file (written by hand, or by a copy that followed the links) is read instead, and the next move takes it over.

`LocalStore` and `WandbStore` answer the same questions of either place; ops/promotion.py asks them. At W&B a stage's
bundles are the versions of the artifact STAGE_bundle, and an alias of several stages cannot move in one step.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from rec.bundles.files import (
    STAGES,
    STATES,
    Entry,
    Metadata,
    Pair,
    Versions,
    alias_file,
    draft,
    parse_history,
    pick,
    read_all_aliases,
    read_metadata,
    state_numbers,
    verify,
    versions,
    versions_named,
)
from rec.errors import UserError
from rec.files import replace_directory, sole_writer

IN_TF_SERVING = "/models"  # where its images find SAVEDMODELS
KEPT_STATES = 20  # of the aliases: somebody may just be reading an older one
ALIAS = r"(?!latest$|v\d+$|id-)[A-Za-z][A-Za-z0-9._-]*"  # W&B reads v3 as a version; id-... tags a bundle there
PROJECT = "rec"  # of W&B, where WANDB_PROJECT names no other
CACHE = Path("~/.cache/rec/bundles")  # downloaded artifacts, by digest


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
        return read_all_aliases(self._root)[stage]

    def named(self, alias: str) -> Versions:
        """The versions that the alias names."""
        return versions_named(self._root, alias)

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
        aliases, history = read_all_aliases(self._root), self.history()
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
        path = alias_file(self._root / "history.jsonl", self._root, "history.jsonl")
        return [] if path is None else parse_history(path)

    def _become(self, aliases: dict[str, dict[str, int]], history: list[dict[str, Any]]) -> None:
        """Writes a state beside the current one, then takes its place in one step."""
        current, new = self._states / "current", self._states / "new"
        shutil.rmtree(new, ignore_errors=True)  # what a killed process left
        new.mkdir(parents=True)
        for stage, named in aliases.items():
            (new / f"{stage}.json").write_text(json.dumps(named, indent=1) + "\n")
        (new / "history.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in history))
        (new / "models.config").write_text(_models_config(aliases))
        numbers = state_numbers(self._root)
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


def _is_whole(bundle: Path, stage: str) -> bool:
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
