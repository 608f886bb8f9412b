"""Several processes that train one model: with the same result as one, and after a kill."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, environment

# Without random masks, which every worker draws for itself, the result is the same to the last digits.
SETTINGS = ("retrieval.epochs=4", "retrieval.dropout=0", "features.users={}", "features.items={}", "index.kind=exact")


def start(place: Path, *overrides: str, **env: str) -> subprocess.Popen[str]:
    """A retrieval training that writes to `place`."""
    command = [sys.executable, "-m", "rec.train", "--stage", "retrieval"]
    for setting in (*SETTINGS, f"output.checkpoints={place}", f"output.savedmodels={place / 'models'}", *overrides):
        command += ["--set", setting]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment(**env), stdout=pipe, stderr=pipe, text=True)


def cluster(place: Path, *overrides: str) -> list[subprocess.Popen[str]]:
    """Two workers on free ports; the first is the chief."""
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in (one, two)]
    tasks = [{"cluster": {"worker": addresses}, "task": {"type": "worker", "index": at}} for at in (0, 1)]
    return [start(place, *overrides, TF_CONFIG=json.dumps(task)) for task in tasks]


def finish(process: subprocess.Popen[str]) -> str:
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr[-3000:]
    return stdout


def epochs(place: Path) -> list[dict[str, Any]]:
    """What the finished run logged of each epoch, without its pace."""
    lines = map(json.loads, (place / "retrieval" / "metrics.jsonl").read_text().splitlines())
    return [{key: of[key] for key in ("epoch", "loss", "val/ndcg@10")} for of in lines if "epoch" in of]


@pytest.mark.skipif(os.name != "posix", reason="needs kill -9")
def test_two_workers_end_as_one_even_if_one_is_killed_and_all_start_again(tmp_path: Path) -> None:
    data = f"dataset={tmp_path / 'data'}"
    make = [sys.executable, "-m", "rec.data_prep.dummy", "--users", "150", "--items", "100", "--output-dir"]
    subprocess.run([*make, str(tmp_path / "data")], env=environment(), check=True, capture_output=True)
    alone, together = tmp_path / "alone", tmp_path / "together"
    finish(start(alone, data))

    chief, other = cluster(together, data)
    state = together / "retrieval.partial" / "state.json"
    while not (state.exists() and json.loads(state.read_text())["epoch"] >= 2):
        assert chief.poll() is None and other.poll() is None, (chief.stderr, other.stderr)
        time.sleep(0.05)
    other.kill()
    chief.communicate(timeout=300)
    assert chief.returncode != 0, "the chief went on without the other"

    chief, other = cluster(together, data)
    assert json.loads(finish(chief).splitlines()[-1])["stage"] == "retrieval"
    assert finish(other) == ""
    for one, two in zip(epochs(alone), epochs(together), strict=True):
        assert two == pytest.approx(one, rel=1e-4)
    assert not (tmp_path / "together" / "models" / "retrieval" / "2").exists()  # only the chief has exported
