"""The command, with a real server on a free port."""

import argparse
import http.client
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from rec import serve
from rec.errors import UserError
from rec.ops.loop.stores import open_store
from rec.ops.start import find_pair
from tests.conftest import ROOT, Trained, environment, rewrite


def answer(
    port: int, path: str, body: object = None, token: str = "secret"
) -> tuple[int, dict[str, object], http.client.HTTPResponse]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    data = body if isinstance(body, bytes) else None if body is None else json.dumps(body)
    connection.request("GET" if body is None else "POST", path, data, headers)
    response = connection.getresponse()
    return response.status, json.loads(response.read()), response


def test_the_command_serves_until_it_is_terminated(trained: Trained, tmp_path: Path) -> None:
    # From a directory without a config: a server needs the bundles and nothing else.
    command = [sys.executable, "-m", "rec.serve", "--port", "0", "--require-auth"]
    command += ["--ranking-bundle", str(trained.savedmodels / "ranking" / "latest")]
    command += ["--events", "events.sqlite", "--shown", "shown"]
    env = environment(REC_API_TOKENS="secret,other")
    server = subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        said: list[str] = []
        while not said or said[-1] != "ready\n":
            said.append(server.stderr.readline())
            assert said[-1], f"the server ended: {said}"
        listening = re.fullmatch(r"listening on http://127\.0\.0\.1:(\d+)\n", said[0])
        assert listening and "serving retrieval version 1 and ranking version 1\n" in said
        port = int(listening[1])

        assert answer(port, "/healthz", token="")[:2] == (200, {"status": "ok"})
        assert answer(port, "/readyz", token="")[0] == 200
        assert answer(port, "/v1/users/u7/recommendations", token="wrong")[0] == 401
        status, content, _ = answer(
            port, "/v1/users/%252F%2Fü/recommendations?k=3".replace("ü", "%C3%BC")
        )
        assert (status, content["user_id"], content["cold_start"]) == (200, "%2F/ü", True)
        status, content, _ = answer(
            port, "/v1/recommend", {"history": ["i1", "i2"], "k": 3}, token="other"
        )
        assert (status, len(content["items"])) == (200, 3)  # type: ignore[arg-type]
        event = {"user_id": "u7", "item_id": "i1", "request_id": content["request_id"]}
        status, counts, _ = answer(port, "/v1/events", {"events": [event]})
        assert (status, counts) == (202, {"accepted": 1, "duplicates": 0})
        status, content, _ = answer(port, "/v1/recommend", b"x" * 10_000_000)
        assert status == 413 and "too long" in str(content["detail"])

        with socket.create_server(
            ("127.0.0.1", 0)
        ):  # an open, idle connection must not keep the server
            idle = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            idle.request("GET", "/healthz")
            idle.getresponse().read()
            server.send_signal(signal.SIGTERM)
            assert server.wait(timeout=30) == 0
    finally:
        server.kill()
    (kept,) = tmp_path.glob("shown/*/*.parquet")  # both answers
    assert len(pq.read_table(kept)) == 2
    assert len(list(open_store(str(tmp_path / "events.sqlite")).read(0, 2e9))) == 1


def test_a_server_imports_nothing_of_the_training_code() -> None:
    code = (
        "import sys, rec.serve, rec.ops.serving.front, rec.ops.serving.supervisor, rec.ops.serving.tf_serving; "
        "print(*sorted(name for name in sys.modules if name.startswith('rec.')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), cwd=ROOT, capture_output=True, text=True
    )
    names = {name.removeprefix("rec.").split(".")[0] for name in done.stdout.split()}
    assert names == {"bundles", "config", "errors", "files", "ops", "serve", "serving", "tables"}


# ------------------------------------------------------------------------------------------------------------
# Which bundles


def arguments(**given: object) -> argparse.Namespace:
    names = ("retrieval_bundle", "ranking_bundle", "retrieval_wandb", "ranking_wandb")
    said = {"alias": "latest", "config": "no such config", "overrides": []}
    return argparse.Namespace(**{**dict.fromkeys(names), **said, **given})


def test_the_default_is_the_latest_ranking_bundle_and_its_retrieval_bundle(
    trained: Trained, tmp_path: Path
) -> None:
    bundles = Path(shutil.copytree(trained.savedmodels, tmp_path / "savedmodels"))
    shutil.copytree(bundles / "retrieval" / "1", bundles / "retrieval" / "2")
    given = arguments(config=trained.config, overrides=[f"output.savedmodels={bundles}"])
    assert find_pair(given) == (bundles / "retrieval" / "1", bundles / "ranking" / "1")
    shutil.rmtree(bundles / "ranking")
    assert find_pair(given) == (bundles / "retrieval" / "2", None)


def test_a_bundle_can_be_named_by_its_directory_or_an_alias(
    trained: Trained, tmp_path: Path
) -> None:
    bundles = Path(shutil.copytree(trained.savedmodels, tmp_path / "savedmodels"))
    (bundles / "retrieval" / "aliases.json").write_text('{"production": 1}')
    one = bundles / "retrieval" / "1"
    assert find_pair(arguments(retrieval_bundle=one)) == (one, None)
    assert find_pair(arguments(retrieval_bundle=one.parent / "production")) == (one, None)
    ranking = bundles / "ranking" / "1"
    assert find_pair(arguments(ranking_bundle=ranking)) == (one, ranking)
    with pytest.raises(
        UserError, match="has no version or alias 'staging'; it has latest, production, 1"
    ):
        find_pair(arguments(retrieval_bundle=one.parent / "staging"))


def refusal(monkeypatch: pytest.MonkeyPatch, *given: object) -> str:
    """The sentence that `python -m rec.serve` ends with."""
    monkeypatch.setattr(sys, "argv", ["rec.serve", *map(str, given)])
    with pytest.raises(UserError) as ended:
        serve.main()
    return str(ended.value)


def test_a_pair_that_was_not_trained_together_is_refused(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Path(
        shutil.copytree(trained.savedmodels / "retrieval" / "1", tmp_path / "retrieval" / "2")
    )
    rewrite(other, version=2)
    ranking = trained.savedmodels / "ranking" / "1"
    sentence = refusal(
        monkeypatch, "--port", 0, "--retrieval-bundle", other, "--ranking-bundle", ranking
    )
    assert (
        "was trained for retrieval version 1, not for version 2" in sentence
        and "--allow-mismatch" in sentence
    )


def test_what_is_no_bundle_is_refused(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sentence = refusal(monkeypatch, "--port", 0, "--ranking-bundle", tmp_path / "ranking" / "1")
    assert sentence.startswith(f"{tmp_path}/ranking holds no bundle")
    sentence = refusal(
        monkeypatch, "--port", 0, "--ranking-bundle", trained.savedmodels / "retrieval" / "1"
    )
    assert sentence.endswith("is a retrieval bundle, not a ranking bundle")
    sentence = refusal(
        monkeypatch, "--port", 0, "--ranking-wandb", "team/project/ranking_bundle:latest"
    )
    assert "W&B" in sentence or "--retrieval-wandb" in sentence


def test_a_port_that_is_taken_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert refusal(monkeypatch, "--port", port) == (
            f"cannot listen on 127.0.0.1 port {port}: Address already in use; choose another --port or --host"
        )


def test_options_that_make_no_sense_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal(monkeypatch, "--workers", 0) == "--workers 0: must be at least 1"
    assert "--follow -1.0: must be 0" in refusal(monkeypatch, "--follow", -1)
