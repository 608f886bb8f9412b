"""One retrieval and one ranking bundle, composed in one graph: retrieve, then rank.

    recommender = Recommender.load("savedmodels/retrieval/1", "savedmodels/ranking/1")
    recommender.recommend(["u7"], [None], k=10)

Nothing of the training code is imported: a server needs the two directories and this file. The composition can itself
be exported as a bundle (`python -m rec.export --stage recommender`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tensorflow as tf

from rec.bundles.files import check_pair, read_catalogue, verify
from rec.errors import UserError

Tensors = dict[str, tf.Tensor]  # what a function gives, by name
Found = tuple[Tensors, tf.Tensor | None]  # what retrieval has found, the ranker's scores of it
IDS = tf.TensorSpec([None], tf.string)
LISTS = tf.TensorSpec([None, None], tf.string)
TIMES = tf.TensorSpec([None], tf.int64)
FLAGS = tf.TensorSpec([None], tf.bool)
ROWS = tf.TensorSpec([None], tf.int32)
LOWEST = float(np.finfo(np.float32).min)  # the bundles' score of an empty place


class AnswersUsers(tf.Module):
    """What retrieval and recommender bundles have in common.

    A subclass has `_find` and `_find_known`, which return what retrieval has found and the ranker's scores of it (None
    without a ranker), and `_show`, which makes the signatures' outputs of both.
    """

    SIGNATURES: tuple[str, ...] = ("serving_default", "from_history")

    @tf.function(input_signature=[IDS])
    def serving_default(self, user_id: tf.Tensor) -> Tensors:
        """A known user's recommendations, from the history that the bundle stores."""
        return self._show(*self._find_known(user_id))

    @tf.function(input_signature=[IDS, LISTS])
    def from_history(self, user_id: tf.Tensor, history: tf.Tensor) -> Tensors:
        """Recommendations from the caller's history; what the bundle stores of a known user is still left out."""
        _, _, exclude = nothing_given(user_id)
        is_given = tf.ones_like(user_id, tf.bool)
        return self._show(*self._find(user_id, history, is_given, exclude))


def nothing_given(user_id: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """The other arguments of `answer` if there are none: history, is_given and exclude."""
    empty = tf.fill([tf.size(user_id), 0], "")
    return empty, tf.zeros_like(user_id, tf.bool), empty


class RecommenderModule(AnswersUsers):
    """Two loaded bundles as one model. `ranking` may be None: then retrieval's order is the answer."""

    def __init__(
        self, retrieval: Any, ranking: Any, candidates: int | None, items: Iterable[str]
    ) -> None:
        """`candidates`: how many of the retrieved items are ranked, and returned by the signatures; None: all.

        `items`: the ids of items.parquet, in its order.
        """
        super().__init__(name="recommender")
        self.retrieval, self.ranking, self._candidates = retrieval, ranking, candidates
        if ranking is not None:  # the ranking bundle's rows; the first is of an empty place, -1
            self._rows = tf.Variable(
                ranking.rows(tf.constant(["", *items])), trainable=False, name="rows"
            )

    @tf.function(input_signature=[IDS, LISTS, LISTS, TIMES])
    def recommend_from(
        self, user_id: tf.Tensor, history: tf.Tensor, seen: tf.Tensor, time: tf.Tensor
    ) -> Tensors:
        """Like from_history, at a given time, without exactly `seen` [B, S]: what an evaluation needs."""
        found = self.retrieval.retrieve(user_id, history, seen, time)
        items = found["item_id"][:, : self._candidates]
        at_time = (
            None
            if self.ranking is None
            else self.ranking.score_at(user_id, history, items, time)["score"]
        )
        return self._show(found, at_time)

    @tf.function(input_signature=[IDS, LISTS, FLAGS, LISTS])
    def answer(
        self, user_id: tf.Tensor, history: tf.Tensor, is_given: tf.Tensor, exclude: tf.Tensor
    ) -> Tensors:
        """What a server asks: retrieval, exclusions and ranking in one call (`Recommender.answer`)."""
        return self._order(*self._find(user_id, history, is_given, exclude))

    @tf.function(input_signature=[IDS])
    def answer_known(self, user_id: tf.Tensor) -> Tensors:
        """As `answer`, to users with their stored histories and without exclusions."""
        return self._order(*self._find_known(user_id))

    @tf.function(input_signature=[IDS, LISTS, FLAGS, ROWS])
    def answer_within(
        self, user_id: tf.Tensor, history: tf.Tensor, is_given: tf.Tensor, within: tf.Tensor
    ) -> Tensors:
        """Like `answer`, with the best of just the items at these places of items.parquet."""
        found = self.retrieval.answer_within(user_id, history, is_given, within)
        return self._order(found, self._rank(found, user_id, history, is_given))

    def _find(
        self, user_id: tf.Tensor, history: tf.Tensor, is_given: tf.Tensor, exclude: tf.Tensor
    ) -> Found:
        found = self.retrieval.answer(user_id, history, is_given, exclude)
        return found, self._rank(found, user_id, history, is_given)

    def _find_known(self, user_id: tf.Tensor) -> Found:
        if not hasattr(self.retrieval, "answer_known"):  # a bundle of version 0.1
            return self._find(user_id, *nothing_given(user_id))
        found = self.retrieval.answer_known(user_id)
        if self.ranking is None:
            return found, None
        return found, self.ranking.rank_known(user_id, *self._offered(found))

    def _rank(
        self, found: Tensors, user_id: tf.Tensor, history: tf.Tensor, is_given: tf.Tensor
    ) -> tf.Tensor | None:
        """The ranker's scores of the first candidates, None without a ranker."""
        if self.ranking is None:
            return None
        return self.ranking.rank(user_id, history, is_given, *self._offered(found))

    def _offered(self, found: Tensors) -> tuple[tf.Tensor, tf.Tensor]:
        """What the ranker gets: the first candidates' rows and retrieval scores."""
        places = found["row"][:, : self._candidates]
        return tf.gather(self._rows, places + 1), found["score"][:, : self._candidates]

    def _order(self, found: Tensors, ranked: tf.Tensor | None) -> Tensors:
        """All that was retrieved: the candidates in the ranker's order, then the others in retrieval's.

        For a cold user, of whom the ranker knows nothing, in order of popularity, as they are. An empty place ("") has
        the lowest score, so those stay last.
        """
        rows, scores, retrieved = found["row"], found["score"], found["score"]
        ranks = tf.broadcast_to(tf.range(1, tf.shape(rows)[1] + 1), tf.shape(rows))
        if ranked is not None:
            offered = scores[:, : self._candidates]
            n = offered.shape[1]
            best, order = tf.math.top_k(tf.where(found["cold"][:, None], offered, ranked), n)
            rest = ranks[:, n:]
            ranks = order + 1
            scores = best
            if rest.shape[1] != 0:
                ranks = tf.concat([ranks, rest], 1)
                scores = tf.concat([best, tf.fill(tf.shape(rest), LOWEST)], 1)
            rows, retrieved = (
                tf.gather(each, ranks - 1, batch_dims=1) for each in (rows, retrieved)
            )
        return {
            "rows": rows,
            "scores": scores,
            "ranks": ranks,
            "retrieved": retrieved,
            "cold": found["cold"],
        }

    def _show(self, found: Tensors, ranked: tf.Tensor | None) -> Tensors:
        """The candidates alone, as the signatures give them."""
        ordered, n = self._order(found, ranked), self._candidates
        items = tf.gather(found["item_id"], ordered["ranks"][:, :n] - 1, batch_dims=1)
        return {"item_id": items, "score": ordered["scores"][:, :n]}


@dataclass(eq=False)
class Recommender:
    """A loaded pair, with what a server needs to know of it."""

    module: RecommenderModule
    items: pd.DataFrame  # items.parquet, indexed by item_id, the most popular first
    users: list[str]  # some of the users that it knows
    metadata: dict[str, dict[str, Any]]  # by stage

    @classmethod
    def load(
        cls, retrieval: Path, ranking: Path | None = None, allow_mismatch: bool = False
    ) -> "Recommender":
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
        first, second = load_bundle(retrieval, "answer"), ranking and load_bundle(ranking, "rank")
        count = (
            metadata["ranking"]["config"]["ranking"]["candidates"] if ranking is not None else None
        )
        items, users = read_catalogue(retrieval)
        return cls(RecommenderModule(first, second, count, items.index), items, users, metadata)

    # Calling the traced graphs themselves saves tf.function's search for them.

    @cached_property
    def _answer(self) -> Any:
        return self.module.answer.get_concrete_function()

    @cached_property
    def _answer_known(self) -> Any:
        return self.module.answer_known.get_concrete_function()

    @property
    def predicts_ratings(self) -> bool:
        """Whether the ranking bundle's scores are ratings."""
        return (
            "ranking" in self.metadata
            and self.metadata["ranking"]["config"]["ranking"]["objective"] == "rating"
        )

    def answer(
        self,
        user_ids: Sequence[str],
        histories: Sequence[list[str] | None],
        excluded: Sequence[list[str]],
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
        is_searched = np.array(
            [
                history is not None or bool(exclude)
                for history, exclude in zip(histories, excluded, strict=True)
            ]
        )
        if not is_searched.any():
            return self._look_up(user_ids)
        if is_searched.all():
            return self._search(user_ids, histories, excluded)
        searched = np.flatnonzero(is_searched).tolist()
        others = np.flatnonzero(~is_searched).tolist()
        found = self._search(
            [user_ids[at] for at in searched],
            [histories[at] for at in searched],
            [excluded[at] for at in searched],
        )
        known = self._look_up([user_ids[at] for at in others])
        order = np.argsort([*searched, *others])
        return {name: np.concatenate([found[name], known[name]])[order] for name in found}

    def _search(
        self,
        user_ids: Sequence[str],
        histories: Sequence[list[str] | None],
        excluded: Sequence[list[str]],
    ) -> dict[str, np.ndarray]:
        given = tf.constant([history is not None for history in histories])
        lists = pad_lists([history or [] for history in histories])
        answer = self._answer(tf.constant(user_ids), lists, given, pad_lists(excluded))
        return {name: values.numpy() for name, values in answer.items()}

    def _look_up(self, user_ids: Sequence[str]) -> dict[str, np.ndarray]:
        """For users with their stored histories and without exclusions."""
        answer = self._answer_known(tf.constant(user_ids))
        return {name: values.numpy() for name, values in answer.items()}

    def answer_within(
        self, user_id: str, history: list[str] | None, rows: np.ndarray
    ) -> dict[str, np.ndarray]:
        """The best of just these rows of `items` [M] for one user: each is scored, so this costs M times as much."""
        lists, given = pad_lists([history or []]), tf.constant([history is not None])
        answer = self.module.answer_within(
            tf.constant([user_id]), lists, given, tf.constant(rows, tf.int32)
        )
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
        return self.module.retrieval.cosines(
            tf.constant(items, tf.string), tf.constant(others, tf.string)
        ).numpy()

    def close(self) -> None:
        """Frees the memory of a ScaNN searcher, which a process otherwise keeps."""
        release = getattr(self.module.retrieval.index, "release", None)
        if release is not None:
            release()


def load_bundle(path: Path, needed: str = "serving_default") -> Any:
    """tf.saved_model.load with ScaNN's operations registered.

    Raises:
      UserError: the directory does not hold a SavedModel that can be read, or one without the function `needed`.
    """
    import scann.scann_ops.py.scann_ops  # noqa: F401  (registers the operations that a ScaNN bundle is made of)

    try:
        module = tf.saved_model.load(str(path))
    except (OSError, ValueError, tf.errors.OpError) as error:
        raise UserError(
            f"{path}: the SavedModel cannot be loaded: {str(error).splitlines()[0]}"
        ) from error
    if not hasattr(module, needed):
        raise UserError(f"{path} is from an older version of rec: export the bundle again")
    return module


def pad_lists(lists: Sequence[list[str]]) -> tf.Tensor:
    """Ragged lists of ids -> [B, widest] string, "" on the left."""
    width = max(map(len, lists), default=0)
    rows = [[""] * (width - len(row)) + list(row) for row in lists]
    return tf.constant(np.array(rows, object).reshape(len(lists), width), tf.string)


def _strings(ids: tf.Tensor) -> np.ndarray:
    return np.char.decode(ids.numpy().astype(bytes), "utf-8")
