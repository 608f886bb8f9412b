"""Aliases of versions, such as `production`, as they are on disk.

    SAVEDMODELS/STAGE/aliases.json   {alias: version}; `latest` is always the highest number

Promotion (ops/registry.py) makes it a link into SAVEDMODELS/.promotions/current. That is itself a link, to a directory
with the aliases of all stages. If aliases.json is missing, it is read from there. If it is a plain file, written by
hand or by a copy that followed the links, that file is read.
"""

import json
from pathlib import Path
from typing import cast

from rec.errors import UserError

STAGES = ("retrieval", "ranking", "recommender")
STATES = ".promotions"  # in SAVEDMODELS: one directory per move

Aliases = dict[str, int]  # {alias: version} of one stage
Versions = dict[str, int]  # {stage: version}


def read_alias(savedmodels: Path, alias: str) -> Versions:
    """The versions that have an alias."""
    aliases = read_all_aliases(savedmodels)
    return {stage: targets[alias] for stage, targets in aliases.items() if alias in targets}


def read_all_aliases(savedmodels: Path) -> dict[str, Aliases]:
    """The aliases of each stage, all from one state."""
    current = savedmodels / STATES / "current"
    before = current.resolve()
    aliases = {stage: read_aliases(savedmodels / stage) for stage in STAGES}
    return aliases if before == current.resolve() else read_all_aliases(savedmodels)


def read_aliases(stage_dir: Path) -> Aliases:
    """The aliases of a stage. Raises UserError if the file is damaged, or a link leads nowhere."""
    path = find_state_file(stage_dir / "aliases.json", stage_dir.parent, f"{stage_dir.name}.json")
    return {} if path is None or not path.exists() else parse_aliases(path)


def parse_aliases(path: Path) -> Aliases:
    try:
        aliases = json.loads(path.read_text())
        if all(type(version) is int for version in aliases.values()):
            return cast(Aliases, aliases)
    except (ValueError, AttributeError):
        pass
    raise UserError(
        f"{path} is damaged: it should be {{ALIAS: VERSION, ..}}; correct it, or restore it from a copy"
    )


def find_state_file(path: Path, root: Path, name: str) -> Path | None:
    """The file to read for `path`: itself if it is a plain file, otherwise the current state's file `name`, if any.

    Raises:
      UserError: the state that `path`, or the states that are there, should lead to is missing.
    """
    # A writer makes `current`, then the first state, then the links to it. A reader looks in the opposite order, so
    # that it never meets a link, or a state, before what was made earlier.
    is_link = path.is_symlink()
    if path.exists() and not is_link:
        return path
    numbers = state_numbers(root)
    state = (root / STATES / "current").resolve()
    if state.is_dir():
        return state / name
    if numbers:
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
    names = [path.name for path in (root / STATES).glob("*")]
    return [int(name) for name in names if name.isdigit()]
