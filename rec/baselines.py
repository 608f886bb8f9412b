"""Baselines on the same splits as the models: popularity (all-time and recent), ItemKNN, RP3beta, iALS and EASE.

- Each is `fit` on training interactions and then scores *histories*: users and interactions that came later count too.
- `tune` chooses hyper-parameters on validation data only, from `GRIDS`.
- A history that holds nothing a baseline was trained on is answered by popularity, as anybody would deploy it.
- Every matrix is CSR over user and item rows; a higher score is better; the models need no TensorFlow.

An interaction counts as much as its weight, which is 1 without weights.

Not covered: side features, the order of a history, and ratings as strengths.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import ClassVar

import numpy as np
import tensorflow as tf
from scipy.linalg import inv
from scipy.sparse import coo_matrix, csr_matrix, diags_array
from threadpoolctl import threadpool_limits

from rec.errors import UserError, note
from rec.metrics import per_user, strongest
from rec.retrieval.taste import fit_als

EASE_MAX_ITEMS = 30_000  # its N x N float32 matrix is then 3.6 GB; solving takes minutes
SECONDS_PER_DAY = 86_400
SCORES_PER_SLICE = 2**25  # users x items scored at a time: 128 MB of float32


class Baseline(ABC):
    """What all baselines have in common."""

    name: ClassVar[str]

    @abstractmethod
    def fit(self, train: csr_matrix, timestamps: np.ndarray | None = None) -> None:
        """Learns from train [U, N]. `timestamps` int64 [nnz] are seconds, parallel to `train.indices`.

        Build `train` from sorted rows by `csr_matrix((ones, items, indptr))`, which keeps their order.
        """

    @abstractmethod
    def scores(self, histories: csr_matrix) -> np.ndarray:
        """Scores [B, N] of every item for every history [B, N]; what has been seen is not masked."""


@dataclass
class Popularity(Baseline):
    """The number of training interactions of each item, for everybody."""

    name = "popularity"

    def fit(self, train: csr_matrix, timestamps: np.ndarray | None = None) -> None:
        self.item_scores = count_interactions(train)

    def scores(self, histories: csr_matrix) -> np.ndarray:
        return np.broadcast_to(self.item_scores, histories.shape)


@dataclass
class RecentPopularity(Baseline):
    """The interactions of each item in the last `days` before the end of training; ties go to the all-time count."""

    days: float
    name = "recent_popularity"

    def fit(self, train: csr_matrix, timestamps: np.ndarray | None = None) -> None:
        """Raises UserError without a timestamp for each interaction."""
        if timestamps is None or len(timestamps) != len(train.indices):
            raise UserError(
                "recent popularity needs the timestamps of the training interactions, one for each"
            )
        is_recent = timestamps > timestamps.max() - self.days * SECONDS_PER_DAY
        recent = np.bincount(train.indices, train.data * is_recent, train.shape[1])
        all_time = count_interactions(train)
        self.item_scores = recent + all_time / (all_time.sum() + 1)  # the second term stays below 1

    def scores(self, histories: csr_matrix) -> np.ndarray:
        return np.broadcast_to(self.item_scores, histories.shape)


class Neighbours(Baseline):
    """Each item of the history votes for its neighbours; `fit` sets the weights of the votes."""

    weights: csr_matrix  # [N, N]
    popularity: np.ndarray  # [N]

    def scores(self, histories: csr_matrix) -> np.ndarray:
        return popular_if_unknown((strongest(histories) @ self.weights).toarray(), self.popularity)


@dataclass
class ItemKNN(Neighbours):
    """Neighbours are the items whose users are most alike (Sarwar et al. 2001).

    The similarity is the cosine with a shrink term, which holds down items with few users: the number of common users,
    divided by (the root of the product of both numbers of users + shrink).
    """

    neighbours: int
    shrink: float
    name = "item_knn"

    def fit(self, train: csr_matrix, timestamps: np.ndarray | None = None) -> None:
        self.popularity = count_interactions(train)
        X = strongest(train)
        common = (X.T @ X).tocoo()
        root = np.sqrt(np.bincount(X.indices, X.data.astype(np.float64) ** 2, X.shape[1]))
        similarity = common.data / (root[common.row] * root[common.col] + self.shrink)
        self.weights = keep_largest(with_values(common, similarity), self.neighbours)


@dataclass
class RP3beta(Neighbours):
    """A random walk of three steps, user, item, user, item, less drawn to popular items (Paudel et al. 2017).

    An item's transition probability to another one, divided by the other one's number of users to the power of beta.
    """

    neighbours: int
    alpha: float
    beta: float
    name = "rp3beta"

    def fit(self, train: csr_matrix, timestamps: np.ndarray | None = None) -> None:
        self.popularity = count_interactions(train)
        X = strongest(train)
        to_users = transition_probability(X.T).power(self.alpha)
        to_items = transition_probability(X).power(self.alpha)
        walk = (to_users @ to_items).tocoo()
        drawn = walk.data / self.popularity[walk.col] ** self.beta
        self.weights = keep_largest(with_values(walk, drawn), self.neighbours)


def transition_probability(X: csr_matrix) -> csr_matrix:
    """Each row divided by its sum; a row of zeros stays."""
    total = np.asarray(X.sum(1)).ravel()
    return csr_matrix(diags_array(1 / np.where(total > 0, total, 1)) @ X)


def with_values(matrix: coo_matrix, values: np.ndarray) -> csr_matrix:
    """Other values in the places of a square matrix, and none on its diagonal."""
    values = np.where(matrix.row == matrix.col, 0.0, values)
    changed = csr_matrix((values, (matrix.row, matrix.col)), shape=matrix.shape, dtype=np.float32)
    changed.eliminate_zeros()
    return changed


def keep_largest(matrix: csr_matrix, n: int) -> csr_matrix:
    """Only the `n` largest values of each row; of several that are equal to the smallest of them, all."""
    for begin, end in pairwise(matrix.indptr):
        row = matrix.data[begin:end]
        if len(row) > n:
            row[row < np.partition(row, -n)[-n]] = 0
    matrix.eliminate_zeros()
    return matrix


@dataclass
class IALS(Baseline):
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
        self._popularity = count_interactions(train)
        self.model = fit_als(
            train,
            factors=self.factors,
            alpha=self.alpha,
            regularization=self.regularization,
            iterations=16,
            seed=self.seed,
        )

    def scores(self, histories: csr_matrix) -> np.ndarray:
        with threadpool_limits(1, "blas"):
            users = self.model.recalculate_user(np.arange(histories.shape[0]), strongest(histories))
        return popular_if_unknown(users @ self.model.item_factors.T, self._popularity)


@dataclass
class EASE(Baseline):
    """Steck, "Embarrassingly Shallow Autoencoders for Sparse Data" (WWW 2019).

    With the Gram matrix G = X^T X + lambda I and P = G^-1, the item weights are B = -P / diag(P), with a zero diagonal.
    """

    regularization: float = 300.0
    name = "ease"

    def fit(self, train: csr_matrix, timestamps: np.ndarray | None = None) -> None:
        """Raises UserError above EASE_MAX_ITEMS."""
        items = train.shape[1]
        if items > EASE_MAX_ITEMS:
            size = items**2 * 4 / 1e9
            raise UserError(
                f"EASE solves an items x items matrix, {size:.0f} GB for {items:,} items: "
                f"leave it out, or reduce the catalogue to at most {EASE_MAX_ITEMS:,}"
            )
        self._popularity = count_interactions(train)
        X = strongest(train)
        gram = (X.T @ X).toarray(order="F")
        gram[np.diag_indices(items)] += self.regularization
        inverse = inv(gram, overwrite_a=True, check_finite=False)
        self.weights = inverse.T  # it is symmetric; transposed, its rows lie together in memory
        self.weights /= -np.diag(self.weights)
        np.fill_diagonal(self.weights, 0)

    def scores(self, histories: csr_matrix) -> np.ndarray:
        return popular_if_unknown(strongest(histories) @ self.weights, self._popularity)


def count_interactions(train: csr_matrix) -> np.ndarray:
    """[N] float64: the weight of the interactions of each item in train [U, N]."""
    return np.bincount(train.indices, weights=train.data, minlength=train.shape[1])


def popular_if_unknown(scores: np.ndarray, popularity: np.ndarray) -> np.ndarray:
    """Scores [B, N] with rows of zeros, which come from histories without a known item, replaced by popularity [N]."""
    scores[~scores.any(axis=1)] = popularity
    return scores


# ------------------------------------------------------------------------------------------------------------
# Ranking


def top_k(scores: np.ndarray, seen: csr_matrix, k: int) -> np.ndarray:
    """The k best unseen items of every user, best first; equal scores in the order of item rows.

    Args:
      scores: [B, N]; -inf is never recommended.
      seen: [B, N], not zero at what must not be recommended.
      k: above 0; may be more than N.

    Returns:
      int64 [B, k] item rows, -1 if nothing is left.

    Raises:
      ValueError: a score is NaN.
    """
    items = scores.shape[1]
    unseen = scores.astype(np.result_type(scores, np.float32))
    has_nan = np.isnan(unseen).any(axis=1)
    if has_nan.any():
        raise ValueError(f"the scores of user row {has_nan.argmax()} contain NaN")
    unseen[seen.nonzero()] = -np.inf
    best, columns = tf.math.top_k(unseen, min(k, items))
    ranked = np.where(np.isneginf(best.numpy()), -1, columns.numpy().astype(np.int64))
    return np.pad(ranked, ((0, 0), (0, max(0, k - items))), constant_values=-1)


def rank(baseline: Baseline, histories: csr_matrix, seen: csr_matrix, k: int) -> np.ndarray:
    """`top_k` [U, k] of the baseline's scores for histories [U, N], a slice of users at a time."""
    users, items = histories.shape
    step = max(1, SCORES_PER_SLICE // items)
    parts = []
    for start in range(0, max(users, 1), step):
        part = slice(start, start + step)
        parts.append(top_k(baseline.scores(histories[part]), seen[part], k))
    return np.concatenate(parts)


# ------------------------------------------------------------------------------------------------------------
# Tuning


def grid(**values: Sequence[float]) -> list[dict[str, float]]:
    """All combinations of the values, as keyword arguments."""
    return [
        dict(zip(values, combination, strict=True)) for combination in product(*values.values())
    ]


# What `tune` chooses from: where Rendle et al. (2022) and Steck (2019) find their best, thinned out. All take about
# 20 s on MovieLens 100K and 2 cores.
GRIDS: dict[type[Baseline], list[dict[str, float]]] = {
    Popularity: grid(),
    RecentPopularity: grid(days=(1, 7, 30, 90, 365)),
    ItemKNN: grid(neighbours=(20, 100, 500), shrink=(0.0, 10.0, 100.0)),
    RP3beta: grid(neighbours=(100, 500), alpha=(0.7, 1.0), beta=(0.2, 0.4, 0.6)),
    IALS: grid(factors=(32, 128), alpha=(1.0, 3.0, 10.0, 30.0), regularization=(1.0, 10.0, 30.0)),
    EASE: grid(regularization=(30.0, 100.0, 300.0, 1000.0)),
}


def tune(
    baseline_class: type[Baseline],
    train: csr_matrix,
    histories: csr_matrix,
    seen: csr_matrix,
    relevant: csr_matrix,
    timestamps: np.ndarray | None,
) -> tuple[float, Baseline]:
    """The highest mean NDCG@10 over validation users, and the fitted baseline of the grid that has it.

    Args:
      train, timestamps: as for `fit`.
      histories, seen, relevant: [U, N] of the validation users. What is seen is not recommended.
    """
    best: tuple[float, Baseline] | None = None
    for parameters in GRIDS[baseline_class]:
        start = time.perf_counter()
        baseline = baseline_class(**parameters)
        baseline.fit(train, timestamps)
        ranked = rank(baseline, histories, seen, 10)
        ndcg = float(per_user(ranked, relevant, (10,))["ndcg@10"].mean())
        seconds = time.perf_counter() - start
        note(f"{baseline}: val/ndcg@10 {ndcg:.4f}, {seconds:.1f} s")
        if best is None or ndcg > best[0]:  # the first of equals
            best = ndcg, baseline
    assert best is not None
    return best
