"""The two towers. A score is the dot product of a query and a candidate.

- The query tower reads the history (encoders.py), the user's id and features, and the request's time.
- The candidate tower is the item's vector and, as one more dimension, its bias. A query is 1 there.
- Both share the items' encoder: each training example teaches items as history and as candidates.
"""

import numpy as np
import tensorflow as tf

from rec.config import ResolvedRetrieval
from rec.corpus import Corpus
from rec.features import PAD, START, UNKNOWN, UNKNOWN_USER, Encoder, cyclic, recent_items
from rec.retrieval.encoders import ENCODERS, Linear


class CandidateTower(tf.keras.layers.Layer):
    """An item's vector and, as one more dimension, its bias: a learned one plus the popularity bias."""

    def __init__(self, config: ResolvedRetrieval, corpus: Corpus) -> None:
        super().__init__(name="candidate_tower")
        self.items = Encoder(
            corpus.items,
            corpus.item_columns,
            corpus.item_table,
            config.embedding_dim,
            UNKNOWN,
            id_dropout=0.02 if corpus.item_columns else 0.0,
            name="items",
        )
        self._trained_rows = corpus.items.first + corpus.items.trained
        self._bias = tf.keras.layers.Embedding(self._trained_rows, 1, "zeros", name="bias")
        self.popularity_bias = PopularityBias(self._trained_rows)

    def call(self, rows: tf.Tensor, training: bool = False) -> tf.Tensor:
        """int32 item rows [...] -> [..., d + 1]."""
        known = tf.where(rows < self._trained_rows, rows, UNKNOWN)
        bias = self._bias(known) + self.popularity_bias(known)
        return tf.concat([self.items(rows, training=training), bias], -1)


class PopularityBias(tf.keras.layers.Layer):
    """A bias per item that is fitted after training (popularity.py), and zero before."""

    def __init__(self, rows: int) -> None:
        super().__init__(name="popularity_bias")
        self._values = self._add_constant("values", [rows, 1])
        self._share = self._add_constant("share", [])
        self._weight = self._add_constant("weight", [])

    def _add_constant(self, name: str, shape: list[int]) -> tf.Variable:
        return self.add_weight(name=name, shape=shape, initializer="zeros", trainable=False)

    def call(self, rows: tf.Tensor) -> tf.Tensor:
        """int32 [...] -> float32 [..., 1]."""
        return tf.nn.embedding_lookup(self._values, rows)

    def assign(self, popularity: np.ndarray, *, share: float, weight: float) -> None:
        """Sets the bias to `weight` times `popularity` [rows], which was counted in the last `share` of the data."""
        self._values.assign(weight * popularity[:, None])
        self._share.assign(share)
        self._weight.assign(weight)

    @property
    def setting(self) -> dict[str, float]:
        """The share and the weight, by name."""
        return {"share": float(self._share), "weight": float(self._weight)}


class QueryTower(tf.keras.layers.Layer):
    """What a user would like next: the history so far, the user, and the request's time."""

    def __init__(self, config: ResolvedRetrieval, corpus: Corpus, items: Encoder) -> None:
        """`items`, the candidate tower's own encoder, embeds the history: both sides learn from each example."""
        super().__init__(name="query_tower")
        self._items = items
        self._encoder = ENCODERS[config.arch](config)
        self.reads_sets = self._encoder.reads_sets
        self._query_time = config.query_time
        self.users = None
        if config.user_id or corpus.user_columns:
            self.users = Encoder(
                corpus.users,
                corpus.user_columns,
                corpus.user_table,
                config.embedding_dim,
                UNKNOWN_USER,
                use_id=config.user_id,
                id_dropout=0.1,
                name="users",
            )
        # One mask for all positions of a window: more random numbers would take a quarter of a two_tower step.
        self._dropout = tf.keras.layers.Dropout(config.dropout, noise_shape=(None, 1, None))
        self._context = Linear(2 * config.embedding_dim, activation="relu", name="context")
        self._add_context = Linear(
            config.embedding_dim, kernel_initializer="zeros", name="add_context"
        )

    def call(
        self,
        user: tf.Tensor,
        tokens: tf.Tensor,
        time: tf.Tensor | None = None,
        last: tf.Tensor | None = None,
        training: bool = False,
    ) -> tf.Tensor:
        """The query at every position of the history, or at its last one only.

        Args:
          user: [B] int32 user rows.
          tokens: [B, L] int32 item rows, L <= window, left-aligned; START first where the history begins there.
          time: [B, L] int64 seconds, when the item after each position is asked for. Only read with `query_time`.
          last: [B] int32, the only position that is needed. Then L of the result and of `time` is 1.

        Returns:
          [B, L, d + 1]: position t has seen tokens 0..t. The last dimension is 1, for the candidates' bias. From an
            encoder that reads sets [B, 1, d + 1], of all tokens.
        """
        hidden = self._encoder(self._items(tokens, training=training), tokens, last, training)
        context = [] if self.reads_sets else [hidden]
        if self.users is not None:
            about_user = self.users(user, training=training)[:, None]
            context.append(tf.broadcast_to(about_user, tf.shape(hidden)))
        if self._query_time:
            context.append(tf.stack(cyclic(time), -1))
        if context:
            known = self._dropout(tf.concat(context, -1), training=training)
            hidden += self._add_context(self._context(known))
        return tf.concat([hidden, tf.ones_like(hidden[..., :1])], -1)


def history_tokens(history: tf.Tensor, window: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Histories as for `recent_items` -> the query tower's input.

    Returns:
      tokens: [B, window] int32, left-aligned, PAD behind: START and the items, or the last `window` items.
      last: [B] int32, the position of the last token: where the query is read.
    """
    items = recent_items(history, window)
    length = tf.reduce_sum(tf.cast(items != PAD, tf.int32), 1)
    started = tf.pad(items, [[0, 0], [1, 0]], constant_values=START)[:, :window]
    is_full = (length == window)[:, None]
    return tf.where(is_full, items, started), tf.minimum(length, window - 1)
