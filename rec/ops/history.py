"""The history of aliases: who moved which one, when, from what to what and why. One line of JSON per move."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rec.bundles.aliases import Versions
from rec.errors import UserError

# Another version of rec may have written more. It is kept.
STORED = ConfigDict(frozen=True, extra="allow", validate_by_name=True, serialize_by_alias=True)


class Verdict(BaseModel):
    """What the gate decided, and what it measured."""

    model_config = STORED

    passed: bool
    reasons: list[str]  # against it


class Move(BaseModel):
    """One line of the history: an alias was moved, or the gate refused to move it."""

    model_config = STORED

    alias: str
    previous: Versions = Field(validation_alias="from", serialization_alias="from")
    to: Versions
    action: str  # promoted, forced, refused, rolled back or unchanged
    gate: Verdict
    why: str
    who: str
    time: str


def parse_history(path: Path) -> list[Move]:
    """All moves, the oldest first. Raises UserError if a line is damaged."""
    moves = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            moves.append(Move.model_validate_json(line))
        except ValidationError:
            hint = "remove the line, or restore the file from a copy"
            raise UserError(f"{path}, line {number} is damaged: {hint}") from None
    return moves
