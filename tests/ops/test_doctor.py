"""The doctor finds what is broken, and says how to fix it. Libraries and environments are really broken here."""

import json
import signal
import socket
from pathlib import Path

import pytest

from rec import KERAS_3
from rec.ops.doctor import (
    LIBRARIES,
    Check,
    check_cluster,
    check_disk,
    check_memory,
    check_processor,
    check_python,
    judge_libraries,
)
from tests.conftest import ROOT, run


@pytest.mark.parametrize("version, is_ok", [((3, 10), False), ((3, 11), True), ((3, 14), False)])
def test_python(version: tuple[int, int], is_ok: bool) -> None:
    check = check_python(version)
    assert check.is_ok == is_ok
    assert is_ok or "rec needs 3.11 to 3.13" in check.text


@pytest.mark.parametrize("flags, missing", [("fpu avx avx2 fma", ""), ("fpu avx", "avx2, fma")])
def test_processor(tmp_path: Path, flags: str, missing: str) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    check = check_processor(cpuinfo)
    assert check.is_ok == (missing == "")
    assert f"no {missing}: " in check.text or check.is_ok


@pytest.mark.parametrize("kilobytes, is_ok", [(3_000_000, True), (1_000_000, False)])
def test_memory(tmp_path: Path, kilobytes: int, is_ok: bool) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(f"MemTotal: 9999999 kB\nMemAvailable: {kilobytes} kB\n")
    assert check_memory(meminfo).is_ok == is_ok


def test_disk(tmp_path: Path) -> None:
    assert check_disk(tmp_path, "disk", 0).is_ok
    full = check_disk(tmp_path, "disk", 1e9)
    assert not full.is_ok and "are needed: delete something there" in full.text
    assert list(tmp_path.iterdir()) == []


CLUSTER = {"cluster": {"worker": ["127.0.0.1:1", "127.0.0.1:2"]}, "task": {"type": "worker"}}


@pytest.mark.parametrize(
    "config, text",
    [
        ({**CLUSTER, "task": {"type": "worker", "index": 1}}, "worker 1 of 2 processes"),
        (CLUSTER, "TF_CONFIG: expected"),
    ],
)
def test_cluster(monkeypatch: pytest.MonkeyPatch, config: dict, text: str) -> None:
    monkeypatch.setenv("TF_CONFIG", json.dumps(config))
    assert text in check_cluster().text


def test_libraries_that_are_not_for_each_other() -> None:
    answer = {name: {"version": "2.20.0"} for name in LIBRARIES}
    assert all(check.is_ok for check in judge_libraries(answer))
    answer["tf_keras"] = {"version": "2.21.0"}
    assert [check for check in judge_libraries(answer) if not check.is_ok] == [
        Check(
            "keras 2",
            False,
            "tf-keras 2.21.0 is not for this TensorFlow: install the package again in an empty environment",
        )
    ]


def test_a_broken_environment_is_a_line_for_each_fault(tmp_path: Path) -> None:
    (tmp_path / "scann.py").write_text("raise ImportError('no wheel for this machine')")
    path = f"{tmp_path}:{ROOT}"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        done = run("rec.doctor", "--port", port, changes={"PYTHONPATH": path, "TF_CONFIG": "{"})
    report = json.loads(done.stdout)
    wrong = {name: each["text"] for name, each in report["checks"].items() if not each["ok"]}
    assert done.returncode == 1 and not report["ok"]
    assert wrong.keys() == {"scann", "port", "TF_CONFIG"}
    assert wrong["scann"].startswith("ImportError: no wheel for this machine: ")
    assert wrong["scann"].endswith("or use --set index.kind=exact")
    assert "choose another --port" in wrong["port"]
    assert done.stderr.splitlines()[-1].startswith("error: fix scann, port, TF_CONFIG: ")
    assert report["checks"]["tensorflow"]["ok"]


def test_a_processor_without_the_instructions_kills_only_the_probe(tmp_path: Path) -> None:
    text = f"import os; os.kill(os.getpid(), {int(signal.SIGILL)})"
    (tmp_path / "tensorflow.py").write_text(text)
    done = run("rec.doctor", "--port", 0, changes={"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    found = json.loads(done.stdout)["checks"]["tensorflow"]
    assert found == {"ok": False, "text": "it needs instructions that this processor does not have"}


def test_keras_3_that_was_used_first_ends_every_command_but_the_doctor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "import tensorflow; tensorflow.keras.version()"
    (tmp_path / "sitecustomize.py").write_text(text)
    changes = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "TF_USE_LEGACY_KERAS": "0"}
    done = run("rec", changes=changes)
    assert done.returncode == 1 and done.stderr.endswith(f"ImportError: {KERAS_3}\n")

    monkeypatch.setattr("rec.ops.doctor.HAS_KERAS_3", True)
    answer = {name: {"version": "2.20.0"} for name in LIBRARIES}
    assert Check("keras 2", False, KERAS_3) in judge_libraries(answer)
