"""Events: what is taken, what is kept, and that nothing is lost or doubled."""

import json
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rec.errors import UserError
from rec.ops.loop.events import LATEST, Event, EventStore, PostedEvent, receive
from rec.ops.loop.stores import open_store
from rec.serving.schemas import UnavailableError
from tests.conftest import ROOT, environment
from tests.ops.loop.conftest import Redis


def event(name: str, user: str = "u1", item: str = "i1", at: float = 100.0) -> Event:
    return Event(name, user, item, "view", at, None, None)


def test_an_event_is_kept_once(store: EventStore) -> None:
    assert store.add([[event("a"), event("b"), event("a")], [event("b"), event("c")]]) == [2, 1]
    assert store.add([[event("a", user="other")]]) == [0]
    assert [each.event_id for each in store.read(0, 101)] == ["a", "b", "c"]
    assert [len(events) for events in store.latest(["u1", "other"], 0)] == [3, 0]


def test_what_is_read_is_what_was_added(store: EventStore) -> None:
    events = [
        Event("1", "ü\n/%", "i'1", None, 1.25, None, None),
        Event("2", "u", "☕", "purchase", 1e9, 9.5, "request-1"),
    ]
    store.add([events])
    assert list(store.read(0, 2e9)) == events
    assert list(store.read(1.25, 1e9)) == events[:1]


def test_the_latest_events_of_a_user_are_in_order_of_time(store: EventStore) -> None:
    store.add([[event("a", item="i3", at=300), event("b", item="i1", at=100)]])
    store.add([[event("c", item="i2", at=200), event("d", user="u2", item="i9", at=50)]])
    found = store.latest(["u1", "nobody", "u2"], 50)
    assert [[each.item_id for each in events] for events in found] == [["i1", "i2", "i3"], [], []]


def test_only_the_latest_events_of_a_user_are_read(store: EventStore) -> None:
    store.add([[event(str(n), item=f"i{n}", at=n) for n in range(LATEST + 5)]])
    (found,) = store.latest(["u1"], -1)
    assert [each.item_id for each in found] == [f"i{n}" for n in range(5, LATEST + 5)]


WRITE = """
import sys
from rec.ops.loop.events import Event
from rec.ops.loop.stores import open_store
store = open_store(sys.argv[1])
number = 0
while True:
    names = [f"{number}-{at}" for at in range(3)]
    store.add([[Event(name, "u1", "i1", None, 1.0, None, None) for name in names]])
    print(*names, flush=True)
    number += 1
"""


def test_what_was_acknowledged_survives_a_kill(tmp_path: Path) -> None:
    path = str(tmp_path / "events.sqlite")
    for _ in range(3):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITE, path],
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
            cwd=ROOT,
        )
        assert writer.stdout is not None
        lines = [writer.stdout.readline() for _ in range(20)]
        writer.send_signal(signal.SIGKILL)
        lines += writer.stdout.readlines()
        acknowledged = [name for line in lines if line.endswith("\n") for name in line.split()]
        stored = [each.event_id for each in open_store(path).read(0, 2)]
        assert len(acknowledged) >= 60 and {*acknowledged} <= {*stored}
        assert len({*stored}) == len(stored) and len(stored) % 3 == 0  # each group as a whole


def test_what_redis_acknowledged_survives_its_kill(tmp_path: Path) -> None:
    server = Redis(tmp_path)
    store = open_store(server.url)
    store.add([[event(str(n))] for n in range(20)])
    server.kill()
    with pytest.raises(UnavailableError, match="the store of events cannot be used now"):
        store.add([[event("lost")]])
    server.start()
    deadline = time.monotonic() + 60
    while True:
        try:
            stored = [each.event_id for each in store.read(0, 200)]
            break
        except UnavailableError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert stored == [str(n) for n in range(20)]
    server.kill()


def test_a_redis_that_may_lose_events_is_refused(tmp_path: Path) -> None:
    server = Redis(tmp_path, "--appendonly", "no")
    with pytest.raises(UserError, match="may lose events that it has acknowledged: start it with"):
        open_store(server.url)
    server.kill()


def test_a_place_that_is_no_store_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("not a database" * 100)
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as connection:
        connection.execute("create table notes (text)")
    with pytest.raises(UserError, match="notes.txt cannot be used: .*not a database"):
        open_store(str(text))
    with pytest.raises(UserError, match="other.sqlite is no store of events: choose another file"):
        open_store(str(other))
    with pytest.raises(UserError, match="cannot be used: .*No such file or directory"):
        open_store(str(tmp_path / "nowhere" / "events.sqlite"))
    pytest.importorskip("redis")
    with pytest.raises(UserError, match="--events unix://"):
        open_store(f"unix://{tmp_path}/nobody")


# ------------------------------------------------------------------------------------------------------------
# What is posted


def posted(**fields: object) -> PostedEvent:
    return PostedEvent.model_validate_json(json.dumps({"user_id": "u", "item_id": "i", **fields}))


def test_an_event_with_a_time_gets_an_id_of_its_content() -> None:
    (first, again, other) = receive([posted(time=5), posted(time=5), posted(time=6)])
    assert first == again
    assert other.event_id != first.event_id


def test_events_without_a_time_are_different_and_of_now() -> None:
    before = time.time()
    first, second = receive([posted(), posted()])
    assert first.event_id != second.event_id
    assert before <= first.time <= time.time()


def test_the_id_of_the_client_decides() -> None:
    assert receive([posted(event_id="mine")])[0].event_id == "mine"


def test_a_time_in_another_unit_is_refused_with_its_place() -> None:
    with pytest.raises(UserError, match=r"events\[1\].time: 1700000000000 is in the future"):
        receive([posted(), posted(time=1_700_000_000_000)])
