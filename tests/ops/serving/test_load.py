"""A real server under load: new bundles, hostile requests, hang-ups, its end; and what its schema promises."""

import http.client
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
import tensorflow as tf
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from bench.serving import Load, get, megabytes
from rec.bundles.recommender import Recommender
from rec.ops.serving.front import guarded_app
from rec.ops.serving.gate import Tokens
from tests.conftest import Trained, environment
from tests.ops.serving.test_front import publish_ranking
from tests.serving.test_app import HOSTILE, service_of


class Running:
    """`python -m rec.serve` on bundles that a test may change."""

    def __init__(self, savedmodels: Path, *options: str) -> None:
        self.savedmodels = savedmodels
        command = [sys.executable, "-m", "rec.serve", "--port", "0", "--follow", "0.3", *options]
        command += ["--ranking-bundle", str(savedmodels / "ranking" / "latest")]
        self.log = open(savedmodels / "log", "a+")  # noqa: SIM115  (the process appends, wherever a test reads)
        env = environment(REC_ADMIN_TOKENS="boss")
        self.process = subprocess.Popen(
            command, env=env, stdout=self.log, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stderr is not None
        said = self.process.stderr.readline()
        self.port = int(said.rpartition(":")[2])
        threading.Thread(target=self.process.stderr.read, daemon=True).start()
        self.wait(lambda: self.ask("GET", "/readyz")[0] == 200)

    def ask(
        self, method: str, path: str, body: bytes | str | None = None, **headers: str
    ) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        text = response.read().decode()
        return response.status, json.loads(text) if text.startswith("{") else text

    @staticmethod
    def wait(condition: Any) -> None:
        deadline = time.monotonic() + 240
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def metric(self, name: str) -> float:
        lines = self.ask("GET", "/metrics")[1].splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    def megabytes(self) -> int:
        return megabytes(self.process.pid)


@pytest.fixture(scope="module")
def server(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    copied = tmp_path_factory.mktemp("load") / "savedmodels"
    running = Running(Path(shutil.copytree(trained.savedmodels, copied)))
    yield running
    running.process.kill()


def test_reloads_under_load_fail_no_request_and_mix_no_versions(server: Running) -> None:
    wrong: list[Any] = []
    seen: set[int] = set()

    def check(status: int, body: bytes) -> None:
        answer = json.loads(body)
        if status != 200 or len(answer["items"]) != 10 or answer["model"]["retrieval"] != 1:
            wrong.append((status, answer))
        seen.add(answer["model"]["ranking"])

    load = Load(server.port, lambda n: get(f"/v1/users/u{n % 200}/recommendations"), check)
    stop = threading.Event()

    def keep_asking() -> None:
        while not stop.is_set():
            load.run(8, 0.5)

    asking = threading.Thread(target=keep_asking)
    asking.start()
    for version in range(2, 6):
        publish_ranking(server.savedmodels, version, damaged=version == 4)
        if version == 4:
            server.wait(lambda: server.ask("GET", "/v1/models")[1]["failed"])
            assert "ranking/4" in server.ask("GET", "/v1/models")[1]["failed"]["bundles"]
        else:
            server.wait(lambda v=version: server.ask("GET", "/readyz")[1]["model"]["ranking"] == v)
    time.sleep(1)
    stop.set()
    asking.join()
    assert not wrong and seen == {1, 2, 3, 5}
    assert server.metric('rec_reloads_total{result="failed"}') >= 1  # it is tried again


def test_ten_thousand_hostile_requests_are_refused_in_the_same_memory(server: Running) -> None:
    def text(case: dict[str, Any]) -> bytes:
        content = case.get("content", json.dumps(case["json"]) if "json" in case else "user_id=u7")
        return content.encode() if isinstance(content, str) else content

    bodies = [
        text(case) for case in HOSTILE.values() if isinstance(case.get("content", ""), (str, bytes))
    ]
    # Bodies beyond the limit end their connection; here each connection serves many.
    bodies = [body for body in bodies if len(body) < 100_000]
    head = "POST /v1/recommend HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: "
    refused = [
        f"{head}{len(body)}\r\n\r\n".encode() + body for body in bodies if body not in (b"{}",)
    ]
    refused += [
        get(f"/v1/users/u7/recommendations?k={k}") for k in ("0", "-1", "51", "x", "1e9", "")
    ]
    load = Load(server.port, lambda n: refused[n % len(refused)])
    while load.sent < 1000:
        load.run(8, 0.5)
    before, found = server.megabytes(), set(load.statuses)
    while load.sent < 11_000:
        load.run(8, 1.0)
        found |= set(load.statuses)
    assert found <= {400, 413, 422}
    assert server.megabytes() < before + 20


def test_what_is_not_http_or_too_long_is_refused_with_a_sentence(server: Running) -> None:
    for sent, status in (
        (b"hello\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nA: " + b"a" * 70_000, 431),
        (b"GET /" + b"a" * 70_000, 431),
        (get("/" + "a" * 10_000), 414),
    ):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
            client.sendall(sent)
            answer = client.recv(10_000)
            assert int(answer[9:12]) == status
            content = json.loads(answer.partition(b"\r\n\r\n")[2] or client.recv(10_000))
            assert list(content) == ["detail"]


def test_a_client_that_hangs_up_leaves_the_queue(server: Running) -> None:
    body = json.dumps(
        {"requests": [{"user_id": f"u{n}", "k": 50, "explain": True} for n in range(100)]}
    ).encode()
    head = (
        "POST /v1/recommend/batch HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}"
    )
    for _ in range(4):
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(head.encode() + b"\r\n\r\n" + body)
            time.sleep(0.02)
    server.wait(lambda: server.metric("rec_hung_up_total") >= 1)
    assert server.ask("GET", "/v1/users/u7/recommendations")[0] == 200


def test_the_log_is_a_json_line_a_request(server: Running) -> None:
    server.ask("GET", "/v1/users/u7/recommendations?k=3", **{"X-Request-ID": "find-me"})
    lines: list[dict[str, Any]] = []

    def logged() -> bool:
        server.log.seek(0)
        lines[:] = [
            json.loads(line) for line in server.log if "find-me" in line and line.endswith("\n")
        ]
        return bool(lines)

    server.wait(logged)
    assert {**lines[0], "time": "", "ms": 0} == {
        "time": "",
        "id": "find-me",
        "client": "127.0.0.1",
        "method": "GET",
        "path": "/v1/users/u7/recommendations",
        "status": 200,
        "ms": 0,
    }


def test_what_is_in_flight_is_finished_on_sigterm(server: Running) -> None:
    body = json.dumps(
        {"requests": [{"user_id": f"u{n}", "k": 50, "explain": True} for n in range(100)]}
    )
    answers: list[tuple[int, Any]] = []
    asking = threading.Thread(
        target=lambda: answers.append(
            server.ask("POST", "/v1/recommend/batch", body, **{"Content-Type": "application/json"})
        )
    )
    asking.start()
    time.sleep(0.05)
    server.process.send_signal(signal.SIGTERM)
    asking.join()
    assert answers[0][0] == 200 and len(answers[0][1]["answers"]) == 100
    assert server.process.wait(30) == 0


def test_the_api_the_bundle_and_the_c_api_answer_alike(trained: Trained) -> None:
    users = [f"u{n}" for n in range(1000)]  # of which 200 are known
    pair = Recommender.load(
        trained.savedmodels / "retrieval" / "1", trained.savedmodels / "ranking" / "1"
    )
    offline = [
        row[:10]
        for row in pair.module.serving_default(tf.constant(users))["item_id"]
        .numpy()
        .astype(str)
        .tolist()
    ]
    request = json.dumps({"signature": "serving_default", "inputs": {"user_id": users}})
    command = [sys.executable, "tests/c_api.py", str(trained.savedmodels / "recommender" / "1")]
    native = subprocess.run(
        command, input=request + "\n", capture_output=True, text=True, env=environment(), check=True
    )
    assert [row[:10] for row in json.loads(native.stdout)["item_id"]] == offline
    service = service_of(trained.savedmodels)
    client = TestClient(guarded_app(service, Tokens()))
    found = []
    for at in range(0, 1000, 100):
        requests = [{"user_id": user} for user in users[at : at + 100]]
        found += client.post("/v1/recommend/batch", json={"requests": requests}).json()["answers"]
    assert [[item["item_id"] for item in answer["items"]] for answer in found] == offline
    for user, expected in zip(users[:100], offline, strict=False):
        alone = client.get(f"/v1/users/{user}/recommendations").json()["items"]
        assert [item["item_id"] for item in alone] == expected


def test_answers_keep_to_the_schema(trained: Trained) -> None:
    """No 5xx, no status or body that the OpenAPI schema does not tell of, whatever the schema lets a client send."""
    api = schemathesis.openapi.from_asgi(
        "/openapi.json", guarded_app(service_of(trained.savedmodels), Tokens())
    )
    limits = settings(
        max_examples=15,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    operations: list[Any] = [each.ok() for each in api.get_all_operations()]  # type: ignore[union-attr]
    assert len(operations) >= 12
    for operation in operations:

        @limits
        @given(case=operation.as_strategy())
        def keeps_to_it(case: Any) -> None:
            case.call_and_validate(
                excluded_checks=[positive_data_acceptance]
            )  # max_k and columns are the bundle's

        keeps_to_it()
