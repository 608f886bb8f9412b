"""The catalogue: what is shown of an item, and which items a filter lets through."""

import json

import numpy as np
import pandas as pd
import pytest

from rec.serving.answer import Catalogue, is_among
from rec.serving.schemas import LOWEST

ITEMS = pd.DataFrame(
    {
        "item_id": ["a", "b", "c", "d"],
        "genres": [["War", "Drama"], [], None, ["Drama", None]],
        "year": [1999.0, float("nan"), 2001.0, float("inf")],
        "title": ["1999", None, "Zoë", ""],
        "score": [1, 2, 3, 4],
        "popularity": np.array([9, 5, 1, 0]),
    }
).set_index("item_id")


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return Catalogue(ITEMS)


def test_what_json_cannot_hold_is_null(catalogue: Catalogue) -> None:
    shown = [json.loads(catalogue.show(row, 0.5)) for row in range(4)]
    assert shown[0] == {
        "item_id": "a",
        "score": 0.5,
        "genres": ["War", "Drama"],
        "year": 1999.0,
        "title": "1999",
        "popularity": 9,
    }
    assert [item["genres"] for item in shown[1:]] == [[], None, ["Drama", None]]
    assert [item["year"] for item in shown] == [1999.0, None, 2001.0, None]
    assert [item["title"] for item in shown] == ["1999", None, "Zoë", ""]


@pytest.mark.parametrize("score", [None, LOWEST, float("nan"), float("inf"), float("-inf")])
def test_a_score_that_is_none_is_null(catalogue: Catalogue, score: float | None) -> None:
    assert json.loads(catalogue.show(0, score))["score"] is None


@pytest.mark.parametrize(
    ("wanted", "rows"),
    [
        ({}, [0, 1, 2, 3]),
        ({"genres": ["Drama"]}, [0, 3]),
        ({"genres": ["War", "Drama"]}, [0, 3]),
        ({"genres": ["Drama"], "year": [1999]}, [0]),
        ({"genres": ["drama"]}, []),
        ({"genres": []}, []),
        ({"year": ["1999"]}, []),
        ({"title": [1999]}, []),
        ({"title": ["", "Zoë"]}, [2, 3]),
        ({"item_id": ["d", "b", "d", "?"]}, [1, 3]),
        ({"score": [3], "popularity": [1, 2**70]}, [2]),
    ],
)
def test_a_filter_matches_any_value_of_every_column(
    catalogue: Catalogue, wanted: dict[str, list[object]], rows: list[int]
) -> None:
    assert catalogue.matching(wanted).tolist() == rows
    assert catalogue.matching(wanted).tolist() == rows  # from the cache
    longer = {name: [*values, *["?" * 500] * 2] for name, values in wanted.items()}
    assert catalogue.matching(longer).tolist() == rows


def test_rows_are_looked_up_as_numpy_does() -> None:
    random = np.random.default_rng(1)
    for size in (0, 1, 5, 50):
        among = np.unique(random.integers(0, 60, size))
        rows = random.integers(0, 70, 40)
        assert is_among(rows, among).tolist() == np.isin(rows, among).tolist()
    assert is_among([], np.arange(3)).tolist() == []
