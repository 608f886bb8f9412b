"""What the training data say of a candidate by mere counting, at any time and after any history.

- How often it was chosen in the last share of all interactions. Windows are shares and not days: the same few suit a
  data set of one week and one of twenty years, and a quiet month does not empty them.
- How often it came soon after the user's latest items. Embeddings smooth such counts; the ranker gets them as they are.

Data without times have one window, all of them, and what came soon after is then what occurs together.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from rec.features import PAD, recent_items
from rec.pipeline import Sequences

SHARES = (0.01, 0.03, 0.1, 0.3, 1.0)  # of the interactions
REACH = 5  # "soon after" is within so many interactions of one user
RECENT = 10  # the latest items that are looked at, at most
MOST_PAIRS = 10_000_000  # that are kept, the most frequent ones; each takes some 35 bytes
NUMBERS = len(SHARES) + 4


class Counts(tf.Module):
    """Looks up what a candidate's numbers are: popularity by binary search in sorted keys, pairs in a hash table."""

    def __init__(self, interactions: Sequences, item_rows: int) -> None:
        super().__init__(name="counts")
        items = interactions.items.astype(np.int64)
        times = np.zeros(len(items), np.int64) if interactions.times is None else interactions.times
        order = np.argsort(times, kind="stable")
        self._n, self._items = len(order), item_rows
        # Item and place in time as one number, ascending: the interactions of an item lie together, in their order.
        places = np.sort(items[order] * (self._n + 1) + np.arange(self._n))
        self._keys = tf.Variable(places, trainable=False, name="keys")
        # Without times every interaction comes before any request.
        self._times = tf.Variable(times[order], trainable=False, name="times")
        users, gaps = interactions.users, range(1, REACH + 1)
        soon = [items[:-gap] * item_rows + items[gap:] for gap in gaps]
        soon = [pairs[users[gap:] == users[:-gap]] for gap, pairs in zip(gaps, soon, strict=True)]
        pairs, count = np.unique(np.concatenate(soon), return_counts=True)
        first, second = (
            np.bincount(rows, count, item_rows) for rows in np.divmod(pairs, item_rows)
        )
        kept = np.argsort(-count, kind="stable")[:MOST_PAIRS]
        # A request asks for a thousand pairs: hashed, in half the time that a binary search takes.
        keys, values = (
            np.append(pairs[kept], -1),
            np.append(count[kept], 0),
        )  # -1, as a table must not be empty
        counted = tf.lookup.KeyValueTensorInitializer(keys, values, tf.int64, tf.float32)
        self._pairs = tf.lookup.StaticHashTable(counted, 0.0)
        self._first = tf.Variable(
            (first / max(count.sum(), 1)).astype(np.float32), trainable=False, name="first"
        )
        self._second = tf.Variable(second.astype(np.float32), trainable=False, name="second")
        end = tf.constant([times.max(initial=0) + 1], tf.int64)
        self._latest = tf.Variable(
            self._popularity(tf.range(item_rows)[None], end)[0], trainable=False, name="latest"
        )

    def __call__(
        self, history: tf.Tensor, items: tf.Tensor, time: tf.Tensor | None = None
    ) -> tf.Tensor:
        """The numbers of candidates, each the log of a count over the count that chance would give.

        Args:
          history: [B, H] int32 item rows, oldest first, PAD anywhere.
          items: [B, N] int32 item rows.
          time: [B] int64 seconds; interactions at that time or later do not count for popularity. After all
            interactions if not given, when it need not be counted: a served request comes later than its model.

        Returns:
          [B, N, NUMBERS] float32: popularity in the last SHARES before the time; then how often the item came soon
          after the last one of the history, after the last three and the last RECENT on average, and at most.
          0 is what chance would give, or nothing known.
        """
        soon = self._soon_after(history, items)
        about = [
            soon[..., 0],
            tf.reduce_mean(soon[..., :3], 2),
            tf.reduce_mean(soon, 2),
            tf.reduce_max(soon, 2),
        ]
        popularity = (
            tf.gather(self._latest, items) if time is None else self._popularity(items, time)
        )
        return tf.concat([popularity, tf.stack(about, -1)], -1)

    def _popularity(self, items: tf.Tensor, time: tf.Tensor) -> tf.Tensor:
        now = tf.searchsorted(self._times, time)[:, None]  # [B, 1]: interactions before the time
        first = tf.cast(items, tf.int64) * (self._n + 1)
        until = _find(self._keys, first + tf.cast(now, tf.int64))
        columns = []
        for share in SHARES:
            begin = tf.maximum(now - round(share * self._n), 0)
            count = tf.cast(until - _find(self._keys, first + tf.cast(begin, tf.int64)), tf.float32)
            expected = tf.cast(now - begin, tf.float32) / self._items
            columns.append(tf.math.log((count + 1.0) / (expected + 1.0)))
        return tf.stack(columns, -1)

    def _soon_after(self, history: tf.Tensor, items: tf.Tensor) -> tf.Tensor:
        """[B, N, RECENT]: of each candidate, after the last item of the history, the one before, ..."""
        recent = recent_items(history, RECENT)
        recent = tf.reverse_sequence(recent, tf.reduce_sum(tf.cast(recent != PAD, tf.int32), 1), 1)[
            :, None
        ]
        keys = tf.cast(recent, tf.int64) * self._items + tf.cast(items, tf.int64)[..., None]
        count = self._pairs.lookup(keys)
        expected = tf.gather(self._first, recent) * tf.gather(self._second, items)[..., None]
        return tf.where(recent == PAD, 0.0, tf.math.log((count + 1.0) / (expected + 1.0)))


def no_counts(history: tf.Tensor, items: tf.Tensor, time: tf.Tensor) -> tf.Tensor:
    """In the place of `Counts` for a model that does not read them: zeros."""
    return tf.zeros([*items.shape, NUMBERS])


Counter = Callable[[Any, Any, Any], tf.Tensor]  # Counts, or no_counts


def _find(ascending: tf.Variable, keys: tf.Tensor) -> tf.Tensor:
    """How many of `ascending` are smaller than each of the keys [...]: int32 [...]."""
    return tf.reshape(tf.searchsorted(ascending, tf.reshape(keys, [-1])), tf.shape(keys))
