"""One retrieval and one ranking bundle, composed in one graph: retrieve, then rank.

    recommender = Recommender.load("savedmodels/retrieval/1", "savedmodels/ranking/1")
    recommender.recommend(["u7"], [None], k=10)

Nothing of the training code is imported: a server needs the two directories and this file. The composition can itself
be exported as a bundle (`python -m rec.export --stage recommender`).
"""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import tensorflow as tf

from rec.bundles.files import read_catalogue, read_pair
from rec.bundles.metadata import PairMetadata, verify
from rec.bundles.pair import Arrays, Candidates, pad_left, rerank
from rec.errors import UserError

Tensors = dict[str, tf.Tensor]  # what a function gives, by name
Request = tuple[str, list[str] | None, list[str], bool]  # user_id, history, exclude, exclude_seen
Found = tuple[Tensors, tf.Tensor | None]  # what retrieval has found, the ranker's scores of it
IDS = tf.TensorSpec([None], tf.string)
LISTS = tf.TensorSpec([None, None], tf.string)
TIMES = tf.TensorSpec([None], tf.int64)
FLAGS = tf.TensorSpec([None], tf.bool)
ROWS = tf.TensorSpec([None], tf.int32)


def _sort(scores: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    return tf.math.top_k(scores, scores.shape[1])


def _take(values: tf.Tensor, places: tf.Tensor) -> tf.Tensor:
    return tf.gather(values, places, batch_dims=1)


TENSORS = Arrays(tf, _sort, _take)


class AnswersUsers(tf.Module):
    """What retrieval and recommender bundles have in common.

    A subclass has `_find` and `_find_known`, which return what retrieval has found and the ranker's scores of it (None
    without a ranker), and `_show`, which makes the signatures' outputs of both.
    """

    # bool: whether what a user has met is left out, unless a request says otherwise
    exclude_seen: tf.Variable
    SIGNATURES: tuple[str, ...] = ("serving_default", "from_history")

    @tf.function(input_signature=[IDS])
    def serving_default(self, user_id: tf.Tensor) -> Tensors:
        """A known user's recommendations, from the history that the bundle stores."""
        return self._show(*self._find_known(user_id))

    @tf.function(input_signature=[IDS, LISTS])
    def from_history(self, user_id: tf.Tensor, history: tf.Tensor) -> Tensors:
        """Recommendations from the caller's history; what the bundle stores of a known user counts as seen, too."""
        _, _, *others = self._nothing_given(user_id)
        is_given = tf.ones_like(user_id, tf.bool)
        return self._show(*self._find(user_id, history, is_given, *others))

    def _nothing_given(self, user_id: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """The other arguments of `answer` if there are none: history, is_given, exclude and exclude_seen."""
        empty = tf.fill([tf.size(user_id), 0], "")
        rule = tf.fill([tf.size(user_id)], self.exclude_seen)
        return empty, tf.zeros_like(user_id, tf.bool), empty, rule


class RecommenderModule(AnswersUsers):
    """Two loaded bundles as one model. `ranking` may be None: then retrieval's order is the answer."""

    def __init__(
        self,
        retrieval: tf.Module,
        ranking: tf.Module | None,
        candidates: int | None,
        items: Iterable[str],
    ) -> None:
        """`candidates`: how many of the retrieved items are ranked, and returned by the signatures; None: all.

        `items`: the ids of items.parquet, in its order.
        """
        super().__init__(name="recommender")
        self.retrieval = retrieval
        self.exclude_seen = retrieval.exclude_seen
        self.ranking = ranking
        self._candidates = candidates
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
        if self.ranking is None:
            return self._show(found, None)
        ranked = self.ranking.score_at(user_id, history, items, time)["score"]
        return self._show(found, ranked)

    @tf.function(input_signature=[IDS, LISTS, FLAGS, LISTS, FLAGS])
    def answer(
        self,
        user_id: tf.Tensor,
        history: tf.Tensor,
        is_given: tf.Tensor,
        exclude: tf.Tensor,
        exclude_seen: tf.Tensor,
    ) -> Tensors:
        """What a server asks: retrieval, exclusions and ranking in one call (`Recommender.answer`)."""
        return self._order(*self._find(user_id, history, is_given, exclude, exclude_seen))

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
        self, user_id: tf.Tensor, history: tf.Tensor, is_given: tf.Tensor, *excluded: tf.Tensor
    ) -> Found:
        found = self.retrieval.answer(user_id, history, is_given, *excluded)
        return found, self._rank(found, user_id, history, is_given)

    def _find_known(self, user_id: tf.Tensor) -> Found:
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
        scores = found["score"][:, : self._candidates]
        return tf.gather(self._rows, places + 1), scores

    def _order(self, found: Tensors, ranked: tf.Tensor | None) -> Tensors:
        """All that was retrieved, reordered by the ranker's scores (`Candidates` by name)."""
        if ranked is None:
            ranked = found["score"]
        return rerank(TENSORS, found, ranked, self._candidates)._asdict()

    def _show(self, found: Tensors, ranked: tf.Tensor | None) -> Tensors:
        """The candidates alone, as the signatures give them."""
        n = self._candidates
        ordered = self._order(found, ranked)
        places = ordered["ranks"][:, :n] - 1
        items = tf.gather(found["item_id"], places, batch_dims=1)
        return {"item_id": items, "score": ordered["scores"][:, :n]}


@dataclass(eq=False)
class Recommender:
    """A `Backend` that computes here."""

    module: RecommenderModule
    items: pd.DataFrame
    users: list[str]
    vectors: np.ndarray
    metadata: PairMetadata

    @classmethod
    def load(
        cls, retrieval: Path, ranking: Path | None = None, allow_mismatch: bool = False
    ) -> "Recommender":
        """Loads a retrieval bundle and, if given, the ranking bundle that was trained for it.

        Raises:
          UserError: a directory is not a bundle of that stage, is damaged, or the ranking bundle belongs to another
            retrieval version and `allow_mismatch` is not set.
        """
        metadata = read_pair(Path(retrieval), ranking and Path(ranking), allow_mismatch)
        verify(Path(retrieval))
        retrieval_module = load_bundle(Path(retrieval), "exclude_seen")
        ranking_module = None
        if ranking is not None:
            verify(Path(ranking))
            ranking_module = load_bundle(Path(ranking), "rank_known")
        items, users, vectors = read_catalogue(Path(retrieval))
        module = RecommenderModule(
            retrieval_module, ranking_module, metadata.candidates, items.index
        )
        return cls(module, items, users, vectors, metadata)

    # Calling the traced graphs themselves saves tf.function's search for them.

    @cached_property
    def _answer(self) -> tf.types.experimental.ConcreteFunction:
        return self.module.answer.get_concrete_function()

    @cached_property
    def _answer_known(self) -> tf.types.experimental.ConcreteFunction:
        return self.module.answer_known.get_concrete_function()

    def answer(
        self,
        user_ids: Sequence[str],
        histories: Sequence[list[str] | None],
        excluded: Sequence[list[str]],
        exclude_seen: Sequence[bool] | None = None,
    ) -> Candidates:
        usual = self.metadata.retrieval.excludes_seen
        rules = exclude_seen or [usual] * len(user_ids)
        requests = list(zip(user_ids, histories, excluded, rules, strict=True))
        is_searched = [
            history is not None or bool(exclude) or rule != usual
            for _, history, exclude, rule in requests
        ]
        if not any(is_searched):
            return self._look_up(user_ids)
        if all(is_searched):
            return self._search(requests)
        searched = np.flatnonzero(is_searched).tolist()
        known = np.flatnonzero(np.logical_not(is_searched)).tolist()
        found = self._search([requests[at] for at in searched])
        looked_up = self._look_up([user_ids[at] for at in known])
        order = np.argsort(searched + known)
        parts = zip(found, looked_up, strict=True)
        return Candidates(*(np.concatenate(part)[order] for part in parts))

    def _search(self, requests: Sequence[Request]) -> Candidates:
        answer = self._answer(
            tf.constant([user_id for user_id, _, _, _ in requests]),
            pad_lists([history or [] for _, history, _, _ in requests]),
            tf.constant([history is not None for _, history, _, _ in requests]),
            pad_lists([exclude for _, _, exclude, _ in requests]),
            tf.constant([rule for _, _, _, rule in requests]),
        )
        return _candidates(answer)

    def _look_up(self, user_ids: Sequence[str]) -> Candidates:
        """For users with their stored histories and without exclusions."""
        return _candidates(self._answer_known(tf.constant(user_ids)))

    def answer_within(
        self, user_id: str, history: list[str] | None, rows: np.ndarray
    ) -> Candidates:
        lists = pad_lists([history or []])
        given = tf.constant([history is not None])
        places = tf.constant(rows, tf.int32)
        return _candidates(self.module.answer_within(tf.constant([user_id]), lists, given, places))

    def similar(self, item_ids: list[str]) -> tuple[np.ndarray, np.ndarray]:
        queries = tf.constant(item_ids, tf.string)
        answer = self.module.retrieval.similar_items(queries)
        ids = _strings(answer["item_id"])
        rows = self.items.index.get_indexer(pd.Index(ids.ravel()))
        return rows.reshape(ids.shape), answer["score"].numpy()

    def histories(self, user_ids: list[str]) -> list[list[str]]:
        return _lists(self.module.retrieval.history(tf.constant(user_ids, tf.string)))

    def disliked(self, user_ids: list[str]) -> list[list[str]]:
        return _lists(self.module.retrieval.disliked(tf.constant(user_ids, tf.string)))


def load_bundle(path: Path, needed: str = "serving_default") -> tf.Module:
    """tf.saved_model.load with ScaNN's operations registered, if ScaNN is installed.

    Raises:
      UserError: the directory does not hold a SavedModel that can be read, or one without the function `needed`.
    """
    with suppress(ModuleNotFoundError):  # a bundle with an exact index does not need it
        import scann.scann_ops.py.scann_ops  # noqa: F401  (registers the operations)

    try:
        module = tf.saved_model.load(str(path))
    except (OSError, ValueError, RuntimeError, tf.errors.OpError) as error:
        reason = str(error).splitlines()[0]
        if "Scann>" in reason:
            reason = (
                "its index needs the package scann; export it again with --set index.kind=exact"
            )
        raise UserError(f"{path}: the SavedModel cannot be loaded: {reason}") from error
    if not hasattr(module, needed):
        raise UserError(f"{path} is from an older version of rec: export the bundle again")
    return module


def pad_lists(lists: Sequence[list[str]]) -> tf.Tensor:
    """Ragged lists of ids -> [B, widest] string, "" on the left."""
    rows = pad_left(lists)
    width = len(rows[0]) if rows else 0
    ids = np.array(rows, object).reshape(len(rows), width)
    return tf.constant(ids, tf.string)


def _candidates(answer: Tensors) -> Candidates:
    return Candidates(**{name: values.numpy() for name, values in answer.items()})


def _lists(ids: tf.Tensor) -> list[list[str]]:
    """[B, S] ids -> a list per row, without the empty places."""
    return [[item for item in row if item] for row in _strings(ids).tolist()]


def _strings(ids: tf.Tensor) -> np.ndarray:
    return np.char.decode(ids.numpy().astype(bytes), "utf-8")
