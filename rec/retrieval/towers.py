"""The query and candidate towers, and the registry behind `--model-arch`.

- A sequence encoder reads item vectors in order and says, at every position, what comes next (causally): one pass over
  a window trains all its positions. `SEQUENCE_ENCODERS` maps each `--model-arch` to one: add a class, add a line.
- The query tower adds what is known of the user (id, features, the request's time) to that.
- The candidate tower is the item's vector and a bias, one more dimension, in which popularity finds its place.
"""

from typing import Any

import tensorflow as tf

from rec.config import Retrieval
from rec.errors import UserError
from rec.features import PAD, START, UNKNOWN, UNKNOWN_USER, Encoder, cyclic
from rec.pipeline import Corpus


class Average(tf.keras.layers.Layer):
    """The mean of the history so far (Covington et al. 2016); the order of items does not matter."""

    def __init__(self, config: Retrieval) -> None:
        super().__init__(name="average")

    def call(self, vectors: tf.Tensor, tokens: tf.Tensor, training: bool = False) -> tf.Tensor:
        """vectors [B, L, d] of tokens [B, L] -> [B, L, d]: at t, the mean over the items up to t (START if none)."""
        is_item = tf.cast(tokens > START, tf.float32)[:, None]
        # A product with a lower triangle: on a CPU, cumsum takes three times as long as all of it.
        weights = tf.linalg.band_part(tf.repeat(is_item, tf.shape(tokens)[1], 1), -1, 0)
        count = tf.reduce_sum(weights, 2, keepdims=True)
        mean = tf.matmul(weights / tf.maximum(count, 1.0), vectors)
        return tf.where(count > 0, mean, vectors[:, :1])


class Gru(tf.keras.layers.Layer):
    """Recurrent layers (Hidasi et al. 2016, GRU4Rec)."""

    def __init__(self, config: Retrieval) -> None:
        super().__init__(name="gru")
        self._dropout = tf.keras.layers.Dropout(config.dropout)
        self._layers = [
            tf.keras.layers.GRU(2 * config.embedding_dim, return_sequences=True, name=f"gru_{j}")
            for j in range(config.layers)
        ]
        self._dense = tf.keras.layers.Dense(config.embedding_dim)

    def call(self, vectors: tf.Tensor, tokens: tf.Tensor, training: bool = False) -> tf.Tensor:
        """vectors [B, L, d] -> [B, L, d]. PAD stands behind the items only, so it needs no mask."""
        hidden = self._dropout(vectors, training=training)
        for layer in self._layers:
            hidden = self._dropout(layer(hidden), training=training)
        return self._dense(hidden)


class Transformer(tf.keras.layers.Layer):
    """Causal self-attention blocks (Kang and McAuley 2018, SASRec), normalised before each sublayer."""

    def __init__(self, config: Retrieval) -> None:
        super().__init__(name="transformer")
        if config.embedding_dim % config.heads:
            raise UserError(
                f"retrieval.heads: {config.heads} heads do not divide retrieval.embedding_dim {config.embedding_dim}"
            )
        dim, keras = config.embedding_dim, tf.keras.layers
        self._scale = dim**0.5
        self._positions = keras.Embedding(config.window, dim, tf.keras.initializers.RandomNormal(stddev=0.02))
        self._dropout = keras.Dropout(config.dropout)
        self._blocks = [
            {
                "norm_attention": keras.LayerNormalization(epsilon=1e-6),
                "attention": keras.MultiHeadAttention(config.heads, dim // config.heads, dropout=config.dropout),
                "norm_feed": keras.LayerNormalization(epsilon=1e-6),
                "feed_in": keras.Dense(4 * dim, activation="gelu"),
                "feed_out": keras.Dense(dim),
            }
            for _ in range(config.layers)
        ]
        self._norm = keras.LayerNormalization(epsilon=1e-6)

    def call(self, vectors: tf.Tensor, tokens: tf.Tensor, training: bool = False) -> tf.Tensor:
        """vectors [B, L, d] -> [B, L, d]. PAD stands behind the items only: the causal mask hides it from them."""
        hidden = vectors * self._scale + self._positions(tf.range(tf.shape(tokens)[1]))
        hidden = self._dropout(hidden, training=training)
        for block in self._blocks:
            normed = block["norm_attention"](hidden)
            attended = block["attention"](normed, normed, use_causal_mask=True, training=training)
            hidden += self._dropout(attended, training=training)
            fed = block["feed_out"](block["feed_in"](block["norm_feed"](hidden)))
            hidden += self._dropout(fed, training=training)
        return self._norm(hidden)


SEQUENCE_ENCODERS: dict[str, Any] = {"two_tower": Average, "gru4rec": Gru, "sasrec": Transformer}


class CandidateTower(tf.keras.layers.Layer):
    """An item's vector and, as one more dimension, its bias."""

    def __init__(self, config: Retrieval, corpus: Corpus) -> None:
        super().__init__(name="candidate_tower")
        self.items = Encoder(
            corpus.items, corpus.item_columns, corpus.item_table, config.embedding_dim, UNKNOWN,
            id_dropout=0.02 if corpus.item_columns else 0.0, name="items",
        )  # fmt: skip
        self._trained_rows = corpus.items.first + corpus.items.trained
        self._bias = tf.keras.layers.Embedding(self._trained_rows, 1, "zeros", name="bias")

    def call(self, rows: tf.Tensor, training: bool = False) -> tf.Tensor:
        """int32 item rows [...] -> [..., d + 1]."""
        bias = self._bias(tf.where(rows < self._trained_rows, rows, UNKNOWN))
        return tf.concat([self.items(rows, training=training), bias], -1)


class QueryTower(tf.keras.layers.Layer):
    """What a user would like next: the history so far, the user, and the request's time."""

    def __init__(self, config: Retrieval, corpus: Corpus, items: Encoder) -> None:
        """`items` embeds the history: it is the candidate tower's own encoder, so both sides learn from each example.

        Raises:
          UserError: `config.arch` is not registered.
        """
        super().__init__(name="query_tower")
        if config.arch not in SEQUENCE_ENCODERS:
            raise UserError(
                f"retrieval.arch: there is no {config.arch!r}; choose one of {', '.join(SEQUENCE_ENCODERS)}"
            )
        self._items = items
        self._sequence = SEQUENCE_ENCODERS[config.arch](config)
        self._query_time = config.query_time
        self.users = None
        if config.user_id or corpus.user_columns:
            self.users = Encoder(
                corpus.users, corpus.user_columns, corpus.user_table, config.embedding_dim, UNKNOWN_USER,
                use_id=config.user_id, id_dropout=0.1, name="users",
            )  # fmt: skip
        self._dropout = tf.keras.layers.Dropout(config.dropout)
        self._context = tf.keras.layers.Dense(2 * config.embedding_dim, activation="relu", name="context")
        self._dense = tf.keras.layers.Dense(config.embedding_dim, kernel_initializer="zeros", name="add_context")

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
          time: [B, L] int64 seconds, when the item after each position is asked for (`query_time` only).
          last: [B] int32: then L of the result and of `time` is 1, and dense layers see this position alone.

        Returns:
          [B, L, d + 1]: position t has seen tokens 0..t. The last dimension is 1, for the candidates' bias.
        """
        hidden = self._sequence(self._items(tokens, training=training), tokens, training=training)
        if last is not None:
            hidden = tf.gather(hidden, last, batch_dims=1)[:, None]
        parts = [hidden]
        if self.users is not None:
            about_user = self.users(user, training=training)[:, None]
            parts.append(tf.broadcast_to(about_user, tf.shape(hidden)))
        if self._query_time:
            parts.append(tf.stack(cyclic(time), -1))
        hidden += self._dense(self._context(self._dropout(tf.concat(parts, -1), training=training)))
        return tf.concat([hidden, tf.ones_like(hidden[..., :1])], -1)


def recent_items(history: tf.Tensor, width: int) -> tf.Tensor:
    """Histories as callers give them, [B, H] rows, oldest first, PAD anywhere (ids that were not known) -> the last
    `width` items, [B, width], left-aligned, PAD behind."""
    order = tf.argsort(tf.cast(history == PAD, tf.int32), axis=1, stable=True)
    items = tf.pad(tf.gather(history, order, batch_dims=1), [[0, 0], [0, width]])
    length = tf.reduce_sum(tf.cast(history != PAD, tf.int32), 1)
    at = tf.maximum(length - width, 0)[:, None] + tf.range(width)
    return tf.gather(items, at, batch_dims=1)


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
