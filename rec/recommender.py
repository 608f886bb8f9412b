"""One retrieval and one ranking bundle, composed in one graph: retrieve, then rank.

    recommender = Recommender.load("savedmodels/retrieval/1", "savedmodels/ranking/1")
    recommender.recommend(["u7"], [None], k=10)

Nothing of the training code is imported: a server needs the two directories and this file. The composition can itself
be exported as a bundle (`python -m rec.export --stage recommender`).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tensorflow as tf

from rec.errors import UserError
from rec.registry import read_metadata

IDS = tf.TensorSpec([None], tf.string)
LISTS = tf.TensorSpec([None, None], tf.string)
TIMES = tf.TensorSpec([None], tf.int64)


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
    """A loaded pair (or recommender bundle), with what a server needs to know of it."""

    module: Any  # RecommenderModule, or a loaded bundle with the same functions
    items: pd.DataFrame  # items.parquet, indexed by item_id
    metadata: dict[str, dict[str, Any]]  # by stage

    @classmethod
    def load(cls, retrieval: Path, ranking: Path | None = None, allow_mismatch: bool = False) -> "Recommender":
        """Loads a retrieval bundle and, if given, the ranking bundle that was trained for it.

        Raises:
          UserError: a directory is not a bundle of that stage, or the ranking bundle belongs to another retrieval
            version and `allow_mismatch` is not set.
        """
        retrieval = Path(retrieval)
        metadata = {"retrieval": read_metadata(retrieval, "retrieval")}
        if ranking is not None:
            metadata["ranking"] = read_metadata(Path(ranking), "ranking")
            if not allow_mismatch:
                check_pair(metadata["retrieval"], metadata["ranking"], ranking)
        loaded = {"retrieval": load_bundle(retrieval), "ranking": None if ranking is None else load_bundle(ranking)}
        count = metadata["ranking"]["config"]["ranking"]["candidates"] if ranking is not None else 0
        module = RecommenderModule(loaded["retrieval"], loaded["ranking"], count)
        try:
            items = pd.read_parquet(retrieval / "items.parquet").set_index("item_id")
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{retrieval}/items.parquet cannot be read: export the bundle again") from error
        return cls(module, items, metadata)

    @property
    def predicts_ratings(self) -> bool:
        """Whether the ranking bundle's scores are ratings."""
        return "ranking" in self.metadata and self.metadata["ranking"]["config"]["ranking"]["objective"] == "rating"

    def versions(self) -> dict[str, int]:
        return {stage: metadata["version"] for stage, metadata in self.metadata.items()}

    def recommend(
        self, user_ids: list[str], histories: list[list[str] | None]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ranked candidates for a batch of users.

        Args:
          user_ids: "" for an anonymous user.
          histories: a caller's history, oldest first; None uses the stored one. All None, or none of them.

        Returns:
          item ids [B, N] (str, "" where there is none), scores [B, N], and cold [B] bool: answered by popularity.
        """
        users = tf.constant(user_ids, tf.string)
        if histories[0] is None:
            answer, history = self.module.serving_default(users), self.module.retrieval.history(users)
        else:
            history = pad_lists([h or [] for h in histories])
            answer = self.module.from_history(users, history)
        cold = self.module.retrieval.is_cold(users, history).numpy()
        return _strings(answer["item_id"]), answer["score"].numpy(), cold

    def stored_history(self, user_id: str) -> list[str]:
        """What the bundle knows of a user, oldest first, up to index.max_seen items."""
        return [item for item in _strings(self.module.retrieval.history(tf.constant([user_id])))[0].tolist() if item]

    def similar(self, item_ids: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Similar items: item ids [B, K] ("" where there is none) and their cosine [B, K]."""
        answer = self.module.retrieval.similar_items(tf.constant(item_ids, tf.string))
        return _strings(answer["item_id"]), answer["score"].numpy()


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


def check_pair(retrieval: dict[str, Any], ranking: dict[str, Any], where: Path | str) -> None:
    """Raises UserError if the ranking bundle was not trained for this retrieval bundle."""
    expected = ranking["built_from"]["retrieval"]
    if expected != {"version": retrieval["version"], "id": retrieval["id"]}:
        raise UserError(
            f"{where} was trained for retrieval version {expected['version']}, not for version "
            f"{retrieval['version']}: name a matching pair, or pass --allow-mismatch"
        )


def pad_lists(lists: list[list[str]]) -> tf.Tensor:
    """Ragged lists of ids -> [B, widest] string, "" on the left."""
    width = max(map(len, lists), default=0)
    rows = [[""] * (width - len(row)) + list(row) for row in lists]
    return tf.reshape(tf.constant(rows, tf.string), [len(lists), width])


def _strings(ids: tf.Tensor) -> np.ndarray:
    return np.char.decode(ids.numpy().astype(bytes), "utf-8")
