"""Baselines on the same splits as the models: popularity (all-time and recent), iALS and EASE.

- Each is `fit` on training interactions and then scores *histories*: users and interactions that came later count too.
- `tune` chooses hyper-parameters on validation data only, from the small `GRIDS`.
- A history that holds nothing a baseline was trained on is answered with popularity, as anybody would deploy it.
- Every matrix is CSR over user and item rows; a score is higher for better; nothing here needs TensorFlow.

Not covered: side features, the order of a history, and ratings as strengths: an interaction is a one.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import tensorflow as tf
from implicit.cpu.als import AlternatingLeastSquares
from scipy.linalg import inv
from scipy.sparse import csr_matrix
from threadpoolctl import threadpool_limits

from rec.errors import UserError
from rec.metrics import binary, per_user, rmse
from rec.pipeline import Sequences

EASE_MAX_ITEMS = 30_000  # its N x N float32 matrix is then 3.6 GB; solving takes minutes
SECONDS_A_DAY = 86_400
SCORES_A_SLICE = 2**25  # users x items scored at a time: 128 MB of float32


@dataclass
class Popularity:
    """The number of training interactions of each item, for everybody. The others build on it and fall back on it."""

    name = "popularity"

    def fit(self, train: csr_matrix, timestamps: np.ndarray | None = None) -> None:
        """Learns from train [U, N]; `timestamps` int64 [nnz] are seconds, parallel to `train.indices`.

        Build `train` from sorted rows by `csr_matrix((ones, items, indptr))`, which keeps their order.
        """
        self.item_scores = np.bincount(train.indices, weights=train.data, minlength=train.shape[1])

    def scores(self, histories: csr_matrix) -> np.ndarray:
        """Scores [B, N] of every item for every history [B, N]; what has been seen is not masked."""
        return np.broadcast_to(self.item_scores, histories.shape)

    def instead_of_zeros(self, scores: np.ndarray) -> np.ndarray:
        """Fills rows of zeros in scores [B, N]: a history that is empty, or all new to the model, says nothing."""
        scores[~scores.any(axis=1)] = self.item_scores
        return scores


Baseline = Popularity  # what all have in common


@dataclass
class RecentPopularity(Popularity):
    """The interactions of each item in the last `days` before the end of training; ties go to the all-time count."""

    days: float
    name = "recent_popularity"

    def fit(self, train: csr_matrix, timestamps: np.ndarray | None = None) -> None:
        if timestamps is None or len(timestamps) != len(train.indices):
            raise UserError(
                "recent popularity needs the timestamps of the training interactions, one for each"
            )
        super().fit(train)
        recent = timestamps > timestamps.max() - self.days * SECONDS_A_DAY
        counts = np.bincount(train.indices, weights=train.data * recent, minlength=train.shape[1])
        self.item_scores = counts + self.item_scores / (
            self.item_scores.sum() + 1
        )  # the second term stays below 1


@dataclass
class IALS(Popularity):
    """Implicit alternating least squares (Hu, Koren and Volinsky 2008); histories are folded in by exact user factors.

    Minimises the sum over observed pairs of alpha (1 - score)^2, over all others of score^2, plus `regularization`
    times the squared factors: the unobserved weight of Rendle et al., "Revisiting the Performance of iALS on Item
    Recommendation Benchmarks" (RecSys 2022), is 1 / (alpha - 1), their lambda regularization / alpha, unscaled.
    """

    factors: int = 64
    regularization: float = 10.0
    alpha: float = 10.0
    seed: int = 0
    name = "ials"

    def fit(self, train: csr_matrix, timestamps: np.ndarray | None = None) -> None:
        super().fit(train)
        weights = (self.factors, self.regularization, self.alpha)
        with threadpool_limits(
            1, "blas"
        ):  # the library's own threads split the users; BLAS threads slow it down
            self.model = AlternatingLeastSquares(*weights, iterations=16, random_state=self.seed)
            self.model.fit(binary(train), show_progress=False)

    def scores(self, histories: csr_matrix) -> np.ndarray:
        with threadpool_limits(1, "blas"):
            users = self.model.recalculate_user(np.arange(histories.shape[0]), binary(histories))
        return self.instead_of_zeros(users @ self.model.item_factors.T)


@dataclass
class EASE(Popularity):
    """Steck, "Embarrassingly Shallow Autoencoders for Sparse Data" (WWW 2019). UserError above EASE_MAX_ITEMS."""

    regularization: float = 300.0
    name = "ease"

    def fit(self, train: csr_matrix, timestamps: np.ndarray | None = None) -> None:
        super().fit(train)
        items = train.shape[1]
        if items > EASE_MAX_ITEMS:
            size = f"{items**2 * 4 / 1e9:.0f} GB for this catalogue of {items:,} items"
            hint = f"leave it out, or reduce the catalogue to at most {EASE_MAX_ITEMS:,}"
            raise UserError(f"EASE solves an items x items matrix, {size}: {hint}")
        X = binary(train)
        gram = (X.T @ X).toarray(order="F")
        gram[np.diag_indices(items)] += self.regularization
        self.weights = inv(
            gram, overwrite_a=True, check_finite=False
        ).T  # symmetric; now in the order of its rows
        self.weights /= -np.diag(self.weights)
        np.fill_diagonal(self.weights, 0)

    def scores(self, histories: csr_matrix) -> np.ndarray:
        return self.instead_of_zeros(binary(histories) @ self.weights)


def top_k(scores: np.ndarray, seen: csr_matrix, k: int) -> np.ndarray:
    """The k best unseen items of every user, best first; equal scores in the order of item rows.

    `scores` is [B, N], -inf is never recommended, NaN raises ValueError; `seen` [B, N] is not zero at what must not be
    recommended; k > 0 may be above N. Returns int64 [B, k] item rows, -1 where nothing is left.
    """
    items = scores.shape[1]
    left = scores.astype(np.result_type(scores, np.float32))
    if np.isnan(left).any():
        raise ValueError(
            f"the scores of user row {np.isnan(left).any(axis=1).argmax()} contain NaN"
        )
    left[seen.nonzero()] = -np.inf
    best, rows = (part.numpy() for part in tf.math.top_k(left, min(k, items)))
    ranked = np.where(np.isneginf(best), -1, rows.astype(np.int64))
    return np.pad(ranked, ((0, 0), (0, max(0, k - items))), constant_values=-1)


def rank(baseline: Baseline, histories: csr_matrix, seen: csr_matrix, k: int) -> np.ndarray:
    """`top_k` [U, k] of the baseline's scores for histories [U, N], a slice of users at a time."""
    step = max(1, SCORES_A_SLICE // histories.shape[1])
    parts = [slice(start, start + step) for start in range(0, max(histories.shape[0], 1), step)]
    return np.concatenate(
        [top_k(baseline.scores(histories[part]), seen[part], k) for part in parts]
    )


def _grid(**values: Sequence[float]) -> list[dict[str, Any]]:
    """All combinations."""
    return [dict(zip(values, each, strict=True)) for each in product(*values.values())]


# What `tune` chooses from: where Rendle et al. (2022) and Steck (2019) find their best, thinned out. All take about
# 20 s on MovieLens 100K and 2 cores.
GRIDS: dict[type[Baseline], list[dict[str, Any]]] = {
    Popularity: _grid(),
    RecentPopularity: _grid(days=(1, 7, 30, 90, 365)),
    IALS: _grid(factors=(32, 128), alpha=(1.0, 3.0, 10.0, 30.0), regularization=(1.0, 10.0, 30.0)),
    EASE: _grid(regularization=(30.0, 100.0, 300.0, 1000.0)),
}


def tune(
    make: type[Baseline],
    train: csr_matrix,
    histories: csr_matrix,
    relevant: csr_matrix,
    timestamps: np.ndarray | None,
) -> tuple[float, Baseline]:
    """The highest mean NDCG@10 over validation users, and the baseline of its grid that has it, fitted.

    `train` and `timestamps` are what `fit` takes; histories (whose items are not recommended) and relevant are [U, N]
    for the validation users.
    """

    def fitted(parameters: dict[str, Any]) -> tuple[float, Baseline]:
        started, baseline = time.perf_counter(), make(**parameters)
        baseline.fit(train, timestamps)
        value = float(
            per_user(rank(baseline, histories, histories, 10), relevant, (10,))["ndcg@10"].mean()
        )
        print(
            f"{baseline}: val/ndcg@10 {value:.4f}, {time.perf_counter() - started:.1f} s",
            file=sys.stderr,
        )
        return value, baseline

    return max(map(fitted, GRIDS[make]), key=lambda each: each[0])  # the first of equals


# ------------------------------------------------------------------------------------------------------------
# Ratings


@dataclass
class RatingBiases:
    """The mean, and how far a user and an item are off it, shrunk to zero (Koren, Bell and Volinsky 2009)."""

    regularization: float = 5.0

    def fit(
        self, user: np.ndarray, item: np.ndarray, rating: np.ndarray, users: int, items: int
    ) -> None:
        """Learns from ratings [n] of user and item rows [n]."""
        self.mean, self.of_user, self.of_item = (
            float(rating.mean()),
            np.zeros(users),
            np.zeros(items),
        )
        for _ in range(10):  # by turns: each is the ridge solution given the other
            self.of_item = self._solved(item, rating - self.mean - self.of_user[user], items)
            self.of_user = self._solved(user, rating - self.mean - self.of_item[item], users)

    def _solved(self, rows: np.ndarray, rest: np.ndarray, n: int) -> np.ndarray:
        return np.bincount(rows, weights=rest, minlength=n) / (
            np.bincount(rows, minlength=n) + self.regularization
        )

    def predict(self, user: np.ndarray, item: np.ndarray) -> np.ndarray:
        """[n] user and item rows -> [n] ratings."""
        return self.mean + self.of_user[user] + self.of_item[item]


@dataclass
class MatrixFactorization(RatingBiases):
    """Biases, then factors for what they leave, by alternating least squares (Zhou et al. 2008, ALS-WR)."""

    factors: int = 16
    weight: float = 0.1  # of the squared factors, for each rating of a row
    seed: int = 0

    def fit(
        self, user: np.ndarray, item: np.ndarray, rating: np.ndarray, users: int, items: int
    ) -> None:
        super().fit(user, item, rating, users, items)
        rest = csr_matrix(
            (rating - super().predict(user, item), (user, item)), shape=(users, items)
        )
        self.P = np.zeros((users, self.factors))
        self.Q = np.random.default_rng(self.seed).normal(0, 0.1, (items, self.factors))
        for _ in range(10):
            self.P = self._half(rest, self.Q)
            self.Q = self._half(rest.T.tocsr(), self.P)

    def _half(self, rest: csr_matrix, fixed: np.ndarray) -> np.ndarray:
        """The factors [rows, F] of each row of `rest`, given those of its columns."""
        solved = np.zeros((rest.shape[0], self.factors))
        for row in np.flatnonzero(np.diff(rest.indptr)):
            at = slice(rest.indptr[row], rest.indptr[row + 1])
            known = fixed[rest.indices[at]]
            gram = known.T @ known + self.weight * len(known) * np.eye(self.factors)
            solved[row] = np.linalg.solve(gram, known.T @ rest.data[at])
        return solved

    def predict(self, user: np.ndarray, item: np.ndarray) -> np.ndarray:
        return super().predict(user, item) + np.einsum("nf,nf->n", self.P[user], self.Q[item])


def rating_baselines(train: Sequences, val: Sequences, items: int) -> dict[str, RatingBiases]:
    """Each rating baseline, fitted on `train` with the settings that have the lowest RMSE on `val`."""
    ratings, held = train.ratings, val.ratings
    assert ratings is not None and held is not None
    settings = product((4, 16), (0.03, 0.1, 0.3))
    grids: dict[str, list[RatingBiases]] = {
        "global_mean": [RatingBiases(np.inf)],  # which leaves no biases
        "biases": [RatingBiases(regularization) for regularization in (1.0, 3.0, 10.0)],
        "mf": [MatrixFactorization(factors=factors, weight=weight) for factors, weight in settings],
    }

    def error(candidate: RatingBiases) -> float:
        candidate.fit(train.users, train.items, ratings, len(train.lengths), items)
        return rmse(candidate.predict(val.users, val.items), held)

    return {name: min(grid, key=error) for name, grid in grids.items()}
