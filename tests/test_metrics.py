"""Metrics against values worked out by hand and against ranx, an independent package."""

import json
import math

import numba
import numpy as np
import pytest
from scipy.sparse import csr_matrix

from rec import metrics
from rec.errors import UserError
from rec.metrics import (
    binary,
    check_no_overlap,
    coverage,
    intra_list_distance,
    paired_bootstrap,
    per_user,
    strongest,
    summarise,
)

# ranx compiles its metrics when first used, which takes longer than all tests here do without compilation.
numba.config.DISABLE_JIT = True  # type: ignore[attr-defined]
from ranx import Qrels, Run, evaluate  # noqa: E402


def matrix(rows: list[list[int]], items: int) -> csr_matrix:
    """A CSR matrix with a one at each user's listed items."""
    indptr = np.cumsum([0] + [len(row) for row in rows])
    indices = np.array([item for row in rows for item in row], dtype=np.int64)
    return csr_matrix(
        (np.ones(len(indices), np.float32), indices, indptr), shape=(len(rows), items)
    )


def test_the_distance_in_a_list_is_the_mean_of_its_pairs() -> None:
    vectors = np.array([[1, 0], [0, 1], [-1, 0], [1, 0]], np.float32)
    ranked = np.array([[0, 1, 2], [0, 3, 1], [1, -1, -1], [-1, -1, -1]])
    # pairs of the first user: 0-1 and 1-2 have cosine 0, 0-2 has -1; of the second: 0-3 has 1, the others 0
    expected = (np.mean([1, 1, 2]) + np.mean([0, 1, 1])) / 2
    assert intra_list_distance(ranked, vectors, 3) == pytest.approx(expected)
    assert intra_list_distance(ranked, vectors, 2) == pytest.approx((1 + 0) / 2)
    assert intra_list_distance(ranked[2:], vectors, 3) == 0


def test_metrics_of_one_user_worked_out_by_hand() -> None:
    values = per_user(np.array([[7, 2, 9, 4]]), matrix([[2, 4, 5]], 10), ks=(1, 2, 4))
    # hits at ranks 2 and 4 of three held-out items
    assert values["recall@1"] == [0]
    assert values["recall@2"] == pytest.approx([1 / 3])
    assert values["recall@4"] == pytest.approx([2 / 3])
    assert values["ndcg@1"] == [0]
    assert values["ndcg@2"] == pytest.approx([(1 / math.log2(3)) / (1 + 1 / math.log2(3))])
    ideal_of_three = 1 + 1 / math.log2(3) + 1 / 2
    assert values["ndcg@4"] == pytest.approx(
        [(1 / math.log2(3) + 1 / math.log2(5)) / ideal_of_three]
    )
    assert values["mrr"] == [1 / 2]


def test_the_default_cutoffs_are_10_20_50_and_100() -> None:
    ranked = np.arange(100)[None]
    values = per_user(ranked, matrix([[9, 19, 49, 99]], 100))
    assert [values[f"recall@{k}"][0] for k in (10, 20, 50, 100)] == [0.25, 0.5, 0.75, 1]
    assert set(values) == {f"{m}@{k}" for m in ("recall", "ndcg") for k in (10, 20, 50, 100)} | {
        "mrr"
    }


def test_the_ideal_list_is_cut_at_k_so_a_perfect_list_has_ndcg_one() -> None:
    values = per_user(np.array([[3, 1]]), matrix([[0, 1, 2, 3]], 5), ks=(1, 2))
    assert values["ndcg@1"] == values["ndcg@2"] == [1]
    assert values["recall@2"] == [0.5]


def test_mrr_is_zero_without_a_hit_within_the_list() -> None:
    assert per_user(np.array([[0, 1, 2]]), matrix([[4]], 5), ks=(3,))["mrr"] == [0]


def test_an_empty_slot_keeps_its_rank_and_never_hits() -> None:
    values = per_user(np.array([[-1, 0, -1], [-1, -1, -1]]), matrix([[0], [4]], 5), ks=(1, 3))
    assert values["recall@1"].tolist() == [0, 0]
    assert values["recall@3"].tolist() == [1, 0]
    assert values["mrr"].tolist() == [1 / 2, 0]
    assert values["ndcg@3"] == pytest.approx([1 / math.log2(3), 0])


def test_only_what_is_stored_as_not_zero_is_relevant_and_repeats_count_once() -> None:
    relevant = csr_matrix(
        (np.array([1.0, 1, 0]), np.array([2, 2, 0]), np.array([0, 3])), shape=(1, 3)
    )
    assert per_user(np.array([[0, 2]]), relevant, ks=(2,))["recall@2"] == [1]
    assert relevant.nnz == 3, "the caller's matrix stays as it was"
    assert binary(relevant).toarray().tolist() == [[0, 0, 1]]


@pytest.mark.parametrize("slice_size", [7, 65_536])
def test_equals_ranx_on_random_data(monkeypatch: pytest.MonkeyPatch, slice_size: int) -> None:
    monkeypatch.setattr(metrics, "USERS_A_SLICE", slice_size)
    rng = np.random.default_rng(3)
    users, items, k = 60, 40, 25
    ranked = np.stack([rng.permutation(items)[:k] for _ in range(users)])
    rows = [rng.choice(items, rng.integers(1, 30), replace=False).tolist() for _ in range(users)]
    values = per_user(ranked, matrix(rows, items), ks=(1, 5, 10, 25))

    qrels = Qrels({f"u{u}": {f"i{i}": 1 for i in row} for u, row in enumerate(rows)})
    run = Run(
        {
            f"u{u}": {f"i{i}": float(k - r) for r, i in enumerate(row)}
            for u, row in enumerate(ranked)
        }
    )
    expected = evaluate(qrels, run, [name for name in values], return_mean=False)
    order = [int(user[1:]) for user in run.keys()]  # noqa: SIM118 - a Run is not iterable
    for name, ours in values.items():
        assert ours[order] == pytest.approx(expected[name]), name


@pytest.mark.parametrize(
    ("ranked", "rows", "problem"),
    [
        ([[0, 1], [2, 2]], [[0], [1]], "user row 1 has the same item twice"),
        ([[0, 1], [2, 3]], [[0], []], "user row 1 has no held-out items"),
        ([[0, 5], [2, 3]], [[0], [1]], "outside the 5 rows"),
        ([[0, -2], [2, 3]], [[0], [1]], "outside the 5 rows"),
        ([[0, 1]], [[0], [1]], "one ranked list a user"),
    ],
)
def test_input_that_cannot_be_scored_is_refused(ranked: list, rows: list, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        per_user(np.array(ranked), matrix(rows, 5), ks=(2,))


def test_a_cutoff_beyond_the_list_is_refused() -> None:
    with pytest.raises(ValueError, match="k = 10 .* 2 columns"):
        per_user(np.array([[0, 1]]), matrix([[0]], 5), ks=(10,))


def test_coverage_counts_distinct_items_in_the_first_k_slots() -> None:
    ranked = np.array([[0, 1, 2], [1, -1, 3]])
    assert coverage(ranked, 1, 8) == 2 / 8
    assert coverage(ranked, 3, 8) == 4 / 8
    assert coverage(np.full((2, 3), -1), 3, 8) == 0


def test_summary_of_equal_users_is_their_value_with_no_width_and_fits_json() -> None:
    summary = summarise({"ndcg@10": np.full(50, 0.25), "mrr": np.zeros(50)})
    assert json.loads(json.dumps(summary)) == {
        "ndcg@10": 0.25,
        "ndcg@10_ci": [0.25, 0.25],
        "mrr": 0.0,
        "mrr_ci": [0.0, 0.0],
    }


def test_interval_of_a_mean_is_the_normal_one_on_many_users() -> None:
    values = np.random.default_rng(1).random(2500)
    low, high = summarise({"recall@10": values}, resamples=4000)["recall@10_ci"]
    half = 1.96 * values.std() / 50
    assert low == pytest.approx(values.mean() - half, abs=half / 10)
    assert high == pytest.approx(values.mean() + half, abs=half / 10)


def test_intervals_depend_on_the_seed_only() -> None:
    values = {"mrr": np.random.default_rng(1).random(200)}
    assert summarise(values, seed=5) == summarise(values, seed=5)
    assert summarise(values, seed=5) != summarise(values, seed=6)


def test_a_single_user_has_an_interval_too() -> None:
    assert summarise({"mrr": np.array([0.5])})["mrr_ci"] == [0.5, 0.5]


def test_paired_bootstrap_sees_a_difference_that_separate_intervals_hide() -> None:
    b = np.random.default_rng(2).random(300)
    a = b + 0.01
    assert summarise({"a": a})["a_ci"][0] < summarise({"b": b})["b_ci"][1]
    result = paired_bootstrap(a, b)
    assert result["difference"] == pytest.approx(0.01)
    assert result["ci"] == pytest.approx([0.01, 0.01])


def test_no_users_or_different_users_cannot_be_summarised() -> None:
    with pytest.raises(ValueError, match="no users"):
        summarise({"mrr": np.zeros(0)})
    with pytest.raises(ValueError, match="same users"):
        paired_bootstrap(np.zeros(3), np.zeros(4))


def test_history_that_holds_the_ground_truth_is_an_error_with_the_first_pair() -> None:
    check_no_overlap(matrix([[0, 1], [2]], 5), matrix([[3], [1]], 5))
    with pytest.raises(
        UserError, match="overlap in 2 user-item pairs, the first at user row 0 and item row 3"
    ):
        check_no_overlap(matrix([[0, 3], [2]], 5), matrix([[3], [2]], 5))


def test_ndcg_of_lists_agrees_with_per_user() -> None:
    labels = (np.random.default_rng(0).random((50, 30)) < 0.1).astype(np.float32)
    labels[0] = 0
    some = labels[labels.any(axis=1)]
    rows = np.tile(np.arange(30), (len(some), 1))
    expected = metrics.per_user(rows, csr_matrix(some), ks=(10,))["ndcg@10"]
    assert metrics.ndcg_of_lists(some, 10) == pytest.approx(expected)
    assert metrics.ndcg_of_lists(labels, 10)[0] == 0
    assert metrics.ndcg_of_lists(np.eye(3), 10) == pytest.approx(1 / np.log2([2, 3, 4]))


def test_of_repeats_the_largest_weight_counts_and_weight_0_does_not():
    values = np.array([1, 5, 2, 0, 3], np.float32)
    columns = np.array([2, 2, 0, 1, 0])
    indptr = np.array([0, 3, 5])
    found = strongest(csr_matrix((values, columns, indptr), shape=(2, 3)))
    assert found.toarray().tolist() == [[2, 0, 5], [3, 0, 0]]
    assert (found.nnz, found.has_sorted_indices) == (3, True)
    ones = csr_matrix((np.ones(5, np.float32), columns, indptr), shape=(2, 3))
    assert strongest(ones).toarray().tolist() == [[1, 0, 1], [1, 1, 0]]
    assert strongest(csr_matrix((2, 3))).nnz == 0
