"""Events in a file of SQLite: for one machine, whose processes share it.

- Write-ahead log with synchronous=FULL: a commit has reached the disk when it returns, so neither kill -9 nor a power
  cut loses what was acknowledged.
- Whoever writes holds a lock on FILE.lock. SQLite's own lock would be polled, with pauses of up to 0.1 s.
- Each thread has a connection of its own. Readers and the writer do not wait for each other.

The file must be on a local disk: the log needs memory that processes share.
"""

import fcntl
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rec.errors import UserError
from rec.ops.loop.events import LATEST, Event, Occurrence
from rec.serving.schemas import UnavailableError

FORMAT = 1  # user_version of the file
TABLES = f"""
    create table events (number integer primary key, event_id text not null unique, user_id text not null,
        item_id text not null, event text, time real not null, value real, request_id text);
    create index by_user on events (user_id, time);
    create index by_time on events (time);
    pragma user_version = {FORMAT};"""
COLUMNS = ", ".join(Event._fields)
ADD = f"insert or ignore into events ({COLUMNS}) values ({', '.join('?' * len(Event._fields))})"
FIND = f"""
    select time, event, item_id from events where user_id = ? and time > ?
    order by time desc, number desc limit {LATEST}"""
READ = f"select {COLUMNS} from events where time >= ? and time < ? order by time, number"
PATIENCE = 10.0  # seconds to wait for another writer


class SqliteStore:
    """See `EventStore`."""

    def __init__(self, path: str) -> None:
        """Raises UserError if the file cannot be opened or made, or is no store of events."""
        self._path = Path(path)
        self._own = threading.local()
        try:
            with self._writing() as connection:
                version = connection.execute("pragma user_version").fetchone()[0]
                tables = connection.execute("select count(*) from sqlite_master").fetchone()[0]
                if not version and not tables:
                    connection.executescript(f"begin; {TABLES} commit;")
                elif version != FORMAT:
                    raise UserError(f"{path} is no store of events: choose another file")
        except (OSError, UnavailableError) as error:
            raise UserError(f"--events {path} cannot be used: {error}") from error

    def add(self, groups: Sequence[Sequence[Event]]) -> list[int]:
        counts = []
        with self._writing() as connection:
            connection.execute("begin immediate")
            try:
                for events in groups:
                    before = connection.total_changes
                    connection.executemany(ADD, events)
                    counts.append(connection.total_changes - before)
                connection.execute("commit")
            except BaseException:
                connection.rollback()
                raise
        return counts

    def latest(self, users: Sequence[str], after: float) -> list[list[Occurrence]]:
        with _available():
            find = self._connection().execute
            rows = [find(FIND, (user, after)).fetchall() for user in users]
        return [[Occurrence(*row) for row in reversed(each)] for each in rows]

    def read(self, begin: float, end: float) -> Iterator[Event]:
        with _available():
            for row in self._connection().execute(READ, (begin, end)):
                yield Event(*row)

    def _connection(self) -> sqlite3.Connection:
        """This thread's."""
        connection: sqlite3.Connection | None = getattr(self._own, "connection", None)
        if connection is None:
            connection = sqlite3.connect(self._path, timeout=PATIENCE, isolation_level=None)
            connection.execute("pragma journal_mode = wal")
            connection.execute("pragma synchronous = full")
            self._own.connection = connection
        return connection

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with open(f"{self._path}.lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            with _available():
                yield self._connection()


@contextmanager
def _available() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise UnavailableError(f"the store of events cannot be used now: {error}") from error
