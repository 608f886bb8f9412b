"""POST /v1/events: takes events, and acknowledges them once they are durable.

One thread per process writes. It takes all that has arrived while its last commit ran, and commits that at once: a
commit waits for the disk, whether it holds one event or a hundred requests.
"""

import asyncio
import threading
from collections.abc import Sequence
from queue import SimpleQueue
from typing import NamedTuple

from fastapi import APIRouter, Response
from prometheus_client import Counter
from starlette.exceptions import HTTPException

from rec.ops.loop.events import Accepted, Event, EventsRequest, EventStore, receive
from rec.ops.serving.gate import EVENTS
from rec.serving.app import PROBLEMS, Json
from rec.serving.schemas import UnavailableError
from rec.serving.service import overloaded

MAX_WAITING = 20_000  # events; then clients are refused
RECEIVED = Counter("rec_events", "Events received.", ["result"])


class Job(NamedTuple):
    events: Sequence[Event]
    future: asyncio.Future[int]  # how many were new


class Intake:
    """The queue of a process, and the thread that writes."""

    def __init__(self, store: EventStore) -> None:
        self._store = store
        self._arrived: SimpleQueue[Job] = SimpleQueue()
        self._waiting = 0
        threading.Thread(target=self._work, name="events", daemon=True).start()

    async def add(self, events: Sequence[Event]) -> int:
        """Returns how many of the events were new, once all of them are durable.

        Raises:
          HTTPException: 503, because too many events wait already, or the store cannot be used.
        """
        if self._waiting + len(events) > MAX_WAITING:
            raise overloaded()
        future = asyncio.get_running_loop().create_future()
        self._waiting += len(events)
        try:
            self._arrived.put(Job(events, future))
            return await future
        except UnavailableError as error:
            raise HTTPException(503, str(error), {"Retry-After": "2"}) from error
        finally:
            self._waiting -= len(events)

    def _work(self) -> None:
        while True:
            jobs = [self._arrived.get()]
            while not self._arrived.empty():
                jobs.append(self._arrived.get())
            try:
                counts: list[int] | Exception = self._store.add([job.events for job in jobs])
            except Exception as error:
                counts = error
            loop = jobs[0].future.get_loop()
            if not loop.is_closed():
                loop.call_soon_threadsafe(_acknowledge, jobs, counts)


def _acknowledge(jobs: list[Job], counts: list[int] | Exception) -> None:
    for number, job in enumerate(jobs):
        if job.future.done():  # its client has hung up
            continue
        if isinstance(counts, Exception):
            job.future.set_exception(counts)
        else:
            job.future.set_result(counts[number])


def events_router(store: EventStore) -> APIRouter:
    """The address."""
    router = APIRouter(responses=PROBLEMS)
    intake = Intake(store)

    @router.post(EVENTS, status_code=202, response_model=Accepted)
    async def add_events(body: EventsRequest) -> Response:
        """Takes events. They are durable, and in the next answer, when this is answered."""
        events = receive(body.events)
        new = await intake.add(events)
        RECEIVED.labels("accepted").inc(new)
        RECEIVED.labels("duplicate").inc(len(events) - new)
        return Json({"accepted": new, "duplicates": len(events) - new}, 202)

    return router
