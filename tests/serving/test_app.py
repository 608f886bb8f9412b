"""The HTTP API on a real pair of bundles: 120 items, index.k 50, of which 40 are ranked."""

import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from fastapi.testclient import TestClient
from httpx import Response

from rec import registry
from rec.recommender import Recommender
from rec.serving.answer import Engine
from rec.serving.app import Service, create_app
from rec.serving.auth import Tokens
from rec.serving.schemas import MAX_BODY, RecommendRequest
from tests.conftest import Trained

USER, K, RANKED = "u7", 50, 40
NONE = Tokens()


def load_latest(savedmodels: Path) -> Recommender:
    return Recommender.load(*registry.latest_pair(savedmodels))


def client_of(service: Service, tokens: Tokens = NONE) -> TestClient:
    return TestClient(create_app(service, tokens), raise_server_exceptions=False)


@pytest.fixture(scope="module")
def service(trained: Trained) -> Service:
    service = Service(lambda: load_latest(trained.savedmodels))
    service.load()
    return service


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


def genres_of(engine: Engine) -> dict[str, list[str]]:
    return dict(zip(engine.catalogue.ids, engine.catalogue.columns["genres"], strict=True))


def test_a_known_user_gets_what_the_models_rank_highest_with_the_items_columns(
    client: TestClient, engine: Engine
) -> None:
    found, scores, _ = engine.recommender.recommend([USER], [None])
    answer = client.get(f"/v1/users/{USER}/recommendations", params={"k": 5}).json()
    assert [item["item_id"] for item in answer["items"]] == found[0, :5].tolist()
    assert [item["score"] for item in answer["items"]] == scores[0, :5].tolist()
    assert list(answer["items"][0]) == ["item_id", "score", "title", "genres", "price", "released", "popularity"]
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
    stored = engine.recommender.stored_history(USER)
    assert stored and not set(stored) & set(ids(asked(client, user_id=USER, k=K)))
    told = [item for item in engine.catalogue.ids if item not in stored][:3]
    assert not {*stored, *told} & set(ids(asked(client, user_id=USER, history=told, k=K)))
    assert not set(told) & set(ids(asked(client, history=told, k=K)))


def test_an_unknown_user_without_a_history_gets_the_popular_items(client: TestClient, engine: Engine) -> None:
    popular = engine.recommender.items["popularity"].sort_values(ascending=False, kind="stable").index[:10].tolist()
    for body in ({"user_id": "nobody"}, {}, {"user_id": None, "history": None}, {"history": ["no such item"]}):
        answer = asked(client, **body)
        assert ids(answer) == popular
        assert answer.json()["cold_start"] is True
        assert answer.json()["user_id"] == body.get("user_id")
    assert ids(client.get("/v1/users/nobody/recommendations")) == popular


def test_an_anonymous_user_with_a_history_is_not_cold(client: TestClient, engine: Engine) -> None:
    answer = asked(client, history=["no such item", engine.catalogue.ids[50]])
    assert answer.json()["cold_start"] is False
    assert len(ids(answer)) == 10


@pytest.mark.parametrize("user", ["a/b", "/", "recommendations/recommendations", "Zoë 東京", "100%", "a?b#c&k=1"])
def test_a_user_id_is_taken_as_it_is(client: TestClient, user: str) -> None:
    assert client.get(f"/v1/users/{quote(user, safe='')}/recommendations").json()["user_id"] == user
    assert asked(client, user_id=user).json()["user_id"] == user


def test_a_slash_in_an_id_may_be_left_as_it_is(client: TestClient) -> None:
    assert client.get("/v1/users/eu/42/recommendations").json()["user_id"] == "eu/42"


def test_excluded_items_are_left_out_and_the_next_ones_move_up(client: TestClient) -> None:
    whole = ids(asked(client, user_id=USER, k=20))
    assert (
        ids(asked(client, user_id=USER, k=10, exclude=[*whole[:10:2], "no such item"]))
        == [item for item in whole if item not in whole[:10:2]][:10]
    )


def test_a_filter_keeps_the_order_of_what_passes(client: TestClient, engine: Engine) -> None:
    genres = genres_of(engine)
    found, _, _ = engine.recommender.recommend([USER], [None])
    passing = [item for item in found[0] if item and {"Drama", "Sci-Fi"} & set(genres[item])]
    answer = ids(asked(client, user_id=USER, k=5, filter={"genres": ["Drama", "Sci-Fi"]}))
    assert len(passing) >= 3
    assert answer[: len(passing)] == passing[:5]


def test_a_short_answer_is_filled_with_popular_items_that_pass(client: TestClient, engine: Engine) -> None:
    genres, stored = genres_of(engine), engine.recommender.stored_history(USER)
    genre = max({name for each in genres.values() for name in each}, key=lambda g: sum(g in x for x in genres.values()))
    excluded = next(item for item in engine.catalogue.ids if genre in genres[item] and item not in stored)
    passing = [item for item in engine.catalogue.ids if genre in genres[item] and item not in {*stored, excluded}]
    ranked = engine.recommender.recommend([USER], [None])[0][0].tolist()
    first = [item for item in ranked if item in passing]
    assert 0 < len(first) < len(passing) < K
    answer = asked(client, user_id=USER, k=K, filter={"genres": [genre]}, exclude=[excluded])
    assert ids(answer) == first + [item for item in passing if item not in first]
    scores = [item["score"] for item in answer.json()["items"]]
    assert None not in scores[: len(first)] and set(scores[len(first) :]) == {None}


def test_items_beyond_the_ranked_ones_are_popular_ones(client: TestClient) -> None:
    scores = [item["score"] for item in asked(client, history=["i1"], k=K).json()["items"]]
    assert len(scores) == K and scores[RANKED:] == [None] * (K - RANKED)


def test_every_column_of_a_filter_must_match(client: TestClient, engine: Engine) -> None:
    item = engine.catalogue.show(30, None)
    wanted = {"genres": item["genres"][:1], "price": [item["price"], "text", True], "title": [item["title"]]}
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


def test_a_batch_gets_the_answers_of_its_requests_one_by_one(engine: Engine) -> None:
    bodies: list[dict[str, Any]] = [
        {"user_id": "u1"}, {"history": ["i1", "i2"]}, {}, {"user_id": "u2", "history": []}, {"user_id": "u3", "k": 3}
    ]  # fmt: skip
    requests = [RecommendRequest(**body) for body in bodies]
    for together, request in zip(engine.answer(requests), requests, strict=True):
        [alone] = engine.answer([request])
        assert [item["item_id"] for item in together["items"]] == [item["item_id"] for item in alone["items"]]
        assert together["cold_start"] == alone["cold_start"]


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
    assert 400 <= response.status_code < 500 and response.status_code in (statuses or range(400, 500)), response.text
    content = json.loads(response.text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert list(content) == ["detail"] and isinstance(content["detail"], str)
    assert 10 < len(content["detail"]) < 500 and "\n" not in content["detail"] and "Traceback" not in content["detail"]


@pytest.mark.parametrize("case", HOSTILE)
def test_a_bad_body_is_refused_with_one_sentence(client: TestClient, case: str) -> None:
    assert_refused(client.post("/v1/recommend", **{"headers": {"Content-Type": "application/json"}, **HOSTILE[case]}))


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
        ("GET", "/v1/items/%F0%9F%8E%AC/similar", 404),
        ("GET", "/v1/items/i5", 404),
        ("GET", "/v1/users/u7/recommendations/", 404),
        ("GET", "/v1/users/a%0Ab/recommendations", 404),
        ("GET", "/v2/models", 404),
        ("GET", "/../../etc/passwd", 404),
        ("GET", "/v1/recommend", 405),
        ("PUT", "/v1/recommend", 405),
        ("POST", "/v1/users/u7/recommendations", 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/healthz", 405),
        ("POST", "/v1/models/reload", 403),
    ],
)
def test_a_bad_address_is_refused_with_one_sentence(client: TestClient, method: str, path: str, status: int) -> None:
    response = client.request(method, path)
    assert_refused(response, status)
    assert status != 405 or response.headers["Allow"]


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"history": ["i1", 2]}, "history[1]: input should be a valid string"),
        ({"filter": {"genres": ["Drama", None]}}, "filter['genres'][1]: input should be a valid string"),
        ({"histroy": []}, "'histroy': unknown key; did you mean history?"),
        ({"k": 51}, "k: must be at most 50, which is as many as the bundle retrieves"),
    ],
)
def test_the_sentence_says_where_and_what(client: TestClient, body: dict[str, Any], sentence: str) -> None:
    assert asked(client, **body).json()["detail"] == sentence


def test_the_largest_request_that_is_allowed_is_answered(client: TestClient) -> None:
    uuids = [f"{number:036d}" for number in range(1000)]
    body = {"user_id": "x" * 512, "history": uuids, "exclude": uuids, "k": K}
    assert len(json.dumps(body)) < MAX_BODY
    assert len(ids(asked(client, **body))) == K


@pytest.mark.parametrize("values", [[10**400], [True], ["\ud800"], [1e308, "x", 5, False], [float("inf")]])
def test_odd_values_of_a_filter_match_nothing(client: TestClient, values: list[Any]) -> None:
    # json.dumps escapes half a character and writes Infinity, as a careless client would.
    content = json.dumps({"filter": {"title": values}})
    response = client.post("/v1/recommend", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 422 or ids(response) == []


def test_null_bytes_in_ids_are_part_of_the_id(client: TestClient) -> None:
    answer = asked(client, user_id="u7\0", history=["i1\0", "\0"], exclude=["\0"])
    assert answer.json()["user_id"] == "u7\0" and answer.json()["cold_start"] is True


# ------------------------------------------------------------------------------------------------------------
# The service


def test_a_failure_tells_nothing_of_the_inside(engine: Engine) -> None:
    broken = Service(lambda: engine.recommender)
    broken.engine = replace(engine, recommender=replace(engine.recommender, module=None))
    response = client_of(broken).get(f"/v1/users/{USER}/recommendations")
    assert response.status_code == 500
    assert response.json() == {"detail": "the server failed to answer; its log says why"}


def test_it_is_alive_before_it_is_ready(engine: Engine) -> None:
    loading = Service(lambda: engine.recommender)
    client = client_of(loading)
    assert client.get("/healthz").status_code == 200
    for path in ("/readyz", f"/v1/users/{USER}/recommendations", "/v1/models"):
        assert client.get(path).status_code == 503
        assert client.get(path).json()["detail"].startswith("the models are being loaded")
    loading.load()
    assert client.get("/readyz").json() == {"status": "ready", "model": {"retrieval": 1, "ranking": 1}}


def test_a_retrieval_bundle_answers_alone(trained: Trained) -> None:
    service = Service(lambda: Recommender.load(trained.savedmodels / "retrieval" / "1"))
    service.load()
    answer = asked(client_of(service), user_id=USER, k=K).json()
    assert answer["model"] == {"retrieval": 1}
    assert len(answer["items"]) == K and all(item["score"] is not None for item in answer["items"])


def test_health_is_answered_while_the_models_work(service: Service, client: TestClient) -> None:
    release = threading.Event()
    working = service.thread.submit(release.wait)
    assert client.get("/healthz").status_code == 200 and not working.done()
    release.set()


@pytest.fixture
def copied(trained: Trained, tmp_path: Path) -> Iterator[Path]:
    """Bundles that a test may change."""
    yield Path(shutil.copytree(trained.savedmodels, tmp_path / "savedmodels"))


def test_a_reload_takes_the_new_version_and_a_failing_one_keeps_the_old(copied: Path, trained: Trained) -> None:
    service = Service(lambda: load_latest(copied))
    service.load()
    client = client_of(service, Tokens(admin=("secret",)))
    admin = {"Authorization": "Bearer secret"}
    assert client.post("/v1/models/reload").status_code == 401

    newer = shutil.copytree(copied / "ranking" / "1", copied / "ranking" / "2")
    metadata = registry.read_metadata(newer)
    (newer / "metadata.json").write_text(json.dumps({**metadata, "version": 2}))
    assert client.post("/v1/models/reload", headers=admin).json() == {"model": {"retrieval": 1, "ranking": 2}}
    before = client.get(f"/v1/users/{USER}/recommendations").json()
    assert before["model"] == {"retrieval": 1, "ranking": 2}

    shutil.copytree(newer, copied / "ranking" / "3")
    (copied / "ranking" / "3" / "saved_model.pb").write_bytes(b"damaged")
    refused = client.post("/v1/models/reload", headers=admin)
    assert_refused(refused, 409)
    assert "ranking/3: the SavedModel cannot be loaded" in refused.json()["detail"]
    assert client.get(f"/v1/users/{USER}/recommendations").json() == before
