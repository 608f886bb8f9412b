"""Kinds of interactions, such as view, cart and purchase: their weights, dislikes, and what val and test ask for.

Every event of the data must have a weight, if any has one: a kind that is forgotten would count like the best one.
"""

import re
from dataclasses import dataclass, field
from typing import Any

from duckdb import DuckDBPyConnection as Connection

from rec.data_prep.engine import Engine
from rec.data_prep.raw_files import literal
from rec.errors import UserError

NUMBER = re.compile(r"\s*\d+([.]\d+)?\s*")


@dataclass(frozen=True)
class Events:
    """What the events of interactions mean."""

    weights: dict[str, float] = field(default_factory=dict)  # none: all weigh the same
    negatives: tuple[str, ...] = ()  # they say that a user did not like an item
    targets: tuple[str, ...] = ()  # what val and test ask for; none: all that are not negative

    @property
    def is_label(self) -> str:
        """SQL for an interaction that val and test may ask for."""
        if self.targets:
            return f"event in ({', '.join(map(literal, self.targets))})"
        if self.negatives:
            return f"event not in ({', '.join(map(literal, self.negatives))})"
        return "true"

    def facts(self, engine: Engine) -> dict[str, Any]:
        """What dataset.json says of them."""
        if "event" not in engine.columns:
            return {}
        names = engine.rows("select event from interactions group by event order by event")
        return {
            "events": {name: self.weights.get(name, 1.0) for (name,) in names},
            "negative_events": list(self.negatives),
            "target_events": list(self.targets),
        }


def parse_weights(text: str) -> dict[str, float]:
    """The weights of "view=1,cart=3". Raises UserError for what is not such a list."""
    weights = {}
    for part in text.split(","):
        name, _, number = part.rpartition("=")
        weight = float(number) if NUMBER.fullmatch(number) else None
        if weight is None or not name.strip():
            hint = "write view=1,cart=3; 0 drops an event, --negative-events names dislikes"
            raise UserError(f"--event-weights: {part!r} is no event with its weight: {hint}")
        weights[name.strip()] = weight
    return weights


def parse_names(text: str) -> tuple[str, ...]:
    """The events of "dislike,skip"."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def weigh_events(con: Connection, events: Events) -> int:
    """Gives table `interactions` its weights; returns the number of rows that it drops, since they weigh nothing.

    Raises UserError for an event that is named and does not occur, or has no weight and needs one.
    """
    columns = con.table("interactions").columns
    if "event" in columns:
        _check_events(con, events)
    weight = "weight" if "weight" in columns else "cast(1 as float)"
    if events.weights:
        cases = [f"when {literal(name)} then {number}" for name, number in events.weights.items()]
        weight = f"{weight} * case event {' '.join(cases)} else 1 end"
    elif "weight" not in columns:
        return 0
    before = len(con.table("interactions"))
    others = ", ".join(name for name in columns if name != "weight")
    weighed = f"select {others}, cast({weight} as float) as weight from interactions"
    con.execute(
        f"create or replace table interactions as select * from ({weighed}) where weight > 0"
    )
    left = len(con.table("interactions"))
    if not left:
        raise UserError(f"all {before:,} interactions have weight 0: give some a weight above 0")
    return before - left


def _check_events(con: Connection, events: Events) -> None:
    counts = dict(
        con.execute(
            "select event, count(*) from interactions group by event order by 2 desc, 1"
        ).fetchall()
    )
    listed = "the events are " + ", ".join(f"{name} ({n:,})" for name, n in counts.items())
    options = {
        "--event-weights": events.weights,
        "--negative-events": events.negatives,
        "--target-events": events.targets,
    }
    for option, named in options.items():
        if missing := [name for name in named if name not in counts]:
            raise UserError(f"{option} names {missing[0]}, which does not occur: {listed}")
    for name in (*events.negatives, *events.targets):
        if events.weights.get(name) == 0 or name in events.negatives and name in events.targets:
            problem = f"{name} has weight 0, or is both negative and a target"
            raise UserError(f"--negative-events and --target-events: {problem}")
    for name in counts:
        if events.weights and name not in (*events.weights, *events.negatives):
            hint = f"give {name} a weight, such as 1, or 0 to drop it"
            raise UserError(f"--event-weights does not name {name}: {listed}; {hint}")
