"""Events in Redis: for several servers.

    rec:events           a stream of all events, in the order of their arrival
    rec:event_ids        the ids of these events
    rec:user:USER        the latest events of a user, which expire some time after the last one

One script adds events, so that an id and its event are kept together or not at all. Redis acknowledges what is durable
only with `appendonly yes` and `appendfsync always`. A server that says it has other settings is refused.

Not covered: a cluster, in which the keys of one script must share a node.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import redis

from rec.errors import UserError, warn
from rec.ops.loop.events import LATEST, Event, Occurrence
from rec.serving.schemas import UnavailableError

STREAM, IDS, USER = "rec:events", "rec:event_ids", "rec:user:"
DAYS = 90  # after which an idle user's latest events expire; the stream keeps them
PAGE = 1000  # events that are read at once
Entries = list[tuple[str, dict[str, str]]]  # of a stream: their ids and fields
TIMEOUT = 2.0  # seconds
DURABLE = {"appendonly": "yes", "appendfsync": "always"}
# ARGV: how many, and for each event its id, its user's key, its occurrence and the whole event
ADD = f"""
local new = 0
for at = 1, #ARGV, 4 do
  if redis.call('SADD', '{IDS}', ARGV[at]) == 1 then
    redis.call('XADD', '{STREAM}', '*', 'event', ARGV[at + 3])
    redis.call('RPUSH', ARGV[at + 1], ARGV[at + 2])
    redis.call('LTRIM', ARGV[at + 1], -{LATEST}, -1)
    redis.call('EXPIRE', ARGV[at + 1], {DAYS * 86_400})
    new = new + 1
  end
end
return new
"""


class RedisStore:
    """See `EventStore`."""

    def __init__(self, url: str) -> None:
        """Raises UserError if no Redis answers there, or one that may lose what it has acknowledged."""
        try:
            self._redis = redis.Redis.from_url(
                url, decode_responses=True, socket_timeout=TIMEOUT, socket_connect_timeout=TIMEOUT
            )
            self._redis.ping()
        except (redis.RedisError, ValueError) as error:
            raise UserError(f"--events {url}: {error}") from error
        self._check_durability(url)
        self._add = self._redis.register_script(ADD)

    def _check_durability(self, url: str) -> None:
        try:
            settings = self._redis.config_get(*DURABLE)
        except redis.ResponseError:
            return warn(f"--events {url}: this Redis does not say whether it writes to disk")
        if settings != DURABLE:
            raise UserError(
                f"--events {url}: this Redis may lose events that it has acknowledged: start it with "
                "--appendonly yes --appendfsync always"
            )

    def add(self, groups: Sequence[Sequence[Event]]) -> list[int]:
        with _available(), self._redis.pipeline(transaction=True) as pipeline:
            for events in groups:
                arguments: list[str] = []
                for each in events:
                    short = json.dumps([each.time, each.event, each.item_id])
                    arguments += (each.event_id, USER + each.user_id, short, json.dumps(each))
                self._add(args=arguments, client=pipeline)
            return pipeline.execute()

    def latest(self, users: Sequence[str], after: float) -> list[list[Occurrence]]:
        with _available(), self._redis.pipeline(transaction=False) as pipeline:
            for user in users:
                pipeline.lrange(USER + user, 0, -1)
            found = pipeline.execute()
        every = [[Occurrence(*json.loads(text)) for text in texts] for texts in found]
        return [
            sorted((each for each in events if each.time > after), key=lambda each: each.time)
            for events in every
        ]

    def read(self, begin: float, end: float) -> Iterator[Event]:
        first = "-"
        with _available():
            while page := cast(Entries, self._redis.xrange(STREAM, first, count=PAGE)):
                for _, fields in page:
                    event = Event(*json.loads(fields["event"]))
                    if begin <= event.time < end:
                        yield event
                first = f"({page[-1][0]}"


@contextmanager
def _available() -> Iterator[None]:
    try:
        yield
    except redis.RedisError as error:
        raise UnavailableError(f"the store of events cannot be used now: {error}") from error
