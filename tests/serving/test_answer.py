"""The catalogue: what is shown of an item, and which items a filter lets through."""

import shutil
from datetime import UTC, datetime
from typing import Any

import numpy as np
import orjson
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fastapi.testclient import TestClient

from rec import LOWEST
from rec.bundles import files
from rec.bundles.recommender import Recommender
from rec.serving.answer import Catalogue, is_among
from rec.serving.app import create_app
from rec.serving.service import Service
from tests.conftest import Trained, rewrite

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
    shown = orjson.loads(orjson.dumps([catalogue.show(row, 0.5) for row in range(4)]))
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
    assert catalogue.show(0, score)["score"] is None


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


# ------------------------------------------------------------------------------------------------------------
# From items.parquet to the answer

LONG = 123_456_789_012_345_678  # floating point ends it in 680
TYPED: dict[str, pa.Array] = {
    "runtime": pa.array([46, None, 90], pa.int64()),
    "ean": pa.array([LONG, LONG + 1, None], pa.int64()),
    "active": pa.array([True, False, None], pa.bool_()),
    "cost": pa.array([1.5, 2.0, None], pa.float64()),
    "seasons": pa.array([[1, 2], [], None], pa.list_(pa.int64())),
    "tags": pa.array([["a", "b"], ["c"], None], pa.list_(pa.string())),
    "code": pa.array(["007", "7", None], pa.string()),
    "seen": pa.array(
        [datetime(2021, 4, 17, 8, 30, tzinfo=UTC), None, None], pa.timestamp("ms", tz="UTC")
    ),
}


@pytest.fixture(scope="module")
def typed(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> TestClient:
    """The API with three items whose columns are TYPED, all others without a value."""
    savedmodels = tmp_path_factory.mktemp("typed") / "savedmodels"
    shutil.copytree(trained.savedmodels, savedmodels)
    path = savedmodels / "retrieval" / "1" / "items.parquet"
    items = pq.read_table(path)
    for name, values in TYPED.items():
        nothing = pa.nulls(len(items) - len(values), values.type)
        items = items.append_column(name, pa.concat_arrays([values, nothing]))
    pq.write_table(items, path)
    rewrite(path.parent)
    service = Service(lambda: Recommender.load(*files.find_pair(savedmodels)))
    service.load()
    return TestClient(create_app(service), raise_server_exceptions=False)


def recommended(client: TestClient, **wanted: list[Any]) -> Any:
    return client.post("/v1/recommend", json={"k": 3, "filter": wanted})


def test_a_value_keeps_its_type_from_file_to_answer(typed: TestClient) -> None:
    answer = recommended(typed, code=["007", "7"])
    assert answer.status_code == 200
    by_code = {item["code"]: item for item in answer.json()["items"]}
    expected = {name: values[:2].to_pylist() for name, values in TYPED.items()}
    expected["seen"] = ["2021-04-17 08:30:00.000Z", None]
    for row, code in enumerate(("007", "7")):
        found = {name: by_code[code][name] for name in TYPED}
        assert found == {name: values[row] for name, values in expected.items()}
        types = {name: type(value) for name, value in found.items()}
        assert types == {name: type(values[row]) for name, values in expected.items()}
    assert '"runtime":46,' in answer.text  # and not 46.0
    assert f'"ean":{LONG},' in answer.text


@pytest.mark.parametrize(
    ("wanted", "codes"),
    [
        ({"active": [True]}, {"007"}),
        ({"active": [False]}, {"7"}),
        ({"runtime": [46]}, {"007"}),
        ({"runtime": [46.0]}, {"007"}),
        ({"ean": [LONG + 1]}, {"7"}),
        ({"cost": [2]}, {"7"}),
        ({"seasons": [1]}, {"007"}),
        ({"tags": ["c"]}, {"7"}),
        ({"seen": ["2021-04-17 08:30:00.000Z"]}, {"007"}),
    ],
)
def test_a_filter_finds_what_has_the_value(
    typed: TestClient, wanted: dict[str, list[Any]], codes: set[str]
) -> None:
    answer = recommended(typed, **wanted)
    assert {item["code"] for item in answer.json()["items"]} == codes


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        ({"active": [1]}, "the column 'active' holds true or false; 1 is a whole number"),
        ({"active": ["true"]}, "the column 'active' holds true or false; \"true\" is text"),
        ({"runtime": ["1"]}, "the column 'runtime' holds whole numbers; \"1\" is text"),
        ({"runtime": [46, 1.5]}, "holds whole numbers; 1.5 is a number with a fraction"),
        ({"runtime": [True]}, "holds whole numbers; true is true or false"),
        ({"cost": ["2"]}, "the column 'cost' holds numbers; \"2\" is text"),
        ({"code": [3]}, "the column 'code' holds text; 3 is a whole number"),
        ({"seasons": ["1"]}, "the column 'seasons' holds whole numbers; \"1\" is text"),
        ({"tags": [False]}, "the column 'tags' holds text; false is true or false"),
        ({"item_id": [7]}, "the column 'item_id' holds text; 7 is a whole number"),
    ],
)
def test_a_filter_of_another_type_than_its_column_is_refused(
    typed: TestClient, wanted: dict[str, list[Any]], sentence: str
) -> None:
    answer = recommended(typed, **wanted)
    assert answer.status_code == 422
    assert sentence in answer.json()["detail"]
    many = typed.post("/v1/recommend/batch", json={"requests": [{"filter": wanted}]})
    assert many.status_code == 422
