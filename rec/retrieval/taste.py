"""The taste part of a query: what a user likes, whatever the order. Implicit ALS, folded in exactly.

A sequence model knows what comes next; a matrix factorisation knows what belongs together. Their sum is one dot
product of longer vectors: [towers ; weight x taste] with [towers ; item factors].

- Item factors come from alternating least squares (Hu, Koren and Volinsky 2008), by the library `implicit`.
- A user's factors are the exact solution for any history, so users need no training of their own:

      (V'V + (alpha - 1) sum of v v' + regularization I) u = alpha sum of v,  over the items of the history

- Validation data decide on alpha, regularization and the weight of the sum (mixture.py). The weight is 0 if taste does
  not help.
"""

from dataclasses import dataclass

import numpy as np
import tensorflow as tf
from implicit.cpu.als import AlternatingLeastSquares
from scipy.sparse import csr_matrix
from threadpoolctl import threadpool_limits

from rec.features import FIRST_ITEM, UNKNOWN, recent_items
from rec.metrics import strongest
from rec.sequences import Sequences

BLOCK = 64  # items of a history that are summed at a time
ITERATIONS = 12


@dataclass(frozen=True)
class TasteSetting:
    """What validation data decide: see the module."""

    alpha: float
    regularization: float
    weight: float  # of the taste's score beside the towers' score


class Taste(tf.keras.layers.Layer):
    """Item factors, and the factors of a user with a given history."""

    def __init__(self, width: int, rows: int) -> None:
        """Width of the factors, 0 for none, and the number of item rows that are trained."""
        super().__init__(name="taste")
        self._rows = rows
        self._width = width
        self._item_factors = self._add_constant("item_factors", [rows, width])
        self._precision = self._add_constant("precision", [width, width])
        self._alpha = self._add_constant("alpha", [])
        self._regularization = self._add_constant("regularization", [])
        self._weight = self._add_constant("weight", [])

    def _add_constant(self, name: str, shape: list[int]) -> tf.Variable:
        return self.add_weight(name=name, shape=shape, initializer="zeros", trainable=False)

    def candidates(self, rows: tf.Tensor) -> tf.Tensor:
        """int32 item rows [...] -> [..., width]; zeros for what was not in training."""
        return tf.nn.embedding_lookup(self._item_factors, self._known(rows))

    def _known(self, rows: tf.Tensor) -> tf.Tensor:
        return tf.where(rows < self._rows, rows, UNKNOWN)

    def call(self, history: tf.Tensor) -> tf.Tensor:
        """The weighted user factors for histories [B, H] int32 of item rows, PAD anywhere: [B, width]."""
        if self._width == 0:
            return tf.zeros([tf.shape(history)[0], 0])
        return tf.cond(
            self._weight > 0,
            lambda: self._weight * self._user_factors(history),
            lambda: tf.zeros([tf.shape(history)[0], self._width]),
        )

    def _user_factors(self, history: tf.Tensor) -> tf.Tensor:
        """[B, H] -> [B, width]: the solution of the module's equation."""
        outer, total = self._sums(history)
        system = self._precision + (self._alpha - 1) * outer
        target = (self._alpha * total)[..., None]
        return tf.linalg.cholesky_solve(tf.linalg.cholesky(system), target)[..., 0]

    def _sums(self, history: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The sums of v v' [B, width, width] and of v [B, width] over the items of each history.

        They run over BLOCK items at a time, so that empty places change no bit.
        """
        blocks = tf.shape(history)[1] // BLOCK + 1
        items = self._known(recent_items(history, blocks * BLOCK))
        count = tf.shape(history)[0]

        def add_block(
            block: tf.Tensor, outer: tf.Tensor, total: tf.Tensor
        ) -> tuple[tf.Tensor, ...]:
            rows = items[:, block * BLOCK : (block + 1) * BLOCK]
            vectors = tf.ensure_shape(self.candidates(rows), [None, BLOCK, self._width])
            outer += tf.matmul(vectors, vectors, transpose_a=True)
            return block + 1, outer, total + tf.reduce_sum(vectors, 1)

        no_outer = tf.zeros([count, self._width, self._width])
        no_total = tf.zeros([count, self._width])
        _, outer, total = tf.while_loop(
            lambda block, *_: block < blocks, add_block, (0, no_outer, no_total)
        )
        return outer, total

    def fit(self, train: Sequences, setting: TasteSetting, seed: int) -> None:
        """Learns item factors from `train` and takes over the setting."""
        factors = fit_item_factors(train, self._rows, self._width, setting, seed)
        identity = np.eye(self._width, dtype=np.float32)
        self._item_factors.assign(factors)
        self._precision.assign(factors.T @ factors + setting.regularization * identity)
        self._alpha.assign(setting.alpha)
        self._regularization.assign(setting.regularization)
        self.set_weight(setting.weight)

    def set_weight(self, weight: float) -> None:
        self._weight.assign(weight)

    @property
    def setting(self) -> TasteSetting:
        return TasteSetting(
            alpha=float(self._alpha),
            regularization=float(self._regularization),
            weight=float(self._weight),
        )


def fit_item_factors(
    train: Sequences, rows: int, width: int, setting: TasteSetting, seed: int
) -> np.ndarray:
    """[item rows, width] float32: item factors by alternating least squares; zeros for what nobody has met."""
    users = np.flatnonzero(train.lengths)
    model = fit_als(
        train.matrix(users, rows),
        factors=width,
        alpha=setting.alpha,
        regularization=setting.regularization,
        iterations=ITERATIONS,
        seed=seed,
    )
    factors = model.item_factors.copy()
    factors[:FIRST_ITEM] = 0  # the rows that are no items
    return factors


def fit_als(
    interactions: csr_matrix,
    *,
    factors: int,
    alpha: float,
    regularization: float,
    iterations: int,
    seed: int,
) -> AlternatingLeastSquares:
    """The library's model of interactions [U, N]: alpha times the weight is the confidence, and repeats count once."""
    # The library's own threads share the users out. Those of BLAS would slow them down.
    with threadpool_limits(1, "blas"):
        model = AlternatingLeastSquares(
            factors=factors,
            alpha=alpha,
            regularization=regularization,
            iterations=iterations,
            random_state=seed,
        )
        model.fit(strongest(interactions), show_progress=False)
    return model
