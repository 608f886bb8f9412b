"""Count features: what the training data say of a candidate by counting, at any time and after any history.

- Popularity: how often it was chosen in the last share of all interactions. Windows of time are shares and not days:
  the same few suit a data set of one week and one of twenty years, and a quiet month does not empty them.
- Co-occurrence: how often it came soon after the user's latest items. Embeddings smooth such counts; the ranker gets
  them as they are.
- Neighbours: what a linear model on such counts says of the whole history (neighbours.py).

Without times there is one window, all interactions, and "soon after" means that two items occur together.
"""

import numpy as np
import tensorflow as tf

from rec.features import PAD
from rec.ranking.neighbours import Neighbours
from rec.sequences import Sequences

SHARES = (0.01, 0.03, 0.1, 0.3, 1.0)  # of all interactions, from the latest
REACH = 5  # "soon after": within this many interactions of one user
RECENT = 10  # how many of the latest items are looked at
LAST_FEW = 3
MAX_PAIRS = 10_000_000  # pairs that are kept, the most frequent first; each takes about 35 bytes
COUNT_FEATURES = len(SHARES) + 5
NEIGHBOURS_COLUMN = COUNT_FEATURES - 1


class CountFeatures(tf.Module):
    """Looks counts up: popularity by binary search in sorted keys, pairs of items in a hash table."""

    def __init__(self, interactions: Sequences, item_rows: int) -> None:
        super().__init__(name="count_features")
        self._item_rows = item_rows
        self._size = len(interactions.items)
        times = interactions.times
        if times is None:
            times = np.zeros(self._size, np.int64)
        self._store_popularity(interactions.items.astype(np.int64), times)
        self._store_pairs(interactions)
        self.neighbours = Neighbours(interactions, item_rows)
        end = tf.constant([times.max(initial=0) + 1], tf.int64)
        all_items = tf.range(item_rows)[None]
        self._latest = _constant(self._popularity(all_items, end)[0], "latest")

    def _store_popularity(self, items: np.ndarray, times: np.ndarray) -> None:
        order = np.argsort(times, kind="stable")
        # An item and its place in time as one number: an item's interactions lie together, in order of time.
        keys = items[order] * (self._size + 1) + np.arange(self._size)
        self._keys = _constant(np.sort(keys), "keys")
        self._times = _constant(times[order], "times")

    def _store_pairs(self, interactions: Sequences) -> None:
        pairs, count = np.unique(
            _pairs_within_reach(interactions, self._item_rows), return_counts=True
        )
        first, second = np.divmod(pairs, self._item_rows)
        total = max(count.sum(), 1)
        as_first = np.bincount(first, count, self._item_rows) / total
        as_second = np.bincount(second, count, self._item_rows)
        self._share_as_first = _constant(as_first.astype(np.float32), "share_as_first")
        self._count_as_second = _constant(as_second.astype(np.float32), "count_as_second")
        kept = np.argsort(-count, kind="stable")[:MAX_PAIRS]
        # A request asks for a thousand pairs. A hash table takes half the time of a binary search.
        keys = np.append(pairs[kept], -1)  # -1, because a table must not be empty
        values = np.append(count[kept], 0)
        initializer = tf.lookup.KeyValueTensorInitializer(keys, values, tf.int64, tf.float32)
        self._pairs = tf.lookup.StaticHashTable(initializer, default_value=0.0)

    def __call__(
        self, history: tf.Tensor, items: tf.Tensor, time: tf.Tensor | None = None
    ) -> tf.Tensor:
        """The features of candidates, each the log of a count over the count that chance would give.

        Args:
          history: [B, H] int32 item rows, oldest first, PAD anywhere.
          items: [B, N] int32 item rows.
          time: [B] int64 seconds; only interactions before it count for popularity. Default: all of them, as for a
            served request, which is later than its model.

        Returns:
          [B, N, COUNT_FEATURES] float32: popularity in the last SHARES before the time; then how often the item came
          soon after the last item of the history, after the last LAST_FEW and the last RECENT on average, and at
          most; then what the neighbours say. 0 is what chance would give, or that nothing is known.
        """
        if time is None:
            popularity = tf.gather(self._latest, items)
        else:
            popularity = self._popularity(items, time)
        after = self._soon_after(history, items)
        summary = [
            after[..., 0],
            tf.reduce_mean(after[..., :LAST_FEW], 2),
            tf.reduce_mean(after, 2),
            tf.reduce_max(after, 2),
            self.neighbours(history, items),
        ]
        return tf.concat([popularity, tf.stack(summary, -1)], -1)

    def _popularity(self, items: tf.Tensor, time: tf.Tensor) -> tf.Tensor:
        """[B, N, SHARES]: the log of each item's count in the last shares of what was before the time."""
        before = tf.searchsorted(self._times, time)[:, None]  # [B, 1]: interactions before the time
        first_key = tf.cast(items, tf.int64) * (self._size + 1)
        until = _count_smaller(self._keys, first_key + tf.cast(before, tf.int64))
        columns = []
        for share in SHARES:
            begin = tf.maximum(before - round(share * self._size), 0)
            since = _count_smaller(self._keys, first_key + tf.cast(begin, tf.int64))
            count = tf.cast(until - since, tf.float32)
            by_chance = tf.cast(before - begin, tf.float32) / self._item_rows
            columns.append(tf.math.log((count + 1.0) / (by_chance + 1.0)))
        return tf.stack(columns, -1)

    def _soon_after(self, history: tf.Tensor, items: tf.Tensor) -> tf.Tensor:
        """[B, N, RECENT]: each candidate after the last item of the history, the one before, ..."""
        newest_first = _newest_first(history, RECENT)[:, None]  # [B, 1, RECENT]
        candidate = items[..., None]
        keys = tf.cast(newest_first, tf.int64) * self._item_rows + tf.cast(candidate, tf.int64)
        count = self._pairs.lookup(keys)
        by_chance = tf.gather(self._share_as_first, newest_first) * tf.gather(
            self._count_as_second, candidate
        )
        log_ratio = tf.math.log((count + 1.0) / (by_chance + 1.0))
        return tf.where(newest_first == PAD, 0.0, log_ratio)


def _newest_first(history: tf.Tensor, width: int) -> tf.Tensor:
    """[B, H] rows, oldest first, PAD anywhere -> the last `width` items, newest first, [B, width], PAD behind."""
    newest_first = tf.pad(history[:, ::-1], [[0, 0], [0, width]])
    order = tf.argsort(tf.cast(newest_first == PAD, tf.int32), axis=1, stable=True)
    return tf.gather(newest_first, order[:, :width], batch_dims=1)


def _pairs_within_reach(interactions: Sequences, item_rows: int) -> np.ndarray:
    """[pairs] int64: first item x item_rows + second item, for each two interactions of a user within REACH."""
    items = interactions.items.astype(np.int64)
    users = interactions.users
    parts = []
    for gap in range(1, REACH + 1):
        is_one_user = users[gap:] == users[:-gap]
        pairs = items[:-gap] * item_rows + items[gap:]
        parts.append(pairs[is_one_user])
    return np.concatenate(parts)


def _constant(values: object, name: str) -> tf.Variable:
    return tf.Variable(values, trainable=False, name=name)


def _count_smaller(ascending: tf.Variable, keys: tf.Tensor) -> tf.Tensor:
    """int32 [...]: how many of `ascending` are smaller than each of `keys` [...]."""
    counts = tf.searchsorted(ascending, tf.reshape(keys, [-1]))
    return tf.reshape(counts, tf.shape(keys))
