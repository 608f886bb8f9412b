"""What waits for the thread of the models, and in which order it is answered.

- Plain requests come first, all that wait in one call.
- Requests that cost more (a filter, an explanation) and the parts of batches take turns, a few in one call, a part of
  each batch or request in turn. Between the steps of such a call, the thread answers the plain requests that have
  arrived. So nobody waits for a whole batch of somebody else, and a batch that waits is never forgotten.
- What ends the use of an engine comes after all that still needs the engine.

One thread uses it: there are no locks.
"""

import asyncio
from collections import deque
from typing import Any, NamedTuple

from rec.serving.answer import Engine
from rec.serving.schemas import RecommendRequest

LARGEST = 64  # plain requests of one call: larger calls cost as much per request, and the first waits longer
FEW = 4  # of one call of those that take turns: its longest step takes some 2 ms


class Job(NamedTuple):
    """One argument of a method of the engine, and who waits for the answer."""

    engine: Engine
    method: str
    argument: Any
    future: asyncio.Future[Any] | None  # None: it ends the use of the engine
    queued: float
    batch: object = None  # the same for all jobs of one batch

    @property
    def is_cancelled(self) -> bool:
        return self.future is not None and self.future.cancelled()

    @property
    def is_plain(self) -> bool:
        """Whether it takes no call of the models but the one that it shares."""
        request = self.argument
        if self.batch is not None:
            return False
        return not (isinstance(request, RecommendRequest) and (request.filter or request.explain))


class Lanes:
    def __init__(self) -> None:
        self._plain: deque[Job] = deque()
        self._turns: dict[object, deque[Job]] = {}  # in the order of their turns
        self._ends: list[Job] = []
        self._is_turn = False  # whether the next call is for those that take turns

    def __bool__(self) -> bool:
        return bool(self._plain or self._turns or self._ends)

    def add(self, job: Job) -> None:
        if job.future is None:
            self._ends.append(job)
        elif job.is_plain:
            self._plain.append(job)
        else:
            self._turns.setdefault(job.batch or job.future, deque()).append(job)

    def take(self) -> list[Job]:
        """The jobs of the next call; none if all of them were cancelled."""
        for job in self._ends:
            if not self._needs(job.engine):
                self._ends.remove(job)
                return [job]
        if self._turns and (self._is_turn or not self._plain):
            self._is_turn = False
            return self._take_turns()
        self._is_turn = True
        return self.take_plain()

    def take_plain(self) -> list[Job]:
        jobs = [self._plain.popleft() for _ in range(min(LARGEST, len(self._plain)))]
        return [job for job in jobs if not job.is_cancelled]

    def _take_turns(self) -> list[Job]:
        jobs: list[Job] = []
        while self._turns and len(jobs) < FEW:
            key, waiting = next(iter(self._turns.items()))
            del self._turns[key]
            job = waiting.popleft()
            if waiting:
                self._turns[key] = waiting  # at the end
            if not job.is_cancelled:
                jobs.append(job)
        return jobs

    def _needs(self, engine: Engine) -> bool:
        waiting = [self._plain, *self._turns.values()]
        return any(job.engine is engine for jobs in waiting for job in jobs)
