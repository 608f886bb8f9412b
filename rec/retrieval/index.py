"""The candidate index: the best rows of an embedding matrix for a query, inside the SavedModel.

- `ExactIndex` scores every row. It needs no custom op, so a stock TF Serving can run it.
- `ScannIndex` is approximate: a tree picks leaves, quantised scores pick rows from them, and those are scored again
  with their float32 embeddings, so that every score that comes out is an exact inner product.
- `build_index` finds ScaNN's cheapest settings that meet a recall target on real query embeddings, measures them on
  other queries, and falls back to exact where ScaNN cannot work.
- A query's answer depends on that query alone, whatever else is in its batch: down to the last bit, so that nearly
  equal scores do not change places. `search_each` searches every query to a depth of its own.
- All signatures of a SavedModel share one searcher, which the first request builds from the variables.

A module that holds a `ScannIndex` is saved with `tf.saved_model.SaveOptions(namespace_whitelist=["Scann"])`; Python
loads it after `import scann`. Not covered: filters in the search, adding rows without building anew.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import product
from typing import Any

import numpy as np
import tensorflow as tf

from rec import LOWEST
from rec.errors import UserError
from rec.numerics import at_least

MIN_SCANN_ROWS = 16  # ScaNN trains 16 centres a block and fails with fewer rows
# Few queries go another way through ScaNN, and find other rows where quantised scores are equal (1.7 % of 1,300
# queries). In catalogues below MANY_ROWS, few grows with the width: up to 8 queries of 65 dimensions, 16 of 321. Others
# differed up to 5 queries at most. Filling up to 6 costs a lone query 60 to 190 microseconds.
MANY_ROWS = 16_000
FEWEST_QUERIES = 6
FEWEST_QUERIES_OF_FEW_ROWS = 32
SAMPLE = (
    500  # queries to search settings on, and as many to measure with: standard error about 0.004
)
REORDER_FACTORS = (1.5, 2, 3, 5, 10, 20, 50)  # rows that are scored again, as a multiple of k
REORDER_COST = (
    25  # an exact score costs as much as so many quantised ones (measured: 35 ns against 1.3 ns)
)
LEAF_STEPS = (
    24  # numbers of leaves to try, from the fewest that hold enough rows to all, in equal ratios
)


class ExactIndex(tf.Module):
    """Brute force: the inner product with every row of `embeddings`, float32 [N, d]."""

    def __init__(self, embeddings: np.ndarray) -> None:
        super().__init__(name="exact_index")
        # A column per row of `embeddings`: oneDNN rounds a product with rows by how many queries there are.
        self.columns = tf.Variable(
            embeddings.T, trainable=False, dtype=tf.float32, name="embeddings"
        )

    def search(self, queries: tf.Tensor, depth: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The `depth` rows with the largest inner products, best first; of equal ones the lower row first.

        Args:
            queries: float32 [B, d]; B may be unknown, or 0.
            depth: scalar int, rows for each query; may exceed N.

        Returns:
            scores float32 [B, depth] and rows int32 [B, depth]. Where there is no row (depth > N, or a query
            that is not finite) the score is float32's lowest finite value and the row is -1.
        """
        count = tf.shape(queries)[0]
        scores = tf.matmul(at_least(2, queries), self.columns)[:count]
        scores, rows = tf.math.top_k(
            scores, tf.minimum(tf.cast(depth, tf.int32), tf.shape(scores)[1])
        )
        return _fill(scores, rows, queries, depth)

    def search_each(self, queries: tf.Tensor, depths: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """As `search`, each query to its own depth at least: `depths` int32 [B]. Width D is the largest of them."""
        return self.search(queries, tf.reduce_max(depths, axis=0))


class ScannIndex(tf.Module):
    """ScaNN (Guo et al., 2020, https://arxiv.org/abs/1908.10396); contract as `ExactIndex`, approximate.

    `settings` [2] are the leaves (clusters of rows) to search and the rows to score again in searches to depth
    `k`; a variable, so that trying others needs no new build.
    """

    def __init__(self, tensors: list[tf.Tensor], *, leaves: int, k: int) -> None:
        """`tensors`: from `scann_to_tensors`, of a searcher by dot product with `leaves` and reordering."""
        super().__init__(name="scann_index")
        self.tensors = [tf.Variable(tensor, trainable=False) for tensor in tensors]
        self.rows, self.leaves, self.k = tensors[-1].shape[0], leaves, k
        has_few_rows = self.rows < MANY_ROWS
        self._fewest_queries = FEWEST_QUERIES_OF_FEW_ROWS if has_few_rows else FEWEST_QUERIES
        self.settings = tf.Variable(
            [leaves, self.rows], trainable=False, dtype=tf.int32, name="settings"
        )
        content = b"".join(np.asarray(tensor.numpy()).tobytes() for tensor in tensors)
        # Signatures that name the searcher alike share it instead of building one each (1.6 s and 0.3 GiB for
        # a million rows); the hash keeps two versions in one process apart.
        self.shared_name = f"rec-scann-{hashlib.sha256(content).hexdigest()[:32]}"

    def search(self, queries: tf.Tensor, depth: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """As `ExactIndex.search`, but may miss a row for one that scores less, or where the leaves run out."""
        depth = tf.cast(depth, tf.int32)
        leaves, reorder = tf.unstack(self.settings)
        deeper = tf.maximum(
            tf.cast(depth, tf.float32) / self.k, 1.0
        )  # keeps the recall beyond depth k
        reorder = tf.cast(tf.minimum(tf.cast(reorder, tf.float32) * deeper, self.rows), tf.int32)
        count = tf.shape(queries)[0]
        # A whole batch fails by one NaN: it gets zeros instead.
        clean = tf.where(tf.math.is_finite(queries), queries, 0.0)
        # Not search_batched_parallel: it splits by 256 queries, and what is left may be fewer than that.
        found = self._searcher().search_batched(
            at_least(self._fewest_queries, clean),
            final_num_neighbors=tf.minimum(depth, self.rows),
            pre_reorder_num_neighbors=reorder,
            leaves_to_search=tf.maximum(leaves, _fewest_leaves(depth, self.rows, self.leaves)),
        )
        return _fill(found.distances[:count], found.indices[:count], queries, depth)

    def search_each(self, queries: tf.Tensor, depths: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """As `search`, each query to its own depth: `depths` int32 [B].

        Queries of equal depth are searched together, so few different depths are cheap.

        Returns:
            scores and rows [B, D], D being the largest depth; what lies beyond a query's own depth is left empty.
        """
        distinct, which = tf.unique(depths)
        shape = tf.stack([tf.shape(queries)[0], tf.reduce_max(depths, axis=0)])

        def search_group(
            group: tf.Tensor, scores: tf.Tensor, rows: tf.Tensor
        ) -> tuple[tf.Tensor, ...]:
            members = tf.where(which == group)
            found = self.search(tf.gather(queries, members[:, 0]), distinct[group])
            columns = [[0, 0], [0, shape[1] - distinct[group]]]
            more_scores = tf.pad(found[0], columns, constant_values=LOWEST)
            more_rows = tf.pad(found[1], columns, constant_values=-1)
            return (
                group + 1,
                tf.tensor_scatter_nd_update(scores, members, more_scores),
                tf.tensor_scatter_nd_update(rows, members, more_rows),
            )

        def search_groups() -> tuple[tf.Tensor, tf.Tensor]:
            nothing = tf.fill(shape, LOWEST), tf.fill(shape, -1)
            return tf.while_loop(
                lambda group, *_: group < tf.size(distinct), search_group, (0, *nothing)
            )[1:]

        return tf.cond(tf.size(distinct) > 1, search_groups, lambda: self.search(queries, shape[1]))

    @tf.function(input_signature=[])
    def release(self) -> None:
        """Frees the searcher's memory, which a Python process otherwise keeps after it drops the bundle."""
        tf.raw_ops.DestroyResourceOp(
            resource=self._searcher().searcher_handle, ignore_lookup_error=True
        )

    def _searcher(self) -> Any:
        """The shared searcher; builds it from the variables where there is none yet."""
        from scann.scann_ops.py import (
            scann_ops,
        )  # here, because the exact index has to work without ScaNN

        *state, embeddings = self.tensors
        handle = scann_ops.tensors_to_scann(embeddings, *state, shared_name=self.shared_name)
        return scann_ops.ScannSearcher(handle)


def _fill(
    scores: tf.Tensor, rows: tf.Tensor, queries: tf.Tensor, depth: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Marks places without a row and widens to `depth`. (ScaNN pads with NaN and row 0, or not at all.)"""
    found = tf.math.is_finite(scores) & tf.reduce_all(
        tf.math.is_finite(queries), axis=1, keepdims=True
    )
    columns = [[0, 0], [0, tf.cast(depth, tf.int32) - tf.shape(scores)[1]]]
    scores = tf.pad(tf.where(found, scores, LOWEST), columns, constant_values=LOWEST)
    rows = tf.pad(tf.where(found, rows, -1), columns, constant_values=-1)
    shape = [queries.shape[0], tf.get_static_value(depth)]
    return tf.ensure_shape(scores, shape), tf.ensure_shape(rows, shape)


def _fewest_leaves(depth: tf.Tensor, rows: int, leaves: int) -> tf.Tensor:
    """Leaves that hold 4 x `depth` rows on average: fewer would run out of rows in a deep search."""
    share = tf.minimum(4.0 * tf.cast(depth, tf.float32) / rows, 1.0)
    return tf.cast(tf.math.ceil(share * leaves), tf.int32)


def build_index(
    embeddings: np.ndarray,
    queries: np.ndarray,
    *,
    kind: str,
    recall_target: float,
    k: int,
    seed: int,
) -> tuple[ExactIndex | ScannIndex, dict[str, Any]]:
    """Builds the index over `embeddings` and measures its recall@k against exact search.

    Args:
        embeddings: float32 [N, d], the candidates; a search returns positions in it.
        queries: float32 [Q, d], real query embeddings; of at most 1,000, half tune the settings and half measure them.
        kind: "scann" or "exact".
        recall_target: in (0, 1]; the recall@k that both halves have to reach.
        seed: draws the queries. ScaNN's clustering takes none: two builds differ slightly.

    Returns:
        The index, and for the bundle's metadata "kind" as built, "recall@K", for ScaNN "leaves", "leaves_to_search"
        and "reorder", and "fallback", the reason where exact search took ScaNN's place.

    Raises:
        UserError: without rows, or where an embedding or its norm is not finite: ScaNN would end the process.
    """
    if not len(embeddings):
        raise UserError("there is nothing to index: the catalogue has no items")
    for name, matrix in (("candidate", embeddings), ("query", queries)):
        bad = np.flatnonzero(~np.isfinite(np.einsum("nd,nd->n", matrix, matrix)))
        if len(bad):
            found = f"{len(bad)} of {len(matrix)} {name} embeddings are not finite, the first in row {bad[0]}"
            raise UserError(
                f"{found}: the model has diverged, train it again with a lower learning rate"
            )
    exact, metadata = ExactIndex(embeddings), {"kind": "exact", f"recall@{k}": 1.0}
    if kind == "exact":
        return exact, metadata
    if len(embeddings) < MIN_SCANN_ROWS:
        reason = f"ScaNN needs {MIN_SCANN_ROWS} items, there are {len(embeddings)}"
    elif find_spec("scann") is None:
        reason = "the package scann is not installed (it has wheels for x86-64 Linux only)"
    elif len(queries) < 2:
        reason = f"tuning ScaNN needs 2 query embeddings, there are {len(queries)}"
    else:
        drawn = np.random.default_rng(seed).permutation(len(queries))[: 2 * SAMPLE]
        index = _build_scann(embeddings, k)
        if settings := _tune(index, exact, queries[drawn], recall_target):
            return index, {"kind": "scann", **settings}
        reason = f"ScaNN did not reach recall {recall_target} without scoring every item"
    return exact, metadata | {"fallback": reason}


def _build_scann(embeddings: np.ndarray, k: int) -> ScannIndex:
    """Builds ScaNN with about sqrt(N) leaves."""
    from scann.scann_ops.py import scann_ops

    leaves = round(len(embeddings) ** 0.5)
    # Blocks of 2 dimensions, threshold 0.2: ScaNN's own example. Blocks of 1 need fewer rows scored again, yet
    # cost 1.1 to 2 times as much at equal recall (200k rows, 65 dimensions).
    builder = scann_ops.builder(embeddings, k, "dot_product").tree(leaves, leaves)
    builder = builder.score_ah(2, anisotropic_quantization_threshold=0.2).reorder(5 * k)
    with _without_stderr():
        return ScannIndex(
            scann_ops.scann_to_tensors(builder.build().searcher_handle), leaves=leaves, k=k
        )


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Silences ScaNN's C++ log, which nothing else turns off. Its errors are exceptions."""
    with open(os.devnull, "w") as nowhere, os.fdopen(os.dup(2), "w") as kept:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept.fileno(), 2)


def _tune(
    index: ScannIndex, exact: ExactIndex, queries: np.ndarray, target: float
) -> dict[str, Any] | None:
    """Leaves `index` with the cheapest settings that reach the target on one half of the queries and on the other.

    Recall is the share of scores that reach the exact k-th best one: equal scores are interchangeable, as to a user.

    Returns:
        The settings, and the recall on the second half; None if no settings reach the target.
    """
    rows, leaves, k = index.rows, index.leaves, tf.constant(min(index.k, index.rows))
    parts = np.array_split(
        queries, 1 + len(queries) * rows // 2**25
    )  # a matrix of all scores takes at most 128 MB
    kth_best = np.concatenate([exact.search(part, k)[0].numpy()[:, -1:] for part in parts])
    kth_best -= 1e-5 * np.abs(kth_best)  # float32: ScaNN adds up an inner product in another order
    tuning, measuring = np.array_split(np.arange(len(queries)), 2)
    search = tf.function(index.search)

    def recall(half: np.ndarray) -> float:
        return float((search(queries[half], k)[0].numpy() >= kth_best[half]).mean())

    fewest = int(_fewest_leaves(k, rows, leaves))
    searched = np.unique(np.geomspace(fewest, leaves, LEAF_STEPS).round().astype(int)).tolist()
    reorders = [
        reorder for factor in REORDER_FACTORS if (reorder := round(factor * index.k)) < rows
    ]
    cost = {
        pair: rows * pair[0] / leaves + REORDER_COST * pair[1]
        for pair in product(searched, reorders)
    }
    for settings in sorted(cost, key=cost.__getitem__):
        index.settings.assign(settings)
        if recall(tuning) >= target and (measured := recall(measuring)) >= target:
            found = {"leaves": leaves, "leaves_to_search": settings[0], "reorder": settings[1]}
            return {f"recall@{index.k}": measured, **found}
    return None
