"""Neighbours: how much each item of a history speaks for a candidate, by a linear model with a few weights per item.

The model predicts each item from the others: EASE (Steck 2019), a ridge regression, but on the item's own neighbours
only, as in SLIM (Ning and Karypis 2011). With G = X'X, the counts of common users, and S the NEIGHBOURS items that
have most users in common with item j:

    w = (G[S, S] + REGULARIZATION I)^-1 G[S, j]

So it needs no N x N matrix, and its rank is that of the whole catalogue: it knows of an item with three users what no
vector of some hundred numbers holds.
"""

import numpy as np
import tensorflow as tf
from scipy.sparse import csr_matrix
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from rec.features import PAD
from rec.metrics import binary
from rec.sequences import Sequences

NEIGHBOURS = 64  # of an item
REGULARIZATION = 100.0
MAX_PAIRS = 500_000_000  # of items of one user; beyond it, some users are left out


class Neighbours(tf.Module):
    """Scores of candidates: the sum of the weights of the items in the history."""

    def __init__(self, interactions: Sequences, item_rows: int) -> None:
        super().__init__(name="neighbours")
        neighbours, weights = fit_neighbours(interactions, item_rows)
        self._neighbours = tf.Variable(neighbours, trainable=False, name="neighbours")
        self._weights = tf.Variable(weights, trainable=False, name="weights")

    def __call__(self, history: tf.Tensor, items: tf.Tensor) -> tf.Tensor:
        """History [B, H] and candidates [B, N], int32 item rows, PAD anywhere -> [B, N] float32."""
        neighbours = tf.gather(self._neighbours, items)  # [B, N, NEIGHBOURS]
        shape = tf.shape(neighbours)
        each = tf.reshape(neighbours, [shape[0], -1])
        ascending = tf.sort(tf.pad(history, [[0, 0], [0, 1]]))  # never empty
        last_place = tf.shape(ascending)[1] - 1
        place = tf.minimum(tf.searchsorted(ascending, each), last_place)
        is_same = tf.gather(ascending, place, batch_dims=1) == each
        is_met = tf.reshape(is_same & (each != PAD), shape)
        weights = tf.gather(self._weights, items)
        weights_of_history = tf.where(is_met, weights, 0.0)
        return tf.reduce_sum(weights_of_history, 2)


def fit_neighbours(interactions: Sequences, item_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Each item's neighbours, PAD where it has fewer, and their weights: int32 and float32 [item rows, NEIGHBOURS].

    The weights are scaled so that the largest of an item is 1 on average.
    """
    users = _some_users(interactions)
    matrix = interactions.matrix(users, item_rows)
    history = binary(matrix)
    common = csr_matrix(history.T @ history)
    common.sort_indices()
    neighbours = np.full((item_rows, NEIGHBOURS), PAD, np.int32)
    weights = np.zeros((item_rows, NEIGHBOURS), np.float32)
    items = tqdm(range(item_rows), desc="neighbours", unit="item", leave=False)
    with threadpool_limits(1):  # the systems are small
        for item in items:
            around = _most_in_common(common, item)
            neighbours[item, : len(around)] = around
            weights[item, : len(around)] = _solve(common, item, around)
    largest = weights.max(1)
    largest = largest[largest > 0]
    if len(largest):
        weights /= largest.mean()
    return neighbours, weights


def _some_users(interactions: Sequences) -> np.ndarray:
    """Users with an interaction; so many that the pairs of their items are at most MAX_PAIRS."""
    users = np.flatnonzero(interactions.lengths)
    users = np.random.default_rng(0).permutation(users)
    pairs = np.cumsum(interactions.lengths[users] ** 2)
    count = np.searchsorted(pairs, MAX_PAIRS) + 1
    return np.sort(users[:count])


def _most_in_common(common: csr_matrix, item: int) -> np.ndarray:
    """The NEIGHBOURS items with the most users in common with `item`, ascending."""
    row = slice(common.indptr[item], common.indptr[item + 1])
    others = common.indices[row]
    counts = common.data[row]
    is_other = others != item
    others = others[is_other]
    most = np.argsort(-counts[is_other], kind="stable")[:NEIGHBOURS]
    return np.sort(others[most])


def _solve(common: csr_matrix, item: int, around: np.ndarray) -> np.ndarray:
    """The weights of the items `around` an item: the equation of the module."""
    system = common[around][:, around].toarray()
    system[np.diag_indices(len(around))] += REGULARIZATION
    target = common[around, item].toarray()
    return np.linalg.solve(system, target.ravel())
