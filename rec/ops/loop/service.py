"""The service of `python -m rec.serve`: variants, live histories, and what was shown.

Each answer carries the id of its request, which events name: that of the request's X-Request-ID, with a number behind
it in a batch.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import APIRouter
from prometheus_client import Counter

from rec.ops.loop.events import EventStore
from rec.ops.loop.intake import events_router
from rec.ops.loop.live import LiveHistories
from rec.ops.loop.shown import Shown, ShownLog
from rec.ops.loop.variants import SplitEngine, Variant
from rec.ops.serving.gate import current_exchange
from rec.ops.serving.lanes import Lanes
from rec.ops.serving.metrics import Prometheus
from rec.serving.answer import STORED, Backend, Engine, Histories, Json
from rec.serving.schemas import RecommendRequest
from rec.serving.service import Service

ANSWERS = Counter("rec_answers", "Recommendations, by variant.", ["variant"])


class LoopService(Service):
    def __init__(
        self,
        load: Callable[[], Sequence[Backend]],
        store: EventStore | None = None,
        shown: ShownLog | None = None,
        variants: Sequence[Variant] = (),
        salt: str = "",
    ) -> None:
        """`load` loads the models of each variant; without variants, of one pair."""
        super().__init__(lambda: load()[0], Lanes(), Prometheus())
        self._load_all = load
        self._store = store
        self._shown = shown
        self._variants = variants
        self._salt = salt

    @property
    def addresses(self) -> list[APIRouter]:
        """What the service takes beside requests."""
        return [] if self._store is None else [events_router(self._store)]

    def close(self) -> None:
        """Writes what has not been written yet. Called once all requests have their answer."""
        if self._shown is not None:
            self._shown.close()

    def load(self) -> None:
        engines = [
            Engine.warm(backend, self._observer, self._live(backend))
            for backend in self._load_all()
        ]
        self.engine = engines[0]
        if self._variants:
            self.engine = SplitEngine.of(engines, self._variants, self._salt)
        self._observer.loaded(self.engine.versions)

    def _live(self, backend: Backend) -> Histories:
        if self._store is None:
            return STORED
        return LiveHistories(self._store, backend.metadata.retrieval.covers)

    async def ask(self, function: Callable[..., list[Any]], *arguments: Any) -> list[Any]:
        answers = await super().ask(function, *arguments)
        if isinstance(arguments[0], RecommendRequest):
            self._note(answers)
        return answers

    def _note(self, answers: list[Json]) -> None:
        """Gives the answers their ids, counts them, and keeps what they show."""
        exchange = current_exchange()
        now = time.time()
        for number, answer in enumerate(answers):
            name = exchange.id.decode() if len(answers) == 1 else f"{exchange.id.decode()}-{number}"
            answer["request_id"] = name
            variant = answer.get("variant")
            ANSWERS.labels(variant or "").inc()
            if len(answers) == 1:
                exchange.variant = variant
            if self._shown is not None:
                self._shown.add(_row(answer, now))


def _row(answer: Json, now: float) -> Shown:
    return Shown(
        time=now,
        request_id=answer["request_id"],
        user_id=answer["user_id"] or None,
        variant=answer.get("variant"),
        cold_start=answer["cold_start"],
        model=answer["model"],
        items=[item["item_id"] for item in answer["items"]],
        scores=[item["score"] for item in answer["items"]],
    )
