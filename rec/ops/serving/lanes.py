"""The order in which waiting requests are answered, for many clients: a `Queue` of rec/serving/service.py.

- Plain requests come first, all that wait in one call.
- Requests that cost more (a filter, variety, an explanation) and the parts of batches take turns, a few in one call, a
  part of each batch or request in turn. Between the steps of such a call, the thread answers the plain requests that
  have arrived. So nobody waits for a whole batch of somebody else, and a batch that waits is never forgotten.
"""

from collections import deque

from rec.serving.schemas import RecommendRequest
from rec.serving.service import Fifo, Job

FEW = 4  # requests of one call of those that take turns: its longest step takes some 2 ms


def is_plain(job: Job) -> bool:
    """Whether it takes no call of the models but the one that it shares."""
    request = job.argument
    if job.batch is not None:
        return False
    return not (
        isinstance(request, RecommendRequest)
        and (request.filter or request.max_per or request.diversity or request.explain)
    )


class Lanes:
    def __init__(self) -> None:
        self._plain = Fifo()
        self._turns: dict[object, deque[Job]] = {}  # in the order of their turns
        self._is_turn = False  # whether the next call is for those that take turns

    def __bool__(self) -> bool:
        return bool(self._plain or self._turns)

    def add(self, job: Job) -> None:
        if is_plain(job):
            self._plain.add(job)
        else:
            self._turns.setdefault(job.batch or job.future, deque()).append(job)

    def take(self) -> list[Job]:
        if self._turns and (self._is_turn or not self._plain):
            self._is_turn = False
            return self._take_turns()
        self._is_turn = True
        return self._plain.take()

    def can_be_interrupted(self, jobs: list[Job]) -> bool:
        return not is_plain(jobs[0])  # a call has one kind of jobs

    def take_urgent(self) -> list[Job]:
        return self._plain.take()

    def _take_turns(self) -> list[Job]:
        jobs: list[Job] = []
        while self._turns and len(jobs) < FEW:
            key, waiting = next(iter(self._turns.items()))
            del self._turns[key]
            job = waiting.popleft()
            if waiting:
                self._turns[key] = waiting  # at the end
            if not job.future.cancelled():
                jobs.append(job)
        return jobs
