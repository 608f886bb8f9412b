"""The same numbers in any company: a user's scores do not depend on who else is in the batch, down to the last bit.

A processor computes up to LANES numbers of an array at once, and the few that are left at its end by other code. That
code rounds exponentials, logarithms and roots differently. One row alone is also multiplied with a matrix by other code
than two rows. So the last bit of a score would depend on the batch, and two nearly equal items would change places.

Therefore the served graph uses arrays of which LANES divides each user's part, matrices of two rows or more, and sums
over a fixed width. tests/test_company.py holds the answers to it.
"""

import numpy as np
import tensorflow as tf

LANES = 16
LARGEST_COUNT = 10_000
NOWHERE = -1e9  # a logit that has no weight


def at_least(rows: int, matrix: tf.Tensor) -> tf.Tensor:
    """`matrix` [B, ..], with zeros below if it has fewer rows."""
    missing = tf.maximum(rows - tf.shape(matrix)[0], 0)
    return tf.pad(matrix, [[0, missing]] + [[0, 0]] * (len(matrix.shape) - 1))


def fill_lanes(lists: tf.Tensor, value: float, multiple: int = LANES) -> tf.Tensor:
    """[.., N] -> [.., N rounded up to a multiple], with `value` behind."""
    missing = -width_of(lists) % multiple
    empty = [[0, 0]] * (len(lists.shape) - 1) + [[0, missing]]
    return tf.pad(lists, empty, constant_values=tf.cast(value, lists.dtype))


def width_of(lists: tf.Tensor) -> int | tf.Tensor:
    """The last dimension: a number if the graph knows it, which saves the nodes that compute with it."""
    if lists.shape[-1] is None:
        return tf.shape(lists)[-1]
    return lists.shape[-1]


def softmax(logits: tf.Tensor) -> tf.Tensor:
    """tf.nn.softmax over the last axis, which multiplies by one reciprocal per row."""
    filled = fill_lanes(logits, NOWHERE)
    exponentials = tf.exp(filled - tf.reduce_max(filled, -1, keepdims=True))
    shares = exponentials / tf.reduce_sum(exponentials, -1, keepdims=True)
    return shares[..., : width_of(logits)]


def log_softmax(logits: tf.Tensor) -> tf.Tensor:
    """tf.nn.log_softmax over the last axis, which takes one logarithm per row."""
    filled = fill_lanes(logits, NOWHERE)
    shifted = filled - tf.reduce_max(filled, -1, keepdims=True)
    total = tf.reduce_sum(tf.exp(shifted), -1, keepdims=True)
    logarithms = shifted - tf.math.log(tf.broadcast_to(total, tf.shape(filled)))
    return logarithms[..., : width_of(logits)]


def log1p(counts: tf.Tensor) -> tf.Tensor:
    """int32 counts of any shape -> log(1 + count), from a table. More than LARGEST_COUNT counts as that."""
    table = tf.constant(np.log1p(np.arange(LARGEST_COUNT + 1)), tf.float32)
    return tf.gather(table, tf.minimum(counts, LARGEST_COUNT))


class LayerNormalization(tf.keras.layers.LayerNormalization):
    """Keras' layer, which takes one root per row; here each value has its own."""

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        mean, variance = tf.nn.moments(inputs, -1, keepdims=True)
        scale = tf.math.rsqrt(tf.broadcast_to(variance + self.epsilon, tf.shape(inputs)))
        return (inputs - mean) * scale * self.gamma + self.beta
