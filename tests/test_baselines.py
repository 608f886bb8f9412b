"""Baselines against their definitions on small matrices, and the ranking and tuning around them."""

import warnings
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from rec import baselines
from rec.baselines import (
    EASE,
    GRIDS,
    IALS,
    SECONDS_PER_DAY,
    Baseline,
    ItemKNN,
    Popularity,
    RecentPopularity,
    RP3beta,
    count_interactions,
    keep_largest,
    rank,
    top_k,
    tune,
)
from rec.errors import UserError
from rec.evaluation import Task, _tuned_baselines
from tests.small import corpus, sequences


def csr(rows: list[list[float]]) -> csr_matrix:
    return csr_matrix(np.array(rows, dtype=np.float32))


def two_tastes(seed: int = 0) -> csr_matrix:
    """60 users and 20 items: even users take half of the even items, odd users half of the odd ones."""
    rng = np.random.default_rng(seed)
    dense = np.zeros((60, 20), np.float32)
    for user in range(60):
        dense[user, rng.choice(np.arange(user % 2, 20, 2), 5, replace=False)] = 1
    return csr_matrix(dense)


# --------------------------------------------------------------------------------------------------
# The baselines


def test_item_knn_is_the_shrunk_cosine() -> None:
    baseline = ItemKNN(neighbours=9, shrink=2.0)
    baseline.fit(csr([[1, 1, 0], [1, 1, 0], [1, 0, 1]]))
    scores = baseline.scores(csr([[1, 0, 0]]))[0]  # items with 3, 2 and 1 users
    assert scores == pytest.approx([0, 2 / (6**0.5 + 2), 1 / (3**0.5 + 2)])


def test_rp3beta_is_a_walk_over_users_drawn_away_from_popular_items() -> None:
    baseline = RP3beta(neighbours=9, alpha=1.0, beta=0.5)
    baseline.fit(csr([[1, 1, 0], [1, 1, 0], [1, 0, 1]]))
    scores = baseline.scores(csr([[1, 0, 0]]))[0]
    # From item 0 to each of its three users with 1/3, and on to each of their two items with 1/2.
    assert scores == pytest.approx([0, 2 / 6 / 2**0.5, 1 / 6])


def test_only_the_nearest_neighbours_vote() -> None:
    matrix = csr([[0.1, 0.5, 0.3], [0, 0.2, 0], [0.4, 0.4, 0.1]])
    assert keep_largest(matrix, 1).toarray() == pytest.approx(
        np.array([[0, 0.5, 0], [0, 0.2, 0], [0.4, 0.4, 0]])
    )


def test_popularity_counts_interactions_for_everybody() -> None:
    baseline = Popularity()
    baseline.fit(csr([[1, 0, 1], [1, 0, 0]]))
    assert baseline.scores(csr([[0, 1, 0], [0, 0, 0]])).tolist() == [[2, 0, 1], [2, 0, 1]]


def test_recent_popularity_counts_the_last_days_and_breaks_ties_by_all_time() -> None:
    train = csr_matrix(
        (np.ones(5), np.array([0, 1, 0, 2, 2]), np.array([0, 2, 3, 5])), shape=(3, 4)
    )
    days = np.array(
        [0, 9, 1, 2, 10]
    )  # item 0 on days 0 and 1, item 1 on day 9, item 2 on days 2 and 10
    baseline = RecentPopularity(days=2)
    baseline.fit(train, days * SECONDS_PER_DAY)
    scores = baseline.scores(csr([[0, 0, 0, 0]]))[0]
    assert np.floor(scores).tolist() == [0, 1, 1, 0]
    assert np.argsort(-scores).tolist() == [2, 1, 0, 3]


def test_recent_popularity_needs_one_timestamp_an_interaction() -> None:
    for timestamps in (None, np.zeros(1)):
        with pytest.raises(ValueError, match="timestamps"):
            RecentPopularity(days=1).fit(csr([[1, 1]]), timestamps)


def test_ease_is_the_closed_form_of_the_paper() -> None:
    X = np.array([[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0], [1, 0, 0, 0]], dtype=np.float32)
    baseline = EASE(regularization=2.0)
    baseline.fit(csr_matrix(X))
    P = np.linalg.inv(X.T @ X + 2 * np.eye(4))
    B = np.eye(4) - P / np.diag(P)
    np.testing.assert_allclose(baseline.weights, B, atol=1e-6)
    np.testing.assert_allclose(baseline.scores(csr_matrix(X[:2])), X[:2] @ B, atol=1e-6)


def test_ease_refuses_a_catalogue_that_memory_cannot_hold() -> None:
    with pytest.raises(UserError, match="6 GB for 40,000 items: leave it out"):
        EASE().fit(csr_matrix((2, 40_000), dtype=np.float32))


def test_ials_folds_a_history_in_by_the_exact_solution_of_hu_et_al() -> None:
    baseline = IALS(factors=4, regularization=3.0, alpha=5.0, seed=1)
    baseline.fit(two_tastes())
    history = two_tastes(seed=9)[:1]
    Y = baseline.model.item_factors.astype(np.float64)
    confidence = np.diag(1 + 4 * history.toarray()[0])  # 5 where observed, 1 elsewhere
    user = np.linalg.solve(Y.T @ confidence @ Y + 3 * np.eye(4), Y.T @ (5 * history.toarray()[0]))
    np.testing.assert_allclose(baseline.scores(history)[0], Y @ user, atol=1e-4)


def test_ials_is_reproducible_by_its_seed_and_starts_afresh_at_every_fit() -> None:
    train, history = two_tastes(), two_tastes(seed=9)
    once, again = IALS(factors=4, seed=1), IALS(factors=4, seed=1)
    for baseline in (once, again, again):
        baseline.fit(train)
    np.testing.assert_allclose(once.scores(history), again.scores(history), atol=1e-6)


def test_ials_gives_no_warnings_about_threads() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        IALS(factors=4).fit(two_tastes())


@pytest.mark.parametrize(
    "baseline", [IALS(factors=4, regularization=1.0), EASE(regularization=1.0)]
)
def test_users_who_were_not_trained_on_get_items_of_their_taste(baseline: Baseline) -> None:
    baseline.fit(two_tastes())
    histories = two_tastes(seed=9)[:2]
    even, odd = rank(baseline, histories, histories, k=5)
    assert (even % 2 == 0).all()
    assert (odd % 2 == 1).all()


@pytest.mark.parametrize("baseline", [IALS(factors=2), EASE()])
def test_a_history_without_any_trained_item_is_answered_with_popularity(baseline: Baseline) -> None:
    baseline.fit(csr([[1, 0, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0]]))
    scores = baseline.scores(csr([[0, 0, 0, 0], [0, 0, 0, 1]]))
    assert scores.tolist() == [[3, 1, 1, 0], [3, 1, 1, 0]]


@pytest.mark.parametrize("baseline", [IALS(factors=2), EASE()])
def test_repeated_interactions_count_once(baseline: Baseline) -> None:
    once = csr([[1, 1, 0], [0, 1, 1]])
    ones = np.ones(7, np.float32)
    repeated = csr_matrix((ones, np.array([0, 1, 0, 0, 1, 2, 1]), np.array([0, 4, 7])))
    baseline.fit(once)
    expected = baseline.scores(once)
    baseline.fit(repeated)
    np.testing.assert_allclose(baseline.scores(repeated), expected, atol=1e-6)
    assert repeated[0, 0] == 3, "the caller's matrix stays as it was"


# --------------------------------------------------------------------------------------------------
# Ranking and tuning


def test_top_k_is_best_first_without_what_was_seen() -> None:
    scores = np.array([[0.1, 0.9, 0.5, 0.7]])
    assert top_k(scores, csr([[0, 1, 0, 0]]), 2).tolist() == [[3, 2]]
    assert scores.tolist() == [[0.1, 0.9, 0.5, 0.7]], "the caller's scores stay as they were"


def test_top_k_breaks_ties_by_item_row_at_the_cut_and_inside() -> None:
    scores = np.array([[1, 2, 1, 2, 1, 2], [0, 0, 0, 0, 0, 9]])
    nothing = csr_matrix((2, 6))
    assert top_k(scores, nothing, 4).tolist() == [[1, 3, 5, 0], [5, 0, 1, 2]]


def test_top_k_equals_a_stable_sort_on_random_scores_with_ties() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, (200, 30)).astype(np.float32)
    seen = csr_matrix(rng.random((200, 30)) < 0.2)
    masked = np.where(seen.toarray(), -np.inf, scores)
    np.testing.assert_array_equal(
        top_k(scores, seen, 8), np.argsort(-masked, axis=1, kind="stable")[:, :8]
    )


def test_top_k_leaves_slots_empty_where_nothing_is_left() -> None:
    scores = np.array([[1.0, 2.0, 3.0], [-np.inf, 1.0, -np.inf]])
    assert top_k(scores, csr([[1, 1, 0], [0, 0, 0]]), 2).tolist() == [[2, -1], [1, -1]]
    assert top_k(scores, csr([[0, 0, 0], [0, 1, 0]]), 5).tolist() == [[2, 1, 0, -1, -1], [-1] * 5]


def test_top_k_refuses_nan() -> None:
    with pytest.raises(ValueError, match="user row 1 contain NaN"):
        top_k(np.array([[1.0, 2, 3], [1, np.nan, 2]]), csr_matrix((2, 3)), 1)


def test_rank_is_the_same_in_slices_of_users(monkeypatch: pytest.MonkeyPatch) -> None:
    train = two_tastes()
    baseline = EASE()
    baseline.fit(train)
    whole = rank(baseline, train, train, k=5)
    monkeypatch.setattr(baselines, "SCORES_PER_SLICE", 7 * 20)
    np.testing.assert_array_equal(rank(baseline, train, train, k=5), whole)


def test_tune_takes_the_best_on_validation_and_returns_it_fitted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train = csr([[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]])
    times = np.array([0, 0, 0, 1, 90]) * SECONDS_PER_DAY
    history, relevant = (
        csr([[0, 0, 0, 0]]),
        csr([[0, 0, 0, 1]]),
    )  # the last item is the only recent one
    monkeypatch.setitem(
        GRIDS, cast(Any, RecentPopularity), [{"days": days} for days in (1000, 5, 7)]
    )
    value, best = tune(RecentPopularity, train, history, history, relevant, times)
    assert (value, best) == (1.0, RecentPopularity(days=5))
    assert best.scores(history)[0].argmax() == 3
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "RecentPopularity(days=1000): val/ndcg@10 0.4307" in printed.err


def test_the_first_of_each_grid_fits() -> None:
    assert [make.name for make in GRIDS] == [
        "popularity",
        "recent_popularity",
        "item_knn",
        "rp3beta",
        "ials",
        "ease",
    ]
    for make, grid in GRIDS.items():
        baseline = make(**grid[0])
        baseline.fit(two_tastes(), np.zeros(300))
        assert baseline.scores(two_tastes()).shape == (60, 20)


def test_recency_is_left_out_where_there_are_no_timestamps() -> None:
    users = [[3, 4, 5], [4, 5, 6], [5, 6, 3]]
    for ordered, extra in ((True, {"recent_popularity"}), (False, set())):
        data = corpus(users, val=[[6], [7], [8]], test=[[7], [8], [4]], ordered=ordered)
        assert set(_tuned_baselines(Task(data, "test"))) == (
            {"popularity", "item_knn", "rp3beta", "ials", "ease"} | extra
        )


@pytest.mark.parametrize("make", GRIDS)
def test_a_weight_counts_and_weights_of_1_change_no_bit(make: type[Baseline]) -> None:
    plain = sequences([3, 4, 5, 6], [3, 4], [5, 6, 7], [4, 7])
    users = np.arange(5)
    scores = []
    for weights in (None, np.ones(11), np.array([1, 1, 1, 1, 1, 1, 9, 1, 9, 1, 1])):
        train = replace(plain, weights=None if weights is None else weights.astype(np.float32))
        matrix = train.matrix(users, 8)[:, 3:]
        baseline = make(**GRIDS[make][0])
        baseline.fit(matrix, plain.times)
        scores.append(baseline.scores(matrix)[1:])
    np.testing.assert_array_equal(scores[0], scores[1])
    assert (scores[2] != scores[0]).any()


def test_popularity_and_neighbours_with_weights_by_hand() -> None:
    train = csr_matrix(np.array([[2.0, 1, 0], [1, 0, 3]], np.float32))
    assert count_interactions(train).tolist() == [3, 1, 3]
    neighbours = ItemKNN(neighbours=2, shrink=0.0)
    neighbours.fit(train)
    both = neighbours.weights.toarray()[0]  # of the first item, whose norm is the root of 5
    assert both == pytest.approx([0, 2 / 5**0.5, 3 / (3 * 5**0.5)])
