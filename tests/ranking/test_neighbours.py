"""The linear model of an item's neighbours: beside EASE in closed form, and in the graph."""

import numpy as np
import pytest
import tensorflow as tf

from rec.baselines import EASE
from rec.features import FIRST_ITEM, PAD, UNKNOWN
from rec.ranking import neighbours
from rec.ranking.neighbours import Neighbours, fit_neighbours
from rec.sequences import Sequences
from tests.small import sequences

ITEMS = 30
ROWS = FIRST_ITEM + ITEMS


@pytest.fixture(scope="module")
def interactions() -> Sequences:
    rng = np.random.default_rng(0)
    lengths = rng.integers(10, 25, 60)
    return sequences(
        *[(FIRST_ITEM + rng.permutation(ITEMS))[:length].tolist() for length in lengths]
    )


def dense(found: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[rows, rows]: what the first item says of the second."""
    matrix = np.zeros((ROWS, ROWS), np.float32)
    np.add.at(matrix, (found, np.arange(ROWS)[:, None]), weights)
    return matrix


def test_with_all_items_as_neighbours_it_is_ease(interactions: Sequences) -> None:
    assert neighbours.NEIGHBOURS >= ITEMS
    mine = dense(*fit_neighbours(interactions, ROWS))
    ease = EASE(neighbours.REGULARIZATION)
    users = np.arange(len(interactions.lengths))
    ease.fit(interactions.matrix(users, ROWS))
    scale = mine.max() / ease.weights.max()
    np.testing.assert_allclose(mine, scale * ease.weights, atol=1e-5)


def test_a_score_is_the_sum_of_the_weights_of_what_the_user_has_met(
    interactions: Sequences, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "NEIGHBOURS", 5)
    model = Neighbours(interactions, ROWS)
    matrix = dense(*fit_neighbours(interactions, ROWS))
    met = np.array([FIRST_ITEM, FIRST_ITEM + 3, FIRST_ITEM + 7])
    history = np.array([[PAD, *met, UNKNOWN], [PAD] * 5], np.int32)
    candidates = np.array([[FIRST_ITEM + 1, FIRST_ITEM + 9, PAD]] * 2, np.int32)
    scores = model(tf.constant(history), tf.constant(candidates)).numpy()
    expected = matrix[met].sum(0)[candidates[0]]
    expected[2] = 0
    np.testing.assert_allclose(scores, [expected, [0, 0, 0]], atol=1e-6)
    assert (matrix != 0).sum(0).max() <= 5


def test_without_interactions_every_score_is_0() -> None:
    model = Neighbours(sequences([], []), ROWS)
    assert not model(tf.constant([[FIRST_ITEM]]), tf.constant([[FIRST_ITEM + 1]])).numpy().any()


def test_users_are_left_out_when_their_pairs_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "MAX_PAIRS", 40)
    interactions = sequences(*[[FIRST_ITEM + 1, FIRST_ITEM + 2]] * 100)
    found, _ = fit_neighbours(interactions, ROWS)
    assert found[FIRST_ITEM + 1].max() == FIRST_ITEM + 2
    assert len(neighbours._some_users(interactions)) == 10
