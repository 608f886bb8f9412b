"""What was shown: one row per answer, in Parquet.

    SHOWN/2026-11-30T15/SLOT-NUMBER.parquet     an hour (UTC), a process

- Rows wait in a bounded queue for a thread that writes, so that no answer waits for the disk. If it is full, rows are
  dropped, which the log and /metrics report.
- A file is written beside and renamed, every few minutes and when the process ends. A process that is killed loses what
  it has not written yet.
- Hours that are older than the retention are removed.
"""

import os
import shutil
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from prometheus_client import Counter

from rec.ops.serving.metrics import SLOT
from rec.ops.serving.reload import say

SCHEMA = pa.schema(
    {
        "time": pa.float64(),  # seconds since 1970
        "request_id": pa.string(),
        "user_id": pa.string(),  # null for an anonymous user
        "variant": pa.string(),  # null without variants
        "cold_start": pa.bool_(),
        "model": pa.map_(pa.string(), pa.int32()),  # the version of each stage
        "items": pa.list_(pa.string()),  # the first place first
        "scores": pa.list_(pa.float32()),
    }
)
HOUR = "%Y-%m-%dT%H"
MAX_WAITING = 20_000  # rows
MAX_ROWS = 50_000  # of a file
SECONDS = 300.0  # after which a file is written
DROPPED = Counter("rec_shown_dropped", "Answers that were not kept, since the writer was late.")


class Shown(NamedTuple):
    """An answer; see `SCHEMA`."""

    time: float
    request_id: str
    user_id: str | None
    variant: str | None
    cold_start: bool
    model: dict[str, int]
    items: list[str]
    scores: list[float | None]

    @property
    def hour(self) -> str:
        return datetime.fromtimestamp(self.time, UTC).strftime(HOUR)


class ShownLog:
    """The queue of a process, and the thread that writes."""

    def __init__(self, directory: Path, days: float) -> None:
        """`days`: the retention."""
        self._directory = directory
        self._days = days
        self._arrived: SimpleQueue[Shown | None] = SimpleQueue()
        self._rows: list[Shown] = []  # of one hour
        self._written = 0.0  # when, by time.monotonic
        self._said = 0.0
        self._thread = threading.Thread(target=self._work, name="shown", daemon=True)
        self._thread.start()

    def add(self, row: Shown) -> None:
        """Keeps a row. Returns at once."""
        if self._arrived.qsize() < MAX_WAITING:
            return self._arrived.put(row)
        DROPPED.inc()
        now = time.monotonic()
        if now - self._said > 60:
            say("answers are shown faster than they can be kept: some are dropped")
            self._said = now

    def close(self) -> None:
        """Writes what waits, and ends the thread."""
        self._arrived.put(None)
        self._thread.join()

    def _work(self) -> None:
        self._written = time.monotonic()
        while True:
            try:
                row = self._arrived.get(timeout=SECONDS / 60)
            except Empty:
                self._write_if_due()
                continue
            if row is None:
                return self._write()
            if self._rows and self._rows[0].hour != row.hour:
                self._write()
            self._rows.append(row)
            self._write_if_due()

    def _write_if_due(self) -> None:
        is_old = time.monotonic() - self._written > SECONDS
        if is_old or len(self._rows) >= MAX_ROWS:
            self._write()

    def _write(self) -> None:
        self._written = time.monotonic()
        if not self._rows:
            return
        rows = self._rows
        self._rows = []
        name = f"{os.environ.get(SLOT, '0')}-{os.getpid()}-{time.time_ns()}.parquet"
        try:
            hour = self._directory / rows[0].hour
            hour.mkdir(parents=True, exist_ok=True)
            table = pa.Table.from_pylist([row._asdict() for row in rows], SCHEMA)
            pq.write_table(table, hour / f".{name}")
            os.replace(hour / f".{name}", hour / name)
            self._remove_old()
        except OSError as error:
            DROPPED.inc(len(rows))
            say(f"{len(rows):,} answers cannot be kept: {error}")

    def _remove_old(self) -> None:
        oldest = (datetime.now(UTC) - timedelta(days=self._days)).strftime(HOUR)
        for hour in self._directory.iterdir():
            with suppress(ValueError):
                datetime.strptime(hour.name, HOUR)  # nothing else is removed
                if hour.name < oldest:
                    shutil.rmtree(hour, ignore_errors=True)
