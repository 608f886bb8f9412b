"""Stores of events: SQLite, and a Redis that is started for the tests. And a loaded pair."""

import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rec.bundles.files import find_pair
from rec.bundles.recommender import Recommender
from rec.ops.loop.events import EventStore
from rec.ops.loop.stores import open_store
from tests.conftest import Trained


@pytest.fixture(scope="session")
def backend(trained: Trained) -> Recommender:
    return Recommender.load(*find_pair(trained.savedmodels))


class Redis:
    """Debian's redis-server, on a socket in a directory of its own."""

    def __init__(self, directory: Path, *options: str) -> None:
        self.url = f"unix://{directory}/socket"
        program = shutil.which("redis-server")
        if program is None:
            pytest.skip("there is no redis-server (apt-get install redis-server)")
        pytest.importorskip("redis")
        settings = options or ("--appendonly", "yes", "--appendfsync", "always")
        place = ["--port", "0", "--unixsocket", f"{directory}/socket", "--dir", str(directory)]
        self._command = [program, *place, *settings]
        self._socket = directory / "socket"
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not self._socket.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        self._socket.unlink(missing_ok=True)


@pytest.fixture(params=["sqlite", "redis"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """What --events names."""
    if request.param == "sqlite":
        yield str(tmp_path / "events.sqlite")
        return
    server = Redis(tmp_path)
    yield server.url
    server.kill()


@pytest.fixture
def store(place: str) -> EventStore:
    return open_store(place)
