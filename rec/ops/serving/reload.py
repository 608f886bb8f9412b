"""Decides when new bundles are loaded. It looks at the references again and again, and no failure ends that.

- A look finds which bundles the references mean now. If it fails, that is reported, and the delays before the next
  looks grow, up to a minute.
- New bundles are loaded once two looks in a row have seen the same files, so not while a directory is being copied.
- Bundles that could not be loaded are tried again when their files have changed, and otherwise with growing delays.
- What failed last is `failed` here, in /v1/models, the metrics and the log, until a look or a load succeeds.

Nothing here loads models or waits. The supervisor does, and reports the outcome and the time.
"""

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rec.errors import UserError
from rec.ops.serving.metrics import FOLLOWED, LOOKS_FAILED, RELOADS

SETTLE = 2.0  # seconds at most between the two looks that must see the same files
LONGEST_DELAY = 60.0  # seconds

Bundles = tuple[Path | None, ...]  # a retrieval and a ranking bundle, or a pair for each variant
Files = frozenset[
    tuple[str, int, int]
]  # path, size in bytes, and time of the last change in nanoseconds


@dataclass(frozen=True)
class Seen:
    """What the references meant at a look, and the files there."""

    pair: Bundles
    files: Files


def look(find: Callable[[], Bundles]) -> Seen:
    """Finds the bundles and lists their files. Raises whatever `find` and the file system raise."""
    pair = find()
    files = set()
    for bundle in pair:
        for path in bundle.rglob("*") if bundle else ():
            with suppress(FileNotFoundError):  # it has just been renamed
                status = path.stat()
                files.add((str(path), status.st_size, status.st_mtime_ns))
    return Seen(pair, frozenset(files))


def names(pair: Bundles) -> str:
    return ", ".join(str(path) for path in pair if path)


def say(text: str) -> None:
    """Prints to the log. A log that is gone must not end anything."""
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


@dataclass
class Follower:
    """Decides what to load. Every `now` is a time.monotonic()."""

    seconds: float  # between looks; 0: only when asked
    serving: Bundles | None = None
    failed: dict[str, Any] | None = None
    next_look: float = float("inf")
    _seen: Seen | None = None
    _refused: Seen | None = None
    _retry: float = 0.0  # when the refused bundles are tried again although they have not changed
    _failed_looks: int = field(default=0)

    def saw(self, seen: Seen, now: float) -> Bundles | None:
        """The bundles to load after this look, if any."""
        FOLLOWED.set(time.time())
        self._failed_looks = 0
        self._plan(now, self.seconds)
        if seen.pair == self.serving:
            self.failed = None
            self._seen = None
            return None
        if seen != self._seen:
            self._seen = seen
            self._plan(now, min(self.seconds, SETTLE))
            return None
        if seen == self._refused and now < self._retry:
            return None
        return seen.pair

    def missed(self, error: Exception, now: float) -> None:
        """A look has failed."""
        LOOKS_FAILED.inc()
        self._failed_looks += 1
        self._report("", error, self._failed_looks)
        self._plan(now, self._delay(self._failed_looks))

    def accepted(self, pair: Bundles) -> None:
        """The bundles are in service."""
        RELOADS.labels("done").inc()
        self.serving = pair
        self.failed = None
        self._refused = None

    def refused(self, seen: Seen, error: Exception, now: float) -> None:
        """The bundles could not be loaded."""
        RELOADS.labels("failed").inc()
        attempts = 1
        if seen == self._refused and self.failed:
            attempts += self.failed["attempts"]
        self._refused = seen
        self._retry = now + self._delay(attempts)
        self._report(names(seen.pair), error, attempts)

    def _plan(self, now: float, delay: float) -> None:
        self.next_look = now + delay if self.seconds else float("inf")

    def _delay(self, attempts: int) -> float:
        longest = max(self.seconds, LONGEST_DELAY)
        return min(longest, self.seconds * 2 ** min(attempts - 1, 16))

    def _report(self, bundles: str, error: Exception, attempts: int) -> None:
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        before = self.failed and self.failed["error"]
        self.failed = {
            "bundles": bundles,
            "error": text,
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "attempts": attempts,
        }
        if text != before:
            say(f"the models stay as they are: {text}")
