"""The parts of the benchmarks that a wrong figure could hide in."""

import json
from pathlib import Path

import numpy as np
import pytest

from bench import growth, index, prep, step_scale, time_to_quality
from bench.charts import sizes
from rec.errors import UserError
from tests.test_project import pins


def test_what_the_benchmarks_need_is_pinned_and_moves_no_pin_of_the_project():
    assert {"faiss-cpu", "hnswlib", "chromadb"} <= pins("bench").keys()
    assert not pins("bench").keys() & pins().keys()


def test_one_more_dimension_turns_inner_products_into_distances():
    items, queries = index.vectors(500, norms=0.3, seed=1)
    graph = index.equally_long(items)
    distance = np.square(graph - index.longer(queries[:1])).sum(1)
    np.testing.assert_array_equal(
        np.argsort(distance)[:20], np.argsort(-(queries[:1] @ items.T))[0, :20]
    )


def test_truth_is_the_largest_inner_products():
    items, queries = index.vectors(300, norms=0.2, seed=2)
    truth = index.truth_of(items, queries[:50])
    expected = np.argsort(-(queries[:50] @ items.T), 1)[:, : index.K]
    np.testing.assert_array_equal(np.sort(truth, 1), np.sort(expected, 1))


def test_made_up_ratings_have_no_pair_twice(tmp_path):
    rows = prep.make_csv(tmp_path, 20_000, seed=3)
    lines = (tmp_path / "ratings.csv").read_text().splitlines()
    pairs = [line.split(",")[:2] for line in lines[1:]]
    assert rows == len(pairs) == len({tuple(pair) for pair in pairs})


def test_pandas_cuts_as_the_sql_does(tmp_path):
    prep.make_csv(tmp_path, 20_000, seed=3)
    counts = prep.with_pandas(tmp_path, tmp_path / "out")
    times = np.sort(
        [
            int(line.split(",")[3])
            for line in (tmp_path / "ratings.csv").read_text().splitlines()[1:]
        ]
    )
    assert counts["train"] == np.searchsorted(
        times, times[int(np.ceil(0.8 * len(times))) - 1], side="right"
    )
    assert sum(counts.values()) == len(times)


def test_seconds_to_quality_are_those_of_the_epochs(tmp_path: Path):
    lines = [
        {"step": 10, "train/loss": 1.0},
        {"step": 20, "epoch": 1, "train/examples_per_second": 50.0, "val/ndcg@10": 0.1},
        {"step": 40, "epoch": 2, "train/examples_per_second": 25.0, "val/ndcg@10": 0.2},
        {"step": 40, "epoch": 2, "val/ndcg@10": 0.3},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    curve = time_to_quality.read_curve(tmp_path, interactions=100)
    assert curve == [(2.0, 0.1), (6.0, 0.2)]
    assert time_to_quality.first(curve, 0.15) == 6.0
    assert time_to_quality.first(curve, 0.25) is None


def test_a_run_without_epochs_is_an_error(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no epoch"):
        time_to_quality.read_curve(tmp_path, interactions=100)


def test_the_exponent_of_a_square_is_two():
    assert growth.exponent({10: 1.0, 100: 100.0, 1000: 10_000.0}) == 2.0
    assert growth.exponent({10: 1.0}) is None


def test_sizes_are_numbers_in_order():
    assert sizes({"100000": 1, "20": 2, "ratio": 3}) == ["20", "100000"]


def test_synthetic_interactions_are_long_tailed_and_all_items_are_trained():
    corpus = step_scale.synthetic_corpus(items=5_000, users=64, length=50, seed=4)
    assert corpus.items.trained == 5_000 and len(corpus.train.items) == 64 * 50
    counts = corpus.popularity[corpus.items.first :]
    assert counts[:50].sum() > counts[2500:].sum()
