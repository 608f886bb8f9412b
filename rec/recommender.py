"""One retrieval and one ranking bundle, composed in one graph: retrieve, then rank.

    recommender = Recommender.load("savedmodels/retrieval/1", "savedmodels/ranking/1")
    recommender.recommend(["u7"], [None], k=10)

Nothing of the training code is imported: a server needs the two directories and this file. The composition can itself
be exported as a bundle (`python -m rec.export --stage recommender`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tensorflow as tf

from rec.errors import UserError
from rec.registry import check_pair, read_catalogue, verify

IDS = tf.TensorSpec([None], tf.string)
LISTS = tf.TensorSpec([None, None], tf.string)
TIMES = tf.TensorSpec([None], tf.int64)
FLAGS = tf.TensorSpec([None], tf.bool)
ROWS = tf.TensorSpec([None], tf.int32)
LOWEST = float(np.finfo(np.float32).min)  # the bundles' score of an empty place


class RecommenderModule(tf.Module):
    """Two loaded bundles as one model. `ranking` may be None: then retrieval's order is the answer."""

    def __init__(self, retrieval: Any, ranking: Any | None, candidates: int) -> None:
        """`candidates`: how many of the retrieved items are ranked and returned."""
        super().__init__(name="recommender")
        self.retrieval, self.ranking, self._candidates = retrieval, ranking, candidates

    @tf.function(input_signature=[IDS])
    def serving_default(self, user_id: tf.Tensor) -> dict[str, tf.Tensor]:
        """A known user's recommendations."""
        found = self.retrieval.serving_default(user_id)
        if self.ranking is None:
            return found
        items = found["item_id"][:, : self._candidates]
        scores = self.ranking.serving_default(user_id, items)["score"]
        return self._ranked(found, items, scores, self.retrieval.is_cold(user_id, self.retrieval.history(user_id)))

    @tf.function(input_signature=[IDS, LISTS])
    def from_history(self, user_id: tf.Tensor, history: tf.Tensor) -> dict[str, tf.Tensor]:
        """Recommendations from the caller's history."""
        found = self.retrieval.from_history(user_id, history)
        if self.ranking is None:
            return found
        items = found["item_id"][:, : self._candidates]
        scores = self.ranking.from_history(user_id, history, items)["score"]
        return self._ranked(found, items, scores, self.retrieval.is_cold(user_id, history))

    @tf.function(input_signature=[IDS, LISTS, LISTS, TIMES])
    def recommend_from(
        self, user_id: tf.Tensor, history: tf.Tensor, seen: tf.Tensor, time: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        """Like from_history, at a given time, without exactly `seen` [B, S]: what an evaluation needs."""
        found = self.retrieval.retrieve(user_id, history, seen, time)
        if self.ranking is None:
            return found
        items = found["item_id"][:, : self._candidates]
        scores = self.ranking.score_at(user_id, history, items, time)["score"]
        return self._ranked(found, items, scores, self.retrieval.is_cold(user_id, history))

    @tf.function(input_signature=[IDS, LISTS, FLAGS, LISTS])
    def answer(
        self, user_id: tf.Tensor, history: tf.Tensor, is_given: tf.Tensor, exclude: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        """What a server asks: retrieval, exclusions and ranking in one call (`Recommender.answer`)."""
        found = self.retrieval.answer(user_id, history, is_given, exclude)
        return self._all_ranked(found, user_id, history, is_given)

    @tf.function(input_signature=[IDS, LISTS, FLAGS, ROWS])
    def answer_within(
        self, user_id: tf.Tensor, history: tf.Tensor, is_given: tf.Tensor, within: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        """Like `answer`, with the best of just the items at these places of items.parquet."""
        found = self.retrieval.answer_within(user_id, history, is_given, within)
        return self._all_ranked(found, user_id, history, is_given)

    def _all_ranked(
        self, found: dict[str, tf.Tensor], user_id: tf.Tensor, history: tf.Tensor, is_given: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        """All that was retrieved: the candidates in the ranker's order, then the others in retrieval's."""
        rows, scores, retrieved = found["row"], found["score"], found["score"]
        ranks = tf.broadcast_to(tf.range(1, tf.shape(rows)[1] + 1), tf.shape(rows))
        if self.ranking is not None:
            n = self._candidates
            items = found["item_id"][:, :n]
            ranked = self.ranking.answer(user_id, history, is_given, items)["score"]
            best, order = tf.math.top_k(tf.where(found["cold"][:, None], scores[:, :n], ranked), items.shape[1])
            ranks = tf.concat([order + 1, ranks[:, n:]], 1)
            scores = tf.concat([best, tf.fill(tf.shape(ranks[:, n:]), LOWEST)], 1)
            rows, retrieved = (tf.gather(each, ranks - 1, batch_dims=1) for each in (rows, retrieved))
        return {"rows": rows, "scores": scores, "ranks": ranks, "retrieved": retrieved, "cold": found["cold"]}

    def _ranked(
        self, found: dict[str, tf.Tensor], items: tf.Tensor, scores: tf.Tensor, cold: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        """Items in the ranker's order; in order of popularity, as they are, for a cold user, of whom it knows nothing.

        An empty place ("") has the lowest score, so those stay last.
        """
        scores = tf.where(cold[:, None], found["score"][:, : self._candidates], scores)
        best, order = tf.math.top_k(scores, items.shape[1])
        return {"item_id": tf.gather(items, order, batch_dims=1), "score": best}

    def signatures(self) -> dict[str, Any]:
        return {name: getattr(self, name).get_concrete_function() for name in ("serving_default", "from_history")}


@dataclass(frozen=True)
class Recommender:
    """A loaded pair, with what a server needs to know of it."""

    module: RecommenderModule
    items: pd.DataFrame  # items.parquet, indexed by item_id, the most popular first
    users: list[str]  # some of the users that it knows
    metadata: dict[str, dict[str, Any]]  # by stage

    @classmethod
    def load(cls, retrieval: Path, ranking: Path | None = None, allow_mismatch: bool = False) -> "Recommender":
        """Loads a retrieval bundle and, if given, the ranking bundle that was trained for it.

        Raises:
          UserError: a directory is not a bundle of that stage, is damaged, or the ranking bundle belongs to another
            retrieval version and `allow_mismatch` is not set.
        """
        retrieval = Path(retrieval)
        metadata = {"retrieval": verify(retrieval, "retrieval")}
        if ranking is not None:
            metadata["ranking"] = verify(Path(ranking), "ranking")
            if not allow_mismatch:
                check_pair(metadata["retrieval"], metadata["ranking"], ranking)
        loaded = {"retrieval": load_bundle(retrieval), "ranking": None if ranking is None else load_bundle(ranking)}
        count = metadata["ranking"]["config"]["ranking"]["candidates"] if ranking is not None else 0
        module = RecommenderModule(loaded["retrieval"], loaded["ranking"], count)
        items, users = read_catalogue(retrieval)
        for stage, path in (("retrieval", retrieval), ("ranking", ranking)):
            if loaded[stage] is not None and not hasattr(loaded[stage], "answer"):
                raise UserError(f"{path} is from an older version of rec: export the bundle again")
        return cls(module, items, users, metadata)

    @cached_property
    def _answer(self) -> Any:
        """Calling the traced graph itself saves tf.function's search for it."""
        return self.module.answer.get_concrete_function()

    @property
    def predicts_ratings(self) -> bool:
        """Whether the ranking bundle's scores are ratings."""
        return "ranking" in self.metadata and self.metadata["ranking"]["config"]["ranking"]["objective"] == "rating"

    def versions(self) -> dict[str, int]:
        return {stage: metadata["version"] for stage, metadata in self.metadata.items()}

    def answer(
        self, user_ids: Sequence[str], histories: Sequence[list[str] | None], excluded: Sequence[list[str]]
    ) -> dict[str, np.ndarray]:
        """The candidates for a batch of requests: what neither the caller nor the bundle knows as seen.

        Args:
          user_ids: "" for an anonymous user.
          histories: a caller's history, oldest first; None uses the stored one.
          excluded: further items to leave out.

        Returns, best first, [B, N]:
          rows: the items' places in items.parquet, -1 where there is none.
          scores: the ranker's (retrieval's where there is no ranker); float32's lowest for what it has not ranked.
          ranks, retrieved: the items' places in retrieval's order, from 1, and retrieval's scores.
          cold: [B] bool, answered by popularity.
        """
        given = tf.constant([history is not None for history in histories])
        lists = pad_lists([history or [] for history in histories])
        answer = self._answer(tf.constant(user_ids), lists, given, pad_lists(excluded))
        return {name: values.numpy() for name, values in answer.items()}

    def answer_within(self, user_id: str, history: list[str] | None, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The best of just these rows of `items` [M] for one user: each is scored, so this costs M times as much."""
        lists, given = pad_lists([history or []]), tf.constant([history is not None])
        answer = self.module.answer_within(tf.constant([user_id]), lists, given, tf.constant(rows, tf.int32))
        return {name: values.numpy() for name, values in answer.items()}

    def similar(self, item_ids: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Similar items: rows of `items` [B, K] (-1 where there is none) and their cosine [B, K]."""
        answer = self.module.retrieval.similar_items(tf.constant(item_ids, tf.string))
        ids = _strings(answer["item_id"])
        rows = self.items.index.get_indexer(pd.Index(ids.ravel()))
        return rows.reshape(ids.shape), answer["score"].numpy()

    def histories(self, user_ids: list[str]) -> list[list[str]]:
        """What the bundle knows of each user, oldest first, up to index.max_seen items."""
        stored = _strings(self.module.retrieval.history(tf.constant(user_ids, tf.string)))
        return [[item for item in row if item] for row in stored.tolist()]

    def cosines(self, items: list[str], others: list[str]) -> np.ndarray:
        """[N, H]: how near the items' vectors are; float32's lowest where an item is unknown."""
        return self.module.retrieval.cosines(tf.constant(items, tf.string), tf.constant(others, tf.string)).numpy()

    def close(self) -> None:
        """Frees the memory of a ScaNN searcher, which a process otherwise keeps."""
        release = getattr(self.module.retrieval.index, "release", None)
        if release is not None:
            release()


def load_bundle(path: Path) -> Any:
    """tf.saved_model.load with ScaNN's operations registered.

    Raises:
      UserError: the directory does not hold a SavedModel that can be read.
    """
    import scann.scann_ops.py.scann_ops  # noqa: F401  (registers the operations that a ScaNN bundle is made of)

    try:
        return tf.saved_model.load(str(path))
    except (OSError, ValueError, tf.errors.OpError) as error:
        raise UserError(f"{path}: the SavedModel cannot be loaded: {str(error).splitlines()[0]}") from error


def pad_lists(lists: Sequence[list[str]]) -> tf.Tensor:
    """Ragged lists of ids -> [B, widest] string, "" on the left."""
    width = max(map(len, lists), default=0)
    rows = [[""] * (width - len(row)) + list(row) for row in lists]
    return tf.reshape(tf.constant(rows, tf.string), [len(lists), width])


def _strings(ids: tf.Tensor) -> np.ndarray:
    return np.char.decode(ids.numpy().astype(bytes), "utf-8")
