"""Data smaller than the numbers in the code: trained, measured and asked, or refused before training starts."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rec.config import load_config
from rec.data_prep.dataset import open_dataset
from rec.evaluation import evaluate, load_latest, show_systems
from rec.train import run_ranking, run_retrieval
from rec.training import OneProcess
from tests.conftest import ROOT, run_here

Pairs = list[tuple[str, str]]  # users and items, in order of time

# Each of 12 users meets all of 5 items, from another one on: nothing is left to recommend but what is held out.
EVERYTHING = [(f"u{user}", f"i{(step + user) % 5}") for step in range(5) for user in range(12)]
TRAINABLE: dict[str, tuple[Pairs, list[str]]] = {
    "one_item": ([(f"u{user}", "i") for user in range(10)], ["--split", "temporal"]),
    "everything_seen": (EVERYTHING, ["--split", "leave_one_out"]),
    # Four users at a time: those of validation and test have no history.
    "new_users_only": (
        [(f"u{event // 4}", f"i{event * 7 % 15}") for event in range(120)],
        ["--split", "temporal"],
    ),
    # All of one second, and of each user one interaction for training: there is nothing to rank by.
    "one_each": (
        [("u", "a"), ("u", "b"), ("u", "c"), ("v", "c"), ("v", "a"), ("v", "b")],
        ["--split", "leave_one_out"],
    ),
}
REFUSED: dict[str, tuple[Pairs, list[str], str]] = {
    "one_row": ([("u", "i")], ["--split", "temporal"], "the temporal split leaves val empty"),
    "one_user": (
        [("u", f"i{step}") for step in range(9)],
        ["--split", "leave_one_out"],
        "no item of test occurs in train",
    ),
    "one_interaction_per_user": (
        [(f"u{user}", "i") for user in range(9)],
        ["--split", "leave_one_out"],
        "no user has three interactions",
    ),
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """Where the data sets are, and what preparation said of each: nothing, or why it is refused."""
    root = tmp_path_factory.mktemp("small")
    commands = {"dummy": ["rec.data_prep.dummy", "--users", "10", "--items", "20"]}
    for name, (pairs, options, *_) in {**TRAINABLE, **REFUSED}.items():
        second = 0 if name == "one_each" else 3600
        lines = [
            f"{user},{item},{1_600_000_000 + at * second},{at % 5 + 1}"
            for at, (user, item) in enumerate(pairs)
        ]
        header = "user_id,item_id,timestamp,rating"
        (root / f"{name}.csv").write_text("\n".join([header, *lines]) + "\n")
        columns = ["--timestamp-col", "timestamp", "--rating-col", "rating"]
        if name == "everything_seen":  # without times: a model of sets
            columns = columns[2:]
        if name == "new_users_only":  # one item has no vector, another one no interactions
            vectors = [[item / 7, 1.0, item % 2] if item else None for item in range(16)]
            ids = [f"i{item}" for item in range(16)]
            pq.write_table(pa.table({"item_id": ids, "image": vectors}), root / "items.parquet")
            columns += ["--items", f"{root}/items.parquet"]
        source = ["--interactions", f"{root}/{name}.csv"]
        commands[name] = ["rec.data_prep.tabular", *source, *columns, *options]
    refusals = {}
    for name, command in commands.items():
        done = run_here(*command, "--output-dir", root / name)
        refusals[name] = done.stderr if done.returncode else ""
    return root, refusals


@pytest.mark.parametrize("name", REFUSED)
def test_too_little_for_a_split_is_refused_by_preparation(
    name: str, prepared: tuple[Path, dict[str, str]]
) -> None:
    assert REFUSED[name][2] in prepared[1][name]


@pytest.mark.parametrize(
    ("name", "retrieval", "ranking", "objective"),
    [
        ("one_item", "two_tower", "mlp", "implicit"),
        ("everything_seen", "autoencoder", "dlrm", "rating"),
        ("new_users_only", "two_tower", "dcn", "listwise"),
        ("one_each", "two_tower", "mlp", "implicit"),
        ("dummy", "sasrec", "dlrm", "implicit"),
    ],
)
def test_small_data_are_trained_measured_and_asked(
    name: str,
    retrieval: str,
    ranking: str,
    objective: str,
    prepared: tuple[Path, dict[str, str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root, refusals = prepared
    assert refusals[name] == ""
    changes = [
        f"dataset={root / name}",
        f"retrieval={{arch: {retrieval}, embedding_dim: 4, layers: 1, epochs: 1}}",
        f"ranking={{arch: {ranking}, objective: {objective}, epochs: 1, hidden: [4]}}",
        f"output={{checkpoints: {tmp_path}/checkpoints, savedmodels: {tmp_path}/savedmodels}}",
    ]
    config = load_config(ROOT / "config" / "your_data.yaml", changes)
    dataset = open_dataset(config.dataset)
    trained, of_retrieval = run_retrieval(config, OneProcess())
    of_ranking = run_ranking(config, None, OneProcess(), trained)
    report = evaluate(config, "test", with_baselines=name == "dummy")
    show_systems(report)
    for document in (of_retrieval, of_ranking, report):
        json.dumps(document, allow_nan=False)
    said = capsys.readouterr().err
    assert ("the ranker keeps retrieval's order" in said) == (name == "one_each")
    unread = f"retrieval.layers: 1 has no effect: retrieval.arch {retrieval} does not read it"
    assert (unread in said) == (retrieval != "sasrec")
    assert ("1,024 ratings per step, learning rate 0.003" in said) == (objective == "rating")
    assert report["systems"]["recommender"]["recall@100"] > 0

    assert ("image   vector" in said) == (name == "new_users_only")

    pair = load_latest(config)
    assert "image" not in pair.items
    known = dataset.interactions("train")["user_id"].iloc[0]
    first = str(pair.items.index[0])
    found = pair.answer([known, "", "nobody"], [None, [first], None], [[], [], [first]])
    assert np.isfinite(found.scores).all()
    for rows, seen in zip(found.rows, [*pair.histories([known]), [first], [first]], strict=True):
        items = [str(pair.items.index[row]) for row in rows if row >= 0]
        assert sorted(items) == sorted(set(pair.items.index) - set(seen))  # each once, all of them
        assert (rows[len(items) :] == -1).all()
