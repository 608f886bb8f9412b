"""The service of rec.serve: ids, variants, and what was shown."""

import json
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from rec.bundles.recommender import Recommender
from rec.ops.loop.feedback import Feedback
from rec.ops.loop.service import LoopService
from rec.ops.loop.shown import ShownLog
from rec.ops.loop.stores import open_store
from rec.ops.loop.variants import choose, parse_variants
from rec.ops.serving.front import guarded_app
from rec.ops.serving.gate import LOG_FORMATS, Tokens

VARIANTS = parse_variants(["stable=production:50", "canary=canary:50"])
USERS = [f"u{number}" for number in range(12)]


def test_variants_answer_what_they_are_shown_and_chosen(
    backend: Recommender, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_store(str(tmp_path / "events.sqlite"))
    log = ShownLog(tmp_path / "shown", days=1)
    service = LoopService(lambda: [backend, backend], store=store, shown=log, variants=VARIANTS)
    service.load()
    app = guarded_app(service, Tokens(), access_log=LOG_FORMATS["json"], more=service.addresses)
    with TestClient(app) as client:
        headers = {"X-Request-ID": "page-1"}
        single = client.get("/v1/users/u7/recommendations?k=3", headers=headers).json()
        body = {"requests": [{"user_id": user, "k": 2} for user in USERS] + [{"history": ["i1"]}]}
        batch = client.post("/v1/recommend/batch", json=body, headers=headers).json()["answers"]
        chosen = single["items"][1]["item_id"]
        event = {"user_id": "u7", "item_id": chosen, "request_id": single["request_id"]}
        client.post("/v1/events", json={"events": [event]})
        metrics = client.get("/metrics").text
        assert client.get("/readyz").json()["model"]["canary/ranking"] == 1
    service.close()

    names = [VARIANTS[choose(VARIANTS, user, "")].name for user in USERS]
    assert {*names} == {"stable", "canary"}
    assert [answer["variant"] for answer in batch] == [*names, "stable"]  # nobody gets the first
    assert [answer["user_id"] for answer in batch] == [*USERS, None]
    assert single["request_id"] == "page-1"
    assert [answer["request_id"] for answer in batch] == [f"page-1-{n}" for n in range(13)]
    count = [*names, single["variant"]].count("canary")
    assert f'rec_answers_total{{variant="canary"}} {count}.0' in metrics
    assert 'rec_model_version{stage="canary/retrieval"} 1.0' in metrics
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    variants = [line.get("variant") for line in lines[:2]]
    assert variants == [single["variant"], None]  # a batch has several

    joined = Feedback(tmp_path / "shown", store, 0, 2e9)
    assert (joined.total().shown, joined.total().chosen) == (3 + 12 * 2 + 10, 1)
    (chosen_place,) = [each for each in joined.rates("position") if each.chosen]
    assert chosen_place.name == "2"
