"""Ranking metrics over the full catalogue: recall@k, ndcg@k, mrr, coverage@k, and their bootstrap intervals.

- Vectorised over large slices of users: no Python loop over users, bounded memory at a million of them.
- One value a user: intervals, paired comparisons and user segments (cold, light, heavy) are plain slices.
- What would quietly flatter a system is an error: an item ranked twice, a list too short for k, a user
  without ground truth, held-out items that are also in the history.

Not covered: graded relevance (a held-out item counts 1) and sampled metrics, which order systems differently from
the full catalogue (Krichene and Rendle, "On Sampled Metrics for Item Recommendation", KDD 2020).
"""

from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_matrix

from rec.errors import UserError

KS = (10, 20, 50, 100)
USERS_A_SLICE = 65_536  # keeps the float64 [users, K] temporaries near 50 MB at K = 100


def binary(matrix: csr_matrix) -> csr_matrix:
    """A float32 copy with 1 wherever `matrix` is not zero: repeats count once, indices are sorted."""
    copy = csr_matrix(matrix, dtype=np.float32, copy=True)
    copy.sum_duplicates()
    copy.eliminate_zeros()
    copy.data[:] = 1
    return copy


def strongest(matrix: csr_matrix) -> csr_matrix:
    """A float32 copy with the largest weight of each user and item: repeats count once, indices are sorted."""
    if (matrix.data == 1).all():
        return binary(matrix)
    entries = matrix.tocoo()
    order = np.lexsort((entries.data, entries.col, entries.row))
    row = entries.row[order]
    column = entries.col[order]
    is_last = np.append((np.diff(row) != 0) | (np.diff(column) != 0), True)
    places = (row[is_last], column[is_last])
    weights = entries.data[order][is_last]
    largest = csr_matrix((weights, places), shape=matrix.shape, dtype=np.float32)
    largest.eliminate_zeros()
    return largest


def lower_bound(gains: np.ndarray) -> np.ndarray:
    """[..] the mean of gains [.., U] over users, less one standard error: a gain that is luck is below 0."""
    return gains.mean(-1) - gains.std(-1) / gains.shape[-1] ** 0.5


def per_user(
    ranked: np.ndarray, relevant: csr_matrix, ks: Sequence[int] = KS
) -> dict[str, np.ndarray]:
    """The metrics of every user's ranked list.

    recall@k = hits / |relevant|; ndcg@k has gain 1 and discount 1 / log2(rank + 1), its ideal list cut at
    min(k, |relevant|); mrr = 1 / rank of the first hit within the K ranked items, 0 without one.

    Args:
        ranked: int [U, K], item rows, best first; -1 is an empty slot, which keeps its rank and never hits.
        relevant: [U, N], not zero at each user's held-out items.

    Returns {"recall@10": float64 [U], ..., "ndcg@10": [U], ..., "mrr": [U]}. Raises ValueError for shapes that do not
    fit, a user without held-out items, an item row outside [-1, N) or twice in a list, or a k above K.
    """
    relevant = binary(relevant)
    held_out = np.diff(relevant.indptr)
    _check_lists(ranked, held_out, ks)
    parts = []
    for start in range(0, max(len(ranked), 1), USERS_A_SLICE):
        part = slice(start, start + USERS_A_SLICE)
        hits = _hits(ranked[part], relevant[part], start)
        parts.append(_metrics_of_hits(hits, held_out[part], ks))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _check_lists(ranked: np.ndarray, held_out: np.ndarray, ks: Sequence[int]) -> None:
    """Raises ValueError for shapes that do not fit, a user without held-out items, or a k above K."""
    users = len(held_out)
    if ranked.ndim != 2 or len(ranked) != users:
        raise ValueError(
            f"ranked has shape {ranked.shape}, relevant has {users} users: one ranked list a user"
        )
    for k in ks:
        if not 1 <= k <= ranked.shape[1]:
            raise ValueError(
                f"a metric at k = {k} needs k ranked items a user: ranked has {ranked.shape[1]} columns"
            )
    if not held_out.all():
        raise ValueError(
            f"user row {np.argmin(held_out)} has no held-out items: leave such users out"
        )


def _metrics_of_hits(
    hits: np.ndarray, held_out: np.ndarray, ks: Sequence[int]
) -> dict[str, np.ndarray]:
    """`per_user` of hits [U, K]; `held_out` [U] is the number of each user's held-out items."""
    discounts = 1 / np.log2(np.arange(2, hits.shape[1] + 2))
    ideal = np.cumsum(discounts)
    recall = {f"recall@{k}": hits[:, :k].sum(axis=1) / held_out for k in ks}
    ndcg = {
        f"ndcg@{k}": hits[:, :k] @ discounts[:k] / ideal[np.minimum(k, held_out) - 1] for k in ks
    }
    mrr = np.where(hits.any(axis=1), 1 / (hits.argmax(axis=1) + 1), 0.0)
    return {**recall, **ndcg, "mrr": mrr}


def recall_of_items(
    ranked: np.ndarray, relevant: csr_matrix, items: np.ndarray, k: int
) -> float | None:
    """The share of the held-out pairs of these items, [N] bool, that are in the first k slots; None without a pair."""
    pairs = binary(relevant).tocoo()
    wanted = np.flatnonzero(items[pairs.col])
    if not len(wanted):
        return None
    found = ranked[pairs.row[wanted], :k] == pairs.col[wanted, None]
    return float(found.any(axis=1).mean())


def _hits(ranked: np.ndarray, relevant: csr_matrix, first_row: int) -> np.ndarray:
    """bool [U, K]: is the ranked item one of the user's held-out ones? `first_row` is for error messages."""
    users, items = relevant.shape
    if ranked.size and (ranked.min() < -1 or ranked.max() >= items):
        raise ValueError(
            f"ranked holds an item row outside the {items} rows of the catalogue (-1 is an empty slot)"
        )
    in_order = np.sort(ranked, axis=1)
    twice = ((in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] >= 0)).any(axis=1)
    if twice.any():
        raise ValueError(
            f"user row {first_row + np.argmax(twice)} has the same item twice in its ranked list"
        )
    # A user and an item as one number turns membership into one search for the whole slice.
    rows = np.arange(users, dtype=np.int64)
    truth = np.repeat(rows, np.diff(relevant.indptr)) * items + relevant.indices
    return np.isin(np.where(ranked >= 0, rows[:, None] * items + ranked, -1), truth, kind="sort")


def ndcg_of_lists(labels: np.ndarray, k: int) -> np.ndarray:
    """NDCG@k of re-ordered lists: labels [Q, N], whether each is right, best first -> float64 [Q]; 0 where none is."""
    discounts = 1 / np.log2(np.arange(2, min(k, labels.shape[1]) + 2))
    ideal = np.append(0, np.cumsum(discounts))[
        np.minimum(labels.sum(1).astype(int), len(discounts))
    ]
    return labels[:, :k] @ discounts / np.where(ideal > 0, ideal, 1)


def coverage(ranked: np.ndarray, k: int, catalogue_size: int) -> float:
    """The share of the catalogue that somebody gets in the first k slots of ranked [U, K] (-1 = empty)."""
    top = ranked[:, :k]
    return float(
        np.count_nonzero(np.bincount(top[top >= 0], minlength=catalogue_size)) / catalogue_size
    )


def intra_list_distance(ranked: np.ndarray, vectors: np.ndarray, k: int) -> float:
    """How unlike each other the first k items of a list are: 1 - cosine, averaged over pairs and then over users.

    Args:
      ranked: int [U, K] item rows, -1 in empty slots. Users with fewer than two items do not count.
      vectors: [N, d] of length 1.

    Returns:
      From 0, all alike, to 2; 0 if no user has two items.
    """
    distances = []
    for start in range(0, len(ranked), USERS_A_SLICE // 16):
        top = ranked[start : start + USERS_A_SLICE // 16, :k]
        is_item = top >= 0
        listed = vectors[top] * is_item[:, :, None]
        pairs = is_item.sum(1) * (is_item.sum(1) - 1)
        # The square of a sum of vectors holds each pair twice, and each vector with itself.
        cosines = np.square(listed.sum(1)).sum(1) - np.square(listed).sum((1, 2))
        distances.append(1 - cosines[pairs > 0] / pairs[pairs > 0])
    whole = np.concatenate(distances)
    return float(whole.mean()) if len(whole) else 0.0


def rmse(predicted: np.ndarray, ratings: np.ndarray) -> float:
    """The root of the mean squared error of predicted ratings, of the shape of `ratings`."""
    return float(np.sqrt(np.mean(np.square(np.asarray(predicted, np.float64) - ratings))))


def summarise(values: dict[str, np.ndarray], seed: int = 0, resamples: int = 1000) -> dict:
    """Means over users with 95 % bootstrap intervals: {"ndcg@10": mean, "ndcg@10_ci": [low, high], ...}.

    Plain floats, ready for JSON. Raises ValueError where there are no users.
    """
    means, intervals = _bootstrap(np.stack(list(values.values()), axis=1), seed, resamples)
    named = [f"{name}_ci" for name in values]
    return dict(zip([*values, *named], [*means, *intervals], strict=True))


def paired_bootstrap(a: np.ndarray, b: np.ndarray, seed: int = 0, resamples: int = 1000) -> dict:
    """Is system `a` better than `b` on the same users [U]? {"difference": mean(a - b), "ci": [low, high]}.

    A 95 % interval above zero says that `a` is. Raises ValueError where users are none or not equally many.
    """
    if a.shape != b.shape:
        raise ValueError(
            f"a paired comparison needs the same users: got {a.shape} and {b.shape} values"
        )
    means, intervals = _bootstrap((a - b)[:, None], seed, resamples)
    return {"difference": means[0], "ci": intervals[0]}


def _bootstrap(
    values: np.ndarray, seed: int, resamples: int
) -> tuple[list[float], list[list[float]]]:
    """Means [M] of values [U, M] over users, and percentiles 2.5 and 97.5 [M, 2] of the means of resampled users."""
    users = len(values)
    if users == 0:
        raise ValueError("there are no users to average over")
    rng = np.random.default_rng(seed)
    drawn = (
        np.bincount(rng.integers(users, size=users), minlength=users) for _ in range(resamples)
    )
    resampled = [times @ values / users for times in drawn]
    return values.mean(axis=0).tolist(), np.percentile(resampled, [2.5, 97.5], axis=0).T.tolist()


def check_no_overlap(seen: csr_matrix, relevant: csr_matrix) -> None:
    """Raises UserError where a user's history [U, N] already holds one of its held-out items [U, N]."""
    overlap = binary(seen).multiply(binary(relevant)).tocoo()
    if overlap.nnz:
        first = f"the first at user row {overlap.row[0]} and item row {overlap.col[0]}"
        hint = "remove from the later split what an earlier holds"
        raise UserError(
            f"history and ground truth overlap in {overlap.nnz} user-item pairs, {first}: {hint}"
        )
