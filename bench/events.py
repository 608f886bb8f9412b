"""What does it cost to take events while recommending, and is anything lost?

    python -m bench.events --savedmodels DIR                     events in SQLite
    python -m bench.events --savedmodels DIR --redis             in a Redis that is started for it
    python -m bench.events --savedmodels DIR --only kills --kills 50

`python -m rec.serve --workers 2` is asked at a steady pace: RECOMMENDATIONS per second for known users, each another
one, and EVENTS per second, ten in a request. A latency counts from when the request was due. The client is one process
of the same machine, and takes its share of the cores.

- `load`: latencies `without` events (a server without --events), with a store that is `idle`, and beside the events. In
  `sessions` each event is of another anonymous session, so that known users keep their precomputed answers.
  `one_by_one` sends the same with one event per request. In `same_users` the events are of users who are recommended
  to, who are then answered from their live histories. "p50_ratio" compares each with `without`.
- `freshness`: beside that load, one event of a new user at a time; once it is acknowledged, the user's recommendations
  over another connection. "stale" counts answers that do not know of the event.
- `kills`: clients send events while the server is killed with SIGKILL and started again. "lost" counts events that were
  acknowledged and are not in the store, "doubled" those that are in it twice. Unanswered events are sent again.
"""

import argparse
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.serving import ITEMS, USERS, Server, ask, make_model, processor
from rec.errors import UserError, run_command
from rec.ops.loop.stores import open_store

RECOMMENDATIONS = 500  # per second
EVENTS = 1000  # per second
TOGETHER = 10  # events in one request: what a page sends
CONNECTIONS = 16  # per stream
SECONDS = 15.0
WARM = 2.0  # seconds that are not measured
PROBES = 200
WRITERS = 4  # clients that send events while the server is killed


def item_of(number: int) -> str:
    """Ids begin with i1."""
    return f"i{number * 977 % ITEMS + 1}"


def event(user: str, number: int, **more: str) -> dict[str, str]:
    return {"user_id": user, "item_id": item_of(number), **more}


def post(*events: dict[str, str]) -> bytes:
    body = json.dumps({"events": events}).encode()
    head = (
        "POST /v1/events HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


@dataclass
class Stream:
    """Requests at a steady rate over a few connections."""

    rate: float
    request: Callable[[int], bytes]
    seconds: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    sent: int = 0
    free: list[socket.socket] = field(default_factory=list)


class Paced:
    """Several streams in one loop."""

    def __init__(self, port: int, streams: list[Stream]) -> None:
        self._poll = select.epoll()
        self._streams = streams
        self._busy: dict[int, tuple[socket.socket, Stream, float]] = {}
        self._received: dict[int, bytes] = {}
        for stream in streams:
            for _ in range(CONNECTIONS):
                client = socket.create_connection(("127.0.0.1", port))
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._poll.register(client, select.EPOLLIN)
                stream.free.append(client)

    def run(self, seconds: float, first: float = 0.0) -> None:
        """Sends for so long; what was due in the `first` seconds is not counted."""
        begin = time.perf_counter()
        starts = [stream.sent for stream in self._streams]
        while (now := time.perf_counter()) < begin + seconds:
            wait = 0.05
            for stream, start in zip(self._streams, starts, strict=True):
                while stream.free:
                    due = begin + (stream.sent - start) / stream.rate
                    if due > now:
                        wait = min(wait, due - now)
                        break
                    self._send(stream, due)
            for number, _ in self._poll.poll(wait):
                self._receive(number, begin + first)

    def _send(self, stream: Stream, due: float) -> None:
        client = stream.free.pop(0)
        self._busy[client.fileno()] = client, stream, due
        self._received[client.fileno()] = b""
        client.sendall(stream.request(stream.sent))
        stream.sent += 1

    def _receive(self, number: int, counted_from: float) -> None:
        client, stream, due = self._busy[number]
        part = client.recv(262_144)
        if not part:
            raise UserError("the server closed a connection")
        answer = self._received[number] + part
        self._received[number] = answer
        head, end, body = answer.partition(b"\r\n\r\n")
        length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
        if not end or len(body) < int(length):
            return
        del self._busy[number]
        stream.free.append(client)
        if due >= counted_from:
            stream.statuses[int(head[9:12])] += 1
            stream.seconds.append(time.perf_counter() - due)


def milliseconds(seconds: list[float]) -> dict[str, float]:
    p50, p99 = np.percentile(seconds, [50, 99]) * 1000
    return {"p50_ms": round(float(p50), 2), "p99_ms": round(float(p99), 2)}


def user(number: int) -> str:
    """Each is another known user than the one before."""
    return f"u{number * 7919 % USERS}"


def streams_of(users: Callable[[int], str] | None, together: int) -> list[Stream]:
    """Recommendations, and events of the users that a function names, several in one request."""

    def request(number: int) -> bytes:
        assert users is not None
        numbers = range(number * together, (number + 1) * together)
        return post(*(event(users(each), each) for each in numbers))

    streams = [Stream(RECOMMENDATIONS, partial(ask, "/v1/users/{}/recommendations"))]
    if users is not None:
        streams.append(Stream(EVENTS / together, request))
    return streams


# ------------------------------------------------------------------------------------------------------------
# Load and freshness


def measure(port: int, users: Callable[[int], str] | None, together: int = 1) -> dict[str, Any]:
    """The rates and latencies of each stream's requests, and its answers other than 200 and 202."""
    streams = streams_of(users, together)
    Paced(port, streams).run(SECONDS + WARM, WARM)
    report: dict[str, Any] = {}
    for name, stream in zip(("recommendations", "events"), streams, strict=False):
        errors = sum(stream.statuses.values()) - stream.statuses[200] - stream.statuses[202]
        rate = round(len(stream.seconds) / SECONDS)
        report[name] = {"rps": rate, **milliseconds(stream.seconds), "errors": errors}
    return report


def probe(port: int, prefix: str) -> dict[str, Any]:
    """Whether an acknowledged event is in the next answer, under load; and the time to that answer."""
    seconds = []
    stale = 0
    load = Paced(port, streams_of(lambda number: f"{prefix}{number}", TOGETHER))
    loading = threading.Thread(target=load.run, args=(PROBES * 0.05,))
    loading.start()
    for number in range(PROBES):
        name = f"{prefix}probe{number}"
        status, _ = call(port, post(event(name, number)))
        acknowledged = time.perf_counter()
        _, body = call(port, ask_for(name))  # over another connection, so of any worker
        seconds.append(time.perf_counter() - acknowledged)
        answer = json.loads(body)
        known = [item["item_id"] for item in answer["history"]]
        shown = [item["item_id"] for item in answer["items"]]
        item = item_of(number)
        stale += status != 202 or item not in known or item in shown
    loading.join()
    return {"events": PROBES, "stale": stale, **milliseconds(seconds)}


def ask_for(name: str) -> bytes:
    body = json.dumps({"user_id": name, "explain": True}).encode()
    head = (
        "POST /v1/recommend HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def call(port: int, request: bytes) -> tuple[int, bytes]:
    """The status and the body of an answer, over a connection of its own. Raises OSError if there is none."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        client.sendall(request.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
        received = b""
        while part := client.recv(262_144):
            received += part
    head, end, body = received.partition(b"\r\n\r\n")
    if not end:
        raise ConnectionResetError
    return int(head[9:12]), body


# ------------------------------------------------------------------------------------------------------------
# Kills


class Writer(threading.Thread):
    """Sends events one after the other, each of them again until it is acknowledged."""

    def __init__(self, number: int, ports: list[int], stop: threading.Event) -> None:
        super().__init__(daemon=True)
        self._number = number
        self._ports = ports  # the last one is in use
        self._stopped = stop
        self.acknowledged: list[str] = []

    def run(self) -> None:
        number = 0
        while not self._stopped.is_set():
            name = f"w{self._number}-{number}"
            try:
                status, _ = call(self._ports[-1], post(event(user(number), number, event_id=name)))
            except OSError:
                status = 0
            if status == 202:
                self.acknowledged.append(name)
                number += 1
            else:
                time.sleep(0.02)


def kill_often(serve: Callable[[], Server], store: str, kills: int) -> dict[str, int]:
    """Kills servers under load, and compares what was acknowledged with what is in the store."""
    ports: list[int] = []
    stop = threading.Event()
    writers = [Writer(number, ports, stop) for number in range(WRITERS)]
    generator = np.random.default_rng(0)
    for kill in range(kills):
        with serve() as server:
            ports.append(server.port)
            for writer in writers:
                if not writer.is_alive():
                    writer.start()
            time.sleep(generator.uniform(0.3, 1.0))
            for process in [*children(server.process.pid), server.process.pid]:
                os.kill(process, signal.SIGKILL)
        done = sum(len(writer.acknowledged) for writer in writers)
        print(f"kill {kill + 1}: {done:,} events acknowledged", file=sys.stderr)
    stop.set()
    for writer in writers:
        writer.join()
    stored = Counter(event.event_id for event in open_store(store).read(0, time.time() + 60))
    acknowledged = [name for writer in writers for name in writer.acknowledged]
    return {
        "kills": kills,
        "acknowledged": len(acknowledged),
        "lost": sum(name not in stored for name in acknowledged),
        "doubled": sum(count > 1 for count in stored.values()),
        "unacknowledged": len(stored) - len(acknowledged),
    }


def children(process: int) -> list[int]:
    found = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(each) for each in found]


@contextmanager
def redis_server(directory: str) -> Iterator[str]:
    """A Redis of its own, with durable writes: its URL."""
    program = shutil.which("redis-server")
    if program is None:
        raise UserError("--redis: there is no redis-server; apt-get install redis-server")
    place = f"{directory}/redis.sock"
    options = ["--port", "0", "--unixsocket", place, "--dir", directory]
    options += ["--appendonly", "yes", "--appendfsync", "always"]
    process = subprocess.Popen([program, *options], stdout=subprocess.DEVNULL)
    try:
        while not Path(place).exists():
            time.sleep(0.05)
        yield f"unix://{place}"
    finally:
        process.terminate()
        process.wait()


def run_all(savedmodels: Path, store: str, only: str | None, kills: int) -> dict[str, Any]:
    command = ["rec.serve", "--ranking-bundle", f"{savedmodels}/ranking/latest", "--follow", "0"]
    two = [*command, "--workers", "2"]
    report: dict[str, Any] = {"processor": processor()}
    if only in (None, "load"):
        with Server(*two, savedmodels=savedmodels) as server:
            report["without"] = measure(server.port, None)
        with Server(*two, "--events", store, savedmodels=savedmodels) as server:
            report["idle"] = measure(server.port, None)
            report["sessions"] = measure(server.port, "s{}".format, TOGETHER)
            report["one_by_one"] = measure(server.port, "t{}".format)
            report["same_users"] = measure(server.port, user, TOGETHER)
        base = report["without"]["recommendations"]["p50_ms"]
        for name in ("idle", "sessions", "one_by_one", "same_users"):
            found = report[name]["recommendations"]
            found["p50_ratio"] = round(found["p50_ms"] / base, 2)
            print(name, report[name], file=sys.stderr)
    if only in (None, "freshness"):
        with Server(*two, "--events", store, savedmodels=savedmodels) as server:
            report["freshness"] = probe(server.port, os.urandom(3).hex())
    if only in (None, "kills"):
        serve = partial(Server, *command, "--events", store, savedmodels=savedmodels)
        report["kills"] = kill_often(serve, store, kills)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--savedmodels", type=Path, help="a directory of bundles; without it, one is made"
    )
    parser.add_argument("--redis", action="store_true", help="instead of SQLite")
    parser.add_argument("--only", choices=("load", "freshness", "kills"), help="one of the parts")
    parser.add_argument("--kills", type=int, default=10, help="(default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root, ExitStack() as stack:
        savedmodels = args.savedmodels or make_model(Path(root))
        store = f"{root}/events.sqlite"
        if args.redis:
            store = stack.enter_context(redis_server(root))
        print(json.dumps(run_all(savedmodels, store, args.only, args.kills)))


if __name__ == "__main__":
    run_command(main)
