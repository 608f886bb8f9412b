"""The query and candidate towers, and the registry behind `--model-arch`.

- A sequence encoder reads item vectors in order and says, at every position, what comes next (causally): one pass over
  a window trains all its positions; a request asks for the last one only, and no more is computed for it.
- `Autoencoder` reads a set instead, of data without order. `ENCODERS` maps each `--model-arch` to an encoder: add a
  class, add a line.
- The query tower adds what is known of the user (id, features, the request's time) to that.
- The candidate tower is the item's vector and a bias, one more dimension, in which popularity finds its place.
"""

from typing import Any

import tensorflow as tf

from rec.config import Retrieval
from rec.errors import UserError
from rec.features import (
    PAD,
    START,
    UNKNOWN,
    UNKNOWN_USER,
    Encoder,
    cyclic,
    fill_lanes,
    recent_items,
    softmax,
)
from rec.pipeline import Corpus

LENGTH_POWER = 0.7  # of .5, .7 and 1 the best on MovieLens 100K without times


class HistoryEncoder(tf.keras.layers.Layer):
    """What an encoder has to say of itself: whether it reads a history as a set, not in order."""

    of_sets = False


class Average(HistoryEncoder):
    """The sum of the history over the root of its length (Covington et al. 2016 average it); order does not matter."""

    def __init__(self, config: Retrieval) -> None:
        super().__init__(name="average")

    def call(
        self, vectors: tf.Tensor, tokens: tf.Tensor, last: tf.Tensor | None, training: bool
    ) -> tf.Tensor:
        """vectors [B, L, d] of tokens [B, L] -> [B, L, d]: at t, what predicts number t + 1 (START if none).

        last: [B] positions; then the result is of these alone, [B, 1, d].
        """
        position = tf.range(tf.shape(tokens)[1])
        at = position[:, None] if last is None else last[:, None, None]
        # Products with these weights: on a CPU, cumsum takes three times as long as all of it.
        weights = tf.cast((position <= at) & (tokens > START)[:, None], tf.float32)
        count = tf.reduce_sum(weights, 2, keepdims=True)
        scaled = weights / tf.sqrt(tf.maximum(count, 1.0))
        return tf.where(count > 0, tf.matmul(scaled, vectors), vectors[:, :1])


class Autoencoder(HistoryEncoder):
    """A linear denoising autoencoder of low rank (Steck 2020, EDLAE), for data without order.

    The history's vectors are summed over their number to the power of LENGTH_POWER; a square matrix makes of them what
    candidates are compared with. There is one query for all positions: RetrievalModel trains it on items that it hides.
    """

    of_sets = True

    def __init__(self, config: Retrieval) -> None:
        super().__init__(name="autoencoder")
        self._dense = tf.keras.layers.Dense(
            config.embedding_dim, use_bias=False, kernel_initializer="identity"
        )

    def call(
        self, vectors: tf.Tensor, tokens: tf.Tensor, last: tf.Tensor | None, training: bool
    ) -> tf.Tensor:
        """vectors [B, L, d] of tokens [B, L], PAD anywhere -> [B, 1, d]; zeros for no history."""
        is_item = tokens > START
        count = tf.reduce_sum(tf.cast(is_item, tf.int32), 1, keepdims=True)
        # Looked up, so that a power does not depend on its place in the batch (see features.LANES).
        scale = tf.maximum(tf.range(tf.shape(tokens)[1] + 1), 1)
        scale = tf.gather(tf.cast(scale, tf.float32) ** -LENGTH_POWER, count)
        summed = tf.einsum("bl,bld->bd", tf.where(is_item, scale, 0.0), vectors)
        return self._dense(summed)[:, None]


class Gru(HistoryEncoder):
    """Recurrent layers (Hidasi et al. 2016, GRU4Rec)."""

    def __init__(self, config: Retrieval) -> None:
        super().__init__(name="gru")
        self._dropout = tf.keras.layers.Dropout(config.dropout)
        self._layers = [
            tf.keras.layers.GRU(2 * config.embedding_dim, return_sequences=True, name=f"gru_{j}")
            for j in range(config.layers)
        ]
        self._dense = tf.keras.layers.Dense(config.embedding_dim)

    def call(
        self, vectors: tf.Tensor, tokens: tf.Tensor, last: tf.Tensor | None, training: bool
    ) -> tf.Tensor:
        """As `Average.call`. PAD stands behind the items only, so it needs no mask."""
        if (
            last is not None
        ):  # a step takes its time, and nothing is read behind the longest history
            vectors = vectors[:, : tf.reduce_max(last) + 1]
        hidden = self._dropout(vectors, training=training)
        for layer in self._layers:
            hidden = self._dropout(layer(hidden), training=training)
        return self._dense(
            hidden if last is None else tf.gather(hidden, last, batch_dims=1)[:, None]
        )


class Normalization(tf.keras.layers.LayerNormalization):
    """Keras' layer, but with a root for each value, not one per row (see features.LANES)."""

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        mean, variance = tf.nn.moments(inputs, -1, keepdims=True)
        scale = tf.math.rsqrt(tf.broadcast_to(variance + self.epsilon, tf.shape(inputs)))
        return (inputs - mean) * scale * self.gamma + self.beta


class Transformer(HistoryEncoder):
    """Causal self-attention blocks (Kang and McAuley 2018, SASRec), normalised before each sublayer.

    What a position attends to depends on how far back it is, by a learned bias a head and distance (Raffel et al. 2020,
    T5; Zhai et al. 2024, HSTU), instead of on absolute positions, which say little: windows begin anywhere.
    """

    def __init__(self, config: Retrieval) -> None:
        """Raises UserError where the heads do not divide the width."""
        super().__init__(name="transformer")
        dim, keras = config.embedding_dim, tf.keras.layers
        if dim % config.heads:
            raise UserError(
                f"retrieval.heads: {config.heads} heads do not divide retrieval.embedding_dim {dim}"
            )
        self._dim, self._heads = dim, config.heads
        self._dropout = keras.Dropout(config.dropout)
        self._blocks = [
            {
                "norm_attention": Normalization(epsilon=1e-6),
                "query_key_value": keras.Dense(3 * dim),
                "attended": keras.Dense(dim),
                "norm_feed": Normalization(epsilon=1e-6),
                "feed_in": keras.Dense(4 * dim, activation="gelu"),
                "feed_out": keras.Dense(dim),
            }
            for _ in range(config.layers)
        ]
        self._distance_bias = [
            self.add_weight(
                name=f"distance_bias_{j}", shape=[config.heads, config.window], initializer="zeros"
            )
            for j in range(config.layers)
        ]
        self._norm = Normalization(epsilon=1e-6)

    def call(
        self, vectors: tf.Tensor, tokens: tf.Tensor, last: tf.Tensor | None, training: bool
    ) -> tf.Tensor:
        """As `Average.call`. PAD stands behind the items only: the causal mask hides it from them."""
        position = tf.range(tf.shape(tokens)[1])
        hidden = self._dropout(
            tf.reshape(vectors, [-1, self._dim]) * self._dim**0.5, training=training
        )  # [B x L, d]
        reads = [None] * (len(self._blocks) - 1) + [
            last
        ]  # nothing follows the last block that needs other positions
        for block, distance_bias, asked in zip(
            self._blocks, self._distance_bias, reads, strict=True
        ):
            query, key, value = tf.split(
                block["query_key_value"](block["norm_attention"](hidden)), 3, 1
            )
            at = position[None]
            if asked is not None:
                at, rows = asked[:, None], tf.range(tf.size(asked)) * tf.size(position) + asked
                query, hidden = tf.gather(query, rows), tf.gather(hidden, rows)
            back = at[:, :, None] - position  # [1 or B, L or 1, L]: how far, below 0 ahead
            bias = tf.where(back >= 0, tf.gather(distance_bias, tf.maximum(back, 0), axis=1), -1e9)
            query = self._by_head(query, tf.shape(at)[1])
            key, value = (self._by_head(x, tf.size(position)) for x in (key, value))
            logits = tf.matmul(query, key, transpose_b=True) / query.shape[-1] ** 0.5 + bias
            if training:
                weights = tf.nn.softmax(logits)
            else:
                weights = softmax(fill_lanes(logits, -1e9))[..., : tf.size(position)]
            heads = tf.transpose(
                tf.matmul(self._dropout(weights, training=training), value), [1, 2, 0, 3]
            )
            attended = block["attended"](tf.reshape(heads, [-1, self._dim]))
            hidden += self._dropout(attended, training=training)
            fed = block["feed_out"](block["feed_in"](block["norm_feed"](hidden)))
            hidden += self._dropout(fed, training=training)
        return tf.reshape(self._norm(hidden), [-1, tf.shape(at)[1], self._dim])

    def _by_head(self, x: tf.Tensor, length: tf.Tensor) -> tf.Tensor:
        """[B x L, d] -> [heads, B, L, d / heads]."""
        return tf.transpose(
            tf.reshape(x, [-1, length, self._heads, self._dim // self._heads]), [2, 0, 1, 3]
        )


ENCODERS: dict[str, Any] = {
    "two_tower": Average,
    "gru4rec": Gru,
    "sasrec": Transformer,
    "autoencoder": Autoencoder,
}


class CandidateTower(tf.keras.layers.Layer):
    """An item's vector and, as one more dimension, its bias."""

    def __init__(self, config: Retrieval, corpus: Corpus) -> None:
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
        # What is added to the bias for popularity after training (model.calibrate).
        self.lean = self.add_weight(
            name="lean", shape=[self._trained_rows, 1], initializer="zeros", trainable=False
        )

    def call(self, rows: tf.Tensor, training: bool = False) -> tf.Tensor:
        """int32 item rows [...] -> [..., d + 1]."""
        known = tf.where(rows < self._trained_rows, rows, UNKNOWN)
        bias = self._bias(known) + tf.nn.embedding_lookup(self.lean, known)
        return tf.concat([self.items(rows, training=training), bias], -1)


class QueryTower(tf.keras.layers.Layer):
    """What a user would like next: the history so far, the user, and the request's time."""

    def __init__(self, config: Retrieval, corpus: Corpus, items: Encoder) -> None:
        """`items`, the candidate tower's own encoder, embeds the history: both sides learn from each example."""
        super().__init__(name="query_tower")
        self._items = items
        self._encoder = ENCODERS[config.arch](config)
        self.of_sets = (
            self._encoder.of_sets
        )  # then there is one query for all positions, linear in the history
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
        # One mask for all positions of a window: drawing random numbers would take a quarter of a two_tower step.
        self._dropout = tf.keras.layers.Dropout(config.dropout, noise_shape=(None, 1, None))
        self._context = tf.keras.layers.Dense(
            2 * config.embedding_dim, activation="relu", name="context"
        )
        self._dense = tf.keras.layers.Dense(
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
          time: [B, L] int64 seconds, when the item after each position is asked for (`query_time` only).
          last: [B] int32: then L of the result and of `time` is 1, and what follows attention sees this position alone.

        Returns:
          [B, L, d + 1]: position t has seen tokens 0..t. The last dimension is 1, for the candidates' bias. Of an
            encoder of sets [B, 1, d + 1], from all tokens.
        """
        hidden = self._encoder(self._items(tokens, training=training), tokens, last, training)
        parts = [] if self.of_sets else [hidden]
        if self.users is not None:
            about_user = self.users(user, training=training)[:, None]
            parts.append(tf.broadcast_to(about_user, tf.shape(hidden)))
        if self._query_time:
            parts.append(tf.stack(cyclic(time), -1))
        if parts:
            known = self._dropout(tf.concat(parts, -1), training=training)
            # As a matrix: Keras' dense layers take ten operations instead of two for a tensor of three dimensions.
            added = self._dense(self._context(tf.reshape(known, [-1, known.shape[-1]])))
            hidden += tf.reshape(added, tf.shape(hidden))
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
