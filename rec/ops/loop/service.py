"""The service of `python -m rec.serve`: answers from live histories."""

from collections.abc import Callable

from rec.ops.loop.events import EventStore
from rec.ops.loop.live import LiveHistories
from rec.serving.answer import STORED, Backend, Engine, Histories, Observer
from rec.serving.service import Queue, Service


class LoopService(Service):
    def __init__(
        self,
        load: Callable[[], Backend],
        queue: Queue,
        observer: Observer,
        store: EventStore | None = None,
    ) -> None:
        super().__init__(load, queue, observer)
        self._store = store

    def load(self) -> None:
        backend = self._load()
        self.engine = Engine.warm(backend, self._observer, self._live(backend))
        self._observer.loaded(self.engine.versions)

    def _live(self, backend: Backend) -> Histories:
        if self._store is None:
            return STORED
        return LiveHistories(self._store, backend.metadata.retrieval.covers)
