"""A loaded pair of bundles: what it can do, and how the ranker's scores reorder what retrieval has found.

recommender.py implements `Backend` with TensorFlow, another module lets TF Serving compute. Both reorder by `rerank`.
Nothing of TensorFlow is imported here.
"""

from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import NamedTuple, Protocol

import numpy as np
import pandas as pd

from rec import LOWEST
from rec.bundles.metadata import PairMetadata


class Candidates(NamedTuple):
    """The answers to a batch of requests, the best item first: [B, N] arrays, or tensors in a graph."""

    rows: np.ndarray  # the items' places in items.parquet, -1 for an empty place
    scores: np.ndarray  # the ranker's (LOWEST if it has none), or without a ranker retrieval's
    ranks: np.ndarray  # the items' places in retrieval's order, from 1
    retrieved: np.ndarray  # retrieval's scores
    cold: np.ndarray  # [B] bool, answered by popularity


class Backend(Protocol):
    """A loaded retrieval bundle and, if there is one, its ranking bundle. One thread calls all methods.

    UnavailableError (rec/serving/schemas.py) means that the models do not answer now.
    """

    items: pd.DataFrame  # items.parquet, indexed by item_id, the most popular first
    users: list[str]  # some of the users that it knows
    vectors: (
        np.ndarray
    )  # [items, d] float32 of length 1: items that are alike have a large dot product
    metadata: PairMetadata

    def answer(
        self,
        user_ids: Sequence[str],
        histories: Sequence[list[str] | None],
        excluded: Sequence[list[str]],
        exclude_seen: Sequence[bool] | None = None,
    ) -> Candidates:
        """The candidates for a batch of requests.

        Args:
          user_ids: "" for an anonymous user.
          histories: a caller's history, oldest first; None uses the stored one.
          excluded: items to leave out.
          exclude_seen: whether what the caller and the bundle know as seen is left out; None: the bundle's rule.
        """

    def answer_within(
        self, user_id: str, history: list[str] | None, rows: np.ndarray
    ) -> Candidates | None:
        """The best of just these rows of `items` [M] for one user. None if this pair cannot do it.

        Each of them is scored, so it costs M times as much.
        """

    def similar(self, item_ids: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Similar items: rows of `items` [B, K] (-1 for an empty place) and their cosines [B, K]."""

    def histories(self, user_ids: list[str]) -> list[list[str]]:
        """The stored history of each user, oldest first, up to index.max_seen items."""

    def disliked(self, user_ids: list[str]) -> list[list[str]]:
        """What each user has marked by a negative event: never to be recommended."""


class Arrays(NamedTuple):
    """The operations that `rerank` needs, on NumPy's arrays or on tensors."""

    library: ModuleType  # numpy or tensorflow
    sort: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    """[B, N] -> the scores in descending order, and where they were. Equal scores keep their order."""
    take: Callable[[np.ndarray, np.ndarray], np.ndarray]
    """The values [B, N] at the places [B, N]."""


def _sort(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    places = np.argsort(-scores, axis=1, kind="stable")
    return _take(scores, places), places


def _take(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    return np.take_along_axis(values, places, axis=1)


NUMPY = Arrays(np, _sort, _take)


def rerank(
    arrays: Arrays, retrieved: Mapping[str, np.ndarray], ranked: np.ndarray, candidates: int | None
) -> Candidates:
    """The first `candidates` in the ranker's order, then the others in retrieval's.

    The ranker knows nothing about a cold user, whose order stays. An empty place has the lowest score, so it stays
    behind the others.

    Args:
      retrieved: row, score [B, N] and cold [B], from a retrieval bundle's `answer`.
      ranked: the ranker's scores of the first candidates.
      candidates: None without a ranker.
    """
    library = arrays.library
    found = retrieved["score"]
    cold = retrieved["cold"]
    scores = library.where(cold[:, None], found[:, :candidates], ranked)
    if candidates is not None:
        others = found[:, candidates:]
        if others.shape[1] != 0:  # each operation of a graph costs some time
            scores = library.concat([scores, library.zeros_like(others) + LOWEST], 1)
    scores, places = arrays.sort(scores)
    return Candidates(
        rows=arrays.take(retrieved["row"], places),
        scores=scores,
        ranks=places + 1,
        retrieved=arrays.take(found, places),
        cold=cold,
    )


def pad_left(lists: Sequence[list[str]], width: int = 0) -> list[list[str]]:
    """Lists of ids with "" in front, to a common length of at least `width`."""
    width = max(width, *map(len, lists), 0)
    return [[""] * (width - len(row)) + list(row) for row in lists]
