"""One process of a server: loads its bundles, answers, and ends on SIGTERM or when its parent has died.

It sends and receives pairs of a kind and a value, over its connection to the supervisor:

- to the supervisor: ("ready", versions) once it listens with its models loaded, or ("refused", sentence); ("beat",
  None) every second from the event loop; ("reload", None) when a client asks for it.
- from the supervisor: ("failed", what /v1/models says); ("reloaded", versions or a sentence).
"""

import asyncio
import gc
import os
import queue
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from rec.errors import UserError
from rec.ops.serving.connections import http_settings
from rec.ops.serving.metrics import DIRECTORY
from rec.ops.serving.reload import Bundles, names
from rec.serving.schemas import UnavailableError
from rec.serving.service import Service

GRACE = 10.0  # seconds to finish requests, before a process is killed
LINGER = 1.0  # seconds for clients to close their connections: each answer tells them to
BACKGROUND = 5  # nice value of a process that loads: it gets a third of one that answers
BEAT = 1  # seconds between signs of life
# Seconds after which the thread of the models gets the interpreter from the event loop. With Python's 5 ms it idles
# while a batch of answers is written: at 32 clients, 5 % fewer requests per second.
SWITCH = 0.0002


class Server(uvicorn.Server):
    """uvicorn that reports when it listens. When it ends, clients that have just sent a request get their answer."""

    def __init__(
        self, config: uvicorn.Config, listening: Callable[[], None], ended: Callable[[], None]
    ) -> None:
        """`ended` is called once all requests have their answer; then the signal that ends the process takes effect."""
        super().__init__(config)
        self._listening = listening
        self._ended = ended

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._listening()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()  # new connections go to the other processes
        state = self.server_state
        state.default_headers = [*state.default_headers, (b"connection", b"close")]
        deadline = time.monotonic() + LINGER
        while state.connections and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        await super().shutdown(sockets)
        self._ended()


class Supervision:
    """The worker's end of its connection to the supervisor."""

    def __init__(self, connection: Connection, service: Service, bundles: Bundles) -> None:
        self._connection = connection
        self._service = service
        self._bundles = bundles
        self._sending = threading.Lock()
        self._preparing = threading.Lock()
        self._missing = {"models", "listening"}  # until it is ready
        self._reloading = threading.Lock()
        self._outcomes: queue.SimpleQueue[dict[str, int] | str] = queue.SimpleQueue()

    def send(self, kind: str, value: object = None) -> None:
        try:
            with self._sending:
                self._connection.send((kind, value))
        except OSError:
            return  # the parent has died: `listen` ends this process

    async def beat(self) -> None:
        self.send("beat")

    def reload(self) -> dict[str, int]:
        """Asks the supervisor to reload; returns the new versions. Raises UserError if the old ones stay."""
        if not self._reloading.acquire(blocking=False):
            raise UserError("another reload is under way")
        try:
            self.send("reload")
            outcome = self._outcomes.get()
        finally:
            self._reloading.release()
        if isinstance(outcome, str):
            raise UserError(outcome)
        return outcome

    def load(self) -> None:
        """Has the service load its models. If it cannot, this process ends."""
        try:
            self._service.load()
        except Exception as error:
            self.send("refused", self._refusal(error))
            os._exit(1)
        # A full collection takes 0.2 s: what is there now is left out of later ones.
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 50, 100)
        self.note("models")

    def _refusal(self, error: Exception) -> str:
        if isinstance(error, UserError):
            return str(error)
        if not isinstance(error, UnavailableError):
            traceback.print_exception(error)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return f"{names(self._bundles)} cannot be taken into service: {reason}"

    def note(self, part: str) -> None:
        """Notes one of the two things that make a process ready, and reports the second one."""
        with self._preparing:
            self._missing.discard(part)
            is_ready = not self._missing
        if is_ready:
            self.send("ready", self._service.ready.versions)

    def listen(self) -> None:
        """Receives until the parent dies. Then this process ends as on SIGTERM."""
        try:
            while True:
                kind, value = self._connection.recv()
                if kind == "failed":
                    self._service.failed = value
                else:
                    self._outcomes.put(value)
        except (EOFError, OSError):
            shutil.rmtree(os.environ.get(DIRECTORY, ""), ignore_errors=True)  # the parent's
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(GRACE)
            os._exit(1)


@contextmanager
def background() -> Iterator[None]:
    """Leaves the other cores, and most of this one, to the processes that answer."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(cores)[os.getpid() % len(cores)]})
    _weigh(BACKGROUND)
    try:
        yield
    finally:
        _weigh(0)
        for task in os.listdir("/proc/self/task"):
            with suppress(ProcessLookupError):
                os.sched_setaffinity(int(task), cores)


def _weigh(nice: int) -> None:
    """Sets the nice value of this process's session, where the kernel shares out processor time by session."""
    with suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(nice))


def run(
    supervision: Supervision,
    app: ASGIApp,
    listener: socket.socket,
    at_once: bool,
    ended: Callable[[], None],
) -> None:
    """Loads and answers until SIGTERM.

    Args:
      listener: a socket that listens, which other processes may share.
      ended: called once all requests have their answer.
      at_once: answer while loading too, with 503 and a healthy /healthz; otherwise connections wait for the models.
    """
    sys.setswitchinterval(SWITCH)
    threading.Thread(target=supervision.listen, daemon=True).start()
    loading = threading.Thread(target=supervision.load, daemon=True)
    if at_once:
        loading.start()
    else:
        with background():
            loading.start()
            loading.join()
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=int(GRACE - 2 * LINGER),
        callback_notify=supervision.beat,
        timeout_notify=BEAT,
        **http_settings(),
    )
    Server(config, lambda: supervision.note("listening"), ended).run(sockets=[listener])
    _weigh(BACKGROUND)  # freeing gigabytes takes a while
    os._exit(0)  # a thread may still be loading, which must not keep the process
