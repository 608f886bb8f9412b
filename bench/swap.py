"""What does a request cost while new bundles take over? Latency second by second, through several swaps.

    python -m bench.swap                                 makes data and a model first: 100k items, some 5 minutes
    python -m bench.swap --savedmodels DIR               with a pair that is there
    python -m bench.swap --savedmodels DIR --against OLD  and beside another checkout of rec, in turns

CLIENTS clients ask `python -m rec.serve`, each at a steady pace, so that the server is far from busy. They keep their
connections open until an answer says that it closes. A latency counts from when the request was due, even if the client
was still waiting for the answer before it. Each swap publishes a copy of the ranking bundle and calls POST
/v1/models/reload, which loads both bundles anew.

The JSON has, for each checkout, medians over all swaps: "usual_p50_ms" and "usual_p99_ms" of the quiet seconds before;
"swap_p50_ms" and "swap_p99_ms" of the worst second between the reload's start and a second after its end;
"quiet_p99_ms", the worst of as many quiet seconds, which shows what chance does to a worst second; "seconds" that a
reload takes. "ratio" is swap_p99_ms / usual_p99_ms; "refused" counts the answers other than 200, "lost" the requests
without an answer.
"""

import argparse
import http.client
import json
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np

from bench.serving import Server, ask, make_model
from rec.bundles.files import versions
from rec.bundles.metadata import read_metadata, write_metadata
from rec.errors import UserError, run_command

CLIENTS = 8
RATE = 160  # requests per second, of all clients together
QUIET = 6.0  # seconds without a swap, before each swap
PAUSE = 2.0  # seconds after a swap, for its memory to be freed
TOKEN = "boss"
LOST = 0  # the status of a request without an answer


class Answer(NamedTuple):
    due: float  # seconds, by time.perf_counter
    seconds: float  # until the answer was complete
    status: int


class Client(threading.Thread):
    """Asks at a steady pace, over one connection as long as the server keeps it."""

    def __init__(self, port: int, number: int, answers: list[Answer], stop: threading.Event):
        super().__init__(daemon=True)
        self._port = port
        self._connection: socket.socket | None = None
        self._number = number
        self._answers = answers
        self._stopped = stop

    def run(self) -> None:
        interval = CLIENTS / RATE
        due = time.perf_counter() + interval * self._number / CLIENTS
        number = self._number
        while not self._stopped.is_set():
            time.sleep(max(0.0, due - time.perf_counter()))
            try:
                status = self._ask(ask("/v1/users/{}/recommendations", number))
            except OSError:
                status = LOST
                self._connection = None
            self._answers.append(Answer(due, time.perf_counter() - due, status))
            number += CLIENTS
            due += interval

    def _ask(self, request: bytes) -> int:
        if self._connection is None:
            self._connection = socket.create_connection(("127.0.0.1", self._port))
        self._connection.sendall(request)
        received = b""
        while True:
            part = self._connection.recv(262_144)
            if not part:
                raise ConnectionResetError
            received += part
            head, end, body = received.lower().partition(b"\r\n\r\n")
            length = head.partition(b"content-length: ")[2].partition(b"\r\n")[0]
            if end and len(body) >= int(length):
                if b"\r\nconnection: close" in head:
                    self._connection.close()
                    self._connection = None
                return int(head[9:12])


def publish_copy(savedmodels: Path) -> None:
    """Publishes the latest ranking bundle once more, as the next version."""
    stage = savedmodels / "ranking"
    latest = max(versions(stage))
    draft = Path(shutil.copytree(stage / str(latest), stage / "draft-copy"))
    write_metadata(draft, replace(read_metadata(draft), version=latest + 1))
    draft.rename(stage / str(latest + 1))


def reload(port: int) -> None:
    """Has the server load the new version; waits for a swap that is still under way."""
    for _ in range(60):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
        headers = {"Authorization": f"Bearer {TOKEN}"}
        connection.request("POST", "/v1/models/reload", headers=headers)
        answer = connection.getresponse()
        body = answer.read().decode()
        if answer.status == 200:
            return
        if "under way" not in body:
            break
        time.sleep(1)
    raise UserError(f"the reload failed: {body}")


def worst_second(answers: list[Answer], begin: float, end: float, percent: int) -> float:
    """The largest percentile of any second that begins in this time, in milliseconds."""
    worst = 0.0
    for start in np.arange(begin, end, 0.25):
        window = [each.seconds for each in answers if start <= each.due < start + 1]
        if window:
            worst = max(worst, float(np.percentile(window, percent)) * 1000)
    return worst


class Found:
    """What the swaps of one checkout cost, in milliseconds and seconds."""

    def __init__(self) -> None:
        self.by_name: dict[str, list[float]] = {}
        self.refused = 0
        self.lost = 0

    def add(self, name: str, value: float) -> None:
        self.by_name.setdefault(name, []).append(value)

    def report(self) -> dict[str, float]:
        found = {name: round(median(values), 2) for name, values in self.by_name.items()}
        found["ratio"] = round(found["swap_p99_ms"] / found["usual_p99_ms"], 2)
        return {**found, "refused": self.refused, "lost": self.lost}


def measure(savedmodels: Path, checkout: Path, swaps: int, found: Found) -> None:
    """Starts a server of this checkout and adds what its swaps cost."""
    os.chdir(checkout)
    os.environ["PYTHONPATH"] = str(checkout)
    os.environ["REC_ADMIN_TOKENS"] = TOKEN
    command = ["rec.serve", "--follow", "0", "--ranking-bundle", f"{savedmodels}/ranking/latest"]
    answers: list[Answer] = []
    stop = threading.Event()
    with Server(*command, savedmodels=savedmodels) as server:
        clients = [Client(server.port, number, answers, stop) for number in range(CLIENTS)]
        for client in clients:
            client.start()
        time.sleep(PAUSE)
        for _ in range(swaps):
            publish_copy(savedmodels)
            swap(server.port, answers, found)
            last = {name: round(values[-1], 1) for name, values in found.by_name.items()}
            print(f"{checkout}: {last}", file=sys.stderr)
        stop.set()
        for client in clients:
            client.join()
    found.refused += sum(each.status not in (200, LOST) for each in answers)
    found.lost += sum(each.status == LOST for each in answers)


def swap(port: int, answers: list[Answer], found: Found) -> None:
    """Waits, reloads, and adds what the answers before and during the reload cost."""
    quiet = time.perf_counter()
    time.sleep(QUIET)
    begin = time.perf_counter()
    reload(port)
    end = time.perf_counter()
    time.sleep(PAUSE)
    found.add("seconds", end - begin)
    usual = [each.seconds * 1000 for each in answers if quiet <= each.due < begin - 1]
    for percent in (50, 99):
        found.add(f"usual_p{percent}_ms", float(np.percentile(usual, percent)))
        found.add(f"swap_p{percent}_ms", worst_second(answers, begin, end, percent))
    length = min(end - begin, QUIET - 2)
    found.add("quiet_p99_ms", worst_second(answers, quiet, quiet + length, 99))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--savedmodels", type=Path, help="a directory of bundles; without it, one is made"
    )
    parser.add_argument("--against", type=Path, help="another checkout of rec, measured in turns")
    parser.add_argument("--swaps", type=int, default=3, help="of each server (default: 3)")
    parser.add_argument("--rounds", type=int, default=2, help="servers per checkout (default: 2)")
    args = parser.parse_args()
    checkouts = {"rec": Path(__file__).resolve().parent.parent}
    if args.against:
        checkouts["against"] = args.against.resolve()
    found = {name: Found() for name in checkouts}
    with tempfile.TemporaryDirectory() as root:
        savedmodels = args.savedmodels.resolve() if args.savedmodels else make_model(Path(root))
        copied = Path(shutil.copytree(savedmodels, Path(root) / "copy"))
        for _ in range(args.rounds):
            for name, checkout in checkouts.items():
                measure(copied, checkout, args.swaps, found[name])
    print(json.dumps({name: each.report() for name, each in found.items()}))


if __name__ == "__main__":
    run_command(main)
