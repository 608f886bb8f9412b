"""The API with its models in TF Serving: the same answers as in process, and what happens when replicas fail."""

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient

from rec.bundles.metadata import PairMetadata
from rec.bundles.pair import Candidates
from rec.bundles.recommender import Recommender
from rec.errors import UserError
from rec.ops.serving.tf_serving import TfServing, connect
from rec.serving.answer import Catalogue, Engine
from rec.serving.app import create_app
from rec.serving.schemas import RecommendRequest, UnavailableError
from rec.serving.service import Service
from tests.conftest import ROOT, Trained, environment, rewrite

BATCH: tuple[list[str], list[list[str] | None], list[list[str]]] = (
    ["u7", "nobody", "", "u9", "u8", "u1"],
    [None, None, ["i3", "no such item", "i9"], ["i1"], [], None],
    [["i2"], [], ["i5", "i7"], [], [], []],
)


@pytest.fixture(scope="module")
def pair(trained: Trained) -> tuple[Path, Path]:
    return trained.savedmodels / "retrieval" / "1", trained.savedmodels / "ranking" / "1"


@pytest.fixture(scope="module")
def replica(pair: tuple[Path, Path]) -> Iterator[str]:
    """The address of a process that speaks TF Serving's REST protocol."""
    command = [sys.executable, str(Path(__file__).with_name("tf_serving_fixture.py"))]
    models = [f"{path.parent.name}={path}" for path in pair]
    server = subprocess.Popen(
        command + models, stdout=subprocess.PIPE, text=True, env=environment()
    )
    try:
        assert server.stdout is not None
        port = server.stdout.readline().strip()
        assert port, "the stand-in ended"
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()


@pytest.fixture(scope="module")
def nobody() -> str:
    """The address of a replica that is dead: a port where nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture(scope="module")
def silent() -> Iterator[str]:
    """The address of a replica that hangs: connections are made and nothing is ever said."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture(scope="module")
def local(pair: tuple[Path, Path]) -> Recommender:
    return Recommender.load(*pair)


@pytest.fixture
def fleet(replica: str, pair: tuple[Path, Path]) -> Iterator[TfServing]:
    fleet = connect([replica], *pair)
    yield fleet
    fleet.client.close()


def equal(mine: Candidates, theirs: Candidates) -> bool:
    """The same items in the same order. The last digits of scores may differ: the loaders fuse other operations."""
    return all(np.allclose(*pair, rtol=1e-5) for pair in zip(mine, theirs, strict=True))


# ------------------------------------------------------------------------------------------------------------
# The protocol: what TensorFlow's description says, of the stand-in


def post(replica: str, path: str, body: object) -> tuple[int, Any]:
    answer = httpx.post(f"{replica}/v1/models/{path}", json=body, timeout=30)
    return answer.status_code, answer.json()


def test_the_stand_in_takes_rows_and_columns(replica: str) -> None:
    status, columns = post(replica, "retrieval:predict", {"inputs": {"user_id": ["u7", "u9"]}})
    assert status == 200 and np.shape(columns["outputs"]["item_id"]) == np.shape(
        columns["outputs"]["score"]
    ) == (2, 50)
    status, rows = post(
        replica,
        "retrieval/versions/1:predict",
        {"instances": [{"user_id": "u7"}, {"user_id": "u9"}]},
    )
    assert status == 200
    assert {
        name: [row[name] for row in rows["predictions"]] for name in ("item_id", "score")
    } == columns["outputs"]
    assert post(replica, "retrieval:predict", {"instances": ["u7", "u9"]}) == (200, rows)
    assert post(replica, "retrieval:predict", {"inputs": ["u7", "u9"]}) == (200, columns)
    similar = {"signature_name": "similar_items", "instances": [{"item_id": "i1"}]}
    assert post(replica, "retrieval:predict", similar)[1]["predictions"][0].keys() == {
        "item_id",
        "score",
    }


def test_the_stand_in_leaves_out_the_name_of_an_only_output(replica: str) -> None:
    request = {"user_id": ["u7"], "item_id": [["i1", "i2", ""]]}
    status, by_column = post(replica, "ranking:predict", {"inputs": request})
    assert status == 200 and np.shape(by_column["outputs"]) == (1, 3)
    by_row = post(
        replica, "ranking:predict", {"instances": [{"user_id": "u7", "item_id": ["i1", "i2", ""]}]}
    )
    assert by_row == (200, {"predictions": by_column["outputs"]})


def test_the_stand_in_tells_a_models_status_and_refuses_with_an_error(replica: str) -> None:
    fine = {"error_code": "OK", "error_message": ""}
    known = {"model_version_status": [{"version": "1", "state": "AVAILABLE", "status": fine}]}
    for path, expected in (
        ("retrieval", 200),
        ("retrieval/versions/1", 200),
        ("retrieval/versions/2", 404),
        ("x", 404),
    ):
        answer = httpx.get(f"{replica}/v1/models/{path}")
        assert answer.status_code == expected
        assert (
            answer.json() == known
            if expected == 200
            else "Servable not found" in answer.json()["error"]
        )
    for path, body, expected in (
        ("x:predict", {}, 404),
        ("retrieval/versions/2:predict", {}, 404),
        ("retrieval:predict", {}, 400),
        ("retrieval:predict", {"inputs": ["u7"], "instances": ["u7"]}, 400),
        ("retrieval:predict", {"instances": []}, 400),
        ("retrieval:predict", {"inputs": {"user": ["u7"]}}, 400),
        ("retrieval:predict", {"inputs": ["u7"], "signature_name": "x"}, 400),
        ("retrieval:predict", {"inputs": ["u7"], "signature_name": "from_history"}, 400),
        ("retrieval:predict", ["u7"], 400),
    ):
        status, answer = post(replica, path, body)
        assert (status, list(answer)) == (expected, ["error"]), body


# ------------------------------------------------------------------------------------------------------------
# Answers


def test_a_fleet_answers_as_the_process_itself(fleet: TfServing, local: Recommender) -> None:
    assert equal(fleet.answer(*BATCH), local.answer(*BATCH))
    assert fleet.answer(*BATCH).cold.tolist() == [False, True, False, False, True, False]
    assert fleet.metadata.versions == {"retrieval": 1, "ranking": 1}
    assert (
        fleet.users == local.users
        and fleet.items.equals(local.items)
        and fleet.metadata == local.metadata
        and np.array_equal(fleet.vectors, local.vectors)
    )


def test_without_a_ranker_retrievals_order_is_the_answer(
    replica: str, pair: tuple[Path, Path]
) -> None:
    fleet = connect([replica], pair[0], None)
    answer = fleet.answer(*BATCH)
    assert equal(answer, Recommender.load(pair[0]).answer(*BATCH))
    assert answer.ranks.tolist() == [list(range(1, 51))] * 6


def test_neighbours_and_histories_are_the_same(fleet: TfServing, local: Recommender) -> None:
    users = ["u7", "nobody", "u9"]
    assert fleet.histories(users) == local.histories(users)
    for mine, theirs in zip(
        fleet.similar(["i1", "no such item"]), local.similar(["i1", "no such item"]), strict=True
    ):
        assert np.array_equal(mine, theirs)


# ------------------------------------------------------------------------------------------------------------
# Replicas that fail


def test_a_dead_replica_is_passed_over_and_asked_last_for_a_while(
    replica: str, nobody: str, pair: tuple[Path, Path], local: Recommender
) -> None:
    fleet = connect([f"{nobody}, {replica}/"], *pair)
    for _ in range(3):
        assert equal(fleet.answer(*BATCH), local.answer(*BATCH))
    assert list(fleet._failed) == [nobody]
    failed = fleet._failed[nobody]
    fleet.answer(*BATCH)
    assert fleet._failed[nobody] == failed  # not asked again yet


def test_a_replica_that_hangs_costs_one_time_out(
    replica: str, silent: str, pair: tuple[Path, Path], local: Recommender
) -> None:
    fleet = connect([silent, replica], *pair, timeout=1)
    start = time.monotonic()
    for _ in range(2):
        assert equal(fleet.answer(*BATCH), local.answer(*BATCH))
    assert time.monotonic() - start > 1 and list(fleet._failed) == [silent]
    failed = fleet._failed[silent]
    assert equal(fleet.answer(*BATCH), local.answer(*BATCH)) and fleet._failed[silent] == failed


def test_one_sentence_says_that_none_answers(
    replica: str, nobody: str, silent: str, pair: tuple[Path, Path]
) -> None:
    fleet = connect([replica], *pair)
    fleet.replicas[:] = [nobody]
    with pytest.raises(
        UnavailableError, match=f"^no TF Serving answers for retrieval; .*{nobody}: .*refused$"
    ):
        fleet.answer(*BATCH)
    fleet.replicas[:], fleet.client.timeout = [silent], 0.2
    with pytest.raises(UnavailableError, match=f"{silent}: timed out$"):
        fleet.similar(["i1"])
    fleet.replicas[:] = [replica]
    fleet.metadata = PairMetadata(replace(fleet.metadata.retrieval, version=9))
    with pytest.raises(
        UnavailableError, match="404 .*Servable not found for request: Specific\\(retrieval, 9\\)"
    ):
        fleet.histories(["u7"])


def test_a_fleet_without_these_versions_is_refused(
    replica: str, nobody: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    newer = Path(shutil.copytree(pair[0], tmp_path / "retrieval" / "2"))
    rewrite(newer, version=2)
    with pytest.raises(
        UnavailableError, match="no replica has retrieval version 2 loaded .*not found.*refused"
    ):
        connect([replica, nobody], newer, None)
    with pytest.raises(UserError, match="was trained for retrieval version 1, not for version 2"):
        connect([replica], newer, pair[1])
    with pytest.raises(
        UnavailableError, match="no replica has retrieval version 2 and ranking version 1 loaded"
    ):
        connect([replica], newer, pair[1], allow_mismatch=True)
    for urls in ([], [","], ["localhost:8501"], ["http://[::1"]):
        with pytest.raises(
            UnavailableError, match="--tf-serving: no replica has retrieval version 1 loaded"
        ):
            connect(urls, pair[0], None)


# ------------------------------------------------------------------------------------------------------------
# The command


def free_of_tensorflow(pid: int) -> bool:
    """No library of TensorFlow is in the memory of the process and its children."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    alone = "tensorflow" not in Path(f"/proc/{pid}/maps").read_text()
    return alone and all(free_of_tensorflow(int(child)) for child in children)


def assert_alike(answer: Any, expected: Any) -> None:
    """Equal but for the last bit of scores: the two sides compute them by graphs of their own."""
    if isinstance(expected, dict):
        assert answer.keys() == expected.keys()
        for key in expected:
            assert_alike(answer[key], expected[key])
    elif isinstance(expected, list):
        assert len(answer) == len(expected)
        for one, other in zip(answer, expected, strict=True):
            assert_alike(one, other)
    else:
        assert answer == (
            pytest.approx(expected, rel=1e-6) if isinstance(expected, float) else expected
        )


def test_the_command_answers_from_a_fleet_without_tensorflow(
    replica: str, nobody: str, pair: tuple[Path, Path], local: Recommender
) -> None:
    command = [
        sys.executable,
        "-m",
        "rec.serve",
        "--port",
        "0",
        "--follow",
        "0",
        "--ranking-bundle",
        str(pair[1]),
    ]
    command += ["--tf-serving", nobody, "--tf-serving", f"{replica},{nobody}"]
    server = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment(), cwd=ROOT
    )
    try:
        assert server.stderr is not None
        said = [server.stderr.readline()]
        while said[-1] not in ("ready\n", ""):
            said.append(server.stderr.readline())
        assert said[-1], f"the server ended: {said}"
        address = said[0].removeprefix("listening on ").strip()
        engine = Engine(local, Catalogue(local.items))
        body = {"user_id": "u7", "exclude": ["i2"], "explain": True}
        for options in ({}, {"diversity": 0.5}):
            answer = httpx.post(f"{address}/v1/recommend", json=body | options, timeout=30).json()
            (expected,) = engine.recommend([RecommendRequest.model_validate(body | options)])
            assert answer.pop("request_id")
            assert_alike(answer, expected)
        assert [item["item_id"] for item in answer["history"]] == local.histories(["u7"])[0]
        assert free_of_tensorflow(server.pid)
    finally:
        server.kill()


def test_the_api_says_in_one_sentence_that_the_fleet_is_down(fleet: TfServing, nobody: str) -> None:
    service = Service(lambda: fleet)
    service.load()
    client = TestClient(create_app(service))
    assert client.get("/v1/users/u7/recommendations").status_code == 200
    fleet.replicas[:] = [nobody]
    answer = client.get("/v1/users/u7/recommendations")
    assert (
        answer.status_code == 503
        and answer.headers["Retry-After"]
        and list(answer.json()) == ["detail"]
    )
    assert answer.json()["detail"].startswith("no TF Serving answers for retrieval; ")
    assert (
        client.get("/v1/items").status_code == client.get("/healthz").status_code == 200
    )  # need no model
