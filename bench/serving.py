"""What does a recommendation cost over HTTP? Requests a second and latency, side by side, one worker each.

    python -m bench.serving                              makes data and a model first: 100k items, some 5 minutes
    python -m bench.serving --savedmodels DIR            with a pair that is there

- `trivial`: a FastAPI endpoint that returns a constant list: what HTTP itself costs here.
- `thread_pool`: the usual way, a plain `def` endpoint that calls the model once a request, from FastAPI's threads.
- `rec`: `python -m rec.serve`, with its access log, metrics and tokens, asked for known users.
- `rec_history`: the same, with a history of 20 items in each request: the query tower and the index take part.
- `model` (`--only model`): the model's call alone, in a process without a server: microseconds of processor time a
  request, in batches of 1, 8 and 32, and the resident memory after batches of every size up to 64.

Each number in the JSON is a count of clients that ask again as soon as they are answered, over connections that stay
open: {"rps", "p50_ms", "p99_ms"}. Both of `rec` also have "refused" (503) and "percent", the rate as a share of the
trivial endpoint's with as many clients. "processor" names the machine, on which all figures depend. Every user is
another one. The clients are one process of this machine, so they take their share of its cores; the resident memory of
the server is in megabytes.
"""

import argparse
import json
import os
import platform
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import uvicorn
from fastapi import FastAPI, Query

from rec.errors import UserError, run_command

SECONDS, PAUSE = 5.0, 0.5  # of one measurement, and of load before it
USERS, ITEMS = 10_000, 100_000
HISTORY = 20  # items
K = 10
CLOSES = b"\r\nconnection: close\r\n"


# ------------------------------------------------------------------------------------------------------------
# The clients


class Load:
    """Many clients over HTTP/1.1 in one loop without a framework: 15 microseconds a request."""

    def __init__(
        self,
        port: int,
        request: Callable[[int], bytes],
        check: Callable[[int, bytes], None] | None = None,
    ):
        """`request` gives the bytes of request number n, `check` sees each answer's status and body."""
        self.port, self.request, self.check = port, request, check
        self.seconds: list[float] = []
        self.statuses: Counter[int] = Counter()
        self.sent = 0

    def run(self, clients: int, seconds: float) -> dict[str, float]:
        """Asks for so long and returns the rate and the latencies of what was answered with 200."""
        self.seconds, self.statuses = [], Counter()
        sockets = [socket.create_connection(("127.0.0.1", self.port)) for _ in range(clients)]
        by_number = {each.fileno(): each for each in sockets}
        started: dict[int, float] = {}
        received: dict[int, bytes] = {}
        poll = select.epoll()
        for number in by_number:
            poll.register(number, select.EPOLLIN)
            self._send(by_number[number], number, started, received)
        begin = time.perf_counter()
        while time.perf_counter() < begin + seconds:
            for number, _ in poll.poll(0.1):
                received[number] += by_number[number].recv(262_144)
                if not self._done(number, received[number], started[number]):
                    continue
                if CLOSES in received.pop(number):  # the process that answers has a successor
                    started.pop(number)
                    by_number.pop(number).close()
                    client = socket.create_connection(("127.0.0.1", self.port))
                    number = client.fileno()
                    by_number[number] = client
                    poll.register(number, select.EPOLLIN)
                self._send(by_number[number], number, started, received)
        elapsed = time.perf_counter() - begin
        poll.close()
        for each in by_number.values():
            each.close()
        p50, p99 = np.percentile(self.seconds, [50, 99]) * 1000 if self.seconds else (0, 0)
        return {
            "rps": round(len(self.seconds) / elapsed),
            "p50_ms": round(float(p50), 2),
            "p99_ms": round(float(p99), 2),
        }

    def _send(
        self,
        client: socket.socket,
        number: int,
        started: dict[int, float],
        received: dict[int, bytes],
    ) -> None:
        received[number], started[number] = b"", time.perf_counter()
        client.sendall(self.request(self.sent))
        self.sent += 1

    def _done(self, number: int, answer: bytes, started: float) -> bool:
        """Whether the answer is complete; then it is counted."""
        if not answer:
            raise UserError("the server closed a connection")
        head, end, body = answer.partition(b"\r\n\r\n")
        if not end or len(body) < int(
            head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
        ):
            return False
        status = int(head[9:12])
        self.statuses[status] += 1
        if status == 200:
            self.seconds.append(time.perf_counter() - started)
        if self.check is not None:
            self.check(status, body)
        return True


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


def ask(path: str, number: int) -> bytes:
    """Each request is of another user than the one before."""
    return get(path.format(f"u{number * 7919 % USERS}"))


def ask_with_history(number: int) -> bytes:
    items = [f"i{(number * 7919 + at * 977) % ITEMS}" for at in range(HISTORY)]
    body = json.dumps({"history": items}).encode()
    head = (
        "POST /v1/recommend HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


# ------------------------------------------------------------------------------------------------------------
# What is compared


def trivial() -> FastAPI:
    app = FastAPI()

    @app.get("/users/{user_id}")
    async def constant(user_id: str) -> list[str]:
        return [f"i{number}" for number in range(K)]

    return app


def thread_pool() -> FastAPI:
    """What one would write first: the loaded bundles, called in a plain `def`."""
    from rec.bundles.files import find_pair
    from rec.bundles.recommender import Recommender

    pair = Recommender.load(*find_pair(Path(os.environ["BENCH_SAVEDMODELS"])))
    titles = pair.items["title"].to_dict()
    app = FastAPI()

    @app.get("/users/{user_id}")
    def recommend(user_id: str, k: Annotated[int, Query(ge=1, le=100)] = K) -> list[dict[str, Any]]:
        answer = pair.answer([user_id], [None], [[]])
        ids, scores = pair.items.index[answer.rows[0, :k]], answer.scores[0, :k].tolist()
        return [
            {"item_id": i, "score": score, "title": titles[i]}
            for i, score in zip(ids, scores, strict=True)
        ]

    return app


def model_call(savedmodels: Path) -> dict[str, int]:
    """What the model's call costs by itself; see above."""
    import tensorflow as tf

    from rec.bundles.files import find_pair
    from rec.bundles.recommender import Recommender

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    pair = Recommender.load(*find_pair(savedmodels))

    def answer(size: int, number: int) -> None:
        users = [f"u{(number + at) * 7919 % USERS}" for at in range(size)]
        pair.answer(users, [None] * size, [[]] * size)

    found = {}
    for size in (1, 8, 32):
        for number in range(20):
            answer(size, number)
        start, calls = time.process_time(), 6400 // size
        for number in range(calls):
            answer(size, number * size)
        found[f"{size}_cpu_us"] = round((time.process_time() - start) / calls / size * 1e6)
    for number in range(40 * 64):
        answer(1 + number % 64, number)
    return found | {"rss_mb": megabytes(os.getpid())}


def processor() -> str:
    """The processor's name and the number of cores that this process may use."""
    information = Path("/proc/cpuinfo").read_text()
    name = information.partition("model name\t: ")[2].partition("\n")[0] or platform.machine()
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def megabytes(process: int) -> int:
    """Resident memory of a process and its children."""
    status = Path(f"/proc/{process}/status").read_text()
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    own = int(status.partition("VmRSS:")[2].split()[0]) // 1024
    return own + sum(megabytes(int(child)) for child in children)


class Server:
    """A server process on a port of its own."""

    def __init__(self, *command: str, savedmodels: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        environment = {**os.environ, "BENCH_SAVEDMODELS": str(savedmodels), "REC_API_TOKENS": ""}
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  the access log goes to a file, as it would
        self.process = subprocess.Popen(
            [sys.executable, "-m", *command, "--port", str(self.port)],
            env=environment,
            stdout=self._log,
            stderr=subprocess.PIPE,
        )

    def __enter__(self) -> "Server":
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                with socket.create_connection(("127.0.0.1", self.port)) as probe:
                    probe.sendall(
                        b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
                    )
                    if probe.recv(12)[9:] != b"503":
                        return self
            except OSError:
                pass
            time.sleep(0.2)
        assert self.process.stderr is not None
        raise UserError(f"the server did not start: {self.process.stderr.read().decode()[-500:]}")

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(20)
        self._log.close()

    def megabytes(self) -> int:
        return megabytes(self.process.pid)


def make_model(root: Path) -> Path:
    """Data of the wanted size and a model, hardly trained: its answers cost what good ones do."""
    config = root / "config.yaml"
    config.write_text(
        f"{{dataset: {root}/data, retrieval: {{epochs: 1}}, ranking: {{epochs: 1}}, "
        f"output: {{checkpoints: {root}/checkpoints, savedmodels: {root}/savedmodels}}}}\n"
    )
    size = ["--users", str(USERS), "--items", str(ITEMS), "--interactions-per-user", "20"]
    for command in (
        ["rec.data_prep.dummy", "--output-dir", f"{root}/data", *size],
        ["rec.train", "--stage", "all", "--config", str(config)],
    ):
        print(f"python -m {' '.join(command)}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", *command], check=True, stdout=subprocess.DEVNULL)
    return root / "savedmodels"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--savedmodels", type=Path, help="a directory of bundles; without it, one is made"
    )
    parser.add_argument(
        "--requests", type=int, default=0, help="then ask for so many more, watching the memory"
    )
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument(
        "--only",
        choices=("trivial", "thread_pool", "rec", "rec_history", "model"),
        help="measure one of them",
    )
    parser.add_argument("--serve", choices=("trivial", "thread_pool"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only == "model":
        if args.savedmodels is None:
            raise UserError("--only model needs --savedmodels")
        found = model_call(args.savedmodels)
        return print(json.dumps({"processor": processor(), "model": found}))
    if args.serve:
        app = {"trivial": trivial, "thread_pool": thread_pool}[args.serve]()
        return uvicorn.run(app, port=args.port, log_level="warning", access_log=False)

    with tempfile.TemporaryDirectory() as root:
        savedmodels = args.savedmodels or make_model(Path(root))
        report: dict[str, Any] = {"processor": processor()}
        errors = 0
        known = partial(ask, "/v1/users/{}/recommendations")
        serve = ["rec.serve", "--ranking-bundle", f"{savedmodels}/ranking/latest"]
        systems: dict[str, tuple[list[str], Callable[[int], bytes], tuple[int, ...]]] = {
            name: (["bench.serving", "--serve", name], partial(ask, "/users/{}"), (1, 32))
            for name in ("trivial", "thread_pool")
        }
        systems["rec"] = (serve, known, (1, 8, 32, 256))
        systems["rec_history"] = (serve, ask_with_history, (1, 8, 32, 256))
        for name, (command, request, clients) in systems.items():
            if args.only not in (None, name):
                continue
            is_rec = name.startswith("rec")
            with Server(*command, savedmodels=savedmodels) as server:
                load = Load(server.port, request)
                report[name] = {}
                for count in clients:
                    load.run(count, PAUSE)
                    measured: dict[str, float] = load.run(count, SECONDS)
                    refused = load.statuses[503] if is_rec else 0
                    if is_rec:
                        measured["refused"] = refused
                        trivial_rps = report.get("trivial", {}).get(str(count), {}).get("rps")
                        if trivial_rps:
                            measured["percent"] = round(100 * measured["rps"] / trivial_rps, 1)
                    errors += sum(load.statuses.values()) - load.statuses[200] - refused
                    report[name][str(count)] = measured
                    line = f"{name:12} {count:4} clients  {measured}  {processor()}"
                    print(line, file=sys.stderr)
                report[name]["rss_mb"] = server.megabytes()
                if name == "rec" and args.requests:
                    report[name]["memory"] = watch_memory(load, server, args.requests)
        print(json.dumps({**report, "errors": errors}))


def watch_memory(load: Load, server: Server, requests: int) -> dict[str, int]:
    """The server's resident memory after each of ten parts of that many requests of 32 clients."""
    found = {"0": server.megabytes()}
    first, part = load.sent, requests // 10
    for at in range(1, 11):
        while load.sent < first + at * part:
            load.run(32, 2.0)
        found[str(load.sent - first)] = server.megabytes()
        print(f"after {load.sent - first:,} requests: {server.megabytes()} MB", file=sys.stderr)
    return found


if __name__ == "__main__":
    run_command(main)
