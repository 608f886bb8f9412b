"""The engine in service: a queue, and the one thread that calls the models.

- The thread takes what has queued while its last call ran, and answers it in one call: a lone request does not wait for
  company, and there is no timer. (Waiting 1 ms for company was slower at every load.)
- The queue is bounded: a request that finds it full is refused with 503 and Retry-After. Batches have a bound of their
  own, so that they refuse nobody else.
- A service loads its models once. New bundles are loaded by another process (rec/ops/serving/supervisor.py).
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from typing import Any, NamedTuple, Protocol

from starlette.exceptions import HTTPException

from rec.serving.answer import SILENT, Backend, Engine, Observer
from rec.serving.schemas import UnavailableError

LARGEST = (
    64  # requests of one call: larger calls cost as much per request, and the first waits longer
)
MAX_WAITING = 512  # a quarter of a second of plain requests; and as many of batches
PATIENCE = 1.0  # seconds for which a batch waits for room in the queue


class Job(NamedTuple):
    """One request: an argument of a function that answers several in one call, and who waits for the answer."""

    function: Callable[..., list[Any]]
    argument: Any
    future: asyncio.Future[Any]
    queued: float
    batch: object = None  # the same for all jobs of one batch


class Queue(Protocol):
    """The order in which waiting requests are answered. Only the thread of the models uses it, so it needs no locks."""

    def __bool__(self) -> bool: ...
    def add(self, job: Job) -> None: ...
    def take(self) -> list[Job]:
        """The jobs of the next call; none if all of them were cancelled."""

    def can_be_interrupted(self, jobs: list[Job]) -> bool:
        """Whether `take_urgent` has to be asked between the steps of a call for these jobs."""

    def take_urgent(self) -> list[Job]:
        """Jobs that do not wait for the end of the call that runs."""


class Fifo:
    """The default: requests in the order of their arrival, all that wait in one call."""

    def __init__(self) -> None:
        self._jobs: deque[Job] = deque()

    def __bool__(self) -> bool:
        return bool(self._jobs)

    def add(self, job: Job) -> None:
        self._jobs.append(job)

    def take(self) -> list[Job]:
        jobs = [self._jobs.popleft() for _ in range(min(LARGEST, len(self._jobs)))]
        return [job for job in jobs if not job.future.cancelled()]

    def can_be_interrupted(self, jobs: list[Job]) -> bool:
        return False

    def take_urgent(self) -> list[Job]:
        return []


def overloaded() -> HTTPException:
    return HTTPException(
        503, "the server is overloaded: try again in a second", {"Retry-After": "1"}
    )


class Service:
    def __init__(
        self, load: Callable[[], Backend], queue: Queue | None = None, observer: Observer = SILENT
    ) -> None:
        """`load` loads the models, see `Service.load`."""
        self._load = load
        self._observer = observer
        self.engine: Engine | None = None
        self.failed: dict[str, Any] | None = None  # newer bundles that could not be loaded
        self._arrived: SimpleQueue[Job] = SimpleQueue()
        self._queue = Fifo() if queue is None else queue  # the thread's own
        self._waiting = 0
        self._in_batches = 0  # of those that wait
        threading.Thread(target=self._work, name="model", daemon=True).start()

    def load(self) -> None:
        """Loads the models and brings them into service. Raises UserError, or whatever loading raises."""
        self.engine = Engine.warm(self._load(), self._observer)
        self._observer.loaded(self.engine.versions)

    @property
    def ready(self) -> Engine:
        if self.engine is None:
            raise HTTPException(
                503, "the models are being loaded: try again in a few seconds", {"Retry-After": "2"}
            )
        return self.engine

    # --------------------------------------------------------------------------------------------------------
    # In the event loop

    async def wait_for_room(self, size: int) -> None:
        """Waits until a batch of this size fits into the queue: a client that is refused at once asks again at once.

        Raises:
          HTTPException: 503, because there is no room within a second.
        """
        deadline = time.monotonic() + PATIENCE
        while self._in_batches + size > MAX_WAITING:
            if time.monotonic() > deadline:
                raise overloaded()
            await asyncio.sleep(PATIENCE / 20)

    async def ask(self, function: Callable[..., list[Any]], *arguments: Any) -> list[Any]:
        """What a method of the engine answers to each of the arguments.

        Raises:
          HTTPException: 503, because too many requests wait already.
        """
        in_batch = len(arguments) if len(arguments) > 1 else 0
        alike = self._in_batches if in_batch else self._waiting - self._in_batches
        if alike + len(arguments) > MAX_WAITING:
            raise overloaded()
        loop = asyncio.get_running_loop()
        now = time.perf_counter()
        futures = [loop.create_future() for _ in arguments]
        self._waiting += len(futures)
        self._in_batches += in_batch
        batch = object() if in_batch else None
        try:
            for argument, future in zip(arguments, futures, strict=True):
                self._arrived.put(Job(function, argument, future, now, batch))
            return [await future for future in futures]
        except UnavailableError as error:
            raise HTTPException(503, str(error), {"Retry-After": "2"}) from error
        finally:
            self._waiting -= len(futures)
            self._in_batches -= in_batch
            if not self._waiting:  # the next call reports it otherwise
                self._observer.waiting(0)
            for future in futures:
                future.cancel()  # if the client has hung up, the thread passes over it

    # --------------------------------------------------------------------------------------------------------
    # In the thread of the models

    def _work(self) -> None:
        while True:
            if not self._queue:
                self._queue.add(self._arrived.get())
            self._sort()
            self._call(self._queue.take())

    def _sort(self) -> None:
        while not self._arrived.empty():
            self._queue.add(self._arrived.get())

    def _call_urgent(self) -> None:
        """Answers what has arrived and is urgent, between the steps of a longer call."""
        self._sort()
        self._call(self._queue.take_urgent())

    def _call(self, jobs: list[Job]) -> None:
        by_function: dict[Callable[..., list[Any]], list[Job]] = {}
        for job in jobs:
            by_function.setdefault(job.function, []).append(job)
        for function, group in by_function.items():
            self._observer.stage("queue", time.perf_counter() - group[0].queued)
            if self._queue.can_be_interrupted(group):
                function = partial(function, between=self._call_urgent)
            self._answer(function, group)

    def _answer(self, function: Callable[[list[Any]], list[Any]], group: list[Job]) -> None:
        self._observer.call(len(group))
        self._observer.waiting(self._waiting)
        try:
            answers = function([job.argument for job in group])
        except Exception as error:
            may_be_of_one = not isinstance(error, UnavailableError)
            if may_be_of_one and len(group) > 1:  # the others get answers
                for job in group:
                    self._answer(function, [job])
                return
            answers = [error] * len(group)
        loop = group[0].future.get_loop()
        if not loop.is_closed():
            loop.call_soon_threadsafe(_deliver, group, answers)


def _deliver(group: list[Job], answers: list[Any]) -> None:
    for job, answer in zip(group, answers, strict=True):
        if job.future.done():
            continue
        if isinstance(answer, Exception):
            job.future.set_exception(answer)
        else:
            job.future.set_result(answer)
