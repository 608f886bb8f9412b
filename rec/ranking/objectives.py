"""What a ranker can be trained for: losses of candidate lists, as Keras losses for tfrs.tasks.Ranking.

Each takes labels and scores [B, N] float32 and a sample weight [B, N], 1 for a candidate and 0 for an empty place, and
returns a scalar. `OBJECTIVES` maps a `ranking.objective` to its loss: add a function and a line.
"""

from collections.abc import Callable

import tensorflow as tf

NOT_THERE = -1e9  # the logit of an empty place


def implicit(y_true: tf.Tensor, y_pred: tf.Tensor, sample_weight: tf.Tensor) -> tf.Tensor:
    """Pointwise: was this candidate chosen or not? Binary cross-entropy."""
    losses = tf.nn.sigmoid_cross_entropy_with_logits(y_true, y_pred)
    return weighted_mean(losses, sample_weight)


def listwise(y_true: tf.Tensor, y_pred: tf.Tensor, sample_weight: tf.Tensor) -> tf.Tensor:
    """Which of the list was chosen? Softmax cross-entropy, divided among the right ones."""
    shares = y_true / tf.reduce_sum(y_true, 1, keepdims=True)
    logits = tf.where(sample_weight > 0, y_pred, NOT_THERE)
    return tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits(shares, logits))


def weighted_mean(losses: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(losses * weights) / tf.reduce_sum(weights)


OBJECTIVES: dict[str, Callable[..., tf.Tensor]] = {"implicit": implicit, "listwise": listwise}
