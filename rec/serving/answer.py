"""Answers to requests: what the models recommend, without what the caller excludes, with what there is to show.

- `Engine.recommend` takes a batch of requests: one call of the models, whatever its size.
- `exclude` and `filter` are honoured exactly. A filter chooses among the ranked candidates; where too few of those
  pass, the passing items themselves are scored; where that cannot be done or was not enough, the most popular items
  that pass follow, with score null. Never one that the user has seen.
- Answers are written as JSON text at once, from each item's text: that costs a fifth of dictionaries and json.dumps.
- The rows of a column's values are collected when a filter first names the column (a million items: 0.3 s for genres).

Everything here runs in the one thread that calls the models.
"""

import difflib
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from rec.errors import UserError
from rec.serving.metrics import COLD, STAGE_SECONDS
from rec.serving.schemas import LOWEST, RecommendRequest

DEEPEST = 10_000  # the most popular passing items that are scored for a narrow filter: some 5 ms
COMPARED = 50  # the latest items of a history, among which an explanation finds the nearest


class Backend(Protocol):
    """What computes: rec.recommender.Recommender, or TF Serving behind the same methods, which describe themselves
    there. All are called in one thread. `UnavailableError` is answered with 503."""

    @property
    def items(self) -> pd.DataFrame: ...
    @property
    def users(self) -> list[str]: ...
    @property
    def metadata(self) -> dict[str, dict[str, Any]]: ...
    def versions(self) -> dict[str, int]: ...
    def answer(
        self, user_ids: Sequence[str], histories: Sequence[list[str] | None], excluded: Sequence[list[str]]
    ) -> dict[str, np.ndarray]: ...
    def answer_within(self, user_id: str, history: list[str] | None, rows: np.ndarray) -> dict[str, np.ndarray] | None:
        """None: it cannot be done here."""

    def similar(self, item_ids: list[str]) -> tuple[np.ndarray, np.ndarray]: ...
    def histories(self, user_ids: list[str]) -> list[list[str]]: ...
    def cosines(self, items: list[str], others: list[str]) -> np.ndarray | None:
        """None: it cannot be done here."""

    def close(self) -> None: ...


def as_json(value: Any) -> Any:
    """The value with null for numbers that JSON has not."""
    if isinstance(value, dict):
        return {key: as_json(each) for key, each in value.items()}
    if isinstance(value, list):
        return [as_json(each) for each in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _score(value: float | None) -> float | None:
    return value if value is not None and LOWEST < value < float("inf") else None


class Catalogue:
    """items.parquet in memory, in its order: the most popular item first."""

    def __init__(self, items: pd.DataFrame) -> None:
        self._table = pa.Table.from_pandas(items.reset_index(), preserve_index=False)
        self.columns = self._table.column_names
        self.ids: list[str] = self._table["item_id"].to_pylist()
        self.row_of = {item: row for row, item in enumerate(self.ids)}
        self._title = "title" if "title" in self.columns else "item_id"
        self._text = lru_cache(100_000)(self._write)
        self._rows_by_value = lru_cache(None)(self._collect)

    def item(self, row: int) -> dict[str, Any]:
        """The item's columns."""
        return {name: as_json(self._table[name][row].as_py()) for name in self.columns}

    def show(self, row: int, score: float | None, explain: str = "") -> str:
        """The item as JSON."""
        begin, end = self._text(row)
        score = _score(score)
        return f"{begin}{'null' if score is None else score}{end}{explain}}}"

    def _write(self, row: int) -> tuple[str, str]:
        shown = {name: value for name, value in self.item(row).items() if name not in ("item_id", "score", "explain")}
        return f'{{"item_id":{to_json(self.ids[row])},"score":', f",{to_json(shown)[1:-1]}" if shown else ""

    def matching(self, wanted: dict[str, list[Any]]) -> np.ndarray:
        """[M] rows, ascending, that have one of the values in every one of the columns."""
        rows = np.arange(len(self.ids))
        for name, values in wanted.items():
            found = [row for value in set(values) for row in self._rows_by_value(name).get(value, ())]
            rows = np.intersect1d(rows, np.array(found, int))
        return rows

    def _collect(self, column: str) -> dict[Any, list[int]]:
        rows: dict[Any, list[int]] = {}
        for row, value in enumerate(self._table[column].to_pylist()):
            for each in value if isinstance(value, list) else [value]:
                rows.setdefault(each, []).append(row)
        return rows

    def find(self, text: str, limit: int) -> list[int]:
        """The rows of the most popular items with this text in their title (without one: id), in any case."""
        column = pc.cast(self._table[self._title], pa.string())
        found = pc.match_substring(column, text, ignore_case=True).fill_null(False)
        return np.flatnonzero(found.to_numpy())[:limit].tolist()


class Place(NamedTuple):
    """An item of an answer; without its scores where it fills up."""

    row: int
    score: float | None = None
    rank: int | None = None
    retrieved: float | None = None


def _places(found: dict[str, np.ndarray], width: int | None) -> list[Place]:
    parts = (found[name][:width].tolist() for name in ("rows", "scores", "ranks", "retrieved"))
    return [Place(*each) for each in zip(*parts, strict=True) if each[0] >= 0]


@dataclass(frozen=True, eq=False)
class Engine:
    """A loaded pair and its catalogue. A reload replaces it as a whole, so an answer never mixes versions."""

    backend: Backend
    catalogue: Catalogue

    @classmethod
    def warm(cls, backend: Backend) -> "Engine":
        """An engine that has answered each kind of request: a model's first call takes a second.

        Raises:
          UserError: the answers are empty or not numbers.
        """
        engine = cls(backend, Catalogue(backend.items))
        item = engine.catalogue.ids[0]
        user = backend.users[0] if backend.users else None
        requests = [RecommendRequest(user_id=user, explain=True), RecommendRequest(history=[item], exclude=[item])]
        for answer in map(json.loads, engine.recommend(requests)):
            if len(engine.catalogue.ids) > 1 and not any(shown["score"] is not None for shown in answer["items"]):
                raise UserError(f"the bundles {backend.versions()} answer without a single score")
        backend.answer_within("", [item], np.arange(1))
        engine.similar([(item, 1)])
        return engine

    @property
    def max_k(self) -> int:
        return int(self.backend.metadata["retrieval"]["config"]["index"]["k"])

    def check(self, k: int, columns: Iterable[str] = ()) -> None:
        """Raises UserError if the bundle does not retrieve k items, or the catalogue has no such column."""
        if k > self.max_k:
            raise UserError(f"k: must be at most {self.max_k}, which is as many as the bundle retrieves")
        for name in columns:
            if name not in self.catalogue.columns:
                nearest = difflib.get_close_matches(name[:64], self.catalogue.columns, n=1, cutoff=0.0)[0]
                raise UserError(f"filter: there is no column {name[:64]!r}; did you mean {nearest}?")

    # --------------------------------------------------------------------------------------------------------
    # What the thread of the models calls, each with a batch

    def recommend(self, requests: Sequence[RecommendRequest]) -> list[str]:
        """The answers (schemas.Recommendations) to a batch of requests, in its order."""
        start = time.perf_counter()
        users = [request.user_id or "" for request in requests]
        found = self.backend.answer(users, [each.history for each in requests], [each.exclude for each in requests])
        called = time.perf_counter()
        STAGE_SECONDS.labels("model").observe(called - start)
        COLD.inc(int(found["cold"].sum()))
        model = to_json(self.backend.versions())
        answers = []
        for at, (request, cold) in enumerate(zip(requests, found["cold"].tolist(), strict=True)):
            places = self._choose(request, {name: part[at] for name, part in found.items()})
            if request.explain:
                history, shown = self._explained(request, places, cold)
                more = f',"history":[{",".join(self.catalogue.show(row, None) for row in history)}]'
            else:
                shown, more = [self.catalogue.show(place.row, place.score) for place in places], ""
            answers.append(
                f'{{"user_id":{to_json(request.user_id)},"items":[{",".join(shown)}],'
                f'"cold_start":{"true" if cold else "false"},"model":{model}{more}}}'
            )
        STAGE_SECONDS.labels("answer").observe(time.perf_counter() - called)
        return answers

    def similar(self, wanted: Sequence[tuple[str, int]]) -> list[str]:
        """The answers (schemas.Similar): the k items nearest to each known item."""
        model, answers = to_json(self.backend.versions()), []
        rows, scores = self.backend.similar([item for item, _ in wanted])
        for (item, k), *found in zip(wanted, rows.tolist(), scores.tolist(), strict=True):
            shown = [self.catalogue.show(row, score) for row, score in zip(*found, strict=True) if row >= 0][:k]
            answers.append(f'{{"item_id":{to_json(item)},"items":[{",".join(shown)}],"model":{model}}}')
        return answers

    def histories(self, users: Sequence[str]) -> list[str]:
        """The answers (schemas.History): what the bundle stores of each user."""
        found = zip(users, self.backend.histories(list(users)), strict=True)
        return [f'{{"user_id":{to_json(user)},"items":[{",".join(self._shown(items))}]}}' for user, items in found]

    def close(self, _: Sequence[None]) -> list[None]:
        self.backend.close()
        return [None]

    # --------------------------------------------------------------------------------------------------------

    def _rows(self, items: Iterable[str]) -> list[int]:
        return [self.catalogue.row_of[item] for item in items if item in self.catalogue.row_of]

    def _shown(self, items: Iterable[str]) -> list[str]:
        return [self.catalogue.show(row, None) for row in self._rows(items)]

    def _told(self, request: RecommendRequest) -> list[str]:
        """The history that an answer rests on."""
        if request.history is not None or not request.user_id:
            return request.history or []
        return self.backend.histories([request.user_id])[0]

    def _choose(self, request: RecommendRequest, found: dict[str, np.ndarray]) -> list[Place]:
        """The k best items that the request allows, of what was found for it: [N] each."""
        places = _places(found, None if request.filter else request.k)
        if not request.filter and len(places) == request.k:
            return places
        allowed = self.catalogue.matching(request.filter)
        passing = set(allowed[np.isin(allowed, found["rows"])].tolist())
        places = [place for place in places if place.row in passing][: request.k]
        if len(places) == request.k:
            return places
        stored = self.backend.histories([request.user_id])[0] if request.user_id else []
        taken = self._rows([*request.exclude, *(request.history or ()), *stored])
        rest = np.setdiff1d(allowed, np.array(taken, int))
        if request.filter and len(rest) > len(places):
            deeper = self.backend.answer_within(request.user_id or "", request.history, rest[:DEEPEST])
            if deeper is not None:
                places = _places({name: part[0] for name, part in deeper.items()}, request.k)
        popular = np.setdiff1d(rest, [place.row for place in places])[: request.k - len(places)]
        return [*places, *map(Place, popular.tolist())]

    def _explained(self, request: RecommendRequest, places: list[Place], cold: bool) -> tuple[list[int], list[str]]:
        """The rows of the history, and the items with where they come from (schemas.Explanation)."""
        history = self._rows(self._told(request))
        latest = history[-COMPARED:]
        ids, ranked = self.catalogue.ids, "ranking" in self.backend.metadata and not cold
        near = None
        if history and places:
            near = self.backend.cosines([ids[place.row] for place in places], [ids[row] for row in latest])
        shown = []
        for at, place in enumerate(places):
            nearest = None
            if near is not None and _score(float(near[at].max())) is not None:
                row = latest[int(near[at].argmax())]
                kept = {name: value for name, value in self.catalogue.item(row).items() if name in ("item_id", "title")}
                nearest = {**kept, "similarity": float(near[at].max())}
            explain = {
                "retrieval_rank": place.rank,
                "retrieval_score": _score(place.retrieved),
                "ranking_score": _score(place.score) if ranked else None,
                "nearest": nearest,
            }
            shown.append(self.catalogue.show(place.row, place.score, f',"explain":{to_json(explain)}'))
        return history, shown
