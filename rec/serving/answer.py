"""Answers to requests: what the models recommend, without what the caller excludes, with what there is to show.

- `Engine.recommend` takes a batch of requests: one call of the models, whatever its size.
- `exclude` and `filter` are honoured exactly. A filter chooses among the ranked candidates; where too few of those
  pass, the passing items themselves are scored; where that cannot be done or is not enough, the most popular items
  that pass follow, with score null. Never one that the user dislikes, or has seen if seen items are excluded.
- `max_per` and `diversity` choose among all candidates that pass (selection.py). If these run out because of `max_per`,
  further items that fit are scored, up to PASSES times, and then popular ones that fit follow.
- Answers are dictionaries, which the application writes as JSON; NaN and the infinities become null there.

All of it runs in the one thread that calls the models.
"""

import difflib
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt
from numpy.typing import ArrayLike

from rec import LOWEST
from rec.bundles.pair import Backend, Candidates
from rec.errors import UserError
from rec.serving.schemas import Item, RecommendRequest
from rec.serving.selection import Place, Selection, Variety

DEEPEST = 10_000  # the most popular passing items that are scored for a narrow filter: some 5 ms
MATCHES = 64 * 1024 * 1024  # bytes for the rows of the latest filters,
LONG = 1000  # characters; each filter in memory is shorter
PASSES = 4  # times that items are scored for one answer
COMPARED = 50  # the latest items of a history, among which an explanation finds the nearest
CACHED = 50_000  # items of which the columns are kept as Python values, some 700 bytes each
Json = dict[str, Any]


class Observer:
    """What a server does, for whoever counts it. This one is silent. Subclasses must return at once."""

    def loaded(self, versions: dict[str, int]) -> None:
        """The models are in service."""

    def waiting(self, requests: int) -> None:
        """So many requests wait or are being answered."""

    def call(self, requests: int) -> None:
        """So many requests share a call of the models."""

    def stage(self, name: str, seconds: float) -> None:
        """A stage of a call has ended: `queue` (the longest wait), `model`, or `answer` (choosing and writing)."""

    def cold_starts(self, answers: int) -> None:
        """So many answers are popular items, for users of whom nothing is known."""


SILENT = Observer()


def do_nothing() -> None:
    """There is nothing else to do between two steps."""


class Histories(Protocol):
    """What users have done since their bundle was made. A server that does not know it uses `StoredHistories`."""

    def since(self, users: Sequence[str]) -> Sequence[list[str]]:
        """Each user's items, oldest first. The thread of the models calls it once per batch."""


class StoredHistories:
    """What the bundle stores is all."""

    def since(self, users: Sequence[str]) -> Sequence[list[str]]:
        return [[]] * len(users)


STORED = StoredHistories()


def score_or_none(value: float | None) -> float | None:
    return value if value is not None and LOWEST < value < float("inf") else None


@dataclass(frozen=True)
class Kind:
    """What a column of the catalogue holds, and which values a filter can name."""

    name: str
    holds: Callable[[pa.DataType], bool]
    accepts: Callable[[str | int | float | bool], bool]


def is_whole(value: Any) -> bool:
    """A whole number, 3.0 among them: JSON has one type of numbers."""
    return is_number(value) and (isinstance(value, int) or value.is_integer())


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_bool(value: object) -> bool:
    return isinstance(value, bool)


def is_text(value: object) -> bool:
    return isinstance(value, str)


def is_any(_: pa.DataType) -> bool:
    return True


KINDS = (
    Kind("true or false", pt.is_boolean, is_bool),
    Kind("whole numbers", pt.is_integer, is_whole),
    Kind("numbers", pt.is_floating, is_number),
    Kind("numbers", pt.is_decimal, is_number),
    Kind("text", is_any, is_text),
)


def kind_of(type_: pa.DataType) -> Kind:
    """Of a list, what its elements are."""
    while hasattr(type_, "value_type"):
        type_ = type_.value_type
    return next(kind for kind in KINDS if kind.holds(type_))


def name_of_type(value: str | int | float | bool) -> str:
    """What JSON calls a value that a filter may have."""
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, str):
        return "text"
    return "a whole number" if is_whole(value) else "a number with a fraction"


class Catalogue:
    """items.parquet in memory, in its order: the most popular item first.

    A value keeps its type, whole numbers with gaps among them. What JSON has no type for, such as a time, is text.
    """

    def __init__(self, items: pd.DataFrame) -> None:
        table = pa.Table.from_pandas(items.reset_index(), preserve_index=False)
        self._table = pa.table({name: _as_json_type(table[name]) for name in table.column_names})
        self._kinds = {field.name: kind_of(field.type) for field in self._table.schema}
        self.columns: list[str] = self._table.column_names
        self.ids: list[str] = self._table["item_id"].to_pylist()
        self.row_of = {item: row for row, item in enumerate(self.ids)}
        self._columns_of = lru_cache(CACHED)(self._read_columns)
        self._rows_by_value = lru_cache(None)(
            self._collect
        )  # a million items: 0.3 s when a filter first names genres
        matches = MATCHES // (8 * len(self.ids) + LONG)
        self._matching = lru_cache(min(max(matches, 8), 1000))(self._intersect)

    def rows(self, items: Iterable[str]) -> list[int]:
        """Of the items that there are."""
        return [self.row_of[item] for item in items if item in self.row_of]

    def item(self, row: int) -> Json:
        return {name: self._table[name][row].as_py() for name in self.columns}

    def show(self, row: int, score: float | None = None) -> Json:
        """The item as it is in an answer (schemas.Item)."""
        return {"item_id": self.ids[row], "score": score_or_none(score), **self._columns_of(row)}

    def check(
        self, option: str, name: str, values: Iterable[str | int | float | bool] = ()
    ) -> None:
        """Raises UserError if a column that an option names does not exist, or holds values of another type."""
        if name not in self._kinds:
            nearest = difflib.get_close_matches(name[:64], self.columns, n=1, cutoff=0.0)[0]
            raise UserError(f"{option}: there is no column {name[:64]!r}; did you mean {nearest}?")
        kind = self._kinds[name]
        for value in values:
            if not kind.accepts(value):
                shown = json.dumps(value, ensure_ascii=False)[:64]
                raise UserError(
                    f"{option}: the column {name!r} holds {kind.name}; {shown} is {name_of_type(value)}"
                )

    def values(self, row: int, name: str) -> list[object]:
        """What an item has in a column: each value of a list; nothing where there is no value."""
        value = self._table[name][row].as_py()
        values = value if isinstance(value, list) else [value]
        return [each for each in values if each is not None and each == each]  # NaN is no value

    def having(self, values: Iterable[tuple[str, object]]) -> np.ndarray:
        """[M] rows, ascending, that have one of the values, each of a column."""
        rows = [row for name, value in values for row in self._rows_by_value(name)[value]]
        return np.unique(np.array(rows, int))

    def _read_columns(self, row: int) -> Json:
        return {
            name: value for name, value in self.item(row).items() if name not in Item.model_fields
        }

    def matching(self, wanted: Mapping[str, Sequence[object]]) -> np.ndarray:
        """[M] rows, ascending, that have one of the values in every one of the columns. Not to be written to."""
        key = tuple((name, tuple(values)) for name, values in wanted.items())
        return self._matching(key) if len(str(key)) < LONG else self._intersect(key)

    def _intersect(self, wanted: tuple[tuple[str, tuple[object, ...]], ...]) -> np.ndarray:
        rows = np.arange(len(self.ids))
        for name, values in wanted:
            found = [
                row for value in set(values) for row in self._rows_by_value(name).get(value, ())
            ]
            rows = np.intersect1d(rows, np.array(found, int))
        return rows

    def _collect(self, column: str) -> dict[object, list[int]]:
        rows: dict[object, list[int]] = {}
        for row, value in enumerate(self._table[column].to_pylist()):
            for each in value if isinstance(value, list) else [value]:
                rows.setdefault(each, []).append(row)
        return rows

    def find(self, text: str, limit: int) -> list[int]:
        """The rows of the most popular items with this text in their title (without titles: id), in any case."""
        column = pc.cast(
            self._table["title" if "title" in self.columns else "item_id"], pa.string()
        )
        found = pc.match_substring(column, text, ignore_case=True).fill_null(False)
        return np.flatnonzero(found.to_numpy())[:limit].tolist()


def _as_json_type(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The column, or its values as text where JSON has no type for them."""
    if pt.is_temporal(column.type):
        return pc.cast(column, pa.string())
    return column


class Choice(NamedTuple):
    """An answer in the engine's terms."""

    places: list[Place]
    stored: list[str]  # the user's stored history, where it was needed
    cold: bool


def places_of(found: Candidates, width: int) -> list[list[Place]]:
    """The first `width` places of each request."""
    columns = (found.rows, found.scores, found.ranks, found.retrieved)
    parts = (column[:, :width].tolist() for column in columns)
    return [
        [Place(*each) for each in zip(*row, strict=True) if each[0] >= 0]
        for row in zip(*parts, strict=True)
    ]


def merge(places: Sequence[Place], others: Iterable[Place]) -> list[Place]:
    """Both, the best scores first; an item that is in both as it is in the first."""
    rows = {place.row for place in places}
    both = [*places, *(place for place in others if place.row not in rows)]
    return sorted(both, key=lambda place: -(LOWEST if place.score is None else place.score))


def is_among(rows: ArrayLike, among: np.ndarray) -> np.ndarray:
    """[N] rows -> [N] bool: is it one of `among` [M], which ascends? N log M, where np.isin sorts them all."""
    rows = np.asarray(rows, int)
    if len(among) == 0:
        return np.zeros(len(rows), bool)
    at = np.searchsorted(among, rows).clip(max=len(among) - 1)
    return among[at] == rows


@dataclass(frozen=True, eq=False)
class Engine:
    """A loaded pair and its catalogue."""

    backend: Backend
    catalogue: Catalogue
    observer: Observer = SILENT
    live: Histories = STORED

    @classmethod
    def warm(
        cls, backend: Backend, observer: Observer = SILENT, live: Histories = STORED
    ) -> "Engine":
        """An engine that has answered each kind of request: a model's first call takes a second.

        Raises:
          UserError: the answers are empty or not numbers.
        """
        engine = cls(backend, Catalogue(backend.items), observer, live)
        first = engine.catalogue.ids[0]
        user = backend.users[0] if backend.users else None
        requests = [
            RecommendRequest(user_id=user, explain=True),
            RecommendRequest(history=[first], exclude=[first]),
        ]
        for answer in engine.recommend(requests):
            if len(engine.catalogue.ids) > 1 and not any(
                item["score"] is not None for item in answer["items"]
            ):
                raise UserError(f"the bundles {engine.versions} answer without a single score")
        backend.answer_within("", [first], np.arange(1))
        engine.similar([(first, 1)])
        return engine

    @cached_property
    def versions(self) -> dict[str, int]:
        """Of each stage."""
        return self.backend.metadata.versions

    @property
    def max_k(self) -> int:
        return self.backend.metadata.retrieval.config.index.k

    def check(self, k: int) -> None:
        """Raises UserError if the bundle does not retrieve k items."""
        if k > self.max_k:
            raise UserError(
                f"k: must be at most {self.max_k}, which is as many as the bundle retrieves"
            )

    def check_request(self, request: RecommendRequest) -> None:
        """Raises UserError if the bundle does not retrieve k items, or an option does not fit the columns."""
        self.check(request.k)
        for name, values in request.filter.items():
            self.catalogue.check("filter", name, values)
        for name in request.max_per or ():
            self.catalogue.check("max_per", name)

    def recommend(
        self, requests: Sequence[RecommendRequest], between: Callable[[], None] | None = None
    ) -> list[Json]:
        """The answers (schemas.Recommendations) to a batch of requests, in its order.

        Args:
          between: called before each step that takes long, for what else the thread has to do.
        """
        requests = self._complete(requests)
        chosen = zip(requests, self.choose(requests, between), strict=True)
        return [self._describe(request, choice) for request, choice in chosen]

    def choose(
        self, requests: Sequence[RecommendRequest], between: Callable[[], None] | None = None
    ) -> Iterator[Choice]:
        """What `recommend` answers to each request, as rows of the catalogue and without descriptions."""
        start = time.perf_counter()
        found = self.find(requests)
        called = time.perf_counter()
        self.observer.stage("model", called - start)
        self.observer.cold_starts(int(found.cold.sum()))
        yield from self._choose(requests, found, between or do_nothing)
        self.observer.stage("answer", time.perf_counter() - called)

    def find(self, requests: Sequence[RecommendRequest]) -> Candidates:
        """What the models find for each request, before anything is chosen."""
        return self.backend.answer(
            [request.user_id or "" for request in requests],
            [request.history for request in requests],
            [request.exclude for request in requests],
            [self._excludes_seen(request) for request in requests],
        )

    def _complete(self, requests: Sequence[RecommendRequest]) -> list[RecommendRequest]:
        """The requests, with the whole history of those that do not rest on what the bundle stores alone."""
        live = self.live.since([request.user_id or "" for request in requests])
        pairs = list(zip(requests, live, strict=True))
        stored = self._stored(request for request, done in pairs if done or request.recent)
        return [
            self._extend(request, stored.get(request.user_id, []), done) for request, done in pairs
        ]

    def _extend(
        self, request: RecommendRequest, stored: list[str], done: list[str]
    ) -> RecommendRequest:
        """The request of a user who has `done` something since the bundle was made, or sends recent items."""
        if not done and not request.recent:
            return request
        history = [*stored, *done] if request.history is None else request.history
        exclude = [*request.exclude, *done] if self._excludes_seen(request) else request.exclude
        changes = {"history": [*history, *request.recent], "exclude": exclude}
        return request.model_copy(update=changes)

    def _choose(
        self, requests: Sequence[RecommendRequest], found: Candidates, between: Callable[[], None]
    ) -> Iterator[Choice]:
        """The choices from what the models have found."""
        width = max(request.k if self.is_plain(request) else self.max_k for request in requests)
        selections = [
            self._select(request, self._passing(request, places))
            for request, places in zip(requests, places_of(found, width), strict=True)
        ]
        stored = self._stored(
            request
            for request, selection in zip(requests, selections, strict=True)
            if request.explain or not selection.is_complete
        )
        for request, selection, cold in zip(requests, selections, found.cold.tolist(), strict=True):
            history = stored.get(request.user_id, [])
            between()
            if not selection.is_complete:
                selection = self._fill_up(request, selection, history, between)
            yield Choice(selection.chosen, history, cold)

    @cached_property
    def _default_variety(self) -> Variety:
        """Of requests that do not say. Raises UserError if the items lack one of its columns."""
        index = self.backend.metadata.retrieval.config.index
        for column in index.max_per:
            self.catalogue.check("the bundle's index.max_per", column)
        return Variety(index.max_per, index.diversity)

    def _variety(self, request: RecommendRequest) -> Variety:
        default = self._default_variety
        return Variety(
            default.max_per if request.max_per is None else request.max_per,
            default.diversity if request.diversity is None else request.diversity,
        )

    def is_plain(self, request: RecommendRequest) -> bool:
        """Whether the answer is the first k of what the models find, if these are k."""
        return not request.filter and not self._variety(request).is_wanted

    def _select(self, request: RecommendRequest, places: Sequence[Place]) -> Selection:
        variety = self._variety(request)
        selection = Selection(request.k, variety, self.catalogue.values, self.backend.vectors)
        selection.add(places)
        return selection

    def _describe(self, request: RecommendRequest, choice: Choice) -> Json:
        places, stored, cold = choice
        items = [self.catalogue.show(place.row, place.score) for place in places]
        answer = {
            "user_id": request.user_id,
            "items": items,
            "cold_start": cold,
            "model": self.versions,
        }
        if request.explain:
            history = self._history(request, stored)
            for item, reason in zip(items, self._explain(places, history, cold), strict=True):
                item["explain"] = reason
            answer["history"] = [self.catalogue.show(row) for row in history]
        return answer

    def similar(self, wanted: Sequence[tuple[str, int]]) -> list[Json]:
        """The answers (schemas.Similar): the k items nearest to each known item."""
        answers = []
        rows, scores = self.backend.similar([item for item, _ in wanted])
        for (item, k), *found in zip(wanted, rows.tolist(), scores.tolist(), strict=True):
            items = [
                self.catalogue.show(row, score)
                for row, score in zip(*found, strict=True)
                if row >= 0
            ]
            answers.append({"item_id": item, "items": items[:k], "model": self.versions})
        return answers

    def histories(self, users: Sequence[str]) -> list[Json]:
        """The answers: what the bundle stores of each user, and what the user has done since."""
        answers = []
        stored = self.backend.histories(list(users))
        for user, *items in zip(users, stored, self.live.since(users), strict=True):
            rows = self.catalogue.rows(itertools.chain(*items))
            answers.append({"user_id": user, "items": [self.catalogue.show(row) for row in rows]})
        return answers

    def _excludes_seen(self, request: RecommendRequest) -> bool:
        """Whether what the user has met is left out of the answer."""
        if request.exclude_seen is None:
            return self.backend.metadata.retrieval.excludes_seen
        return request.exclude_seen

    def _stored(self, requests: Iterable[RecommendRequest]) -> dict[str | None, list[str]]:
        """The stored histories of the requests' users, by user, in one call."""
        users: list[str] = sorted({request.user_id for request in requests if request.user_id})
        return dict(zip(users, self.backend.histories(users), strict=True)) if users else {}

    def _passing(self, request: RecommendRequest, places: list[Place]) -> list[Place]:
        """The candidates that the filter lets pass."""
        if not request.filter:
            return places
        allowed = self.catalogue.matching(request.filter)
        passing = is_among([place.row for place in places], allowed)
        return [place for place, passes in zip(places, passing, strict=True) if passes]

    def _fill_up(
        self,
        request: RecommendRequest,
        selection: Selection,
        history: list[str],
        between: Callable[[], None],
    ) -> Selection:
        """The answer where the candidates are not enough: further items are scored, then popular ones follow."""
        left_out = self._left_out(request, history)
        taken = np.unique(np.array(self.catalogue.rows(left_out), int))
        if request.filter or selection.variety.max_per:
            selection = self._deepen(request, selection, taken, between)
        rest = self._rest(request, selection, taken)
        others = rest[~np.isin(rest, [place.row for place in selection.chosen])]
        selection.add_in_order(map(Place, others.tolist()))
        return selection

    def _deepen(
        self,
        request: RecommendRequest,
        selection: Selection,
        taken: np.ndarray,
        between: Callable[[], None],
    ) -> Selection:
        """Scores further items, and chooses anew, as long as there is something to gain."""
        for _ in range(PASSES):
            rest = self._rest(request, selection, taken)
            if np.isin(rest, [place.row for place in selection.chosen]).all():
                break
            deeper = self.backend.answer_within(request.user_id or "", request.history, rest)
            if deeper is None:
                break
            full = selection.full
            candidates = merge(places_of(deeper, self.max_k)[0], selection.chosen)
            selection = self._select(request, candidates)
            if selection.is_complete or selection.full == full:
                break
            between()
        return selection

    def _rest(
        self, request: RecommendRequest, selection: Selection, taken: np.ndarray
    ) -> np.ndarray:
        """The rows of the most popular items that may still follow, and of chosen ones, ascending."""
        rows = self.catalogue.matching(request.filter)
        full = self.catalogue.having(selection.full)
        rows = rows[: DEEPEST + len(taken) + len(full)]
        rows = rows[~is_among(rows, taken)]
        return rows[~is_among(rows, full)][:DEEPEST]

    def _left_out(self, request: RecommendRequest, history: list[str]) -> list[str]:
        """What must not fill the answer up; `history` is the stored one."""
        left_out = list(request.exclude)
        if request.user_id:
            left_out += self.backend.disliked([request.user_id])[0]
        if self._excludes_seen(request):
            left_out += [*(request.history or ()), *history]
        return left_out

    def _history(self, request: RecommendRequest, stored: list[str]) -> list[int]:
        """The rows of the history that the request is answered from."""
        return self.catalogue.rows(stored if request.history is None else request.history)

    def _explain(self, places: list[Place], history: list[int], cold: bool) -> list[Json]:
        """Of each item, where it comes from (schemas.Item)."""
        latest = history[-COMPARED:]
        vectors = self.backend.vectors
        near = vectors[[place.row for place in places]] @ vectors[latest].T
        is_ranked = self.backend.metadata.ranking is not None and not cold
        reasons = []
        for at, place in enumerate(places):
            nearest: Json | None = None
            if latest:
                best = int(near[at].argmax())
                item = self.catalogue.item(latest[best])
                nearest = {name: item[name] for name in ("item_id", "title") if name in item}
                nearest["similarity"] = float(near[at, best])
            reasons.append(
                {
                    "retrieval_rank": place.rank,
                    "retrieval_score": score_or_none(place.retrieved),
                    "ranking_score": score_or_none(place.score) if is_ranked else None,
                    "nearest": nearest,
                }
            )
        return reasons
