"""Several processes that train one model: with the same result as one, and after a kill; on parameter servers."""

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from rec.bundles.recommender import load_bundle
from rec.errors import UserError
from rec.ops.distributed import distribution_of
from tests.conftest import ROOT, Trained, environment, run_here

# Without random masks, which every worker draws for itself, the result is the same to the last digits.
SETTINGS = (
    "retrieval.epochs=4",
    "retrieval.dropout=0",
    "features.users={}",
    "features.items={}",
    "index.kind=exact",
)


def arguments(place: Path, *overrides: str) -> list[str]:
    """Of a retrieval training that writes to `place`."""
    command = ["rec.train", "--stage", "retrieval"]
    for setting in (
        *SETTINGS,
        f"output.checkpoints={place}",
        f"output.savedmodels={place / 'models'}",
        *overrides,
    ):
        command += ["--set", setting]
    return command


def start(place: Path, *overrides: str, **env: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    command = [sys.executable, "-m", *arguments(place, *overrides)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(**env), stdout=pipe, stderr=pipe, text=True
    )


def cluster(place: Path, *overrides: str, **jobs: int) -> list[subprocess.Popen[str]]:
    """So many processes of each job on free ports; the first of all is the chief."""
    with ExitStack() as held:
        ports = iter(
            [
                held.enter_context(socket.create_server(("127.0.0.1", 0)))
                for _ in range(sum(jobs.values()))
            ]
        )
        addresses = {
            job: [f"127.0.0.1:{next(ports).getsockname()[1]}" for _ in range(n)]
            for job, n in jobs.items()
        }
    tasks = [{"type": job, "index": at} for job, n in jobs.items() for at in range(n)]
    told = [json.dumps({"cluster": addresses, "task": task}) for task in tasks]
    return [start(place, *overrides, TF_CONFIG=each) for each in told]


def dataset(place: Path, users: int, items: int) -> str:
    """The setting of a new one."""
    sizes = ["--users", users, "--items", items]
    done = run_here("rec.data_prep.dummy", *sizes, "--output-dir", place)
    assert done.returncode == 0, done.stderr
    return f"dataset={place}"


def wait_for_epoch(number: int, place: Path, processes: list[subprocess.Popen[str]]) -> None:
    state = place / "retrieval.partial" / "state.json"
    while not (state.exists() and json.loads(state.read_text())["epoch"] >= number):
        for each in processes:
            assert each.poll() is None, each.communicate()
        time.sleep(0.05)


def finish(process: subprocess.Popen[str]) -> str:
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr[-3000:]
    return stdout


def epochs(place: Path) -> list[dict[str, Any]]:
    """What the finished run logged of each epoch, without its pace."""
    lines = map(json.loads, (place / "retrieval" / "metrics.jsonl").read_text().splitlines())
    return [
        {key: of[key] for key in ("epoch", "loss", "val/ndcg@10")} for of in lines if "epoch" in of
    ]


@pytest.mark.skipif(os.name != "posix", reason="needs kill -9")
def test_two_workers_end_as_one_even_if_one_is_killed_and_all_start_again(tmp_path: Path) -> None:
    data = dataset(tmp_path / "data", 150, 100)
    alone, together = tmp_path / "alone", tmp_path / "together"
    done = run_here(*arguments(alone, data))
    assert done.returncode == 0, done.stderr

    chief, other = cluster(together, data, worker=2)
    wait_for_epoch(2, together, [chief, other])
    other.kill()
    assert "lost another process that TF_CONFIG names" in chief.communicate(timeout=300)[1]
    assert chief.returncode == 1, "the chief went on without the other"

    chief, other = cluster(together, data, worker=2)
    assert json.loads(finish(chief).splitlines()[-1])["stage"] == "retrieval"
    assert finish(other) == ""
    for one, two in zip(epochs(alone), epochs(together), strict=True):
        assert two == pytest.approx(one, rel=1e-4)
    assert not (
        tmp_path / "together" / "models" / "retrieval" / "2"
    ).exists()  # only the chief has exported


@pytest.mark.skipif(os.name != "posix", reason="needs kill -9")
def test_parameter_servers_hold_the_tables_in_parts_and_a_worker_may_be_lost(
    tmp_path: Path, trained: Trained
) -> None:
    data = dataset(tmp_path / "data", 300, 2500)  # items enough for a table that is worth dividing
    settings = (data, "strategy=ps", "retrieval.arch=two_tower")
    chief, *others = everyone = cluster(tmp_path, *settings, chief=1, worker=2, ps=2)
    wait_for_epoch(1, tmp_path, everyone)
    others[1].kill()
    bundle = Path(json.loads(finish(chief).splitlines()[-1])["bundle"])
    for at, other in enumerate(others):
        assert at == 1 or finish(other) == "", "it has not ended with the chief"
    parts = list((tmp_path / "retrieval").glob("weights.data-*"))
    assert len(parts) > 2, "the chief's part and only one server's"
    first, *_, last = epochs(tmp_path)
    assert last["loss"] < first["loss"]

    signatures = load_bundle(bundle).signatures
    assert set(signatures) == set(load_bundle(trained.savedmodels / "retrieval" / "1").signatures)
    found = signatures["serving_default"](user_id=tf.constant(["u1", "nobody"]))
    assert found["item_id"].shape[0] == 2 and np.isfinite(found["score"]).all()


@pytest.mark.parametrize(
    ("kind", "told", "sentence"),
    [
        ("ps", None, "TF_CONFIG: expected"),
        ("mirrored", "{", "TF_CONFIG: expected"),
        ("mirrored", '{"cluster": {"worker": ["a:1"]}}', "TF_CONFIG: expected"),
        (
            "ps",
            '{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 1}}',
            "TF_CONFIG: expected",
        ),
        (
            "ps",
            '{"cluster": {"chief": ["a"]}, "task": {"type": "chief", "index": 0}}',
            "TF_CONFIG: expected",
        ),
        (
            "ps",
            '{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 0}}',
            "names chief, ps too",
        ),
    ],
)
def test_what_is_wrong_with_a_cluster_is_told(
    kind: str, told: str | None, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TF_CONFIG", raising=False)
    if told is not None:
        monkeypatch.setenv("TF_CONFIG", told)
    with pytest.raises(UserError, match=sentence):
        distribution_of(kind)
