"""What is popular, at any time: how often each item was chosen in the last share of all interactions before it.

Windows are shares of the interactions and not days: the same few suit a data set of one week and one of twenty years,
and a quiet month does not empty them. Data without times have one window, all of them.
"""

import numpy as np
import tensorflow as tf

from rec.pipeline import Sequences

SHARES = (0.01, 0.03, 0.1, 0.3, 1.0)  # of the interactions


class Trend(tf.Module):
    """Counts any item's interactions before any time, by binary search; an interaction takes 16 bytes."""

    def __init__(self, interactions: Sequences, item_rows: int) -> None:
        super().__init__(name="trend")
        times = np.zeros(len(interactions.items), np.int64) if interactions.times is None else interactions.times
        order = np.argsort(times, kind="stable")
        self._n = len(order)
        # Item and place in time as one number, ascending: the interactions of an item lie together, in their order.
        keys = np.sort(interactions.items[order].astype(np.int64) * (self._n + 1) + np.arange(self._n))
        self._keys = tf.Variable(keys, trainable=False, name="keys")
        # Without times every interaction comes before any request.
        self._times = tf.Variable(times[order], trainable=False, name="times")
        self._items = item_rows

    def __call__(self, items: tf.Tensor, time: tf.Tensor) -> tf.Tensor:
        """The log of each item's share of a window, over an even share.

        Args:
          items: [B, N] int32 item rows.
          time: [B] int64 seconds; interactions at that time or later do not count.

        Returns:
          [B, N, len(SHARES)] float32; 0 is an item as popular as the average, or a window that is empty.
        """
        now = tf.searchsorted(self._times, time)[:, None]  # [B, 1]: interactions before the time
        first = tf.cast(items, tf.int64) * (self._n + 1)
        until = self._count(first + tf.cast(now, tf.int64))
        columns = []
        for share in SHARES:
            begin = tf.maximum(now - round(share * self._n), 0)
            count = tf.cast(until - self._count(first + tf.cast(begin, tf.int64)), tf.float32)
            expected = tf.cast(now - begin, tf.float32) / self._items
            columns.append(tf.math.log((count + 1.0) / (expected + 1.0)))
        return tf.stack(columns, -1)

    def _count(self, keys: tf.Tensor) -> tf.Tensor:
        """How many interactions have a smaller key than each of these."""
        return tf.reshape(tf.searchsorted(self._keys, tf.reshape(keys, [-1])), tf.shape(keys))
