"""What does a hostile client cost the others? Memory, stalls and latency, on this machine alone.

    python -m bench.attack --savedmodels DIR         some 90 seconds
    python -m bench.attack --savedmodels DIR --only batches

- `headers`, `url`: one connection sends headers, or an address, without end. Over 6 seconds: how much it could send, by
  how many megabytes the server's memory grew, and the longest time that another client waited for /healthz.
- `idle`: 300 connections that send nothing, to a server that may open 200 files: the milliseconds until a newcomer is
  answered; null if that takes more than 5 seconds.
- `beside_N`: the latency of one client, which asks again as soon as it is answered, beside N clients that each keep one
  batch of 100 filtered requests in flight, and how often each of them was answered (200) or refused (503).

The clients are processes of this machine, and so share its cores with the server.
"""

import argparse
import contextlib
import json
import multiprocessing
import resource
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

from bench.serving import Load, Server, ask, get
from rec.errors import run_command

SECONDS = 6.0
PROBES = 0.02  # seconds between two looks at what others wait for
FILES, IDLE, PATIENCE = 200, 300, 5.0
BATCH, K = 100, 50
SINGLE = "/v1/users/{}/recommendations"


def serve(savedmodels: Path) -> Server:
    command = ("rec.serve", "--ranking-bundle", f"{savedmodels}/ranking/latest")
    return Server(*command, savedmodels=savedmodels)


# ------------------------------------------------------------------------------------------------------------
# One connection without end


def endless_headers() -> Iterator[bytes]:
    yield b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
    yield from repeat(b"".join(b"X-%d: %s\r\n" % (number, b"x" * 16) for number in range(2000)))


def endless_url() -> Iterator[bytes]:
    yield b"GET /"
    yield from repeat(b"a" * 65_536)


def pour(port: int, parts: Callable[[], Iterator[bytes]], sent: list[int]) -> None:
    """Sends for so long, and connects again whenever the server ends the connection."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)) as client:
            client.settimeout(1)
            for part in parts():
                client.sendall(part)
                sent[0] += len(part)
                if time.monotonic() > deadline:
                    return
        time.sleep(0.01)


def wait_for_health(port: int) -> float:
    """Seconds until a new client has its answer."""
    start = time.perf_counter()
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as client:
        client.sendall(get("/healthz"))
        if not client.recv(1000).startswith(b"HTTP/1.1 200"):
            raise OSError("the server did not answer")
    return time.perf_counter() - start


def measure_flood(server: Server, parts: Callable[[], Iterator[bytes]]) -> dict[str, Any]:
    before = server.megabytes()
    most, stall, lost = before, 0.0, 0
    sent = [0]
    attack = threading.Thread(target=pour, args=(server.port, parts, sent))
    attack.start()
    while attack.is_alive():
        try:
            stall = max(stall, wait_for_health(server.port))
        except OSError:
            lost += 1
        most = max(most, server.megabytes())
        time.sleep(PROBES)
    return {
        "sent_mb": sent[0] // 2**20,
        "grown_mb": most - before,
        "stall_ms": round(stall * 1000, 1),
        "unanswered": lost,
    }


# ------------------------------------------------------------------------------------------------------------
# Many connections


@contextlib.contextmanager
def files_at_most(number: int) -> Iterator[None]:
    """For the processes that are started inside."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def measure_idle(server: Server) -> float | None:
    with contextlib.ExitStack() as connections:
        for _ in range(IDLE):
            client = socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE)
            connections.enter_context(client)
        try:
            return round(wait_for_health(server.port) * 1000, 1)
        except OSError:
            return None


# ------------------------------------------------------------------------------------------------------------
# Batches


def batch(genres: list[str], number: int) -> bytes:
    """100 requests of other users, each for one genre."""
    requests = [
        {
            "user_id": f"u{number * BATCH + at}",
            "k": K,
            "filter": {"genres": [genres[at % len(genres)]]},
        }
        for at in range(BATCH)
    ]
    body = json.dumps({"requests": requests}).encode()
    head = (
        "POST /v1/recommend/batch HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def keep_asking(port: int, genres: list[str], clients: int, seconds: float, answers: Any) -> None:
    load = Load(port, partial(batch, genres))
    load.run(clients, seconds)
    answers.put({str(status): count for status, count in load.statuses.items()})


def measure_single(server: Server, genres: list[str], batches: int) -> dict[str, Any]:
    answers: Any = multiprocessing.Queue()
    arguments = (server.port, genres, batches, SECONDS + 2, answers)
    attack = multiprocessing.Process(target=keep_asking, args=arguments)
    if batches:
        attack.start()
        time.sleep(1)
    load = Load(server.port, partial(ask, SINGLE))
    found: dict[str, Any] = load.run(1, SECONDS)
    found["refused"] = load.statuses[503]
    if batches:
        found["batches"] = answers.get(timeout=60)
        attack.join()
    return found


def genres_of(savedmodels: Path) -> list[str]:
    import pandas as pd

    items = pd.read_parquet(savedmodels / "retrieval" / "1" / "items.parquet")
    return sorted({genre for genres in items["genres"] for genre in genres})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--savedmodels", type=Path, required=True, help="a directory of bundles")
    parser.add_argument("--only", choices=("headers", "url", "idle", "batches"))
    args = parser.parse_args()
    report: dict[str, Any] = {}

    def say(name: str, found: Any) -> None:
        report[name] = found
        print(f"{name:12} {found}", file=sys.stderr)

    for name, parts in (("headers", endless_headers), ("url", endless_url)):
        if args.only in (None, name):
            with serve(args.savedmodels) as server:
                say(name, measure_flood(server, parts))
    if args.only in (None, "idle"):
        with files_at_most(FILES):
            server = serve(args.savedmodels)
        with server:
            say("idle", measure_idle(server))
    if args.only in (None, "batches"):
        genres = genres_of(args.savedmodels)
        with serve(args.savedmodels) as server:
            Load(server.port, partial(ask, SINGLE)).run(4, 1.0)
            for batches in (0, 1, 8):
                say(f"beside_{batches}", measure_single(server, genres, batches))
    print(json.dumps(report))


if __name__ == "__main__":
    run_command(main)
