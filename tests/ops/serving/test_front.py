"""The application behind the gate: answers as the plain one, plus what the gate, /metrics and the reload add."""

import re
import shutil
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from starlette.types import Message

from rec.errors import UserError
from rec.ops.serving import front
from rec.ops.serving.front import Reload, guarded_app, never_reload
from rec.ops.serving.gate import Tokens
from rec.ops.serving.lanes import Lanes
from rec.ops.serving.metrics import Prometheus
from rec.serving.service import Service
from tests.conftest import Trained, rewrite
from tests.serving.test_app import HOSTILE, USER, asked, assert_refused, client_of, service_of


def publish_ranking(savedmodels: Path, version: int, damaged: bool = False) -> None:
    """A copy of the first ranking bundle as another version, published as the registry does."""
    draft = Path(
        shutil.copytree(savedmodels / "ranking" / "1", savedmodels / "ranking" / f"draft-{version}")
    )
    if damaged:
        (draft / "saved_model.pb").write_bytes(b"damaged")
    rewrite(draft, version=version)
    draft.rename(savedmodels / "ranking" / str(version))


def guarded(
    service: Service, tokens: Tokens | None = None, reload: Reload = never_reload
) -> TestClient:
    app = guarded_app(service, tokens or Tokens(), reload)
    return TestClient(app, raise_server_exceptions=False)


@pytest.fixture(scope="module")
def service(trained: Trained) -> Service:
    return service_of(trained.savedmodels, Lanes(), Prometheus())


@pytest.fixture(scope="module")
def client(service: Service) -> TestClient:
    return guarded(service)


@pytest.mark.parametrize(
    "path",
    [
        f"/v1/users/{USER}/recommendations",
        f"/v1/users/{USER}/recommendations?k=7",
        f"/v1/users/{USER}/recommendations?k=51",
        f"/v1/users/{USER}/recommendations?k=01",
        f"/v1/users/{USER}/recommendations?k=ten",
        "/v1/users/a%2Fb%0Ac/recommendations",
        f"/v1/users/{'u' * 513}/recommendations",
        "/v1/users//recommendations",
    ],
)
def test_the_shortcut_answers_as_the_plain_server(
    client: TestClient, service: Service, path: str
) -> None:
    mine, plain = client.get(path), client_of(service).get(path)
    assert (mine.status_code, mine.json()) == (plain.status_code, plain.json())
    assert mine.headers["content-type"] == plain.headers["content-type"]


@pytest.mark.parametrize("case", HOSTILE)
def test_a_bad_body_is_refused_with_one_sentence(client: TestClient, case: str) -> None:
    headers = {"Content-Type": "application/json"}
    response = client.post("/v1/recommend", **{"headers": headers, **HOSTILE[case]})
    assert_refused(response, *((413,) if case.startswith("10 MB") else ()))


def test_the_application_answers_its_first_requests_before_it_listens(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages: list[Message] = []

    async def keep(message: Message) -> None:
        messages.append(message)

    monkeypatch.setattr(front, "_drop", keep)
    with guarded(service):
        assert [each["status"] for each in messages if "status" in each] == [200, 200]


def test_an_address_that_is_not_text_is_refused(client: TestClient) -> None:
    assert_refused(client.get("/v1/items/%ff%fe/similar"), 400)
    assert_refused(client.post("/v1/models/reload"), 403)


def test_every_answer_has_the_id_of_its_request(client: TestClient) -> None:
    assert (
        client.get("/healthz", headers={"X-Request-ID": "abc-1"}).headers["X-Request-ID"] == "abc-1"
    )
    made = [
        client.get("/healthz", headers={"X-Request-ID": given}).headers["X-Request-ID"]
        for given in ("", "a b", "x" * 129)
    ]
    assert len({*made}) == 3 and all(re.fullmatch("[0-9a-f]{16}", each) for each in made)
    assert "X-Request-ID" in client.get("/nowhere").headers


def test_only_the_pages_that_are_named_may_call_from_elsewhere(service: Service) -> None:
    asking = {"Origin": "https://shop.example", "Access-Control-Request-Method": "POST"}
    for origins, allowed in (
        ((), None),
        (("https://shop.example",), "https://shop.example"),
        (("https://a.b",), None),
    ):
        client = TestClient(guarded_app(service, Tokens(api=("t",)), origins=origins))
        assert (
            client.options("/v1/recommend", headers=asking).headers.get(
                "Access-Control-Allow-Origin"
            )
            == allowed
        )


def test_metrics_count_what_happened(client: TestClient) -> None:
    def value(name: str) -> float:
        lines = client.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    counted = 'rec_requests_total{address="/v1/recommend",status="200"}'
    before = value(counted), value("rec_cold_starts_total"), value("rec_batch_size_count")
    asked(client, history=[])
    assert (value(counted), value("rec_cold_starts_total")) == (before[0] + 1, before[1] + 1)
    assert value("rec_batch_size_count") == before[2] + 1
    assert value('rec_model_version{stage="retrieval"}') == 1
    for stage in ("queue", "model", "answer"):
        assert value(f'rec_stage_seconds_count{{stage="{stage}"}}') > 0


def test_a_reload_answers_with_the_new_versions_or_the_reason(service: Service) -> None:
    outcomes: list[dict[str, int] | UserError] = [{"ranking": 2}, UserError("ranking 3 is damaged")]

    def reload() -> dict[str, int]:
        outcome = outcomes.pop(0)
        if isinstance(outcome, UserError):
            raise outcome
        return outcome

    client = guarded(service, Tokens(admin=("secret",)), reload)
    admin = {"Authorization": "Bearer secret"}
    assert client.post("/v1/models/reload").status_code == 401
    done = client.post("/v1/models/reload", headers=admin)
    assert done.json() == {"model": {"ranking": 2}}
    refused = client.post("/v1/models/reload", headers=admin)
    assert_refused(refused, 409)
    assert refused.json()["detail"] == "the models stay as they are: ranking 3 is damaged"
