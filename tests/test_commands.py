"""train, export and evaluate as a user runs them."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tensorflow as tf

from rec.bundles.aliases import STAGES
from rec.bundles.files import versions
from rec.bundles.metadata import read_metadata
from rec.bundles.recommender import load_bundle
from rec.config import load_config
from rec.data_prep.dataset import open_dataset
from tests.conftest import ROOT, Trained, environment, run_here
from tests.serving.test_app import client_of, service_of


@pytest.fixture
def copy(trained: Trained, tmp_path: Path) -> tuple[str, ...]:
    """Options that let a command work on a copy of what was trained."""
    for source in (trained.checkpoints, trained.savedmodels):
        shutil.copytree(source, tmp_path / source.name)
    places = [f"output.{kind}={tmp_path / kind}" for kind in ("checkpoints", "savedmodels")]
    return ("--config", str(trained.config), "--set", places[0], "--set", places[1])


def answer(module: str, *arguments: object) -> dict[str, Any]:
    done = run_here(module, *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def error(module: str, *arguments: object) -> str:
    done = run_here(module, *arguments)
    assert done.returncode == 1 and done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in done.stderr
    return lines[0]


def test_training_all_stages_answers_with_each(trained: Trained):
    assert list(trained.report) == ["retrieval", "ranking", "recommender"]
    for stage, part in trained.report.items():
        assert {"stage", "bundle", "version", "metrics", "examples_per_second", "seconds"} <= set(
            part
        )
        assert (part["stage"], part["version"]) == (stage, 1)
        assert Path(part["bundle"]) == trained.savedmodels / stage / "1"
    assert {"val/ndcg@10", "val/recall@100", "val/factorized_top_k@10"} <= set(
        trained.report["retrieval"]["metrics"]
    )


@pytest.mark.parametrize("split", ["val", "test"])
def test_evaluation_measures_the_bundles_beside_popularity(trained: Trained, split: str):
    report = answer("rec.evaluate", "--config", trained.config, "--split", split)
    assert (report["split"], report["users"]) == (split, 200)
    assert set(report["systems"]) == {"popularity", "retrieval", "retrieval_ann", "recommender"}
    for values in report["systems"].values():
        low, high = values["ndcg@10_ci"]
        assert 0 <= low <= values["ndcg@10"] <= high <= 1
    assert report["systems"]["popularity"]["ndcg@10"] == pytest.approx(
        popularity_ndcg(trained, split)
    )
    if split == "val":  # what training reported of the same model
        value = report["systems"]["retrieval"]["ndcg@10"]
        assert value == pytest.approx(
            trained.report["retrieval"]["metrics"]["val/ndcg@10"], abs=1e-6
        )


def popularity_ndcg(trained: Trained, split: str) -> float:
    """NDCG@10 of popularity for one held-out item a user, worked out user by user."""
    dataset = open_dataset(trained.dataset)
    train, val, held = (dataset.interactions(part) for part in ("train", "val", split))
    counts = train["item_id"].value_counts().rename_axis("item_id").reset_index()
    order = counts.sort_values(["count", "item_id"], ascending=[False, True])["item_id"].tolist()
    known = train if split == "val" else pd.concat([train, val])
    seen = known.groupby("user_id")["item_id"].agg(set)
    gains = []
    for user, item in zip(held["user_id"], held["item_id"], strict=True):
        best = [candidate for candidate in order if candidate not in seen[user]][:10]
        gains.append(1 / np.log2(best.index(item) + 2) if item in best else 0.0)
    return float(np.mean(gains))


def test_baselines_stand_in_the_same_table(trained: Trained):
    report = answer("rec.evaluate", "--config", trained.config, "--baselines")
    assert {"recent_popularity", "ials", "ease"} < set(report["systems"])


def test_another_architecture_that_starts_from_retrieval(copy: tuple[str, ...], tmp_path: Path):
    start = ("--init-from-retrieval", tmp_path / "checkpoints" / "retrieval")
    report = answer("rec.train", "--stage", "ranking", "--model-arch", "dlrm", *start, *copy)
    assert report["version"] == 2
    metadata = read_metadata(Path(report["bundle"]))
    assert metadata.architecture == "dlrm"
    assert metadata.run is not None and metadata.run["init_from"] == str(start[1])
    composed = answer("rec.export", "--stage", "recommender", *copy)
    assert read_metadata(Path(composed["bundle"])).built_from["ranking"].version == 2


def test_ratings_are_predicted_on_their_own_scale(copy: tuple[str, ...], trained: Trained):
    report = answer("rec.train", "--stage", "ranking", "--set", "ranking.objective=rating", *copy)
    ratings = open_dataset(trained.dataset).interactions("val")["rating"]
    assert 0 < report["metrics"]["val/rmse"] < ratings.std() * 1.2
    bundle = load_bundle(Path(report["bundle"]))
    scores = bundle.signatures["serving_default"](
        user_id=tf.constant(["u1"]), item_id=tf.constant([["i1", "i2", "i3"]])
    )["score"].numpy()
    assert ((scores > 0) & (scores < 6)).all()


@pytest.fixture
def newer(trained: Trained, tmp_path: Path) -> Path:
    """The data set that was trained on, prepared again with one item more, which nobody has met."""
    files = tmp_path / "files"
    files.mkdir()
    dataset = open_dataset(trained.dataset)
    items = dataset.items()
    added = items.head(1).assign(item_id="brand-new", title="Brand New Western")
    pd.concat([items, added]).to_parquet(files / "items.parquet", index=False)
    dataset.users().to_parquet(files / "users.parquet", index=False)
    command: list[object] = ["--output-dir", tmp_path / "newer", "--timestamp-col", "timestamp"]
    command += ["--rating-col", "rating"]
    for split in ("train", "val", "test"):
        dataset.interactions(split).to_parquet(files / f"{split}.parquet", index=False)
        command += [f"--{split}", files / f"{split}.parquet"]
    for table in ("users", "items"):
        command += [f"--{table}", files / f"{table}.parquet"]
    answer("rec.data_prep.tabular", *command)
    return tmp_path / "newer"


def test_items_that_came_since_reach_a_server_by_one_command_without_training(
    copy: tuple[str, ...], newer: Path, tmp_path: Path
):
    savedmodels = tmp_path / "savedmodels"
    client = client_of(service_of(savedmodels))
    assert client.get("/v1/items", params={"q": "brand new"}).json()["items"] == []

    report = answer("rec.export", "--stage", "all", *copy, "--set", f"dataset={newer}")
    assert {stage: part["version"] for stage, part in report.items()} == dict.fromkeys(STAGES, 2)
    client = client_of(service_of(savedmodels))
    assert client.get("/readyz").json()["model"] == {"retrieval": 2, "ranking": 2}
    found = client.get("/v1/items", params={"q": "brand new"}).json()["items"]
    assert [item["item_id"] for item in found] == ["brand-new"]
    wanted = {"user_id": "u7", "filter": {"title": ["Brand New Western"]}, "k": 1}
    (best,) = client.post("/v1/recommend", json=wanted).json()["items"]
    assert best["item_id"] == "brand-new" and best["score"] is not None
    after = client.post("/v1/recommend", json={"history": ["brand-new"], "k": 5}).json()
    assert len(after["items"]) == 5 and not after["cold_start"]
    similar = client.get("/v1/items/brand-new/similar", params={"k": 3}).json()["items"]
    assert len(similar) == 3


def test_a_retrieval_bundle_alone_is_said_to_reach_no_server(copy: tuple[str, ...]):
    exact = ("--set", "index.kind=exact", "--set", "index.recall_target=.8")
    done = run_here(
        "rec.export", "--stage", "retrieval", *copy, *exact, "--set", "retrieval.epochs=9"
    )
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert warnings[:2] == [
        "warning: retrieval.epochs: 9 has no effect: the checkpoint was trained with 2",
        "warning: index.recall_target: 0.8 has no effect: index.kind exact does not read it",
    ]
    assert "no server follows" in warnings[2] and "--stage all" in warnings[2]
    bundle = Path(json.loads(done.stdout.splitlines()[-1])["bundle"])
    assert read_metadata(bundle).config.retrieval.epochs == 2


def test_mistakes_are_one_sentence(trained: Trained, tmp_path: Path, copy: tuple[str, ...]):
    assert "there is no 'lstm'; choose one of" in error(
        "rec.train", "--stage", "retrieval", "--model-arch", "lstm", *copy
    )
    elsewhere = ("--config", trained.config, "--set", f"output.checkpoints={tmp_path / 'none'}")
    assert "run python -m rec.train --stage retrieval first" in error(
        "rec.train", "--stage", "ranking", *elsewhere
    )
    assert "--model-arch is for one stage" in error(
        "rec.train", "--stage", "all", "--model-arch", "mlp", *copy
    )
    assert "is not a dataset directory" in error(
        "rec.evaluate", *copy, "--set", f"dataset={tmp_path / 'none'}"
    )
    assert "--checkpoint is for one checkpoint" in error(
        "rec.export", "--stage", "all", "--checkpoint", tmp_path, *copy
    )
    assert "unknown key; did you mean retrieval.epochs?" in error(
        "rec.evaluate", *copy, "--set", "retrieval.epoch=3"
    )


@pytest.mark.parametrize("module", ["train", "evaluate", "export", "serve", "data_prep.dummy"])
def test_help_shows_an_example(module: str):
    done = run_here(f"rec.{module}", "--help")
    assert done.returncode == 0
    assert f"python -m rec.{module} --" in done.stdout


def test_a_killed_training_leaves_no_bundle_and_goes_on_when_started_again(
    trained: Trained, tmp_path: Path
):
    places = [f"output.{kind}={tmp_path / kind}" for kind in ("checkpoints", "savedmodels")]
    command = [
        "--stage",
        "retrieval",
        "--config",
        trained.config,
        "--set",
        places[0],
        "--set",
        places[1],
    ]
    command += ["--set", "retrieval.epochs=4"]
    state = tmp_path / "checkpoints" / "retrieval.partial" / "state.json"
    process = subprocess.Popen(
        [sys.executable, "-m", "rec.train", *map(str, command)],
        cwd=ROOT,
        env=environment(),
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (state.exists() and json.loads(state.read_text())["epoch"] >= 1):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert versions(tmp_path / "savedmodels" / "retrieval") == []
    done = run_here("rec.train", *command)
    assert done.returncode == 0, done.stderr
    assert "resuming after epoch" in done.stderr
    assert versions(tmp_path / "savedmodels" / "retrieval") == [1]
    assert not state.exists()


def test_every_config_is_valid():
    for path in sorted((ROOT / "config").rglob("*.yaml")):
        load_config(path)
        first = path.read_text().splitlines()[0]
        assert first.startswith("# python -m rec.train") and str(path.relative_to(ROOT)) in first
