"""The engine in service: a queue, the one thread that calls the models, and how the models are loaded.

- The thread takes what has queued while its last call ran, and answers it in one call: a lone request does not wait for
  company, and there is no timer. (Waiting 1 ms for company was slower at every load.) Batches and expensive requests
  take turns in calls of their own (rec/ops/serving/lanes.py).
- The queue is bounded: a request that finds it full is refused with 503 and Retry-After. Batches have a bound of their
  own, so that they refuse nobody else.
- Bundles are loaded, warmed and checked before they answer. A request keeps the engine that it was checked against. If
  anything fails, the old bundles stay, and `failed` says what and why.
- Under `python -m rec.serve` each process loads once: supervisor.py swaps bundles by swapping processes.
"""

import asyncio
import gc
import queue
import threading
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Any

from starlette.exceptions import HTTPException

from rec.bundles.files import Pair
from rec.errors import UserError
from rec.ops.serving.lanes import Job, Lanes
from rec.ops.serving.metrics import BATCH_SIZE, QUEUE, RELOADS, STAGE_SECONDS, VERSION
from rec.serving.answer import Backend, Engine
from rec.serving.schemas import UnavailableError

MAX_WAITING = 512  # a quarter of a second of plain requests; and as many of batches
PATIENCE = 1.0  # seconds for which a batch waits for room in the queue


def overloaded() -> HTTPException:
    return HTTPException(
        503, "the server is overloaded: try again in a second", {"Retry-After": "1"}
    )


class Service:
    def __init__(self, find: Callable[[], Pair], load: Callable[[Pair], Backend]) -> None:
        """`find` says which bundles the references mean now, `load` loads those; both may raise UserError."""
        self._find, self._load = find, load
        self.engine: Engine | None = None
        self.failed: dict[str, Any] | None = None
        # Loads what the references mean now and returns its versions; a supervised process asks its parent instead.
        self.reload: Callable[[], dict[str, int]] = self._reload
        self._reloading = threading.Lock()
        self._jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._lanes = Lanes()  # the thread's own
        self._waiting = 0
        self._in_batches = 0  # of those that wait
        threading.Thread(target=self._work, name="model", daemon=True).start()

    @property
    def ready(self) -> Engine:
        if self.engine is None:
            raise HTTPException(
                503, "the models are being loaded: try again in a few seconds", {"Retry-After": "2"}
            )
        return self.engine

    # --------------------------------------------------------------------------------------------------------
    # Questions

    async def wait_for_room(self, size: int) -> None:
        """Waits until a batch of this size fits into the queue: a client that is refused at once asks again at once.

        Call it before an engine is chosen, which may be closed meanwhile.

        Raises:
          HTTPException: 503, because there is no room within a second.
        """
        deadline = time.monotonic() + PATIENCE
        while self._in_batches + size > MAX_WAITING:
            if time.monotonic() > deadline:
                raise overloaded()
            await asyncio.sleep(PATIENCE / 20)

    async def ask(self, engine: Engine, method: str, *arguments: Any) -> list[Any]:
        """What the engine's method answers to each of the arguments.

        Raises:
          HTTPException: 503, because too many requests wait already.
        """
        in_batch = len(arguments) if len(arguments) > 1 else 0
        alike = self._in_batches if in_batch else self._waiting - self._in_batches
        if alike + len(arguments) > MAX_WAITING:
            raise overloaded()
        loop, now = asyncio.get_running_loop(), time.perf_counter()
        futures = [loop.create_future() for _ in arguments]
        self._waiting += len(futures)
        self._in_batches += in_batch
        batch = object() if in_batch else None
        try:
            for argument, future in zip(arguments, futures, strict=True):
                self._jobs.put(Job(engine, method, argument, future, now, batch))
            return [await future for future in futures]
        except UnavailableError as error:
            raise HTTPException(503, str(error), {"Retry-After": "2"}) from error
        finally:
            self._waiting -= len(futures)
            self._in_batches -= in_batch
            if not self._waiting:  # the next call sets it otherwise
                QUEUE.set(0)
            for future in futures:
                future.cancel()  # where the client has hung up: the thread passes over it

    def _work(self) -> None:
        """The thread of the models."""
        while True:
            if not self._lanes:
                self._lanes.add(self._jobs.get())
            self._sort()
            self._call(self._lanes.take())

    def _sort(self) -> None:
        while not self._jobs.empty():
            self._lanes.add(self._jobs.get())

    def _call_plain(self) -> None:
        """Answers the plain requests that have arrived, between the steps of a longer call."""
        self._sort()
        self._call(self._lanes.take_plain())

    def _call(self, jobs: list[Job]) -> None:
        groups: dict[tuple[Engine, str, bool], list[Job]] = {}
        for job in jobs:
            groups.setdefault((job.engine, job.method, job.is_plain), []).append(job)
        for (engine, method, is_plain), group in groups.items():
            STAGE_SECONDS.labels("queue").observe(time.perf_counter() - group[0].queued)
            function = getattr(engine, method)
            if method == "recommend" and not is_plain:
                function = partial(function, between=self._call_plain)
            self._answer(function, group)

    def _answer(self, function: Callable[[list[Any]], list[Any]], group: list[Job]) -> None:
        BATCH_SIZE.observe(len(group))
        QUEUE.set(self._waiting)
        try:
            answers = function([job.argument for job in group])
        except Exception as error:
            if len(group) > 1 and not isinstance(
                error, UnavailableError
            ):  # one is to blame: the others get answers
                for job in group:
                    self._answer(function, [job])
                return
            answers = [error] * len(group)
        loop = group[0].future.get_loop() if group[0].future else None
        if loop is None:
            self._tidy()
        elif not loop.is_closed():
            loop.call_soon_threadsafe(_deliver, group, answers)

    # --------------------------------------------------------------------------------------------------------
    # Bundles

    def load(self) -> None:
        """Takes into service what the references mean now.

        Raises:
          UserError: another load is under way, or this one fails; what was in service stays.
        """
        if not self._reloading.acquire(blocking=False):
            raise UserError("another reload is under way")
        pair = None
        try:
            pair = self._find()
            engine = Engine.warm(self._load(pair))
        except Exception as error:
            refusal = self._refusal(pair, error)
            raise refusal from (None if refusal is error else error)
        else:
            old = self.engine
            self.engine = engine  # the step
            self.failed = None
            for stage in ("retrieval", "ranking"):
                VERSION.labels(stage).set(engine.versions.get(stage, 0))
            if old is not None:  # closed behind all that still need it
                self._jobs.put(Job(old, "close", engine, None, time.perf_counter()))
            self._tidy()
        finally:
            self._reloading.release()

    def _refusal(self, pair: Pair | None, error: Exception) -> UserError:
        """Says in `failed` what could not be loaded and why; the same as a sentence."""
        named = ", ".join(str(path) for path in pair or () if path)
        self.failed = {
            "bundles": named,
            "error": str(error),
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "attempts": 1,
        }
        if isinstance(error, UserError):
            return error
        if not isinstance(error, UnavailableError):
            traceback.print_exception(error)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return UserError(f"{named} cannot be taken into service: {reason}")

    def _reload(self) -> dict[str, int]:
        try:
            self.load()
        except UserError:
            RELOADS.labels("failed").inc()
            raise
        RELOADS.labels("done").inc()
        return self.ready.versions

    @staticmethod
    def _tidy() -> None:
        """Collects garbage, then leaves all that is left out of later collections: a full one takes 0.2 s."""
        gc.unfreeze()
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 50, 100)


def _deliver(group: list[Job], answers: list[Any]) -> None:
    for job, answer in zip(group, answers, strict=True):
        if job.future is None or job.future.done():
            continue
        if isinstance(answer, Exception):
            job.future.set_exception(answer)
        else:
            job.future.set_result(answer)
