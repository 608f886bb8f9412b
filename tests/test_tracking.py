"""W&B, played by a module that remembers what it was told, and fails on demand."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rec.config import Config
from rec.tracking import track


class Wandb(SimpleNamespace):
    """The part of wandb that is used: one run, whose calls are in `told`."""

    def __init__(self, fail: str = "") -> None:
        super().__init__(told=[], fail=fail)

    def tell(self, name: str, value: Any = None) -> None:
        self.told.append(name if value is None else (name, value))
        if name == self.fail:
            raise ConnectionError("no route to host")

    def init(self, **kwargs: Any) -> "Wandb":
        self.tell("init", (kwargs["job_type"], kwargs["config"]["seed"]))
        return self

    def log(self, values: dict[str, float]) -> None:
        self.tell("log", values)

    def finish(self) -> None:
        self.tell("finish")

    def log_artifact(self, artifact: SimpleNamespace) -> None:
        self.tell("artifact", (artifact.name, artifact.metadata["version"], artifact.path))

    @staticmethod
    def Artifact(name: str, type: str, metadata: dict[str, Any]) -> SimpleNamespace:  # noqa: N802
        artifact = SimpleNamespace(name=name, metadata=metadata)
        artifact.add_dir = lambda path: setattr(artifact, "path", path)
        return artifact


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    metadata = {"stage": "ranking", "metrics": {}, "dataset": "d", "version": 3, "built_from": {}, "id": "x"}
    (tmp_path / "metadata.json").write_text(json.dumps(metadata))
    return tmp_path


def train(wandb: Wandb, bundle: Path, monkeypatch: pytest.MonkeyPatch, use_wandb: bool = True) -> list[Any]:
    """Tracks a stage of one epoch; returns what W&B was told."""
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with track(Config("data", use_wandb=use_wandb, seed=7), "ranking") as tracker:
        tracker.log(1, {"loss": 0.5})
        tracker.log_bundle(bundle)
    return wandb.told


def test_epochs_and_the_bundle_are_logged(bundle: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_API_KEY", "key")
    assert train(Wandb(), bundle, monkeypatch) == [
        ("init", ("ranking", 7)), ("log", {"epoch": 1, "loss": 0.5}),
        ("artifact", ("ranking_bundle", 3, str(bundle))), "finish",
    ]  # fmt: skip


@pytest.mark.parametrize("step", ["init", "log", "artifact", "finish"])
def test_a_failure_is_warned_of_once_and_ends_tracking(
    step: str, bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("WANDB_MODE", "offline")
    told = train(Wandb(step), bundle, monkeypatch)
    assert told[-1] == step or told[-1][0] == step
    assert capsys.readouterr().err == "warning: W&B failed, tracking ends: no route to host\n"


def test_without_a_key_or_the_wish_nothing_is_tracked(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    assert train(Wandb(), bundle, monkeypatch, use_wandb=False) == []
    assert capsys.readouterr().err == ""
    assert train(Wandb(), bundle, monkeypatch) == []
    assert "neither WANDB_API_KEY nor WANDB_MODE=offline" in capsys.readouterr().err
