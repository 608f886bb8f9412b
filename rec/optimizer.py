"""The optimiser: Adam that costs as much as the rows that a batch touches, not as much as the table."""

from typing import Any

import tensorflow as tf


class LazyAdam(tf.keras.optimizers.Adam):
    """Adam that leaves the rows of an embedding table alone that a batch did not touch.

    Keras' Adam decays the moments of every row at every step, which costs time in proportion to the table.
    """

    def apply_gradients(self, grads_and_vars: Any, *args: object, **kwargs: object) -> tf.Operation:
        """As Keras', without a warning for variables that this configuration of a model does not train."""
        pairs = [pair for pair in grads_and_vars if pair[0] is not None]
        return super().apply_gradients(pairs, *args, **kwargs)

    def update_step(self, gradient: tf.Tensor | tf.IndexedSlices, variable: tf.Variable) -> None:
        """One step of Adam (Kingma and Ba 2015) on the rows that `gradient` has."""
        if not isinstance(gradient, tf.IndexedSlices):
            super().update_step(gradient, variable)
            return
        index = self._index_dict[self._var_key(variable)]
        step = tf.cast(self.iterations + 1, variable.dtype)
        correction = tf.sqrt(1 - tf.pow(self.beta_2, step)) / (1 - tf.pow(self.beta_1, step))
        rate = self.learning_rate * correction
        rows = gradient.indices
        values = gradient.values  # Keras has summed the gradients of equal rows
        momentum = _decay(self._momentums[index], rows, self.beta_1, values)
        velocity = _decay(self._velocities[index], rows, self.beta_2, tf.square(values))
        change = rate * momentum / (tf.sqrt(velocity) + self.epsilon)
        variable.scatter_sub(tf.IndexedSlices(change, rows))


def _decay(table: tf.Variable, rows: tf.Tensor, beta: float, values: tf.Tensor) -> tf.Tensor:
    """Moves the rows of a table of moments towards `values`, by a share of 1 - beta; returns them."""
    moment = beta * tf.gather(table, rows) + (1 - beta) * values
    table.scatter_update(tf.IndexedSlices(moment, rows))
    return moment
