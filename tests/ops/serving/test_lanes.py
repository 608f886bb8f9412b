"""In which order waiting requests are answered. No test here measures time."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from starlette.exceptions import HTTPException

from rec.ops.serving.lanes import FEW, Lanes
from rec.serving import service as service_module
from rec.serving.schemas import RecommendRequest
from rec.serving.service import LARGEST, MAX_WAITING, Job, Service

FILTERED, EXPLAINED = {"filter": {"genres": ["Drama"]}}, {"explain": True}
VARIED = {"diversity": 0.3, "max_per": {"genres": 2}}


def request(name: str, **what: Any) -> RecommendRequest:
    return RecommendRequest(user_id=name, **what)


def names(jobs: Sequence[Job]) -> list[str]:
    return [job.argument.user_id for job in jobs]


class Queue:
    """Lanes, and what is put into them."""

    def __init__(self) -> None:
        self.lanes, self.loop = Lanes(), asyncio.new_event_loop()

    def add(self, name: str, batch: object = None, **what: Any) -> Job:
        future = self.loop.create_future()
        job = Job(list, request(name, **what), future, 0.0, batch)
        self.lanes.add(job)
        return job

    def take(self) -> list[str]:
        return names(self.lanes.take())


@pytest.fixture
def queue() -> Queue:
    return Queue()


def test_plain_requests_share_a_call(queue: Queue) -> None:
    for number in range(LARGEST + 1):
        queue.add(f"u{number}")
    assert queue.take() == [f"u{number}" for number in range(LARGEST)]
    assert queue.take() == [f"u{LARGEST}"] and not queue.lanes


def test_a_batch_alternates_with_plain_requests(queue: Queue) -> None:
    for number in range(FEW + 1):
        queue.add(f"batch{number}", batch="a")
    queue.add("one")
    assert queue.take() == ["one"]
    queue.add("two")
    assert queue.take() == [f"batch{number}" for number in range(FEW)]
    assert queue.take() == ["two"]
    assert queue.take() == [f"batch{FEW}"]


def test_batches_and_expensive_requests_take_turns(queue: Queue) -> None:
    for number in range(10):
        queue.add(f"a{number}", batch="a", **FILTERED)
    for number in range(10):
        queue.add(f"b{number}", batch="b")
    queue.add("filtered", **FILTERED)
    queue.add("explained", **EXPLAINED)
    queue.add("varied", **VARIED)
    assert FEW == 4
    assert queue.take() == ["a0", "b0", "filtered", "explained"]
    assert queue.take() == ["varied", "a1", "b1", "a2"]


def test_what_is_cancelled_takes_no_place(queue: Queue) -> None:
    jobs = [queue.add(f"a{number}", batch="a") for number in range(FEW + 2)]
    single = queue.add("one")
    for job in [*jobs[:FEW], single]:
        job.future.cancel()
    assert queue.take() == []
    assert queue.take() == [f"a{FEW}", f"a{FEW + 1}"] and not queue.lanes


# ------------------------------------------------------------------------------------------------------------
# In service


class Recording:
    """An engine that notes each request when it is answered, and waits before the first until it is let."""

    def __init__(self) -> None:
        self.let, self.is_called = threading.Event(), threading.Event()
        self.answered: list[str] = []

    def recommend(
        self, requests: list[RecommendRequest], between: Callable[[], None] | None = None
    ) -> list[str]:
        self.is_called.set()
        assert self.let.wait(10)
        for each in requests:
            if between is not None:
                between()
            self.answered.append(each.user_id or "")
        return [each.user_id or "" for each in requests]


def unloaded() -> Service:
    return Service(lambda: pytest.fail("not to be called"), Lanes())


@pytest.mark.parametrize("what", [FILTERED, {}], ids=["filtered", "plain"])
def test_a_single_request_is_answered_in_the_midst_of_a_batch(what: dict[str, Any]) -> None:
    service, engine = unloaded(), Recording()

    async def ask() -> list[list[str]]:
        batch = [request(f"batch{number}", **what) for number in range(100)]
        first = asyncio.create_task(service.ask(engine.recommend, *batch))
        await asyncio.to_thread(engine.is_called.wait, 10)
        single = asyncio.create_task(service.ask(engine.recommend, request("single")))
        await asyncio.sleep(0)  # it is in the queue
        engine.let.set()
        return await asyncio.gather(first, single)

    batch, single = asyncio.run(ask())
    assert batch == [f"batch{number}" for number in range(100)] and single == ["single"]
    assert engine.answered[0] == "single"  # although the batch's first call had begun


def test_eight_batches_delay_a_filtered_request_by_two_calls() -> None:
    service, engine = unloaded(), Recording()

    async def ask() -> None:
        asked = [service.ask(engine.recommend, request("first", **FILTERED))]
        for name in "abcdefgh":
            batch = [request(f"{name}{number}", **FILTERED) for number in range(50)]
            asked.append(service.ask(engine.recommend, *batch))
        asked.append(service.ask(engine.recommend, request("single", **FILTERED)))
        tasks = [asyncio.create_task(each) for each in asked]
        await asyncio.to_thread(engine.is_called.wait, 10)
        engine.let.set()
        await asyncio.gather(*tasks)

    asyncio.run(ask())
    assert len(engine.answered) == 402
    assert engine.answered.index("single") <= 1 + 8 + FEW


def test_batches_that_do_not_fit_wait_and_refuse_nobody_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(service_module, "PATIENCE", 0.1)
    service, engine = unloaded(), Recording()
    batch = [request(f"u{number}") for number in range(100)]

    async def ask() -> None:
        fitting = [
            asyncio.create_task(service.ask(engine.recommend, *batch))
            for _ in range(MAX_WAITING // 100)
        ]
        await asyncio.to_thread(engine.is_called.wait, 10)
        await service.wait_for_room(MAX_WAITING % 100)
        with pytest.raises(HTTPException, match="overloaded"):
            await service.wait_for_room(100)
        single = asyncio.create_task(service.ask(engine.recommend, request("single")))
        monkeypatch.setattr(service_module, "PATIENCE", 10.0)
        room = asyncio.create_task(service.wait_for_room(100))
        await asyncio.sleep(0)
        assert not room.done()
        engine.let.set()
        assert await single == ["single"]
        await asyncio.gather(room, *fitting)

    asyncio.run(ask())
