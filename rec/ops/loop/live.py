"""What users have done since their bundle was made: the events in the store.

- An event counts if it is of a kind that the bundle's histories hold, and later than all of them. A bundle of data
  without kinds takes every event; one of data without times takes every time.
- The store is asked once per call of the models, so an acknowledged event is in the next answer of every process.
- If the store does not answer, the bundle's own histories do, and the store is left alone for a moment.
"""

import time
from collections.abc import Sequence

from prometheus_client import Counter

from rec.bundles.metadata import Coverage
from rec.ops.loop.events import EventStore, Occurrence
from rec.ops.serving.reload import say
from rec.serving.answer import STORED
from rec.serving.schemas import UnavailableError

PAUSE = 1.0  # seconds after a failure
FAILED = Counter("rec_live_history_failed", "Reads of live histories that failed.")


class LiveHistories:
    """A `Histories` of rec/serving/answer.py."""

    def __init__(self, store: EventStore, covers: Coverage) -> None:
        self._store = store
        self._covers = covers
        self._ask_again = 0.0  # the time from which the store is asked

    def since(self, users: Sequence[str]) -> Sequence[list[str]]:
        until = self._covers.until
        after = -1 if until is None else until
        now = time.monotonic()
        if now < self._ask_again:
            return STORED.since(users)
        try:
            found = self._store.latest(users, after)
        except UnavailableError as error:
            FAILED.inc()
            say(f"live histories are left out: {error}")
            self._ask_again = now + PAUSE
            return STORED.since(users)
        return [[each.item_id for each in events if self._counts(each)] for events in found]

    def _counts(self, each: Occurrence) -> bool:
        kinds = self._covers.events
        return kinds is None or each.event is None or each.event in kinds
