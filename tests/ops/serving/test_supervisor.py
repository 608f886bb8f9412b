"""Several processes that answer on one port: deaths, restarts and swaps, with real processes and signals."""

import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.serving import Load, get
from tests.conftest import Trained
from tests.ops.serving.test_front import publish_ranking
from tests.ops.serving.test_load import Running

PATH = "/v1/users/u7/recommendations?k=3"


LOADING = """
import os
from pathlib import Path
from rec.ops.serving.worker import background

def shares():
    return Path("/proc/self/autogroup").read_text().split()[-1], len(os.sched_getaffinity(0))

os.setsid()
before = shares()
with background():
    print(*shares())
assert shares() == before
"""


def status_of(pid: int) -> str:
    """The letter of its state: Z is a zombie."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def children(parent: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def workers(parent: int) -> list[int]:
    """The living processes of a server, the oldest first; without multiprocessing's own."""
    found = []
    for pid in children(parent):
        if status_of(pid) != "Z" and b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
            found.append(pid)
    return found


def shared_directory(worker: int) -> Path:
    entries = Path(f"/proc/{worker}/environ").read_bytes().split(b"\0")
    [found] = [each for each in entries if each.startswith(b"PROMETHEUS_MULTIPROC_DIR=")]
    return Path(found.decode().partition("=")[2])


class Asking:
    """Clients that ask all the time: some open a connection for each request, some keep theirs open."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.statuses: Counter[int] = Counter()
        self.lost: list[str] = []
        self.versions: set[int] = set()

    def __enter__(self) -> "Asking":
        self._stop = threading.Event()
        keeps = (True, True, False, False)
        self._threads = [threading.Thread(target=self._ask, args=(keep,)) for keep in keeps]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, keeps: bool) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        while not self._stop.wait(0.02):
            try:
                connection.request("GET", PATH, headers={} if keeps else {"Connection": "close"})
                answer = connection.getresponse()
                answer.read()
                self.statuses[answer.status] += 1
            except (OSError, http.client.HTTPException) as error:
                self.lost.append(repr(error))
                connection.close()


@pytest.fixture(scope="module")
def server(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    copied = tmp_path_factory.mktemp("workers") / "savedmodels"
    running = Running(Path(shutil.copytree(trained.savedmodels, copied)), "--workers", "2")
    try:
        yield running
        running.process.terminate()
        assert running.process.wait(30) == 0
    finally:
        running.process.kill()


def wait_for_two(server: Running) -> None:
    server.wait(lambda: server.metric("rec_workers") == 2)


def test_the_second_process_answers_only_when_it_is_warm(server: Running) -> None:
    with Asking(server.port) as asking:
        wait_for_two(server)
        time.sleep(1)
    assert set(asking.statuses) == {200} and not asking.lost


def test_both_share_a_port_and_their_numbers(server: Running) -> None:
    load = Load(server.port, lambda n: get(f"/v1/users/u{n % 200}/recommendations"))
    load.run(16, 1.0)
    counted = server.metric(
        'rec_requests_total{address="/v1/users/{user_id:path}/recommendations",status="200"}'
    )
    assert set(load.statuses) == {200} and counted >= load.statuses[200] > 0


def test_a_killed_process_is_replaced_by_one_that_answers_when_it_is_warm(server: Running) -> None:
    victim, other = workers(server.process.pid)
    counted = server.metric("rec_requests_total")
    with Asking(server.port) as asking:
        time.sleep(0.5)
        os.kill(victim, signal.SIGKILL)
        server.wait(lambda: victim not in children(server.process.pid))  # as a zombie neither
        server.wait(lambda: len(workers(server.process.pid)) == 2)
        wait_for_two(server)
        time.sleep(1)
    assert set(asking.statuses) == {200}
    assert len(asking.lost) <= 4  # what the killed process was answering
    assert other in workers(server.process.pid)
    assert server.metric("rec_requests_total") >= counted + asking.statuses[200] - 4
    live = {path.name for path in shared_directory(other).glob("gauge_live*")}
    expected = {f"gauge_{mode}_{n}.db" for mode in ("livesum", "livemin") for n in "01"}
    assert live <= expected | {"gauge_livesum_parent.db"}


def test_sighup_replaces_one_after_the_other_and_loses_no_request(server: Running) -> None:
    before = set(workers(server.process.pid))
    with Asking(server.port) as asking:
        server.process.send_signal(signal.SIGHUP)
        server.wait(lambda: not before & set(workers(server.process.pid)))
        wait_for_two(server)
        time.sleep(1)
    assert set(asking.statuses) == {200} and not asking.lost
    assert len(workers(server.process.pid)) == 2


def test_a_new_version_reaches_every_process_and_loses_no_request(server: Running) -> None:
    before = set(workers(server.process.pid))
    with Asking(server.port) as asking:
        publish_ranking(server.savedmodels, 2)
        server.wait(lambda: not before & set(workers(server.process.pid)))
        wait_for_two(server)
    assert set(asking.statuses) == {200} and not asking.lost
    versions = {server.ask("GET", "/readyz")[1]["model"]["ranking"] for _ in range(20)}
    assert versions == {2}
    # The supervisor forgets a process a moment after its end.
    server.wait(lambda: server.metric('rec_model_version{stage="ranking"}') == 2)


def test_a_process_that_dies_while_it_tries_new_bundles_harms_nobody(server: Running) -> None:
    before = set(workers(server.process.pid))
    failed_reloads = server.metric('rec_reloads_total{result="failed"}')
    publish_ranking(server.savedmodels, 3)
    server.wait(lambda: set(workers(server.process.pid)) - before)
    for pid in set(workers(server.process.pid)) - before:
        os.kill(pid, signal.SIGKILL)
    server.wait(lambda: server.ask("GET", "/v1/models")[1]["failed"])
    failed = server.ask("GET", "/v1/models")[1]["failed"]
    assert "ranking/3" in failed["bundles"] and "SIGKILL" in failed["error"]
    assert server.metric('rec_reloads_total{result="failed"}') == failed_reloads + 1
    # It is tried again, and works.
    server.wait(lambda: server.ask("GET", "/v1/models")[1]["failed"] is None)
    server.wait(lambda: not before & set(workers(server.process.pid)))
    wait_for_two(server)


def test_while_the_latest_bundle_is_broken_a_killed_process_comes_back_with_the_last_good_one(
    server: Running,
) -> None:
    publish_ranking(server.savedmodels, 4, damaged=True)
    server.wait(lambda: server.ask("GET", "/v1/models")[1]["failed"])
    victim = workers(server.process.pid)[0]
    os.kill(victim, signal.SIGKILL)
    server.wait(lambda: server.metric("rec_workers") == 1)
    wait_for_two(server)
    assert {server.ask("GET", "/readyz")[1]["model"]["ranking"] for _ in range(10)} == {3}
    shutil.rmtree(server.savedmodels / "ranking" / "4")
    server.wait(lambda: server.ask("GET", "/v1/models")[1]["failed"] is None)


def test_sigterm_right_after_a_crash_ends_all_processes(server: Running) -> None:
    found = workers(server.process.pid)
    os.kill(found[0], signal.SIGKILL)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(25) == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in found)
    with socket.create_server(("127.0.0.1", server.port)):
        pass


@pytest.mark.skipif(
    not Path("/proc/self/autogroup").exists(), reason="the kernel has no groups of sessions"
)
def test_a_process_that_loads_leaves_the_processor_to_those_that_answer() -> None:
    command = [sys.executable, "-c", LOADING]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["5", "1"]


def test_processes_end_when_their_parent_is_killed(trained: Trained, tmp_path: Path) -> None:
    running = Running(Path(shutil.copytree(trained.savedmodels, tmp_path / "savedmodels")))
    [worker] = workers(running.process.pid)
    shared = shared_directory(worker)
    assert shared.is_dir()
    running.process.kill()
    running.wait(lambda: not Path(f"/proc/{worker}").exists() or status_of(worker) == "Z")
    assert not shared.exists()
    with socket.create_server(("127.0.0.1", running.port)):
        pass
