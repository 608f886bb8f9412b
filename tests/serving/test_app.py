"""The HTTP API on a real pair of bundles: 120 items, index.k 50, of which 40 are ranked."""

import asyncio
import json
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from fastapi.testclient import TestClient
from httpx import Response
from starlette.exceptions import HTTPException

from rec.bundles import files
from rec.bundles.recommender import Recommender
from rec.errors import UserError
from rec.serving.answer import SILENT, Backend, Engine, Observer
from rec.serving.app import create_app
from rec.serving.schemas import MAX_BODY, RecommendRequest
from rec.serving.service import MAX_WAITING, Job, Queue, Service
from tests.conftest import Trained

USER, K, RANKED = "u7", 50, 40


def service_of(
    savedmodels: Path, queue: Queue | None = None, observer: Observer = SILENT
) -> Service:
    """A service that has loaded the latest pair."""
    service = Service(lambda: Recommender.load(*files.find_pair(savedmodels)), queue, observer)
    service.load()
    return service


def client_of(service: Service) -> TestClient:
    return TestClient(create_app(service), raise_server_exceptions=False)


@pytest.fixture(scope="module")
def service(trained: Trained) -> Service:
    return service_of(trained.savedmodels)


@pytest.fixture(scope="module")
def client(service: Service) -> TestClient:
    return client_of(service)


@pytest.fixture(scope="module")
def engine(service: Service) -> Engine:
    return service.ready


def ids(response: Response) -> list[str]:
    assert response.status_code == 200, response.text
    return [item["item_id"] for item in response.json()["items"]]


def asked(client: TestClient, **body: Any) -> Response:
    return client.post("/v1/recommend", json=body)


def ranked(engine: Engine, excluded: Sequence[str] = ()) -> tuple[list[str], list[float]]:
    """What the models answer for USER: ids and scores. The ranker's order depends on who else is in the list."""
    found = engine.backend.answer([USER], [None], [list(excluded)])
    return [engine.catalogue.ids[row] for row in found.rows[0]], found.scores[0].tolist()


def stored_of(engine: Engine) -> list[str]:
    return engine.backend.histories([USER])[0]


def genres_of(engine: Engine) -> dict[str, list[str]]:
    return {str(item): list(genres) for item, genres in engine.backend.items["genres"].items()}


def test_a_known_user_gets_what_the_models_rank_highest_with_the_items_columns(
    client: TestClient, engine: Engine
) -> None:
    found, scores = ranked(engine)
    answer = client.get(f"/v1/users/{USER}/recommendations", params={"k": 5}).json()
    assert [item["item_id"] for item in answer["items"]] == found[:5]
    assert [item["score"] for item in answer["items"]] == scores[:5]
    assert list(answer["items"][0]) == [
        "item_id",
        "score",
        "title",
        "genres",
        "price",
        "released",
        "popularity",
    ]
    assert {name: answer[name] for name in ("user_id", "cold_start", "model")} == {
        "user_id": USER,
        "cold_start": False,
        "model": {"retrieval": 1, "ranking": 1},
    }


def test_ten_items_are_the_default_and_both_addresses_agree(client: TestClient) -> None:
    by_get = client.get(f"/v1/users/{USER}/recommendations")
    assert len(ids(by_get)) == 10
    assert by_get.json() == asked(client, user_id=USER).json()


def test_nothing_comes_back_that_the_user_has_seen(client: TestClient, engine: Engine) -> None:
    stored = stored_of(engine)
    assert stored and not set(stored) & set(ids(asked(client, user_id=USER, k=K)))
    told = [item for item in engine.catalogue.ids if item not in stored][:3]
    assert not {*stored, *told} & set(ids(asked(client, user_id=USER, history=told, k=K)))
    assert not set(told) & set(ids(asked(client, history=told, k=K)))


def test_a_request_may_ask_for_what_was_met_before(client: TestClient, engine: Engine) -> None:
    stored = stored_of(engine)
    again = ids(asked(client, user_id=USER, k=K, exclude_seen=False))
    assert len(again) == K and set(stored) & set(again)
    by_default = ids(asked(client, user_id=USER, k=K))
    assert by_default == ids(asked(client, user_id=USER, k=K, exclude_seen=True))
    genre = next(iter(genres_of(engine)[stored[0]]))
    narrow = asked(client, user_id=USER, k=K, filter={"genres": [genre]}, exclude_seen=False)
    assert stored[0] in ids(narrow)


def test_an_unknown_user_without_a_history_gets_the_popular_items(
    client: TestClient, engine: Engine
) -> None:
    popular = (
        engine.backend.items["popularity"]
        .sort_values(ascending=False, kind="stable")
        .index[:10]
        .tolist()
    )
    for body in (
        {"user_id": "nobody"},
        {},
        {"user_id": None, "history": None},
        {"history": ["no such item"]},
    ):
        answer = asked(client, **body)
        assert ids(answer) == popular
        assert answer.json()["cold_start"] is True
        assert answer.json()["user_id"] == body.get("user_id")
    assert ids(client.get("/v1/users/nobody/recommendations")) == popular


def test_an_anonymous_user_with_a_history_is_not_cold(client: TestClient, engine: Engine) -> None:
    answer = asked(client, history=["no such item", engine.catalogue.ids[50]])
    assert answer.json()["cold_start"] is False
    assert len(ids(answer)) == 10


@pytest.mark.parametrize(
    "user",
    [
        *("a/b", "/", "recommendations/recommendations", "Zoë 東京", "100%", "a?b#c&k=1"),
        *("a\nb", "\n", "\r\n", "a\0b", "\x7f\x1b[0m", "\ufffd", "a\n/recommendations"),
    ],
)
def test_a_user_id_is_taken_as_it_is(client: TestClient, user: str) -> None:
    assert client.get(f"/v1/users/{quote(user, safe='')}/recommendations").json()["user_id"] == user
    assert asked(client, user_id=user).json()["user_id"] == user


def test_a_slash_in_an_id_may_be_left_as_it_is(client: TestClient) -> None:
    assert client.get("/v1/users/eu/42/recommendations").json()["user_id"] == "eu/42"


def test_excluded_items_are_left_out_and_others_take_their_places(client: TestClient) -> None:
    excluded = ids(asked(client, user_id=USER, k=10))[::2]
    answer = ids(asked(client, user_id=USER, k=10, exclude=[*excluded, "no such item"]))
    assert len(set(answer)) == 10 and not set(excluded) & set(answer)


def test_a_filter_keeps_the_order_of_what_passes(client: TestClient, engine: Engine) -> None:
    genres = genres_of(engine)
    passing = [item for item in ranked(engine)[0] if {"Drama", "Sci-Fi"} & set(genres[item])]
    answer = ids(asked(client, user_id=USER, k=5, filter={"genres": ["Drama", "Sci-Fi"]}))
    assert len(passing) >= 3
    assert answer[: len(passing)] == passing[:5]


def narrow(engine: Engine) -> tuple[str, list[str]]:
    """A genre of which fewer than K items are new to USER, and those items, the most popular first."""
    genres, stored = genres_of(engine), stored_of(engine)
    by_genre = {
        genre: [
            item for item in engine.catalogue.ids if genre in genres[item] and item not in stored
        ]
        for genre in sorted({name for each in genres.values() for name in each})
    }
    found = set(ranked(engine)[0][:RANKED])

    def mixed(items: list[str]) -> int:
        """How many of them are among the ranked candidates, or are not, whichever are fewer."""
        return min(len(found.intersection(items)), len(set(items) - found))

    few = [(name, items) for name, items in by_genre.items() if len(items) < RANKED]
    name, items = max(few, key=lambda each: mixed(each[1]))
    assert mixed(items) > 1
    return name, items


def test_a_narrow_filter_scores_all_that_passes(client: TestClient, engine: Engine) -> None:
    genre, passing = narrow(engine)
    ranker = engine.backend.module.ranking  # type: ignore[attr-defined]
    wanted = dict(
        zip(
            passing,
            ranker.serving_default([USER], [passing])["score"][0].numpy().tolist(),
            strict=True,
        )
    )
    answer = asked(client, user_id=USER, k=K, filter={"genres": [genre]})
    assert ids(answer) == sorted(passing, key=lambda item: -wanted[item])
    assert [item["score"] for item in answer.json()["items"]] == pytest.approx(
        sorted(wanted.values(), reverse=True)
    )
    assert (
        ids(asked(client, user_id=USER, k=K, filter={"genres": [genre]}, exclude=passing[1:]))
        == passing[:1]
    )


class Shallow:
    """A backend that cannot score given items, as TF Serving cannot."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def answer_within(self, *_: object) -> None:
        return None


def test_a_short_answer_is_filled_with_popular_items_that_pass(engine: Engine) -> None:
    genre, passing = narrow(engine)
    request = RecommendRequest(user_id=USER, k=K, filter={"genres": [genre]}, exclude=passing[:1])
    [answer] = replace(engine, backend=Shallow(engine.backend)).recommend([request])
    items = answer["items"]
    first = [item for item in ranked(engine, passing[:1])[0] if item in passing[1:]]
    assert [item["item_id"] for item in items] == first + [
        item for item in passing[1:] if item not in first
    ]
    assert 0 < sum(item["score"] is None for item in items) < len(items)


def test_items_beyond_the_ranked_ones_follow_in_retrievals_order(
    client: TestClient, engine: Engine
) -> None:
    answer = asked(client, history=["i1"], k=K, explain=True).json()["items"]
    assert [item["explain"]["retrieval_rank"] for item in answer[RANKED:]] == list(
        range(RANKED + 1, K + 1)
    )
    assert [item["score"] for item in answer[RANKED:]] == [None] * (K - RANKED)


def test_an_explanation_says_where_each_item_comes_from(client: TestClient, engine: Engine) -> None:
    answer = asked(client, user_id=USER, k=5, explain=True).json()
    plain = asked(client, user_id=USER, k=5).json()
    assert [{**item, "explain": None} for item in answer["items"]] == [
        {**i, "explain": None} for i in plain["items"]
    ]
    assert [item["item_id"] for item in answer["history"]] == stored_of(engine)
    retrieval = engine.backend.module.retrieval  # type: ignore[attr-defined]
    found = retrieval.serving_default([USER])
    order = [item.decode() for item in found["item_id"][0].numpy()]
    for item in answer["items"]:
        explain = item["explain"]
        assert order[explain["retrieval_rank"] - 1] == item["item_id"]
        assert (
            explain["retrieval_score"] == found["score"][0, explain["retrieval_rank"] - 1].numpy()
        )
        assert explain["ranking_score"] == item["score"]
        vectors = engine.backend.vectors
        latest = engine.catalogue.rows(stored_of(engine)[-50:])
        near = vectors[latest] @ vectors[engine.catalogue.row_of[item["item_id"]]]
        assert explain["nearest"]["similarity"] == pytest.approx(near.max(), abs=1e-6)
        assert explain["nearest"]["item_id"] in stored_of(engine) and explain["nearest"]["title"]
    cold = asked(client, explain=True).json()
    assert cold["history"] == [] and cold["items"][0]["explain"]["nearest"] is None
    assert cold["items"][0]["explain"]["ranking_score"] is None


def test_a_batch_is_answered_like_its_requests_one_by_one(client: TestClient) -> None:
    bodies: list[dict[str, Any]] = [
        {"user_id": "u1"},
        {"history": ["i1", "i2"]},
        {},
        {"user_id": "u2", "history": []},
        {"user_id": "u3", "k": 3},
    ]
    together = client.post("/v1/recommend/batch", json={"requests": bodies})
    assert together.status_code == 200
    for answer, body in zip(together.json()["answers"], bodies, strict=True):
        alone = asked(client, **body).json()
        assert [item["item_id"] for item in answer["items"]] == [
            item["item_id"] for item in alone["items"]
        ]
        assert (answer["user_id"], answer["cold_start"]) == (alone["user_id"], alone["cold_start"])
    assert_refused(client.post("/v1/recommend/batch", json={"requests": bodies * 21}), 422)
    assert_refused(client.post("/v1/recommend/batch", json={"requests": [{"k": K + 1}]}), 422)


def test_items_are_found_by_their_title_and_users_with_their_history(
    client: TestClient, engine: Engine
) -> None:
    found = client.get("/v1/items", params={"q": "COMEDY OF", "limit": 3}).json()["items"]
    titles = engine.backend.items["title"]
    assert [item["item_id"] for item in found] == titles.index[titles.str.contains("Comedy of")][
        :3
    ].tolist()
    assert ids(client.get("/v1/items")) == engine.catalogue.ids[:20]
    assert client.get("/v1/users", params={"limit": 2}).json() == {
        "users": engine.backend.users[:2]
    }
    assert ids(client.get(f"/v1/users/{USER}/history")) == stored_of(engine)
    assert ids(client.get("/v1/users/nobody/history")) == []


def test_every_column_of_a_filter_must_match(client: TestClient, engine: Engine) -> None:
    item = engine.catalogue.item(30)
    wanted = {"genres": item["genres"][:1], "price": [item["price"], -1], "title": [item["title"]]}
    assert ids(asked(client, filter=wanted)) == [item["item_id"]]
    assert ids(asked(client, filter={**wanted, "title": ["No Such Title"]})) == []
    assert ids(asked(client, filter={"item_id": [item["item_id"]], "genres": []})) == []


def test_an_unknown_column_is_named_with_the_nearest_known_one(client: TestClient) -> None:
    answer = asked(client, filter={"genre": ["Drama"]})
    assert answer.status_code == 422
    assert answer.json() == {"detail": "filter: there is no column 'genre'; did you mean genres?"}


def test_similar_items_are_the_nearest_ones_without_the_item(client: TestClient) -> None:
    answer = client.get("/v1/items/i5/similar", params={"k": 7})
    assert len(ids(answer)) == 7 and "i5" not in ids(answer)
    scores = [item["score"] for item in answer.json()["items"]]
    assert scores == sorted(scores, reverse=True) and max(scores) <= 1.00001
    assert answer.json()["item_id"] == "i5" and answer.json()["items"][0]["title"]


def test_there_is_nothing_similar_to_an_unknown_item(client: TestClient) -> None:
    answer = client.get("/v1/items/no%2Fsuch/similar")
    assert (answer.status_code, answer.json()) == (404, {"detail": "there is no item 'no/such'"})


def test_models_tells_what_answers(client: TestClient, trained: Trained) -> None:
    answer = client.get("/v1/models").json()
    assert answer["models"]["ranking"]["built_from"]["retrieval"]["version"] == 1
    assert answer["models"]["retrieval"]["metrics"] == trained.report["retrieval"]["metrics"]
    assert answer["catalogue"]["items"] == 120 and "genres" in answer["catalogue"]["columns"]
    assert answer["max_k"] == K


# ------------------------------------------------------------------------------------------------------------
# Bad requests

HOSTILE: dict[str, dict[str, Any]] = {
    "not JSON": {"content": "{"},
    "a bare word": {"content": "hello"},
    "a number": {"content": "5"},
    "a list": {"content": "[]"},
    "null": {"content": "null"},
    "nothing": {"content": ""},
    "not UTF-8": {"content": b'{"user_id": "\xff\xfe"}'},
    "deep": {"content": "[" * 50_000},
    "deep in a key": {"content": '{"filter": ' + '{"a":' * 20_000 + "1" + "}" * 20_001},
    "a number of 10,000 digits": {"content": '{"k": ' + "9" * 10_000 + "}"},
    "k 0": {"json": {"k": 0}},
    "k below 0": {"json": {"k": -1}},
    "k too large": {"json": {"k": K + 1}},
    "k huge": {"json": {"k": 10**30}},
    "k fraction": {"json": {"k": 1.5}},
    "k text": {"json": {"k": "5"}},
    "k true": {"json": {"k": True}},
    "k null": {"json": {"k": None}},
    "k infinite": {"content": '{"k": Infinity}'},
    "k NaN": {"content": '{"k": NaN}'},
    "filter by NaN": {"content": '{"filter": {"price": [NaN]}}'},
    "filter by -Infinity": {"content": '{"filter": {"price": [-Infinity]}}'},
    "filter by a number without end": {"content": '{"filter": {"price": [1e999]}}'},
    "filter by 10,000 digits": {"content": '{"filter": {"price": [' + "9" * 10_000 + "]}}"},
    "user a number": {"json": {"user_id": 7}},
    "user a list": {"json": {"user_id": ["u7"]}},
    "user half a character": {"content": '{"user_id": "\\ud800"}'},
    "user too long": {"json": {"user_id": "u" * 513}},
    "history text": {"json": {"history": "i1"}},
    "history of numbers": {"json": {"history": [1]}},
    "history of nulls": {"json": {"history": [None]}},
    "history too long": {"json": {"history": ["i1"] * 1001}},
    "exclude too long": {"json": {"exclude": ["i1"] * 1001}},
    "exclude null": {"json": {"exclude": None}},
    "filter a list": {"json": {"filter": ["genres"]}},
    "filter of text": {"json": {"filter": {"genres": "Drama"}}},
    "filter by null": {"json": {"filter": {"genres": [None]}}},
    "filter by a list": {"json": {"filter": {"genres": [["Drama"]]}}},
    "filter unknown": {"json": {"filter": {"x" * 500: [1]}}},
    "filter with line breaks": {"json": {"filter": {"a\nb\r\0c": [1]}}},
    "filter half a character": {"content": '{"filter": {"\\udfff": [1]}}'},
    "unknown key": {"json": {"users": "u7"}},
    "unknown key half a character": {"content": '{"\\ud800": 1}'},
    "unknown long key": {"json": {"x\n" * 20_000: 1}},
    "no content type": {"content": b"{}", "headers": {}},
    "a form": {"data": {"user_id": "u7"}},
    "text": {"content": "{}", "headers": {"Content-Type": "text/plain"}},
    "XML": {"content": "<a/>", "headers": {"Content-Type": "application/xml"}},
    "10 MB": {"json": {"history": ["i" * 500] * 20_000}},
    "10 MB in chunks": {"content": (b" " * 65_536 for _ in range(160))},
}


def assert_refused(response: Response, *statuses: int) -> None:
    """A 4xx with one short sentence in JSON."""
    assert 400 <= response.status_code < 500 and response.status_code in (
        statuses or range(400, 500)
    ), response.text
    content = json.loads(
        response.text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON")
    )
    assert list(content) == ["detail"] and isinstance(content["detail"], str)
    assert (
        10 < len(content["detail"]) < 500
        and "\n" not in content["detail"]
        and "Traceback" not in content["detail"]
    )


@pytest.mark.parametrize("case", HOSTILE)
def test_a_bad_body_is_refused_with_one_sentence(client: TestClient, case: str) -> None:
    assert_refused(
        client.post(
            "/v1/recommend", **{"headers": {"Content-Type": "application/json"}, **HOSTILE[case]}
        )
    )


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/users/u7/recommendations?k=0", 422),
        ("GET", "/v1/users/u7/recommendations?k=-5", 422),
        ("GET", "/v1/users/u7/recommendations?k=51", 422),
        ("GET", "/v1/users/u7/recommendations?k=99999999999999999999999999", 422),
        ("GET", "/v1/users/u7/recommendations?k=ten", 422),
        ("GET", "/v1/users/u7/recommendations?k=", 422),
        ("GET", "/v1/users/u7/recommendations?k=NaN", 422),
        ("GET", f"/v1/users/{'u' * 513}/recommendations", 422),
        ("GET", "/v1/users//recommendations", 422),
        ("GET", "/v1/items//similar", 422),
        ("GET", "/v1/items/i5/similar?k=1000", 422),
        ("GET", "/v1/items/%00/similar", 404),
        ("GET", "/v1/items/%ff%fe/similar", 404),
        ("GET", "/v1/items/a%0Ab/similar", 404),
        ("GET", "/v1/items/a%0A/similar%0A", 404),
        ("GET", "/v1/items/%F0%9F%8E%AC/similar", 404),
        ("GET", "/v1/items/i5", 404),
        ("GET", "/v1/users/u7/recommendations/", 404),
        ("GET", "/v1/users/a%0A/b", 404),
        ("GET", "/v2/models", 404),
        ("GET", "/../../etc/passwd", 404),
        ("GET", "/v1/recommend", 405),
        ("PUT", "/v1/recommend", 405),
        ("POST", "/v1/users/u7/recommendations", 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/healthz", 405),
        ("OPTIONS", "/v1/recommend", 405),
        ("TRACE", "/v1/models", 405),
        ("BREW", "/v1/models", 405),
        ("POST", "/v1/models/reload", 404),
    ],
)
def test_a_bad_address_is_refused_with_one_sentence(
    client: TestClient, method: str, path: str, status: int
) -> None:
    response = client.request(method, path)
    assert_refused(response, status)
    assert status != 405 or response.headers["Allow"]


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"history": ["i1", 2]}, "history[1]: input should be a valid string"),
        (
            {"filter": {"genres": ["Drama", None]}},
            "filter['genres'][1]: input should be a valid string",
        ),
        ({"histroy": []}, "'histroy': unknown key; did you mean history?"),
        ({"k": 51}, "k: must be at most 50, which is as many as the bundle retrieves"),
    ],
)
def test_the_sentence_says_where_and_what(
    client: TestClient, body: dict[str, Any], sentence: str
) -> None:
    assert asked(client, **body).json()["detail"] == sentence


@pytest.mark.parametrize(
    ("content", "status", "sentence"),
    [
        ("[" * 50_000, 400, "the body is nested too deeply"),
        (b'{"user_id": "\xff"}', 400, "the body is not UTF-8 text"),
        (HOSTILE["a number of 10,000 digits"]["content"], 400, "the body has a whole number with"),
        ('{"k": 1', 400, "the body is not JSON: Expecting ',' delimiter at character 7"),
        ('{"filter": {"price": [NaN]}}', 422, "filter['price'][0]: input should be a "),
    ],
)
@pytest.mark.parametrize("path", ["/v1/recommend", "/v1/recommend/batch"])
def test_a_body_that_cannot_be_read_is_refused_with_the_reason(
    client: TestClient, path: str, content: str | bytes, status: int, sentence: str
) -> None:
    if status == 422 and path.endswith("batch"):
        content, sentence = f'{{"requests": [{content!s}]}}', "requests[0]['filter']"
    response = client.post(path, content=content, headers={"Content-Type": "application/json"})
    assert_refused(response, status)
    assert response.json()["detail"].startswith(sentence)


def test_a_request_for_the_head_alone_gets_no_body(client: TestClient) -> None:
    response = client.head("/v1/models")
    assert response.status_code == 405 and response.headers["Allow"] == "GET"


def test_the_largest_request_that_is_allowed_is_answered(client: TestClient) -> None:
    uuids = [f"{number:036d}" for number in range(1000)]
    body = {"user_id": "x" * 512, "history": uuids, "exclude": uuids, "k": K}
    assert len(json.dumps(body)) < MAX_BODY
    assert len(ids(asked(client, **body))) == K


@pytest.mark.parametrize(
    "values", [[10**400], [True], ["\ud800"], [1e308, "x", 5, False], [float("inf")]]
)
def test_odd_values_of_a_filter_match_nothing(client: TestClient, values: list[Any]) -> None:
    # json.dumps escapes half a character and writes Infinity, as a careless client would.
    content = json.dumps({"filter": {"title": values}})
    response = client.post(
        "/v1/recommend", content=content, headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 422 or ids(response) == []


def test_null_bytes_in_ids_are_part_of_the_id(client: TestClient) -> None:
    answer = asked(client, user_id="u7\0", history=["i1\0", "\0"], exclude=["\0"])
    assert answer.json()["user_id"] == "u7\0" and answer.json()["cold_start"] is True


# ------------------------------------------------------------------------------------------------------------
# The service


def unloaded() -> Service:
    return Service(lambda: pytest.fail("not to be called"))


def test_a_failure_tells_nothing_of_the_inside(engine: Engine) -> None:
    broken = unloaded()
    broken.engine = replace(engine, backend=replace(engine.backend, module=None))  # type: ignore[type-var]
    response = client_of(broken).get(f"/v1/users/{USER}/recommendations")
    assert response.status_code == 500
    assert response.json() == {"detail": "the server failed to answer; its log says why"}


def test_a_request_that_fails_does_not_take_its_batch_along(engine: Engine) -> None:
    service = unloaded()
    requests = [RecommendRequest(user_id="u1"), RecommendRequest(filter={"no such column": [1]})]

    async def both() -> list[Any]:
        asked = (service.ask(engine.recommend, request) for request in requests)
        return await asyncio.gather(*asked, return_exceptions=True)

    [answer], error = asyncio.run(both())
    assert answer["user_id"] == "u1" and isinstance(error, KeyError)


def test_it_is_alive_before_it_is_ready(engine: Engine) -> None:
    loading = unloaded()
    client = client_of(loading)
    assert client.get("/healthz").status_code == 200
    for path in ("/readyz", f"/v1/users/{USER}/recommendations", "/v1/models"):
        assert client.get(path).status_code == 503
        assert client.get(path).json()["detail"].startswith("the models are being loaded")
    loading.engine = engine
    assert client.get("/readyz").json() == {
        "status": "ready",
        "model": {"retrieval": 1, "ranking": 1},
    }


def test_a_retrieval_bundle_answers_alone(trained: Trained) -> None:
    service = Service(lambda: Recommender.load(trained.savedmodels / "retrieval" / "1", None))
    service.load()
    answer = asked(client_of(service), user_id=USER, k=K, explain=True).json()
    assert answer["model"] == {"retrieval": 1}
    assert len(answer["items"]) == K and all(item["score"] is not None for item in answer["items"])
    assert {item["explain"]["ranking_score"] for item in answer["items"]} == {None}


class Slow:
    """An engine that answers when it is let, and keeps what it was asked."""

    def __init__(self) -> None:
        self.let, self.batches = threading.Event(), list[list[Any]]()

    def recommend(self, requests: list[Any]) -> list[Any]:
        self.let.wait(10)
        self.batches.append(list(requests))
        return requests


def test_what_queues_while_a_call_runs_shares_the_next_and_what_is_cancelled_costs_nothing() -> (
    None
):
    service, slow = unloaded(), Slow()

    async def ask() -> list[Any]:
        first = asyncio.create_task(service.ask(slow.recommend, 0))
        await asyncio.sleep(0.05)
        others = [asyncio.create_task(service.ask(slow.recommend, n)) for n in range(1, 6)]
        await asyncio.sleep(0.05)
        others[2].cancel()
        await asyncio.sleep(0.05)
        slow.let.set()
        return await asyncio.gather(first, *others, return_exceptions=True)

    answers = asyncio.run(ask())
    assert slow.batches == [[0], [1, 2, 4, 5]]
    assert [n for [n] in answers[:3]] == [0, 1, 2] and isinstance(
        answers[3], asyncio.CancelledError
    )


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    service, slow = unloaded(), Slow()

    async def ask() -> list[Any]:
        tasks = [
            asyncio.create_task(service.ask(slow.recommend, n)) for n in range(MAX_WAITING + 3)
        ]
        await asyncio.sleep(0.1)
        slow.let.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    refused = [answer for answer in asyncio.run(ask()) if isinstance(answer, HTTPException)]
    assert len(refused) == 3 and {each.status_code for each in refused} == {503}
    assert {(each.headers or {})["Retry-After"] for each in refused} == {"1"}
    assert sum(map(len, slow.batches)) == MAX_WAITING and max(map(len, slow.batches)) <= 64


def test_health_is_answered_while_the_models_work(engine: Engine) -> None:
    service, slow = unloaded(), Slow()
    service.engine = replace(engine)
    future = asyncio.new_event_loop().create_future()
    service._arrived.put(Job(slow.recommend, 0, future, 0.0))
    assert client_of(service).get("/healthz").status_code == 200 and not slow.batches
    slow.let.set()


# ------------------------------------------------------------------------------------------------------------
# New bundles


def test_a_bundle_that_answers_nonsense_is_not_taken(engine: Engine) -> None:
    class Nonsense(Shallow):
        def answer(self, *arguments: Any) -> Any:
            found = self._backend.answer(*arguments)
            return found._replace(scores=np.full_like(found.scores, np.nan))

    service = Service(lambda: Nonsense(engine.backend))
    with pytest.raises(UserError, match="without a single score"):
        service.load()
    assert service.engine is None
