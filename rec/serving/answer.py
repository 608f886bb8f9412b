"""Answers to requests: what the models recommend, without what the caller excludes, with what there is to show.

- `Engine.answer` takes a batch of requests and calls the models at most twice, whatever its size.
- `exclude` and `filter` are honoured exactly. They choose among the ranked candidates; where too few of those are left,
  the most popular items that pass follow, with score null, never one that the user has seen.
- The rows of a column's values are collected when a filter first names the column (a million items: 0.3 s for genres).

Not covered: a filter inside the index, which would find recommendations for a narrow filter too.
"""

import difflib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from rec.errors import UserError
from rec.recommender import Recommender
from rec.serving.schemas import RecommendRequest

LOWEST = float(np.finfo(np.float32).min)  # the bundles' score of an empty place


def as_json(value: Any) -> Any:
    """The value with null for numbers that JSON has not."""
    if isinstance(value, dict):
        return {key: as_json(each) for key, each in value.items()}
    if isinstance(value, list):
        return [as_json(each) for each in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


class Catalogue:
    """items.parquet in memory, in its order: the most popular item first."""

    def __init__(self, items: pd.DataFrame) -> None:
        table = pa.Table.from_pandas(items.reset_index(), preserve_index=False)
        self.columns: dict[str, list[Any]] = {name: as_json(table[name].to_pylist()) for name in table.column_names}
        self.ids: list[str] = self.columns["item_id"]
        self.row_of = {item: row for row, item in enumerate(self.ids)}
        self._shown = {name: values for name, values in self.columns.items() if name not in ("item_id", "score")}
        self._rows: dict[str, dict[Any, list[int]]] = {}  # the rows of each value, by column

    def show(self, row: int, score: float | None) -> dict[str, Any]:
        score = score if score is not None and LOWEST < score < float("inf") else None
        return {"item_id": self.ids[row], "score": score, **{name: at[row] for name, at in self._shown.items()}}

    def matching(self, wanted: dict[str, list[Any]]) -> np.ndarray:
        """[M] rows, ascending, that have one of the values in every one of the columns."""
        rows = np.arange(len(self.ids))
        for name, values in wanted.items():
            if name not in self._rows:
                self._rows[name] = _rows_by_value(self.columns[name])
            found = [row for value in set(values) for row in self._rows[name].get(value, ())]
            rows = np.intersect1d(rows, np.array(found, int))
        return rows


def _rows_by_value(column: list[Any]) -> dict[Any, list[int]]:
    rows: dict[Any, list[int]] = {}
    for row, value in enumerate(column):
        for each in value if isinstance(value, list) else [value]:
            rows.setdefault(each, []).append(row)
    return rows


@dataclass(frozen=True)
class Engine:
    """A loaded pair and its catalogue. A reload replaces it as a whole, so an answer never mixes versions."""

    recommender: Recommender
    catalogue: Catalogue

    @classmethod
    def warm(cls, recommender: Recommender) -> "Engine":
        """An engine that has answered once each way: a model's first call takes a second."""
        engine = cls(recommender, Catalogue(recommender.items))
        engine.answer([RecommendRequest(), RecommendRequest(history=engine.catalogue.ids[:1])])
        engine.similar(engine.catalogue.ids[0], 1)
        return engine

    @property
    def max_k(self) -> int:
        return int(self.recommender.metadata["retrieval"]["config"]["index"]["k"])

    def check(self, k: int, columns: Iterable[str] = ()) -> None:
        """Raises UserError if the bundle does not retrieve k items, or the catalogue has no such column."""
        if k > self.max_k:
            raise UserError(f"k: must be at most {self.max_k}, which is as many as the bundle retrieves")
        for name in columns:
            if name not in self.catalogue.columns:
                nearest = difflib.get_close_matches(name[:64], self.catalogue.columns, n=1, cutoff=0.0)[0]
                raise UserError(f"filter: there is no column {name[:64]!r}; did you mean {nearest}?")

    def answer(self, requests: Sequence[RecommendRequest]) -> list[dict[str, Any]]:
        """The answers (schemas.Recommendations) to a batch of requests, in its order."""
        answers: dict[int, dict[str, Any]] = {}
        for stored in (True, False):
            batch = [(at, request) for at, request in enumerate(requests) if (request.history is None) is stored]
            if not batch:
                continue
            users = [request.user_id or "" for _, request in batch]
            ranked = self.recommender.recommend(users, [request.history for _, request in batch])
            for (at, request), items, scores, cold in zip(batch, *(part.tolist() for part in ranked), strict=True):
                chosen = self._choose(request, items, scores)
                answers[at] = {"user_id": request.user_id, "items": chosen, "cold_start": cold}
        return [{**answers[at], "model": self.recommender.versions()} for at in range(len(requests))]

    def _choose(self, request: RecommendRequest, items: list[str], scores: list[float]) -> list[dict[str, Any]]:
        """The k best ranked items that the request allows, then popular ones."""
        ids, row_of, taken = self.catalogue.ids, self.catalogue.row_of, {"", *request.exclude}
        ranked = {row_of[item]: score for item, score in zip(items, scores, strict=True) if item not in taken}
        allowed = self.catalogue.matching(request.filter) if request.filter else np.arange(len(ids))
        rows = np.fromiter(ranked, int)
        rows = (rows[np.isin(rows, allowed)] if request.filter else rows)[: request.k].tolist()
        if len(rows) < request.k:
            taken |= {*(request.history or ()), *self.recommender.stored_history(request.user_id or "")}
            taken |= {ids[row] for row in rows}
            popular = (row for row in allowed if ids[row] not in taken)
            rows += itertools.islice(popular, request.k - len(rows))
        return [self.catalogue.show(row, ranked.get(row)) for row in rows]

    def similar(self, item_id: str, k: int) -> dict[str, Any]:
        """The answer (schemas.Similar) with the k items nearest to a known item."""
        items, scores = self.recommender.similar([item_id])
        found = zip(items[0, :k].tolist(), scores[0, :k].tolist(), strict=True)
        shown = [self.catalogue.show(self.catalogue.row_of[item], score) for item, score in found if item]
        return {"item_id": item_id, "items": shown, "model": self.recommender.versions()}
