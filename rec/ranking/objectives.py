"""What a ranker can be trained for: losses of candidate lists, as Keras losses for tfrs.tasks.Ranking.

Each takes labels and scores [B, N] float32 and a sample weight [B, N], 1 for a candidate and 0 for an empty place, and
returns a scalar. A label is the weight of a right item, and 0 for a wrong one. `OBJECTIVES` maps a `ranking.objective`
to its loss: add a function and a line.
"""

from collections.abc import Callable

import tensorflow as tf

NOT_THERE = -1e9  # the logit of an empty place


def implicit(y_true: tf.Tensor, y_pred: tf.Tensor, sample_weight: tf.Tensor) -> tf.Tensor:
    """Pointwise: was this candidate chosen or not? Binary cross-entropy."""
    is_right = y_true > 0
    losses = tf.nn.sigmoid_cross_entropy_with_logits(tf.cast(is_right, tf.float32), y_pred)
    return weighted_mean(losses, sample_weight * tf.where(is_right, y_true, 1.0))


def listwise(y_true: tf.Tensor, y_pred: tf.Tensor, sample_weight: tf.Tensor) -> tf.Tensor:
    """Which of the list was chosen? Softmax cross-entropy, divided among the right ones by their weights."""
    shares = y_true / tf.reduce_sum(y_true, 1, keepdims=True)
    logits = tf.where(sample_weight > 0, y_pred, NOT_THERE)
    return tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits(shares, logits))


def weighted_mean(losses: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(losses * weights) / tf.reduce_sum(weights)


OBJECTIVES: dict[str, Callable[..., tf.Tensor]] = {"implicit": implicit, "listwise": listwise}
