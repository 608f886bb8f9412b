"""Baselines of rating prediction: the mean, biases, and matrix factorisation. Tuned by the RMSE on validation data."""

from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.sparse import csr_matrix

from rec.metrics import rmse
from rec.sequences import Sequences

SWEEPS = 10  # of alternating least squares


@dataclass
class RatingBiases:
    """The mean, and how far a user and an item are off it, shrunk to zero (Koren, Bell and Volinsky 2009)."""

    regularization: float = 5.0

    def fit(
        self, user: np.ndarray, item: np.ndarray, rating: np.ndarray, users: int, items: int
    ) -> None:
        """Learns from ratings [n] of user and item rows [n]."""
        self.mean = float(rating.mean())
        self.user_bias = np.zeros(users)
        self.item_bias = np.zeros(items)
        for _ in range(SWEEPS):  # by turns: each is the ridge solution given the other
            without_users = rating - self.mean - self.user_bias[user]
            self.item_bias = self._solve(item, without_users, items)
            without_items = rating - self.mean - self.item_bias[item]
            self.user_bias = self._solve(user, without_items, users)

    def _solve(self, rows: np.ndarray, rest: np.ndarray, n: int) -> np.ndarray:
        """[n] the biases that explain `rest`."""
        total = np.bincount(rows, weights=rest, minlength=n)
        return total / (np.bincount(rows, minlength=n) + self.regularization)

    def predict(self, user: np.ndarray, item: np.ndarray) -> np.ndarray:
        """[n] user and item rows -> [n] ratings."""
        return self.mean + self.user_bias[user] + self.item_bias[item]


@dataclass
class MatrixFactorization(RatingBiases):
    """Biases, then factors for what they leave, by alternating least squares (Zhou et al. 2008, ALS-WR)."""

    factors: int = 16
    weight: float = 0.1  # of the squared factors, per rating of a row
    seed: int = 0

    def fit(
        self, user: np.ndarray, item: np.ndarray, rating: np.ndarray, users: int, items: int
    ) -> None:
        super().fit(user, item, rating, users, items)
        unexplained = rating - super().predict(user, item)
        rest = csr_matrix((unexplained, (user, item)), shape=(users, items))
        self.P = np.zeros((users, self.factors))
        self.Q = np.random.default_rng(self.seed).normal(0, 0.1, (items, self.factors))
        for _ in range(SWEEPS):
            self.P = self._solve_factors(rest, self.Q)
            self.Q = self._solve_factors(rest.T.tocsr(), self.P)

    def _solve_factors(self, rest: csr_matrix, fixed: np.ndarray) -> np.ndarray:
        """[rows, F]: the factors of each row of `rest`, given those of its columns."""
        solution = np.zeros((rest.shape[0], self.factors))
        for row in np.flatnonzero(np.diff(rest.indptr)):
            at = slice(rest.indptr[row], rest.indptr[row + 1])
            known = fixed[rest.indices[at]]
            gram = known.T @ known + self.weight * len(known) * np.eye(self.factors)
            solution[row] = np.linalg.solve(gram, known.T @ rest.data[at])
        return solution

    def predict(self, user: np.ndarray, item: np.ndarray) -> np.ndarray:
        return super().predict(user, item) + np.einsum("nf,nf->n", self.P[user], self.Q[item])


def rating_baselines(train: Sequences, val: Sequences, items: int) -> dict[str, RatingBiases]:
    """Each rating baseline, fitted on `train` with the settings that have the lowest RMSE on `val`."""
    val_ratings = val.ratings
    train_ratings = train.ratings
    assert train_ratings is not None and val_ratings is not None
    grids: dict[str, list[RatingBiases]] = {
        "global_mean": [RatingBiases(np.inf)],  # shrinks all biases to zero
        "biases": [RatingBiases(regularization) for regularization in (1.0, 3.0, 10.0)],
        "mf": [
            MatrixFactorization(factors=factors, weight=weight)
            for factors, weight in product((4, 16), (0.03, 0.1, 0.3))
        ],
    }

    def error(candidate: RatingBiases) -> float:
        candidate.fit(train.users, train.items, train_ratings, len(train.lengths), items)
        return rmse(candidate.predict(val.users, val.items), val_ratings)

    return {name: min(candidates, key=error) for name, candidates in grids.items()}
