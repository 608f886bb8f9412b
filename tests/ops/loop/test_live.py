"""Events through the API: the next answer knows of them."""

import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from rec.bundles.metadata import Coverage, read_metadata
from rec.bundles.recommender import Recommender
from rec.data_prep.dataset import open_dataset
from rec.ops.loop.events import Event
from rec.ops.loop.live import LiveHistories
from rec.ops.loop.service import LoopService
from rec.ops.loop.stores import open_store
from rec.ops.serving.front import guarded_app
from rec.ops.serving.gate import Tokens
from tests.conftest import Trained
from tests.serving.test_app import assert_refused

USER = "u7"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("events") / "events.sqlite"


@pytest.fixture(scope="module")
def client(backend: Recommender, place: Path) -> TestClient:
    store = open_store(str(place))
    service = LoopService(lambda: [backend], store)
    service.load()
    app = guarded_app(service, Tokens(api=("secret",)), more=service.addresses)
    client = TestClient(app, raise_server_exceptions=False)
    client.headers["Authorization"] = "Bearer secret"
    return client


def post(client: TestClient, *events: dict[str, Any]) -> dict[str, int]:
    response = client.post("/v1/events", json={"events": events})
    assert response.status_code == 202, response.text
    counts: dict[str, int] = response.json()
    return counts


def history(answer: dict[str, Any]) -> list[str]:
    return [item["item_id"] for item in answer["history"]]


def ask(client: TestClient, **body: Any) -> dict[str, Any]:
    response = client.post("/v1/recommend", json={"explain": True, **body})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_the_next_answer_to_a_known_user_knows_of_an_event(
    client: TestClient, backend: Recommender
) -> None:
    before = client.get(f"/v1/users/{USER}/recommendations").json()
    chosen = before["items"][0]["item_id"]
    assert post(client, {"user_id": USER, "item_id": chosen}) == {"accepted": 1, "duplicates": 0}
    after = client.get(f"/v1/users/{USER}/recommendations").json()
    stored = backend.histories([USER])[0]
    given = ask(client, user_id=USER, history=[*stored, chosen])
    assert [item["item_id"] for item in after["items"]] == [
        item["item_id"] for item in given["items"]
    ]
    assert chosen not in [item["item_id"] for item in after["items"]]
    assert history(ask(client, user_id=USER)) == [*stored, chosen]
    shown = client.get(f"/v1/users/{USER}/history").json()
    assert [item["item_id"] for item in shown["items"]] == [*stored, chosen]


def test_a_session_is_what_it_sent(client: TestClient) -> None:
    assert ask(client, user_id="session-1")["cold_start"] is True
    items = [{"user_id": "session-1", "item_id": item, "time": at} for at, item in enumerate("ab")]
    post(client, *items, {"user_id": "session-1", "item_id": "i5"})
    answer = ask(client, user_id="session-1")
    assert (answer["cold_start"], history(answer)) == (False, ["i5"])  # there are no items a and b
    assert post(client, *items) == {"accepted": 0, "duplicates": 2}


def test_a_history_in_the_request_replaces_and_recent_appends(client: TestClient) -> None:
    post(client, {"user_id": "session-2", "item_id": "i5"})
    assert history(ask(client, user_id="session-2", recent=["i9"])) == ["i5", "i9"]
    given = ask(client, user_id="session-2", history=["i1"], k=50)
    assert history(given) == ["i1"]
    assert "i5" not in [item["item_id"] for item in given["items"]]  # it has been seen
    assert history(ask(client, history=["i1"], recent=["i2"])) == ["i1", "i2"]


def test_what_a_user_has_done_follows_the_rule_of_the_request(client: TestClient) -> None:
    def answer(item: str, rule: bool) -> list[dict[str, Any]]:
        given = ask(client, history=[item], exclude_seen=rule, k=50)
        items: list[dict[str, Any]] = given["items"]
        return items

    def is_found_again(item: str) -> bool:
        return item in [each["item_id"] for each in answer(item, False)]

    item = next(f"i{number}" for number in range(120) if is_found_again(f"i{number}"))
    post(client, {"user_id": "session-4", "item_id": item})
    for rule in (True, False):
        live = ask(client, user_id="session-4", exclude_seen=rule, k=50)
        assert live["items"] == answer(item, rule)


def test_what_is_answered_together_has_histories_of_its_own(client: TestClient) -> None:
    post(client, {"user_id": "session-3", "item_id": "i8"})
    requests = [{"user_id": name, "explain": True} for name in ("session-3", "nobody", USER)]
    answers = client.post("/v1/recommend/batch", json={"requests": requests}).json()["answers"]
    assert [history(answer)[-1:] for answer in answers[:2]] == [["i8"], []]
    alone = ask(client, user_id=USER)
    assert answers[2]["items"] == alone["items"] and history(answers[2]) == history(alone)


def test_the_bundle_says_what_its_histories_cover(trained: Trained) -> None:
    covers = read_metadata(trained.savedmodels / "retrieval" / "1").covers
    dataset = open_dataset(trained.dataset)
    times = [dataset.interactions(part)["timestamp"].max() for part in ("train", "val")]
    assert covers == Coverage(until=max(times), events=None)


@pytest.mark.parametrize(
    ("covers", "expected"),
    [
        (Coverage(), ["i1", "i2", "i3", "i4"]),
        (Coverage(until=200), ["i3", "i4"]),
        (Coverage(events=("view", "cart")), ["i1", "i2", "i3"]),
        (Coverage(until=100, events=("cart",)), ["i2", "i3"]),
    ],
)
def test_events_count_that_are_new_and_of_the_bundles_kinds(
    tmp_path: Path, covers: Coverage, expected: list[str]
) -> None:
    store = open_store(str(tmp_path / "events.sqlite"))
    kinds = ("view", None, "cart", "share")
    events = [
        Event(f"{number}", "u", f"i{number}", kind, number * 100, None, None)
        for number, kind in enumerate(kinds, start=1)
    ]
    store.add([events])
    assert LiveHistories(store, covers).since(["u", "other"]) == [expected, []]


@pytest.mark.parametrize(
    ("event", "sentence"),
    [
        ({"user_id": "", "item_id": "i1"}, "events[0]['user_id']: string should have at least 1"),
        ({"user_id": "u"}, "events[0]['item_id']: field required"),
        ({"user_id": "u", "item_id": 5}, "events[0]['item_id']: input should be a valid string"),
        ({"user_id": "u", "item_id": "i", "time": -1}, "events[0]['time']: input should be great"),
        (
            {"user_id": "u", "item_id": "i", "time": 1e13},
            "events[0].time: 10000000000000 is in the",
        ),
        (
            {"user_id": "u", "item_id": "i", "itemid": "i"},
            "'itemid': unknown key; did you mean ite",
        ),
    ],
)
def test_a_bad_event_is_refused_in_one_sentence_and_nothing_is_kept(
    client: TestClient, place: Path, event: dict[str, Any], sentence: str
) -> None:
    before = list(open_store(str(place)).read(0, 2e9))
    response = client.post("/v1/events", json={"events": [event, {"user_id": "x", "item_id": "i"}]})
    assert_refused(response, 422)
    assert response.json()["detail"].startswith(sentence)
    assert list(open_store(str(place)).read(0, 2e9)) == before


def test_limits_and_tokens_hold_for_events_too(client: TestClient) -> None:
    event = {"user_id": "u", "item_id": "i"}
    assert_refused(client.post("/v1/events", json={"events": []}), 422)
    assert_refused(client.post("/v1/events", json={"events": [event] * 501}), 422)
    assert_refused(client.post("/v1/events", content=b"x" * 1_100_000), 413)
    assert_refused(client.post("/v1/events", json={}, headers={"Authorization": ""}), 401)


def test_while_the_store_cannot_be_used_answers_rest_on_the_bundle(
    client: TestClient, backend: Recommender, place: Path
) -> None:
    post(client, {"user_id": USER, "item_id": "i3"})
    with sqlite3.connect(place) as connection:
        connection.execute("alter table events rename to hidden")
    stored = backend.histories([USER])[0]
    assert history(ask(client, user_id=USER)) == stored
    refused = client.post("/v1/events", json={"events": [{"user_id": "u", "item_id": "i"}]})
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "2")
    assert refused.json() == {
        "detail": "the store of events cannot be used now: no such table: events"
    }
    with sqlite3.connect(place) as connection:
        connection.execute("alter table hidden rename to events")
    deadline = time.monotonic() + 60
    while history(ask(client, user_id=USER))[-1] != "i3":
        assert time.monotonic() < deadline
        time.sleep(0.1)
