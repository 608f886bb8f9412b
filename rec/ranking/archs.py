"""Ranking architectures, and the registry behind `--model-arch` of the ranking stage.

Each is a Keras layer from the same inputs to a hidden vector a candidate: `ARCHS` maps a name to a class; add one by
adding a class and a line. What the fields are is model.py's business.
"""

from typing import Any

import tensorflow as tf
import tensorflow_recommenders as tfrs

from rec.config import Ranking


def _mlp(config: Ranking, name: str) -> tf.keras.Sequential:
    layers: list[tf.keras.layers.Layer] = []
    for width in config.hidden:
        layers += [tf.keras.layers.Dense(width, activation="relu"), tf.keras.layers.Dropout(config.dropout)]
    return tf.keras.Sequential(layers, name=name)


class Mlp(tf.keras.layers.Layer):
    """All inputs side by side through dense layers."""

    def __init__(self, config: Ranking, dim: int) -> None:
        super().__init__(name="mlp")
        self._top = _mlp(config, "top")

    def call(self, fields: tf.Tensor, numbers: tf.Tensor, training: bool = False) -> tf.Tensor:
        """fields [R, F, d], numbers [R, M] -> [R, hidden]."""
        return self._top(tf.concat([_flat(fields), numbers], 1), training=training)


class Dlrm(tf.keras.layers.Layer):
    """Dot products between all pairs of fields (Naumov et al. 2019), by tfrs.layers.feature_interaction."""

    def __init__(self, config: Ranking, dim: int) -> None:
        super().__init__(name="dlrm")
        self._bottom = tf.keras.Sequential(
            [tf.keras.layers.Dense(dim, activation="relu"), tf.keras.layers.Dense(dim)], name="bottom"
        )
        self._interact = tfrs.layers.feature_interaction.DotInteraction()
        self._top = _mlp(config, "top")

    def call(self, fields: tf.Tensor, numbers: tf.Tensor, training: bool = False) -> tf.Tensor:
        """fields [R, F, d], numbers [R, M] -> [R, hidden]."""
        dense = self._bottom(numbers)
        pairs = self._interact([*tf.unstack(fields, axis=1), dense])
        pairs = tf.ensure_shape(pairs, [None, (fields.shape[1] + 1) * fields.shape[1] // 2])
        return self._top(tf.concat([dense, pairs], 1), training=training)


class Dcn(tf.keras.layers.Layer):
    """Explicit feature crosses (Wang et al. 2021, DCN V2), by tfrs.layers.dcn, then dense layers."""

    def __init__(self, config: Ranking, dim: int) -> None:
        super().__init__(name="dcn")
        self._crosses = [tfrs.layers.dcn.Cross(projection_dim=dim) for _ in range(2)]
        self._top = _mlp(config, "top")

    def call(self, fields: tf.Tensor, numbers: tf.Tensor, training: bool = False) -> tf.Tensor:
        """fields [R, F, d], numbers [R, M] -> [R, hidden]."""
        start = crossed = tf.concat([_flat(fields), numbers], 1)
        for cross in self._crosses:
            crossed = cross(start, crossed)
        return self._top(crossed, training=training)


def _flat(fields: tf.Tensor) -> tf.Tensor:
    return tf.reshape(fields, [-1, fields.shape[1] * fields.shape[2]])


ARCHS: dict[str, Any] = {"mlp": Mlp, "dlrm": Dlrm, "dcn": Dcn}
