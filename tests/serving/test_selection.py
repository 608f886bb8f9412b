"""Variety: chosen items by hand, and on a real pair of bundles."""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rec import LOWEST
from rec.api import Recommender
from rec.errors import UserError
from rec.serving.answer import Engine, merge
from rec.serving.schemas import RecommendRequest
from rec.serving.selection import Place, Selection, Variety
from tests.conftest import Trained

GENRES: dict[int, list[object]] = {0: ["a"], 1: ["a", "b"], 2: ["a"], 3: ["b"], 4: [], 5: ["c"]}
EAST, NORTH, WEST = [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]
VECTORS = np.array([EAST, EAST, NORTH, EAST, WEST, NORTH])
SCORES = (5.0, 4.0, 3.0, 2.0, 1.0, LOWEST)


def choose(k: int, max_per: int | None = None, diversity: float = 0.0) -> list[int]:
    """The rows that are chosen of six candidates with falling SCORES."""
    limits = {} if max_per is None else {"genre": max_per}
    selection = Selection(k, Variety(limits, diversity), lambda row, _: GENRES[row], VECTORS)
    selection.add([Place(row, score) for row, score in enumerate(SCORES)])
    return [place.row for place in selection.chosen]


@pytest.mark.parametrize(
    ("max_per", "rows"),
    [
        (None, [0, 1, 2, 3, 4, 5]),
        (1, [0, 3, 4, 5]),  # 1 has an `a` too many; 4 has no genre and is not limited
        (2, [0, 1, 3, 4, 5]),
        (3, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_each_value_of_a_column_is_limited(max_per: int | None, rows: list[int]) -> None:
    assert choose(6, max_per) == rows
    assert choose(2, max_per) == rows[:2]


@pytest.mark.parametrize(
    ("diversity", "rows"),
    [
        (0.0, [0, 1, 2]),
        # Relevance is 1, .75, .5, .25, 0 and 0 (no score). After the first: 1 has .6 - .2, 2 has .4 - 0, a tie that the
        # better one wins.
        (0.2, [0, 1, 2]),
        # 1: .525 - .3; 2: .35 - 0; 3: .175 - .3; 4: 0 + .3; 5: 0 - 0. Then 1 again, 4 has .3 as 2 is orthogonal: 0.
        (0.3, [0, 2, 1]),
        (1.0, [0, 4, 2]),  # the opposite, then what is orthogonal to both
    ],
)
def test_the_next_item_is_relevant_and_unlike_those_before(
    diversity: float, rows: list[int]
) -> None:
    assert choose(3, diversity=diversity) == rows


def test_both_hold_together() -> None:
    assert choose(6, max_per=1, diversity=1.0) == [0, 4, 5, 3]


def test_merged_candidates_are_ordered_and_not_repeated() -> None:
    both = merge([Place(1, 2.0, rank=1), Place(2, LOWEST)], [Place(1, 2.0, rank=9), Place(3, 3.0)])
    assert [(place.row, place.rank) for place in both] == [(3, None), (1, 1), (2, None)]


# ------------------------------------------------------------------------------------------------------------
# In answers


@pytest.fixture(scope="module")
def engine(trained: Trained) -> Engine:
    return Recommender.load(trained.savedmodels).engine


def items_of(engine: Engine, **options: Any) -> list[dict[str, Any]]:
    request = RecommendRequest(**options)
    engine.check_request(request)
    (answer,) = engine.recommend([request])
    return answer["items"]


def ids(items: list[dict[str, Any]]) -> list[str]:
    return [item["item_id"] for item in items]


@pytest.mark.parametrize("options", [{"user_id": "u7"}, {"history": ["i1", "i2"]}, {}])
def test_a_limit_holds_and_keeps_the_order_of_what_fits(
    engine: Engine, options: dict[str, Any]
) -> None:
    counts: Counter[str] = Counter()
    expected = []
    for item in items_of(engine, k=50, **options):
        if all(counts[genre] < 2 for genre in item["genres"]):
            counts.update(item["genres"])
            expected.append(item["item_id"])
    k = len(expected)
    assert 3 < k < 50
    assert ids(items_of(engine, k=k, max_per={"genres": 2}, **options)) == expected


@pytest.mark.parametrize("diversity", [0.0, 0.5])
def test_where_the_candidates_run_out_further_items_are_scored(
    engine: Engine, diversity: float
) -> None:
    """Only 50 of 120 items are candidates. With one genre excluded by its limit, the rest are looked for deeper."""
    asked = {"user_id": "u7", "exclude": ["i5"], "diversity": diversity}
    items = items_of(engine, k=50, max_per={"genres": 8}, **asked)
    counts = Counter(genre for item in items for genre in item["genres"])
    assert max(counts.values()) == 8
    candidates = set(ids(items_of(engine, k=50, user_id="u7")))
    further = [item for item in items if item["item_id"] not in candidates]
    assert further and any(item["score"] is not None for item in further)
    (history,) = engine.backend.histories(["u7"])
    assert not {"i5", *history} & set(ids(items))
    assert len(set(ids(items))) == len(items)
    # An item that is missing would be one too many.
    for item_id in set(engine.catalogue.ids) - {"i5", *history, *ids(items)}:
        genres = engine.backend.items["genres"][item_id]
        assert any(counts[genre] == 8 for genre in genres)


def test_diversity_makes_a_list_less_alike_and_a_filter_holds(engine: Engine) -> None:
    def likeness(**options: Any) -> float:
        items = items_of(
            engine, user_id="u7", k=5, filter={"genres": ["Drama", "Comedy"]}, **options
        )
        assert all({"Drama", "Comedy"} & set(item["genres"]) for item in items)
        vectors = engine.backend.vectors[engine.catalogue.rows(ids(items))]
        return float((vectors @ vectors.T).mean())

    assert likeness(diversity=1.0) < likeness(diversity=0.0) == likeness()
    first = ids(items_of(engine, user_id="u7", k=5, diversity=0.7))[0]
    assert first == ids(items_of(engine, user_id="u7", k=1))[0]


class Changed:
    """A backend with other attributes."""

    def __init__(self, backend: Any, **changes: Any) -> None:
        self._backend = backend
        self.__dict__.update(changes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


def test_where_nothing_can_be_scored_popular_items_that_fit_follow(engine: Engine) -> None:
    backend: Any = Changed(engine.backend, answer_within=lambda *_: None)
    items = items_of(replace(engine, backend=backend), user_id="u7", k=50, max_per={"genres": 8})
    counts = Counter(genre for item in items for genre in item["genres"])
    assert max(counts.values()) == 8
    popular = [item["popularity"] for item in items if item["score"] is None]
    assert popular == sorted(popular, reverse=True) and popular


def with_defaults(engine: Engine, **defaults: Any) -> Engine:
    """The engine with a bundle that was exported with these settings of its index."""
    metadata = engine.backend.metadata
    config = metadata.retrieval.config
    config = replace(config, index=replace(config.index, **defaults))
    metadata = replace(metadata, retrieval=replace(metadata.retrieval, config=config))
    backend: Any = Changed(engine.backend, metadata=metadata)
    return replace(engine, backend=backend)


def test_what_the_bundle_says_holds_for_requests_that_do_not(engine: Engine) -> None:
    variety = {"max_per": {"genres": 2}, "diversity": 0.5}
    default = with_defaults(engine, **variety)
    plain = ids(items_of(engine, user_id="u7", k=5))
    varied = ids(items_of(engine, user_id="u7", k=5, **variety))
    assert plain != varied
    assert ids(items_of(default, user_id="u7", k=5)) == varied
    assert ids(items_of(default, user_id="u7", k=5, max_per={}, diversity=0.0)) == plain


def test_a_column_that_does_not_exist_is_refused(engine: Engine) -> None:
    with pytest.raises(UserError, match="max_per: there is no column 'genre'; did you mean genres"):
        items_of(engine, max_per={"genre": 1})
    with pytest.raises(UserError, match="the bundle's index.max_per: there is no column"):
        items_of(with_defaults(engine, max_per={"genre": 1}))
