"""Ranking architectures, and the registry behind `--model-arch` of the ranking stage.

Each is a Keras layer from the same inputs to a hidden vector a candidate: `ARCHS` maps a name to a class; add one by
adding a class and a line. What the fields are is model.py's business.

All take `fields`, vectors of each candidate (each [B, N, d]), `shared`, vectors that a list's candidates have in common
(each [B, d]), and numbers [B, N, M], and give [R, hidden], a row a candidate, R = B x N.
"""

import tensorflow as tf
import tensorflow_recommenders as tfrs

from rec.config import Ranking
from rec.numerics import at_least

Tensors = list[tf.Tensor]


def _mlp(config: Ranking, widths: tuple[int, ...], name: str) -> tf.keras.Sequential:
    layers: list[tf.keras.layers.Layer] = []
    for width in widths:
        layers += [
            tf.keras.layers.Dense(width, activation="relu"),
            tf.keras.layers.Dropout(config.dropout),
        ]
    return tf.keras.Sequential(layers, name=name)


class Mlp(tf.keras.layers.Layer):
    """All inputs side by side through dense layers; what is shared is multiplied once a list."""

    def __init__(self, config: Ranking, dim: int) -> None:
        super().__init__(name="mlp")
        self._each = tf.keras.layers.Dense(config.hidden[0])
        self._shared = tf.keras.layers.Dense(config.hidden[0], use_bias=False)
        self._dropout = tf.keras.layers.Dropout(config.dropout)
        self._top = _mlp(config, config.hidden[1:], "top")

    def call(
        self, fields: Tensors, shared: Tensors, numbers: tf.Tensor, training: bool = False
    ) -> tf.Tensor:
        each = self._each(_rows(tf.concat([*fields, numbers], 2)))
        by_list = tf.reshape(each, [-1, tf.shape(numbers)[1], each.shape[1]])
        of_lists = self._shared(at_least(2, tf.concat(shared, 1)))[: tf.shape(numbers)[0]]
        first = tf.nn.relu(by_list + of_lists[:, None])
        return self._top(self._dropout(_rows(first), training=training), training=training)


class Dlrm(tf.keras.layers.Layer):
    """Dot products between all pairs of fields (Naumov et al. 2019), by tfrs.layers.feature_interaction."""

    def __init__(self, config: Ranking, dim: int) -> None:
        super().__init__(name="dlrm")
        layers = [tf.keras.layers.Dense(dim, activation="relu"), tf.keras.layers.Dense(dim)]
        self._bottom = tf.keras.Sequential(layers, name="bottom")
        self._interact = tfrs.layers.feature_interaction.DotInteraction()
        self._top = _mlp(config, config.hidden, "top")

    def call(
        self, fields: Tensors, shared: Tensors, numbers: tf.Tensor, training: bool = False
    ) -> tf.Tensor:
        dense, every = self._bottom(_rows(numbers)), _every(fields, shared)
        pairs = self._interact([*every, dense])
        pairs = tf.ensure_shape(pairs, [None, (len(every) + 1) * len(every) // 2])
        return self._top(tf.concat([dense, pairs], 1), training=training)


class Dcn(tf.keras.layers.Layer):
    """Explicit feature crosses (Wang et al. 2021, DCN V2), by tfrs.layers.dcn, then dense layers."""

    def __init__(self, config: Ranking, dim: int) -> None:
        super().__init__(name="dcn")
        self._crosses = [tfrs.layers.dcn.Cross(projection_dim=dim) for _ in range(2)]
        self._top = _mlp(config, config.hidden, "top")

    def call(
        self, fields: Tensors, shared: Tensors, numbers: tf.Tensor, training: bool = False
    ) -> tf.Tensor:
        start = crossed = tf.concat([*_every(fields, shared), _rows(numbers)], 1)
        for cross in self._crosses:
            crossed = cross(start, crossed)
        return self._top(crossed, training=training)


def _rows(by_list: tf.Tensor) -> tf.Tensor:
    """[B, N, width] -> [B x N, width]."""
    return tf.reshape(by_list, [-1, by_list.shape[2]])


def _every(fields: Tensors, shared: Tensors) -> Tensors:
    """All vectors of each candidate, each [R, d]."""
    return [
        _rows(x)
        for x in [*fields, *(tf.broadcast_to(x[:, None], tf.shape(fields[0])) for x in shared)]
    ]


ARCHS: dict[str, type[tf.keras.layers.Layer]] = {"mlp": Mlp, "dlrm": Dlrm, "dcn": Dcn}
