"""History encoders: what the query tower makes of a user's items. `ENCODERS` is the registry behind `--model-arch`.

- A sequence encoder reads item vectors in order. Its output at position t has seen items 0..t and predicts item t + 1
  (causal), so one pass over a window trains all of its positions. A request needs the last position only.
- A set encoder (`Autoencoder`) ignores the order and has one output for the whole history.

To add an architecture, add a class with the same `call` and a line in `ENCODERS`.
"""

import tensorflow as tf

from rec.config import ResolvedRetrieval
from rec.errors import UserError
from rec.features import START
from rec.numerics import LayerNormalization, softmax

LENGTH_POWER = 0.7  # of the autoencoder; the best of .5, .7 and 1 on MovieLens 100K without times
HIDDEN_SCORE = -1e9  # of a position that must not be attended to


class HistoryEncoder(tf.keras.layers.Layer):
    """The interface of all encoders."""

    reads_sets = False  # True if the order of the history does not matter: one output per history

    def call(
        self, vectors: tf.Tensor, tokens: tf.Tensor, last: tf.Tensor | None, training: bool
    ) -> tf.Tensor:
        """Encodes histories.

        Args:
          vectors: [B, L, d] float32, the vectors of `tokens`.
          tokens: [B, L] int32 item rows: items, or START if there is none yet; PAD behind them.
          last: [B] int32, the only position that is needed; None for all positions.
          training: whether dropout is on.

        Returns:
          [B, L, d] float32, or [B, 1, d] with `last` and from an encoder that reads sets.
        """
        raise NotImplementedError


class PooledHistory(HistoryEncoder):
    """The sum of the history's vectors over the root of its length (Covington et al. 2016 average them)."""

    def __init__(self, config: ResolvedRetrieval) -> None:
        super().__init__(name="average")

    def call(
        self, vectors: tf.Tensor, tokens: tf.Tensor, last: tf.Tensor | None, training: bool
    ) -> tf.Tensor:
        position = tf.range(tf.shape(tokens)[1])
        until = position[:, None] if last is None else last[:, None, None]
        is_read = (position <= until) & (tokens > START)[:, None]
        count = tf.reduce_sum(tf.cast(is_read, tf.int32), 2, keepdims=True)
        # One matrix of weights: tf.cumsum takes three times as long on a CPU.
        weights = tf.where(is_read, _power_of_count(count, -0.5, tokens), 0.0)
        return tf.where(count > 0, tf.matmul(weights, vectors), vectors[:, :1])


class Autoencoder(HistoryEncoder):
    """A linear denoising autoencoder of low rank (Steck 2020, EDLAE), for data without order.

    The history's vectors are summed and divided by their number to the power of LENGTH_POWER. A square matrix turns
    the sum into the query.
    """

    reads_sets = True

    def __init__(self, config: ResolvedRetrieval) -> None:
        super().__init__(name="autoencoder")
        self._dense = tf.keras.layers.Dense(
            config.embedding_dim, use_bias=False, kernel_initializer="identity"
        )

    def call(
        self, vectors: tf.Tensor, tokens: tf.Tensor, last: tf.Tensor | None, training: bool
    ) -> tf.Tensor:
        is_item = tokens > START
        count = tf.reduce_sum(tf.cast(is_item, tf.int32), 1, keepdims=True)
        scale = _power_of_count(count, -LENGTH_POWER, tokens)
        summed = tf.einsum("bl,bld->bd", tf.where(is_item, scale, 0.0), vectors)
        return self._dense(summed)[:, None]


def _power_of_count(count: tf.Tensor, power: float, tokens: tf.Tensor) -> tf.Tensor:
    """A power of counts of `tokens` [B, L]; that of 0 is 1.

    It comes from a table: a power that is computed for each depends on its place in the batch (see numerics.py).
    """
    possible = tf.maximum(tf.range(tf.shape(tokens)[1] + 1), 1)
    return tf.gather(tf.cast(possible, tf.float32) ** power, count)


class Gru(HistoryEncoder):
    """Recurrent layers (Hidasi et al. 2016, GRU4Rec). PAD is behind the items, so it needs no mask."""

    def __init__(self, config: ResolvedRetrieval) -> None:
        super().__init__(name="gru")
        self._dropout = tf.keras.layers.Dropout(config.dropout)
        self._layers = [
            tf.keras.layers.GRU(
                2 * config.embedding_dim, return_sequences=True, name=f"gru_{layer}"
            )
            for layer in range(config.layers)
        ]
        self._dense = tf.keras.layers.Dense(config.embedding_dim)

    def call(
        self, vectors: tf.Tensor, tokens: tf.Tensor, last: tf.Tensor | None, training: bool
    ) -> tf.Tensor:
        if (
            last is not None
        ):  # steps take their time, and nothing is read behind the longest history
            vectors = vectors[:, : tf.reduce_max(last) + 1]
        hidden = self._dropout(vectors, training=training)
        for layer in self._layers:
            hidden = self._dropout(layer(hidden), training=training)
        return self._dense(_only(hidden, last))


class Transformer(HistoryEncoder):
    """Causal self-attention blocks (Kang and McAuley 2018, SASRec), normalised before each sublayer."""

    def __init__(self, config: ResolvedRetrieval) -> None:
        super().__init__(name="transformer")
        self._scale = config.embedding_dim**0.5
        self._dropout = tf.keras.layers.Dropout(config.dropout)
        self._blocks = [Block(config, name=f"block_{layer}") for layer in range(config.layers)]
        self._norm = LayerNormalization(epsilon=1e-6)

    def call(
        self, vectors: tf.Tensor, tokens: tf.Tensor, last: tf.Tensor | None, training: bool
    ) -> tf.Tensor:
        *first_blocks, last_block = self._blocks
        hidden = self._dropout(vectors * self._scale, training=training)
        for block in first_blocks:
            hidden = block(hidden, training=training)
        # Nothing follows the last block that needs the other positions.
        hidden = last_block(hidden, last, training=training)
        return self._norm(hidden)


class Block(tf.keras.layers.Layer):
    """One transformer block: x = x + attention(norm(x)), then x = x + feed_forward(norm(x))."""

    def __init__(self, config: ResolvedRetrieval, name: str) -> None:
        super().__init__(name=name)
        self._norm_attention = LayerNormalization(epsilon=1e-6)
        self._attention = CausalSelfAttention(config)
        self._norm_feed = LayerNormalization(epsilon=1e-6)
        self._feed_in = Linear(4 * config.embedding_dim, activation="gelu")
        self._feed_out = Linear(config.embedding_dim)
        self._dropout = tf.keras.layers.Dropout(config.dropout)

    def call(
        self, x: tf.Tensor, last: tf.Tensor | None = None, training: bool = False
    ) -> tf.Tensor:
        """[B, L, d] -> [B, L, d], or with `last` [B] the output at this position only: [B, 1, d]."""
        attended = self._attention(self._norm_attention(x), last, training=training)
        x = _only(x, last) + self._dropout(attended, training=training)
        fed = self._feed_out(self._feed_in(self._norm_feed(x)))
        return x + self._dropout(fed, training=training)


class CausalSelfAttention(tf.keras.layers.Layer):
    """Attention of each position to itself and the ones before it.

    How strongly depends also on the distance: a learned bias per head and distance (Raffel et al. 2020, T5; Zhai et
    al. 2024, HSTU). Absolute positions would say little, because a window begins anywhere in a sequence.
    """

    def __init__(self, config: ResolvedRetrieval) -> None:
        """Raises UserError if the heads do not divide the width."""
        super().__init__(name="attention")
        dim, heads = config.embedding_dim, config.heads
        if dim % heads:
            raise UserError(
                f"retrieval.heads: {heads} heads do not divide retrieval.embedding_dim {dim}"
            )
        self._heads = heads
        self._width = dim // heads
        # One matrix for all three: it starts with smaller numbers than three matrices would. With three, the loss after
        # two epochs on the dummy data was .15 higher.
        self._query_key_value = Linear(3 * dim)
        self._out = Linear(dim)
        self._dropout = tf.keras.layers.Dropout(config.dropout)
        self._distance_bias = self.add_weight(
            name="distance_bias", shape=[heads, config.window], initializer="zeros"
        )

    def call(self, x: tf.Tensor, last: tf.Tensor | None, training: bool) -> tf.Tensor:
        """[B, L, d] -> [B, L, d], or with `last` [B, 1, d]. PAD is behind the items, which never look ahead."""
        length = tf.shape(x)[1]
        query, key, value = tf.split(self._query_key_value(x), 3, -1)  # [B, L, d] each
        query = self._by_head(_only(query, last))  # [B, heads, Q, width]
        key = self._by_head(key)  # [B, heads, L, width]
        value = self._by_head(value)
        scores = tf.matmul(query, key, transpose_b=True) / self._width**0.5  # [B, heads, Q, L]
        scores += self._bias(length, last)
        weights = tf.nn.softmax(scores) if training else softmax(scores)
        weights = self._dropout(weights, training=training)
        heads = tf.transpose(tf.matmul(weights, value), [0, 2, 1, 3])  # [B, Q, heads, width]
        joined = tf.reshape(heads, [-1, tf.shape(heads)[1], self._heads * self._width])
        return self._out(joined)

    def _bias(self, length: tf.Tensor, last: tf.Tensor | None) -> tf.Tensor:
        """[1 or B, heads, L or 1, L]: the bias of each distance, HIDDEN_SCORE ahead of a position."""
        position = tf.range(length)
        reader = position[None] if last is None else last[:, None]
        distance = reader[:, :, None] - position  # [1 or B, L or 1, L], below 0 ahead
        bias = tf.gather(self._distance_bias, tf.maximum(distance, 0), axis=1)
        bias = tf.where(distance >= 0, bias, HIDDEN_SCORE)  # [heads, 1 or B, L or 1, L]
        return tf.transpose(bias, [1, 0, 2, 3])

    def _by_head(self, x: tf.Tensor) -> tf.Tensor:
        """[B, L, d] -> [B, heads, L, width]."""
        split = tf.reshape(x, [-1, tf.shape(x)[1], self._heads, self._width])
        return tf.transpose(split, [0, 2, 1, 3])


class Linear(tf.keras.layers.Dense):
    """A dense layer for [B, L, d] as one matrix product. Keras needs ten operations there instead of two."""

    def call(self, x: tf.Tensor) -> tf.Tensor:
        rows = super().call(tf.reshape(x, [-1, x.shape[-1]]))
        return tf.reshape(rows, [-1, tf.shape(x)[1], self.units])


def _only(x: tf.Tensor, last: tf.Tensor | None) -> tf.Tensor:
    """[B, L, d] at one position per row, `last` [B]: [B, 1, d]. All of it for None."""
    return x if last is None else tf.gather(x, last, batch_dims=1)[:, None]


ENCODERS: dict[str, type[HistoryEncoder]] = {
    "two_tower": PooledHistory,
    "gru4rec": Gru,
    "sasrec": Transformer,
    "autoencoder": Autoencoder,
}
