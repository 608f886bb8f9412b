"""The processes of a server: starts them, replaces them, and swaps bundles by swapping processes.

- New bundles are loaded and warmed by a new process, beside those that answer, and an old process ends once its
  successor is ready. So a swap does not hold the interpreter that answers, and the old models' memory is freed with
  their process. Bundles that crash a process crash only the new one.
- The first process listens at once, and says that it is loading. Every other accepts connections only when its models
  are warm. One that has died is replaced at once, with the bundles that were in service.
- With several processes a swap, or SIGHUP, replaces one after the other: at most one more than wanted is alive.
- This process loads no models and answers no requests. It waits for nothing but its processes and signals.
"""

import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from rec.errors import UserError
from rec.ops.serving.metrics import SLOT, WORKERS, forget
from rec.ops.serving.reload import LONGEST_DELAY, Bundles, Follower, Seen, look, names, say
from rec.ops.serving.worker import GRACE

TICK = 0.5  # seconds between looks at the clock
HUNG = 60.0  # seconds without a sign of life, after which a process that answers requests is killed
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
BUSY = "another reload is under way"

# Called in a new process: the bundles to load, where to listen, the connection to here, and whether to answer at once.
Target = Callable[[Bundles, socket.socket, Connection, bool], None]


@dataclass(eq=False)
class Worker:
    process: SpawnProcess
    connection: Connection
    slot: str  # of the metrics
    pair: Bundles
    generation: int
    heard: float  # the time of its last sign of life
    versions: dict[str, int] | None = None  # once it is ready
    refusal: str = ""  # why it could not load
    end_by: float | None = None  # the time when it is killed, once it has been asked to end


@contextmanager
def wakeups() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two connected sockets. The first receives the number of each signal, and whatever is sent to the second."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        yield reader, writer
    finally:
        signal.set_wakeup_fd(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        reader.close()
        writer.close()


class Supervisor:
    def __init__(
        self,
        find: Callable[[], Bundles],
        target: Target,
        listener: socket.socket,
        count: int = 1,
        follow: float = 0,
    ) -> None:
        """
        Args:
          find: says which bundles the references mean now; may raise anything.
          target: what a process does; must be importable, since processes are spawned.
          listener: the socket that the processes share.
          count: processes that answer.
          follow: seconds between looks for newer bundles; 0 looks only when a client asks for it.
        """
        self._find = find
        self._target = target
        self._listener = listener
        self._count = count
        self._follower = Follower(follow)
        self._spawn = multiprocessing.get_context("spawn")
        self._workers: list[Worker] = []
        self._generation = (
            0  # of the bundles in service; SIGHUP makes a new one of the same bundles
        )
        self._candidate: Seen | None = None  # bundles of the next generation
        self._asking: Worker | None = None  # the one whose client waits for a reload
        self._look: Seen | Exception | None = None  # the outcome of the last look
        self._is_looking = False
        self._reported: dict[str, Any] | None = None
        self._was_ready = False
        self._failures = 0  # in a row, of processes that should have replaced one that died
        self._restart_at = 0.0

    def run(self) -> None:
        """Serves until SIGTERM.

        Raises:
          UserError: the first process could not load the bundles.
          KeyboardInterrupt: on SIGINT, once all processes have ended.
        """
        self._follower.serving = self._find()
        with wakeups() as (reader, self._waker):
            try:
                number = self._supervise(reader)
            finally:
                self._end_all()
        if number == signal.SIGINT:
            raise KeyboardInterrupt

    def _supervise(self, reader: socket.socket) -> int:
        """Returns the signal that ends the server."""
        self._follower.next_look = time.monotonic() + (self._follower.seconds or float("inf"))
        while True:
            self._reconcile(time.monotonic())
            sentinels = [worker.process.sentinel for worker in self._workers]
            connections = [worker.connection for worker in self._workers]
            ready = wait([reader, *sentinels, *connections], TICK)
            numbers = reader.recv(4096) if reader in ready else b""
            for number in (signal.SIGTERM, signal.SIGINT):
                if number in numbers:
                    return number
            if signal.SIGHUP in numbers and self._is_settled():
                self._candidate = Seen(self._serving, frozenset())
            now = time.monotonic()
            for worker in list(self._workers):
                has_ended = not worker.process.is_alive()
                self._hear(worker, now)  # its last words too
                if has_ended:
                    self._bury(worker, now)
            self._kill_silent(now)
            self._follow(now)
            self._report()

    # --------------------------------------------------------------------------------------------------------
    # Processes

    @property
    def _serving(self) -> Bundles:
        assert self._follower.serving is not None
        return self._follower.serving

    def _active(self) -> list[Worker]:
        return [worker for worker in self._workers if worker.end_by is None]

    def _is_settled(self) -> bool:
        """Whether no swap is under way."""
        stale = [each for each in self._active() if each.generation < self._generation]
        return self._was_ready and self._candidate is None and not stale

    def _reconcile(self, now: float) -> None:
        """Starts and ends processes: one step towards those that are wanted."""
        fresh = [each for each in self._active() if each.generation == self._generation]
        stale = [each for each in self._active() if each.generation < self._generation]
        ready = [each for each in fresh if each.versions is not None]
        for worker in stale[: max(0, len(ready) + len(stale) - self._count)]:
            self._end(worker, now)
            stale.remove(worker)
        wanted = self._count if self._was_ready else 1
        if stale and len(ready) == len(fresh) < wanted:
            wanted += 1  # the next stale one ends when there is one more
        if now >= self._restart_at:
            for _ in range(wanted - len(stale) - len(fresh)):
                self._start(self._serving, self._generation)
        active = self._active()
        is_starting = any(each.versions is None for each in active)
        if self._candidate is not None and not stale and not is_starting:
            self._start(self._candidate.pair, self._generation + 1)
        WORKERS.set(sum(each.versions is not None for each in active))

    def _kill_silent(self, now: float) -> None:
        """Kills processes that hang, and those that do not end in time."""
        for worker in self._workers:
            is_hung = worker.versions is not None and now - worker.heard > HUNG
            if is_hung or (worker.end_by is not None and now > worker.end_by):
                say(f"process {worker.process.pid} does not answer, and is killed")
                worker.process.kill()

    def _start(self, pair: Bundles, generation: int) -> None:
        taken = {worker.slot for worker in self._workers}
        slot = next(str(n) for n in range(len(taken) + 1) if str(n) not in taken)
        os.environ[SLOT] = slot
        at_once = not self._was_ready
        ours, theirs = self._spawn.Pipe()
        process = self._spawn.Process(
            target=self._target, args=(pair, self._listener, theirs, at_once), daemon=True
        )
        process.start()
        theirs.close()
        worker = Worker(process, ours, slot, pair, generation, time.monotonic())
        self._workers.append(worker)
        self._send(worker, "failed", self._follower.failed)

    def _end(self, worker: Worker, now: float) -> None:
        worker.end_by = now + GRACE
        worker.process.terminate()

    def _end_all(self) -> None:
        now = time.monotonic()
        for worker in self._active():
            self._end(worker, now)
        while self._workers:
            wait([worker.process.sentinel for worker in self._workers], 0.1)
            for worker in list(self._workers):
                if not worker.process.is_alive():
                    self._forget(worker)
                elif worker.end_by is not None and time.monotonic() > worker.end_by:
                    worker.process.kill()

    def _send(self, worker: Worker, kind: str, value: object) -> None:
        with suppress(OSError):  # it has died
            worker.connection.send((kind, value))

    def _hear(self, worker: Worker, now: float) -> None:
        try:
            while worker.connection.poll():
                kind, value = worker.connection.recv()
                worker.heard = now
                if kind == "ready":
                    worker.versions = value
                    self._take(worker)
                elif kind == "refused":
                    worker.refusal = value
                elif kind == "reload":
                    self._asked(worker)
        except (EOFError, OSError):
            return  # the process has died

    def _take(self, worker: Worker) -> None:
        """A process is ready. The first one with new bundles brings them into service."""
        assert worker.versions is not None
        self._failures = 0
        if worker.generation > self._generation:
            self._generation = worker.generation
            self._candidate = None
            self._follower.accepted(worker.pair)
            self._answer(worker.versions)
        elif self._was_ready:
            return
        stages = [f"{stage} version {number}" for stage, number in worker.versions.items()]
        say(f"serving {' and '.join(stages)}")
        if not self._was_ready:
            say("ready")
        self._was_ready = True

    def _bury(self, worker: Worker, now: float) -> None:
        """Removes a process that has ended, and reports it."""
        self._forget(worker)
        if worker is self._asking:
            self._asking = None
        if worker.end_by is not None:
            return
        code = worker.process.exitcode or 0
        how = signal.Signals(-code).name if code < 0 else f"code {code}"
        if worker.versions is not None:
            say(f"process {worker.process.pid} has ended ({how}): another one takes its place")
            return
        error = UserError(
            worker.refusal or f"{names(worker.pair)}: the process that loaded it ended ({how})"
        )
        if not self._was_ready:
            raise error
        if worker.generation > self._generation and self._candidate is not None:
            self._follower.refused(self._candidate, error, now)
            self._candidate = None
            self._answer(str(error))
            return
        self._failures += 1
        delay = min(LONGEST_DELAY, 2.0 ** min(self._failures - 1, 16))
        self._restart_at = now + delay
        say(f"a process cannot be replaced; the next try is in {delay:.0f} s: {error}")

    def _forget(self, worker: Worker) -> None:
        self._workers.remove(worker)
        worker.process.join()
        worker.connection.close()
        forget(worker.slot)

    # --------------------------------------------------------------------------------------------------------
    # Bundles

    def _asked(self, worker: Worker) -> None:
        """A client asks for a reload."""
        if self._asking is not None or not self._is_settled():
            self._send(worker, "reloaded", BUSY)
        else:
            self._asking = worker

    def _answer(self, outcome: dict[str, int] | str) -> None:
        if self._asking is not None:
            self._send(self._asking, "reloaded", outcome)
        self._asking = None

    def _follow(self, now: float) -> None:
        if not self._is_looking:
            is_due = self._asking is not None or now >= self._follower.next_look
            if is_due and self._is_settled():
                self._is_looking = True
                threading.Thread(target=self._look_behind, daemon=True).start()
            return
        outcome = self._look
        if outcome is None:
            return
        self._look = None
        self._is_looking = False
        if isinstance(outcome, Exception):
            self._follower.missed(outcome, now)
            self._answer(str(outcome))
            return
        pair = self._follower.saw(outcome, now)
        if pair is not None or self._asking is not None:
            self._candidate = outcome

    def _look_behind(self) -> None:
        """Runs in a thread of its own, because a network or a file system may not answer."""
        try:
            self._look = look(self._find)
        except Exception as error:
            self._look = error
        with suppress(OSError):
            self._waker.send(b"\0")

    def _report(self) -> None:
        """Sends the processes what failed, for /v1/models."""
        if self._follower.failed == self._reported:
            return
        self._reported = self._follower.failed
        for worker in self._active():
            self._send(worker, "failed", self._reported)
