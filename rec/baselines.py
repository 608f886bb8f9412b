"""Baselines on the same splits as the models: popularity (all-time and recent), iALS and EASE.

- Every baseline is `fit` on the training interactions and then scores *histories*, so that users who were not in the
  training data, and interactions after it, count as they do for the models.
- `tune` chooses hyper-parameters on validation data only, from the small grids of `grids`.
- A history that holds nothing a baseline was trained on is answered with popularity, as anybody would deploy it.
- Every matrix is CSR over user and item rows; a score is higher for better; nothing here needs TensorFlow.

Not covered: side features, order (of a history's interactions), and ratings as strengths: an interaction is a one.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, Protocol

import numpy as np
from implicit.cpu.als import AlternatingLeastSquares
from scipy.linalg import lapack
from scipy.sparse import csr_matrix
from threadpoolctl import threadpool_limits

from rec.errors import UserError
from rec.metrics import binary, per_user

EASE_MAX_ITEMS = 30_000  # its N x N float32 matrix is then 3.6 GB; solving takes minutes
EASE_BLOCK = 1024  # rows at a time where a product of the whole would need three times the memory
SECONDS_A_DAY = 86_400
SCORES_A_SLICE = 2**25  # users x items scored at a time: 128 MB of float32


class Baseline(Protocol):
    name: str

    def fit(self, train: csr_matrix, timestamps: np.ndarray | None = None) -> None:
        """Learns from train [U, N]; `timestamps` int64 [nnz] are seconds, parallel to `train.indices`."""

    def scores(self, histories: csr_matrix) -> np.ndarray:
        """Scores [B, N] of every item for every history [B, N]; what has been seen is not masked."""


# --------------------------------------------------------------------------------------------------
# The baselines


class Popularity:
    """The number of training interactions of each item, for everybody."""

    name = "popularity"

    def fit(self, train: csr_matrix, timestamps: np.ndarray | None = None) -> None:
        self.item_scores = np.bincount(train.indices, weights=train.data, minlength=train.shape[1])

    def scores(self, histories: csr_matrix) -> np.ndarray:
        return np.broadcast_to(self.item_scores, histories.shape)


class RecentPopularity(Popularity):
    """The interactions of each item in the last `days` before the end of training; ties go to the all-time count.

    Needs timestamps: build `train` from sorted rows by `csr_matrix((ones, items, indptr))`, which keeps their order.
    """

    name = "recent_popularity"

    def __init__(self, days: float) -> None:
        self.days = days

    def fit(self, train: csr_matrix, timestamps: np.ndarray | None = None) -> None:
        if timestamps is None or len(timestamps) != len(train.indices):
            raise ValueError("recent popularity needs the timestamps of the training interactions, one for each")
        super().fit(train)
        recent = timestamps > timestamps.max() - self.days * SECONDS_A_DAY
        counts = np.bincount(train.indices, weights=train.data * recent, minlength=train.shape[1])
        self.item_scores = counts + self.item_scores / (self.item_scores.sum() + 1)  # the second term stays below 1


class IALS:
    """Implicit alternating least squares (Hu, Koren and Volinsky 2008), by `implicit`.

    Minimises the sum over observed pairs of alpha (1 - score)^2, over all others of score^2, plus `regularization`
    times the squared factors. In the terms of Rendle et al., "Revisiting the Performance of iALS on Item
    Recommendation Benchmarks" (RecSys 2022), the unobserved weight is 1 / (alpha - 1) and lambda is
    regularization / alpha, not scaled by frequency. A history is folded in by its exact user factor.
    """

    name = "ials"

    def __init__(
        self, factors: int = 64, regularization: float = 10.0, alpha: float = 10.0, iterations: int = 16, seed: int = 0
    ) -> None:
        self.new_model = partial(
            AlternatingLeastSquares, factors, regularization, alpha, iterations=iterations, random_state=seed
        )

    def fit(self, train: csr_matrix, timestamps: np.ndarray | None = None) -> None:
        self.popularity = Popularity()
        self.popularity.fit(train)
        with threadpool_limits(1, "blas"):  # the library's own threads split the users; BLAS threads slow it down
            self.model = self.new_model()
            self.model.fit(binary(train), show_progress=False)

    def scores(self, histories: csr_matrix) -> np.ndarray:
        with threadpool_limits(1, "blas"):
            users = self.model.recalculate_user(np.arange(histories.shape[0]), binary(histories))
        return _popular_where_blank(users @ self.model.item_factors.T, self.popularity)


class EASE:
    """Steck, "Embarrassingly Shallow Autoencoders for Sparse Data" (WWW 2019): item weights in closed form.

    Memory grows with the square of the catalogue: more than EASE_MAX_ITEMS items raise UserError.
    """

    name = "ease"

    def __init__(self, regularization: float = 300.0) -> None:
        self.regularization = regularization

    def fit(self, train: csr_matrix, timestamps: np.ndarray | None = None) -> None:
        items = train.shape[1]
        if items > EASE_MAX_ITEMS:
            raise UserError(
                f"EASE solves an items x items matrix, {items**2 * 4 / 1e9:.0f} GB for this catalogue of {items:,} "
                f"items: leave it out, or reduce the catalogue to at most {EASE_MAX_ITEMS:,}"
            )
        self.popularity = Popularity()
        self.popularity.fit(train)
        X = binary(train)
        by_item = X.T.tocsr()
        gram = np.empty((items, items), np.float32, order="F")
        blocks = [slice(start, start + EASE_BLOCK) for start in range(0, items, EASE_BLOCK)]
        for block in blocks:
            gram[block] = (by_item[block] @ X).toarray()
        gram[np.diag_indices(items)] += self.regularization
        gram, failed = lapack.spotrf(gram, overwrite_a=True)
        inverse, failed_too = lapack.spotri(gram, overwrite_c=True)  # its upper triangle; the lower is zero
        if failed or failed_too:
            raise UserError(f"EASE has no solution with regularization {self.regularization:g}: choose a larger one")
        for block in blocks:
            inverse[block.start :, block] += np.triu(inverse[block, block.start :], 1).T
        self.weights = inverse.T  # the same matrix, in the memory order that a sparse product wants
        self.weights /= -np.diag(inverse)
        np.fill_diagonal(self.weights, 0)

    def scores(self, histories: csr_matrix) -> np.ndarray:
        return _popular_where_blank(binary(histories) @ self.weights, self.popularity)


def _popular_where_blank(scores: np.ndarray, popularity: Popularity) -> np.ndarray:
    """Scores [B, N] by popularity where a history says nothing: it is empty or all of it is new to the model."""
    blank = ~scores.any(axis=1)
    scores[blank] = popularity.item_scores
    return scores


# --------------------------------------------------------------------------------------------------
# Ranking and tuning


def top_k(scores: np.ndarray, seen: csr_matrix, k: int) -> np.ndarray:
    """The k best unseen items of every user, best first; equal scores in the order of item rows.

    Args:
        scores: [B, N]; -inf is never recommended, NaN raises ValueError.
        seen: [B, N], not zero at what must not be recommended.
        k: > 0; may be above N.

    Returns:
        int64 [B, k] item rows, -1 where nothing is left.
    """
    users, items = scores.shape
    left = scores.astype(np.result_type(scores, np.float32))
    if np.isnan(left).any():
        raise ValueError(f"the scores of user row {np.isnan(left).any(axis=1).argmax()} contain NaN")
    left[seen.nonzero()] = -np.inf
    width = min(k, items)
    cut = np.partition(left, items - width, axis=1)[:, items - width, None]
    above, at = left > cut, left == cut
    room = width - np.count_nonzero(above, axis=1)  # for items at the cut: the first rows get it
    tied = np.flatnonzero(np.count_nonzero(at, axis=1) > room)
    at[tied] &= np.cumsum(at[tied], axis=1) <= room[tied, None]
    rows = np.nonzero(above | at)[1].reshape(users, width)
    best = np.take_along_axis(left, rows, axis=1)
    order = np.argsort(-best, axis=1, kind="stable")
    rows = np.where(np.isneginf(best), -1, rows)
    ranked = np.full((users, k), -1, np.int64)
    ranked[:, :width] = np.take_along_axis(rows, order, axis=1)
    return ranked


def rank(baseline: Baseline, histories: csr_matrix, seen: csr_matrix, k: int) -> np.ndarray:
    """`top_k` [U, k] of the baseline's scores for histories [U, N], a slice of users at a time."""
    step = max(1, SCORES_A_SLICE // histories.shape[1])
    parts = [slice(start, start + step) for start in range(0, max(histories.shape[0], 1), step)]
    return np.concatenate([top_k(baseline.scores(histories[part]), seen[part], k) for part in parts])


Candidate = tuple[str, dict[str, Any], Callable[[], Baseline]]  # name, parameters, a maker of the unfitted baseline


def grids(seed: int = 0, ordered: bool = True) -> dict[str, list[Candidate]]:
    """What `tune` chooses from, by baseline: about 20 s for all of MovieLens 100K on 2 cores.

    The ranges in which Rendle et al. (2022) and Steck (2019) find their best, thinned out. Recent popularity needs
    timestamps and is left out unless `ordered`.
    """
    shapes = product((32, 128), (1.0, 3.0, 10.0, 30.0), (1.0, 10.0, 30.0))
    ials: list[dict[str, Any]] = [{"factors": f, "alpha": a, "regularization": r} for f, a, r in shapes]
    makers: list[tuple[str, Callable[..., Baseline], list[dict[str, Any]]]] = [
        ("popularity", Popularity, [{}]),
        ("recent_popularity", RecentPopularity, [{"days": days} for days in (1, 7, 30, 90, 365) if ordered]),
        ("ials", partial(IALS, seed=seed), ials),
        ("ease", EASE, [{"regularization": r} for r in (30.0, 100.0, 300.0, 1000.0)]),
    ]
    return {name: [(name, p, partial(make, **p)) for p in grid] for name, make, grid in makers if grid}


@dataclass(frozen=True)
class Tuned:
    name: str
    params: dict[str, Any]
    value: float  # the metric on validation data
    baseline: Baseline  # fitted


def tune(
    candidates: Sequence[Candidate],
    train: csr_matrix,
    histories: csr_matrix,
    seen: csr_matrix,
    relevant: csr_matrix,
    metric: str = "ndcg@10",
    timestamps: np.ndarray | None = None,
) -> Tuned:
    """The candidate with the highest mean metric over validation users; the first of equals.

    Args:
        candidates: see `grids`.
        train, timestamps: what `fit` takes.
        histories, seen, relevant: [U, N] for the validation users.
        metric: a name that `per_user` returns for the cut-off after its "@".
    """
    k = int(metric.partition("@")[2] or 100)
    best: Tuned | None = None
    for name, params, make in candidates:
        started = time.perf_counter()
        baseline = make()
        baseline.fit(train, timestamps)
        value = float(per_user(rank(baseline, histories, seen, k), relevant, (k,))[metric].mean())
        seconds = time.perf_counter() - started
        print(f"{name} {params}: val/{metric} {value:.4f}, {seconds:.1f} s", file=sys.stderr)
        if best is None or value > best.value:
            best = Tuned(name, params, value, baseline)
    if best is None:
        raise ValueError("tune needs at least one candidate")
    return best
