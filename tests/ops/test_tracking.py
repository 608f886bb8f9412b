"""W&B, by its real client: offline, and against a server on this machine (wandb_server.py)."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tensorflow as tf

from rec import serve
from rec.bundles.files import draft, publish
from rec.bundles.metadata import Reference, Stage, read_metadata
from rec.config import Config
from rec.errors import UserError
from rec.ops import promotion
from rec.ops.registry import WandbStore
from rec.ops.start import find_pair
from rec.ops.tracking import track
from tests.conftest import Trained, run, run_here
from tests.small import bundle_metadata
from tests.wandb_server import WandbServer


def bundle(
    savedmodels: Path, stage: Stage, built_from: dict[str, Reference] | None = None, **changes: Any
) -> Path:
    """A published bundle that holds no model."""
    with draft(savedmodels / stage) as directory:
        (directory / "saved_model.pb").write_text(f"{changes}")
        metadata = replace(bundle_metadata(stage), built_from=built_from or {}, **changes)
        return savedmodels / stage / str(publish(directory, savedmodels / stage, metadata))


def identity(path: Path) -> Reference:
    return read_metadata(path).reference


def follow(config: Config, directory: Path, published: Path) -> None:
    """Tracks a stage of one epoch."""
    with track(config, "ranking") as tracker:
        tracker.start("abc123", directory)
        tracker.log({"step": 10, "train/loss": 0.5})
        tracker.log({"step": 12, "epoch": 1, "val/ndcg@10": 0.2})
        tracker.log_bundle(published)


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard finds in a checkpoint."""
    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted((directory / "events").iterdir()):
        for event in tf.compat.v1.train.summary_iterator(str(path)):
            for value in event.summary.value:
                found.setdefault(value.tag, []).append(
                    (event.step, float(tf.make_ndarray(value.tensor)))
                )
    return found


TRACKED = Config("data", use_wandb=True, seed=7)


def test_a_run_is_logged_with_its_bundle(server: WandbServer, wandb: Any, tmp_path: Path):
    published = bundle(tmp_path, "ranking", architecture="mlp")
    follow(TRACKED, tmp_path / "checkpoint", published)
    told = server.runs["abc123"]
    assert (told.project, told.job_type, told.finished, told.config["seed"]) == (
        "rec",
        "ranking",
        True,
        7,
    )
    assert [row.get("train/loss") for row in told.history] == [0.5, None]
    assert told.history[1]["val/ndcg@10"] == 0.2 and told.logged == ["ranking_bundle:v0"]
    [version] = server.collection("ranking_bundle")
    assert version.aliases == {"latest", f"id-{identity(published).id}"}
    assert (version.metadata["stage"], version.metadata["architecture"]) == ("ranking", "mlp")
    assert scalars(tmp_path / "checkpoint")["val/ndcg@10"] == [(12, pytest.approx(0.2))]


def test_without_a_key_or_the_wish_nothing_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would raise
    follow(Config("data"), tmp_path, tmp_path)
    assert capsys.readouterr().err == ""
    follow(TRACKED, tmp_path, tmp_path)
    assert "neither WANDB_API_KEY nor WANDB_MODE=offline" in capsys.readouterr().err
    assert set(scalars(tmp_path)) == {"step", "train/loss", "epoch", "val/ndcg@10"}


def test_offline_a_run_is_kept_on_disk(
    server: WandbServer,
    wandb: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_API_KEY")
    published = bundle(tmp_path, "ranking")
    with track(TRACKED, "ranking") as tracker:
        tracker.start("abc123", None)
        tracker.use(published)
        tracker.log({"step": 10, "train/loss": 0.5})
        tracker.log_bundle(published)
    assert "warning" not in capsys.readouterr().err
    assert server.runs == {} and list((tmp_path / "client").rglob("run-abc123.wandb"))


@pytest.mark.parametrize("step", ["UpsertBucket", "CreateArtifact", "storage", "CommitArtifact"])
def test_a_failure_is_warned_of_once_and_training_goes_on(
    step: str, server: WandbServer, wandb: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    server.fail = step
    follow(TRACKED, tmp_path / "checkpoint", bundle(tmp_path, "ranking"))
    assert capsys.readouterr().err.count("warning: W&B failed, tracking ends: ") == 1
    assert "val/ndcg@10" in scalars(tmp_path / "checkpoint")
    assert server.collection("ranking_bundle") == []


def log(*bundles: Path) -> None:
    """Logs bundles as artifacts."""
    with track(TRACKED, "any") as tracker:
        tracker.start("abc123", None)
        for each in bundles:
            tracker.log_bundle(each)


@pytest.fixture
def pairs(wandb: Any, tmp_path: Path) -> list[Path]:
    """Two pairs at W&B, each with its recommender: six bundles."""
    found = []
    for number in (1, 2):
        first = bundle(
            tmp_path, "retrieval", run_id=f"a{number}", metrics={"val/ndcg@10": 0.1 * number}
        )
        second = bundle(tmp_path, "ranking", {"retrieval": identity(first)}, run_id=f"b{number}")
        parts = {"retrieval": identity(first), "ranking": identity(second)}
        found += [first, second, bundle(tmp_path, "recommender", parts, run_id=f"b{number}")]
    log(*found)
    return found


def test_aliases_move_together_are_told_and_taken_back(
    server: WandbServer, pairs: list[Path], tmp_path: Path
):
    config, store = Config("data"), WandbStore("team/rec")
    number, why = promotion.choose(store, "recommender", None, "b1", None)
    assert number == 0  # W&B counts from 0
    for version in (0, 1):  # not `production`: these bundles hold no model for the gate to measure
        promotion.promote(store, config, "recommender", version, "to try", "candidate")
    one, two = (
        {stage: version for stage in ("retrieval", "ranking", "recommender")} for version in (0, 1)
    )
    assert [move.to for move in store.history()] == [one, two]
    assert all("candidate" in server.find(f"{stage}_bundle:v1").aliases for stage in two)  # type: ignore[union-attr]
    assert promotion.roll_back(store, "no good", "candidate").to == one
    assert all("candidate" in server.find(f"{stage}_bundle:v0").aliases for stage in one)  # type: ignore[union-attr]
    assert not any("candidate" in server.find(f"{stage}_bundle:v1").aliases for stage in one)  # type: ignore[union-attr]
    assert [move.action for move in WandbStore("team/rec").history()] == [
        "promoted",
        "promoted",
        "rolled back",
    ]
    assert promotion.choose(store, "retrieval", None, None, "val/ndcg@10")[0] == 1
    with pytest.raises(UserError, match="no version or alias 'staging'; it has latest, "):
        WandbStore.find("team/rec/ranking_bundle:staging", "ranking")
    with pytest.raises(
        UserError, match=r"is not \[ENTITY/PROJECT/\]ranking_bundle:VERSION_OR_ALIAS"
    ):
        WandbStore.find("team/rec/other:latest", "ranking")


def test_a_download_is_kept_by_its_digest_and_a_damaged_one_is_refused(
    server: WandbServer, pairs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("rec.ops.registry.CACHE", tmp_path / "cache")
    with server.client(tmp_path / "another"):
        for reference, version in (
            ("ranking_bundle:v0", 0),
            ("ranking_bundle:0", 0),
            ("ranking_bundle:latest", 1),
        ):
            store, found = WandbStore.find(f"team/rec/{reference}", "ranking")
            assert found == version
            path = store.directory("ranking", found)
            assert read_metadata(path) == read_metadata(pairs[1 + 3 * version])
        assert len(list((tmp_path / "cache").iterdir())) == 2
        downloads = server.requests.count("GetArtifactMembershipFileUrls")
        store.directory("ranking", 1)
        assert server.requests.count("GetArtifactMembershipFileUrls") == downloads
        (path / "saved_model.pb").write_text("spoilt here")
        assert read_metadata(store.directory("ranking", 1)) == read_metadata(pairs[4])

        # A ranking artifact brings the retrieval artifact that it was trained for.
        monkeypatch.setattr(
            sys, "argv", ["rec.serve", "--ranking-wandb", "team/rec/ranking_bundle:v0"]
        )
        retrieval, ranking = find_pair(serve.parse())
        assert ranking is not None
        assert [read_metadata(each) for each in (retrieval, ranking)] == [
            read_metadata(each) for each in pairs[:2]
        ]

        server.damage("retrieval_bundle:v1", "saved_model.pb")
        store, found = WandbStore.find("team/rec/retrieval_bundle:v1", "retrieval")
        with pytest.raises(UserError, match="saved_model.pb has changed since the export"):
            store.directory("retrieval", found)


def test_a_server_that_does_not_answer_is_told_in_a_sentence(
    server: WandbServer, pairs: list[Path]
):
    store = WandbStore("team/rec")
    server.fail = True
    with pytest.raises(UserError, match="^W&B, team/rec: "):
        store.aliases("ranking")


@pytest.mark.parametrize("by", ["the variable", "the command"])
def test_offline_nothing_can_be_promoted_or_downloaded(
    by: str, server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    client = server.environment(tmp_path / "client")
    client["WANDB_MODE"] = "offline"
    if by == "the command":
        del client["WANDB_MODE"], client["WANDB_DIR"]
        (tmp_path / "wandb").mkdir()
        (tmp_path / "wandb" / "settings").write_text("[default]\nmode = offline\n")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    del client["WANDB_API_KEY"]
    config = tmp_path / "config.yaml"
    config.write_text("dataset: data\n")
    artifact = ("--artifact-name", "team/rec/ranking_bundle", "--version", "latest")
    done = run("rec.promote", *artifact, "--config", config, cwd=tmp_path, changes=client)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: W&B is offline here, by WANDB_MODE or")
    assert server.requests == []


def test_from_training_to_production(server: WandbServer, trained: Trained, tmp_path: Path):
    """The commands, as a team runs them."""
    options: list[object] = ["--config", trained.config]
    for setting in (
        f"output.checkpoints={tmp_path / 'checkpoints'}",
        f"output.savedmodels={tmp_path / 'savedmodels'}",
        "retrieval={arch: two_tower, taste_dim: 0, batch_size: 16}",
        "use_wandb=true",
    ):
        options += ["--set", setting]
    artifact = ["--artifact-name", "team/rec/recommender_bundle"]
    with server.client(tmp_path / "client"):
        done = run_here("rec.train", "--stage", "all", *options)
        assert done.returncode == 0 and "warning: W&B" not in done.stderr, done.stderr
        report = json.loads(done.stdout.splitlines()[-1])
        retrieval, ranking = (
            server.runs[report[stage]["run_id"]] for stage in ("retrieval", "ranking")
        )
        promoted = run_here("rec.promote", *artifact, "--run-id", ranking.id, *options)
        history = run_here("rec.promote", *artifact, "--history", *options)
    assert (retrieval.logged, ranking.used, ranking.logged) == (
        ["retrieval_bundle:v0"],
        ["retrieval_bundle:v0"],
        ["ranking_bundle:v0"],
    )
    names = set().union(*retrieval.history)
    assert {"train/loss", "train/steps_per_second", "val/ndcg@10", "val/recall@100"} <= names
    lines = (tmp_path / "checkpoints" / "retrieval" / "metrics.jsonl").read_text().splitlines()
    for line, row in zip(lines, retrieval.history, strict=True):
        assert json.loads(line).items() <= row.items()

    assert promoted.returncode == 0, promoted.stderr
    assert json.loads(promoted.stdout)["to"] == {"retrieval": 0, "ranking": 0, "recommender": 0}
    assert "production" in server.find("ranking_bundle:v0").aliases  # type: ignore[union-attr]
    assert (
        "production promoted: nothing -> retrieval 0 ranking 0 recommender 0 (run "
        in history.stderr
    )
