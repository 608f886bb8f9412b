"""Aliases of versions, such as `production`, and the history of their moves, as they are on disk.

    SAVEDMODELS/STAGE/aliases.json   {alias: version}; `latest` is always the highest number
    SAVEDMODELS/history.jsonl        one line per move

Promotion (ops/registry.py) makes both links into SAVEDMODELS/.promotions/current. That is itself a link, to a directory
with the aliases of all stages. If such a file is missing, it is read from there. If it is a plain file, written by hand
or by a copy that followed the links, that file is read.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from rec.bundles.metadata import Json
from rec.errors import UserError

STAGES = ("retrieval", "ranking", "recommender")
STATES = ".promotions"  # in SAVEDMODELS: one directory per move

Aliases = dict[str, int]  # {alias: version} of one stage
Versions = dict[str, int]  # {stage: version}


# ------------------------------------------------------------------------------------------------------------
# Aliases


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
    is_link = (
        path.is_symlink()
    )  # before the state is looked up: a link is made only when there is one
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


# ------------------------------------------------------------------------------------------------------------
# History


@dataclass(frozen=True)
class Verdict:
    """What the gate decided."""

    passed: bool
    reasons: list[str]  # against it
    measured: Json = field(default_factory=dict)


@dataclass(frozen=True)
class Move:
    """One line of the history: an alias was moved, or the gate refused to move it."""

    alias: str
    previous: Versions
    to: Versions
    action: str  # promoted, forced, refused, rolled back or unchanged
    gate: Verdict
    why: str
    who: str
    time: str

    def to_json(self) -> Json:
        gate = {"passed": self.gate.passed, "reasons": self.gate.reasons, **self.gate.measured}
        return {
            "alias": self.alias,
            "from": self.previous,
            "to": self.to,
            "action": self.action,
            "gate": gate,
            "why": self.why,
            "who": self.who,
            "time": self.time,
        }


def parse_move(line: str) -> Move:
    """The move in a line of JSON. Raises LookupError, TypeError or ValueError if there is none."""
    content = json.loads(line)
    gate = dict(content.pop("gate"))
    verdict = Verdict(gate.pop("passed"), gate.pop("reasons"), gate)
    return Move(previous=content.pop("from"), gate=verdict, **content)


def parse_history(path: Path) -> list[Move]:
    """All moves, the oldest first. Raises UserError if a line is damaged."""
    moves = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            moves.append(parse_move(line))
        except (LookupError, TypeError, ValueError, AttributeError):
            hint = "remove the line, or restore the file from a copy"
            raise UserError(f"{path}, line {number} is damaged: {hint}") from None
    return moves
