"""Events: what users do, as POST /v1/events takes them, and where they are kept.

- A store keeps an event once, whatever is sent again: the event's id decides. Without an id, an event that has a time
  gets one made of its content, so that sending it again changes nothing. An event without both gets an id of its own:
  two clicks in the same second are two.
- A store may be shared by several processes, and by several servers. What one has added, all others read.

Not covered: what an event means. That is up to the bundle (live.py), and to the training.
"""

import hashlib
import json
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Annotated, NamedTuple, Protocol

from pydantic import BaseModel, ConfigDict, Field

from rec.errors import UserError
from rec.serving.schemas import Id

MAX_EVENTS = 500  # in a body
LATEST = 1000  # events of one user that a store returns: as many as a bundle stores by default
AHEAD = 86_400  # seconds that a client's clock may be ahead

Filled = Annotated[Id, Field(min_length=1)]
Name = Annotated[str, Field(min_length=1, max_length=128)]


class Event(NamedTuple):
    """An event as it is kept."""

    event_id: str
    user_id: str
    item_id: str
    event: str | None  # its kind, such as view or purchase
    time: float  # seconds since 1970
    value: float | None  # a rating, a price: whatever the training makes of it
    request_id: str | None  # of the answer that led to it


class PostedEvent(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    user_id: Filled = Field(description="A user, or the id of an anonymous session.")
    item_id: Filled = Field(description="An item; one that the models do not know is kept too.")
    event: Name | None = Field(default=None, description="Its kind, such as view or purchase.")
    time: float | None = Field(default=None, ge=0, description="Seconds since 1970; default: now.")
    value: float | None = Field(default=None, description="Such as a rating or a price.")
    event_id: Name | None = Field(
        default=None,
        description="An event with an id that is known already changes nothing. Default: made of the content if there "
        "is a time, otherwise a new one.",
    )
    request_id: Name | None = Field(default=None, description="Of the answer that led to it.")

    def received(self, now: float) -> Event:
        """The event, with a time and an id. Raises UserError if its time is in the future."""
        if self.time is not None and self.time > now + AHEAD:
            raise UserError(
                f"time: {self.time:.0f} is in the future; it counts seconds since 1970, and now is {now:.0f}"
            )
        content = (self.user_id, self.item_id, self.event, self.time, self.value, self.request_id)
        return Event(
            event_id=self.event_id or _make_id(content, is_repeatable=self.time is not None),
            user_id=self.user_id,
            item_id=self.item_id,
            event=self.event,
            time=now if self.time is None else self.time,
            value=self.value,
            request_id=self.request_id,
        )


def _make_id(content: tuple[object, ...], *, is_repeatable: bool) -> str:
    if not is_repeatable:
        return uuid.uuid4().hex
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


class EventsRequest(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [{"events": [{"user_id": "u7", "item_id": "i1", "event": "view"}]}]
        },
    )

    events: list[PostedEvent] = Field(min_length=1, max_length=MAX_EVENTS)


class Accepted(BaseModel):
    accepted: int = Field(description="Events that are new. They are on disk.")
    duplicates: int = Field(description="Events whose id was known already.")


class Occurrence(NamedTuple):
    """An event of a user who is known."""

    time: float
    event: str | None
    item_id: str


class EventStore(Protocol):
    """Where events are kept. Threads share it. Every method raises UnavailableError (rec/serving/schemas.py)."""

    def add(self, groups: Sequence[Sequence[Event]]) -> list[int]:
        """Adds groups of events, all or none of them. Returns how many of each are new. They are durable then."""

    def latest(self, users: Sequence[str], after: float) -> list[list[Occurrence]]:
        """Each user's events of a later time, at most LATEST of them, in order of time."""

    def read(self, begin: float, end: float) -> Iterator[Event]:
        """All events of a time from `begin` up to `end`."""


def receive(posted: Sequence[PostedEvent]) -> list[Event]:
    """The events with their times and ids. Raises UserError that names the event that is wrong."""
    now = time.time()
    events = []
    for number, each in enumerate(posted):
        try:
            events.append(each.received(now))
        except UserError as error:
            raise UserError(f"events[{number}].{error}") from error
    return events
