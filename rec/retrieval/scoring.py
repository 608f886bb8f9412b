"""Scores of the whole catalogue -> the best items that a user has not seen."""

import numpy as np
import tensorflow as tf

from rec import LOWEST
from rec.features import FIRST_ITEM, PAD

MAX_SCORES = 2**25  # scores computed together: 128 MB of float32


def users_per_batch(items: int) -> int:
    """How many users' scores of the whole catalogue are computed together."""
    return min(256, max(1, MAX_SCORES // items))


def split_users(rows: np.ndarray, items: int) -> list[np.ndarray]:
    """The rows of users or interactions, in parts whose scores of all items are computed together."""
    step = users_per_batch(items)
    return np.array_split(rows, np.arange(step, len(rows), step))


def best_unseen(scores: tf.Tensor, seen: tf.Tensor, k: int) -> tuple[tf.Tensor, tf.Tensor]:
    """The k best items of the catalogue that each user has not seen, best first.

    Args:
      scores: [B, catalogue] float32.
      seen: [B, S] int32 item rows, PAD anywhere.

    Returns:
      scores [B, k] float32 and item rows [B, k] int32; LOWEST and PAD if nothing is left.
    """
    catalogue = tf.shape(scores)[1]
    where = tf.where(seen >= FIRST_ITEM)
    column = tf.cast(tf.gather_nd(seen, where), tf.int64) - FIRST_ITEM
    at = tf.stack([where[:, 0], column], 1)
    scores = tf.tensor_scatter_nd_update(scores, at, tf.fill([tf.shape(at)[0]], LOWEST))
    missing = tf.maximum(k - catalogue, 0)
    scores = tf.pad(scores, [[0, 0], [0, missing]], constant_values=LOWEST)
    best, columns = tf.math.top_k(scores, k)
    return best, tf.where(best > LOWEST, columns + FIRST_ITEM, PAD)
