"""Which store of events a place names."""

from rec.ops.loop.events import EventStore
from rec.ops.loop.sqlite_store import SqliteStore


def open_store(place: str) -> EventStore:
    """The store at redis://HOST:PORT/NUMBER, or in a file of SQLite. Raises UserError if it cannot be used."""
    if place.startswith(("redis://", "rediss://", "unix://")):
        from rec.ops.loop.redis_store import RedisStore

        return RedisStore(place)
    return SqliteStore(place)
