"""What a bundle computes: tf.Modules whose functions become the signatures of the SavedModels.

- Strings are looked up here and nowhere else: ids become rows at the entrance, rows become ids at the exit.
- Known users' histories and features are inside, so a request needs no feature store. What the index finds for them is
  inside too: only a request with a history or exclusions is searched for (with `query_time`, every request is).
- An answer depends on its request alone: nothing reads how long the batch's other histories and exclusions are, nor
  how many requests it holds. (`query_time` reads the clock.)
- `RetrievalModule` and `RankingModule` wrap the trained models; recommender.py composes two loaded bundles through
  these functions only, and says what their arguments are.
"""

from pathlib import Path

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from rec import LOWEST
from rec.bundles.recommender import FLAGS, IDS, LISTS, ROWS, TIMES, AnswersUsers, Tensors
from rec.corpus import Corpus
from rec.features import (
    FIRST_ITEM,
    FIRST_USER,
    PAD,
    UNKNOWN_USER,
    Encoder,
    Vocabulary,
    recent_items,
)
from rec.numerics import at_least
from rec.ranking.count_features import CountFeatures
from rec.ranking.model import RankingModel, score_candidates
from rec.retrieval.index import ExactIndex, ScannIndex
from rec.retrieval.model import RetrievalModel
from rec.retrieval.scoring import best_unseen
from rec.sequences import Sequences

ROW_LISTS = tf.TensorSpec([None, None], tf.int32)
SCORES = tf.TensorSpec([None, None], tf.float32)
Found = tuple[tf.Tensor, tf.Tensor]  # scores and item rows
USERS_AT_ONCE = 256  # queries that are computed together


class StoredItems(tf.Module):
    """The items of every known user."""

    def __init__(self, items: Sequences, name: str) -> None:
        super().__init__(name=name)
        self._offsets = tf.Variable(items.offsets, trainable=False, name=f"{name}_offsets")
        # One item more than there is, so that gathering for a user without items stays in bounds.
        self._items = tf.Variable(
            np.append(items.items, PAD).astype(np.int32), trainable=False, name=name
        )

    def __call__(self, user: tf.Tensor, width: int | None = None) -> tf.Tensor:
        """[B] user rows -> [B, S] item rows, oldest first, PAD behind: the last `width`, by default all.

        S is `width`, or the most items of a user of the batch.
        """
        begin = tf.gather(self._offsets, user)
        end = tf.gather(self._offsets, user + 1)
        if width is None:
            columns = tf.range(tf.reduce_max(end - begin, axis=0))
        else:
            begin = tf.maximum(begin, end - width)
            columns = tf.range(width, dtype=begin.dtype)
        at = begin[:, None] + columns
        inside = at < end[:, None]
        items = tf.gather(self._items, tf.where(inside, at, 0))
        return tf.where(inside, items, PAD)


class Lookup(tf.Module):
    """Ids <-> rows, and of every known user the stored history and what is disliked."""

    def __init__(self, corpus: Corpus, history: Sequences, max_seen: int, assets: Path) -> None:
        """`assets` is a directory for the vocabulary files, which tf.saved_model.save copies into the bundle."""
        super().__init__(name="lookup")
        self._users = _table(corpus.users, assets / "users.txt")
        self._items = _table(corpus.items, assets / "items.txt")
        ids = np.concatenate([np.full(FIRST_ITEM, "", object), corpus.items.ids])
        self._item_ids = tf.Variable(
            tf.constant(ids.tolist(), tf.string), trainable=False, name="item_ids"
        )
        lengths = np.minimum(history.lengths, max_seen)
        first = (history.offsets[1:] - lengths)[history.users]  # of each interaction's user
        self.users = len(history.lengths)
        stored = history.select(np.arange(len(history.items)) >= first)
        self.stored = StoredItems(stored, "history")
        self.disliked = StoredItems(corpus.disliked("test"), "disliked")

    def user_rows(self, user_id: tf.Tensor) -> tf.Tensor:
        """[B] string -> [B] int32; "" and unknown ids are UNKNOWN_USER."""
        line = tf.cast(self._users.lookup(user_id), tf.int32)
        return tf.where(line < 0, UNKNOWN_USER, line + FIRST_USER)

    def item_rows(self, item_id: tf.Tensor) -> tf.Tensor:
        """string [...] -> int32 [...]; "" and unknown ids are PAD."""
        line = tf.cast(self._items.lookup(item_id), tf.int32)
        return tf.where(line < 0, PAD, line + FIRST_ITEM)

    def item_ids(self, rows: tf.Tensor) -> tf.Tensor:
        """int32 [...] -> string [...]; PAD is ""."""
        return tf.gather(self._item_ids, rows)

    def history(self, user: tf.Tensor, rows: tf.Tensor, is_given: tf.Tensor) -> tf.Tensor:
        """[B, H + S]: the caller's history, `rows` [B, H], if it is given, otherwise the stored one; PAD anywhere."""
        given = tf.where(is_given[:, None], rows, PAD)
        stored = tf.where(is_given[:, None], PAD, self.stored(user))
        return tf.concat([given, stored], 1)


def _table(vocabulary: Vocabulary, path: Path) -> tf.lookup.StaticHashTable:
    """A table from words to their numbers; -1 for an unknown word."""
    lines = "".join(f"{word}\n" for word in vocabulary.ids)
    path.write_text(lines, encoding="utf-8", newline="\n")
    initializer = tf.lookup.TextFileInitializer(
        str(path),
        key_dtype=tf.string,
        key_index=tf.lookup.TextFileIndex.WHOLE_LINE,
        value_dtype=tf.int64,
        value_index=tf.lookup.TextFileIndex.LINE_NUMBER,
    )
    return tf.lookup.StaticHashTable(initializer, default_value=-1)


class _Untracked:
    """Hides a Keras model from tf.saved_model.save, which would also store it layer by layer, as Keras would need it.

    Only the signatures' graphs and the variables belong into a bundle.
    """

    def __init__(self, model: tf.keras.Model) -> None:
        self.get = model


def _frozen(variables: list[tf.Variable], encoders: list[Encoder]) -> list[tf.Variable]:
    """Freezes the encoders: the variables with their tables in place of their weights."""
    replaced = {id(variable) for encoder in encoders for variable in encoder.variables}
    others = [variable for variable in variables if id(variable) not in replaced]
    tables = [encoder.freeze() for encoder in encoders]
    return others + tables


class RetrievalModule(AnswersUsers):
    """user_id or history -> the k best items, by default those that the user has not seen."""

    SIGNATURES = (
        "serving_default",
        "from_history",
        "similar_items",
        "answer",
        "answer_known",
        "history",
        "disliked",
    )

    def __init__(
        self,
        model: RetrievalModel,
        index: ExactIndex | ScannIndex,
        lookup: Lookup,
        k: int,
        *,
        exclude_seen: bool = True,
    ) -> None:
        super().__init__(name="retrieval")
        self.exclude_seen = tf.Variable(exclude_seen, trainable=False, name="exclude_seen")
        self.index = index
        self.lookup = lookup
        self.k = k
        self.model = _Untracked(model)
        self.weights = _frozen(model.variables, model.encoders)
        self.popular = tf.Variable(model.most_popular(), trainable=False, name="popular")
        self.known: dict[str, tf.Variable] | None = None
        if not model.config.query_time:
            self.known = {
                name: tf.Variable(values, trainable=False, name=f"known_{name}")
                for name, values in self._search_for_all().items()
            }

    def _search_for_all(self) -> dict[str, np.ndarray]:
        """What `answer` finds for all users with their stored histories: row, score [users, k] and cold [users]."""
        users = np.arange(self.lookup.users, dtype=np.int32)
        batches = np.array_split(users, 1 + len(users) // USERS_AT_ONCE)
        search = tf.function(self._search_for_stored, [ROWS])
        progress = tqdm(batches, "all users", unit="batch", leave=False)
        parts = [search(batch) for batch in progress]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _search_for_stored(self, user: tf.Tensor) -> Tensors:
        history = self.lookup.stored(user)
        query = self.model.get.query(user, history)
        seen = tf.where(self.exclude_seen, history, PAD)
        left_out = tf.concat([seen, self.lookup.disliked(user)], 1)
        scores, rows = self._best(query, user, history, left_out)
        return self._places(scores, rows, user, history)

    def _find(self, *request: tf.Tensor) -> tuple[Tensors, None]:
        return self.answer(*request), None

    def _find_known(self, user_id: tf.Tensor) -> tuple[Tensors, None]:
        return self.answer_known(user_id), None

    def _show(self, found: Tensors, _: None) -> Tensors:
        return {name: found[name] for name in ("item_id", "score")}

    @tf.function(input_signature=[IDS])
    def similar_items(self, item_id: tf.Tensor) -> Tensors:
        """The items with the nearest vectors by cosine, the item itself left out; nothing for an unknown item."""
        row = self.lookup.item_rows(item_id)
        vector = self.model.get.candidate_tower.items(row)
        vector = tf.math.l2_normalize(vector, 1)
        query = self.model.get.item_query(vector)
        # The index ranks by dot product, which long vectors win: look deeper, then order by cosine.
        _, found = self.index.search(query, 4 * self.k + 1)
        found = tf.where(found < 0, PAD, found + FIRST_ITEM)
        near = self.model.get.candidate_tower.items(found)
        near = tf.math.l2_normalize(near, 2)
        scores = tf.einsum("bd,bnd->bn", vector, near)
        scores = tf.where(found == PAD, LOWEST, scores)
        is_itself = found == row[:, None]
        is_unknown = (row == PAD)[:, None]
        scores, found = self._top(tf.where(is_itself | is_unknown, LOWEST, scores), found)
        return self._named(scores, found)

    @tf.function(input_signature=[IDS, LISTS, LISTS, TIMES])
    def retrieve(
        self, user_id: tf.Tensor, history: tf.Tensor, seen: tf.Tensor, time: tf.Tensor
    ) -> Tensors:
        """Like from_history, at a given time, without exactly `seen` [B, S]: what an evaluation needs. As `answer`."""
        user = self.lookup.user_rows(user_id)
        rows = self.lookup.item_rows(history)
        query = self.model.get.query(user, rows, time)
        scores, best = self._best(query, user, rows, self.lookup.item_rows(seen))
        return self._described(scores, best, user, rows)

    @tf.function(input_signature=[IDS, LISTS, LISTS, TIMES])
    def retrieve_exactly(
        self, user_id: tf.Tensor, history: tf.Tensor, seen: tf.Tensor, time: tf.Tensor
    ) -> Tensors:
        """Like `retrieve`, by brute force over the whole catalogue: what the index approximates."""
        user = self.lookup.user_rows(user_id)
        rows = self.lookup.item_rows(history)
        scores = self.model.get.score_catalogue(user, rows, self.model.get.candidates(), time)
        scores, best = best_unseen(scores, self.lookup.item_rows(seen), self.k)
        return self._named(scores, best)

    @tf.function(input_signature=[IDS])
    def history(self, user_id: tf.Tensor) -> tf.Tensor:
        """[B, S] string: the stored history, oldest first, "" behind."""
        user = self.lookup.user_rows(user_id)
        return self.lookup.item_ids(self.lookup.stored(user))

    @tf.function(input_signature=[IDS])
    def disliked(self, user_id: tf.Tensor) -> tf.Tensor:
        """[B, S] string: what each user dislikes, "" behind."""
        user = self.lookup.user_rows(user_id)
        return self.lookup.item_ids(self.lookup.disliked(user))

    @tf.function(input_signature=[IDS, LISTS, FLAGS, LISTS, FLAGS])
    def answer(
        self,
        user_id: tf.Tensor,
        history: tf.Tensor,
        is_given: tf.Tensor,
        exclude: tf.Tensor,
        exclude_seen: tf.Tensor,
    ) -> Tensors:
        """What a server asks, for requests of every kind in one batch.

        Args:
          is_given: [B] where `history` [B, H] takes the place of the stored one.
          exclude: [B, E] left out, beside what the user dislikes.
          exclude_seen: [B] where both histories are left out, too.

        Returns:
          item_id, score [B, k]; row [B, k], the items' places in items.parquet, -1 where there is none; cold [B] bool.
        """
        user = self.lookup.user_rows(user_id)
        rows = self.lookup.item_rows(history)
        seen = tf.concat([rows, self.lookup.stored(user)], 1)
        seen = tf.where(exclude_seen[:, None], seen, PAD)
        excluded = self.lookup.item_rows(exclude)
        left_out = tf.concat([seen, self.lookup.disliked(user), excluded], 1)
        history = self.lookup.history(user, rows, is_given)
        query = self.model.get.query(at_least(2, user), at_least(2, history))
        query = query[: tf.size(user)]
        scores, best = self._best(query, user, history, left_out)
        return self._described(scores, best, user, history)

    @tf.function(input_signature=[IDS])
    def answer_known(self, user_id: tf.Tensor) -> Tensors:
        """As `answer` to users with their stored histories and without exclusions, looked up."""
        if self.known is None:
            return self.answer(user_id, *self._nothing_given(user_id))
        user = self.lookup.user_rows(user_id)
        found = {name: tf.gather(values, user) for name, values in self.known.items()}
        rows = found["row"] + FIRST_ITEM
        return {"item_id": self.lookup.item_ids(rows), **found}

    @tf.function(input_signature=[IDS, LISTS, FLAGS, ROWS])
    def answer_within(
        self, user_id: tf.Tensor, history: tf.Tensor, is_given: tf.Tensor, within: tf.Tensor
    ) -> Tensors:
        """Like `answer`, with the best of just these items (places in items.parquet), each of them scored."""
        user = self.lookup.user_rows(user_id)
        history = self.lookup.history(user, self.lookup.item_rows(history), is_given)
        within = tf.pad(within + FIRST_ITEM, [[0, self.k]], constant_values=PAD)
        shape = [tf.shape(user)[0], tf.shape(within)[0]]
        within = tf.broadcast_to(within, shape)
        scores = self.model.get.score(user, history, within)
        scores, best = self._top(scores, within)
        return self._described(scores, best, user, history)

    def _described(
        self, scores: tf.Tensor, rows: tf.Tensor, user: tf.Tensor, history: tf.Tensor
    ) -> Tensors:
        places = self._places(scores, rows, user, history)
        return {"item_id": self.lookup.item_ids(rows), **places}

    def _places(
        self, scores: tf.Tensor, rows: tf.Tensor, user: tf.Tensor, history: tf.Tensor
    ) -> Tensors:
        return {
            "row": tf.where(rows == PAD, -1, rows - FIRST_ITEM),
            "score": scores,
            "cold": self.model.get.is_cold(user, history),
        }

    def item_vectors(self) -> np.ndarray:
        """[catalogue, d] float32 of length 1: what `similar_items` compares, in the order of items.parquet."""
        rows = tf.range(FIRST_ITEM, FIRST_ITEM + self.model.get.n_items)
        vectors = self.model.get.candidate_tower.items(rows)
        return tf.math.l2_normalize(vectors, 1).numpy()

    def _best(
        self, query: tf.Tensor, user: tf.Tensor, history: tf.Tensor, seen: tf.Tensor
    ) -> Found:
        """query [B, d + 1]; user [B], history [B, H], seen [B, S] as rows -> scores and rows of the k best, [B, k]."""
        scores, found = self.index.search_each(query, self._depths(seen))
        found = tf.where(found < 0, PAD, found + FIRST_ITEM)
        prior, popular = self._most_popular(tf.shape(found)[1])
        cold = self.model.get.is_cold(user, history)[:, None]
        scores = tf.where(cold, prior, scores)
        found = tf.where(cold, popular, found)
        return self._top(tf.where(_are_among(found, seen), LOWEST, scores), found)

    def _most_popular(self, n: tf.Tensor) -> Found:
        """The scores [n] and the rows [n] of what a cold user gets, PAD behind."""
        rows = self.popular[:n]
        missing = n - tf.size(rows)
        rows = tf.pad(rows, [[0, missing]], constant_values=PAD)
        scores = tf.where(rows == PAD, LOWEST, self.model.get.cold_start_score(rows))
        return scores, rows

    def _depths(self, seen: tf.Tensor) -> tf.Tensor:
        """seen [B, S] -> [B] int32: how deep to search for k items that the user has not seen.

        The room for what was seen comes in few sizes, k times a power of four: each depth in a batch costs a search of
        its own, which is more than to search deeper.
        """
        is_item = tf.cast(seen != PAD, tf.int32)
        count = tf.reduce_sum(is_item, 1)
        powers = np.arange((32 - self.k.bit_length()) // 2)
        rooms = tf.constant(self.k * 4**powers, tf.int32)
        size = tf.searchsorted(rooms, count)
        return self.k + tf.gather(rooms, size)

    def _top(self, scores: tf.Tensor, rows: tf.Tensor) -> Found:
        best, at = tf.math.top_k(scores, self.k)
        rows = tf.gather(rows, at, batch_dims=1)
        return best, tf.where(best > LOWEST, rows, PAD)

    def _named(self, scores: tf.Tensor, rows: tf.Tensor) -> Tensors:
        return {"item_id": self.lookup.item_ids(rows), "score": scores}


def _are_among(rows: tf.Tensor, others: tf.Tensor) -> tf.Tensor:
    """[B, N] bool: which rows [B, N] are among the others [B, S], by binary search."""
    padded = tf.pad(others, [[0, 0], [0, 1]], constant_values=PAD)
    ordered = tf.sort(padded, 1)
    last = tf.shape(ordered)[1] - 1
    at = tf.minimum(tf.searchsorted(ordered, rows), last)
    return tf.gather(ordered, at, batch_dims=1) == rows


class RankingModule(tf.Module):
    """user_id or history, and candidates -> the candidates' scores.

    It holds the retrieval model that it was trained for (its towers, not its index), whose score is one of its inputs.
    """

    SIGNATURES = ("serving_default", "from_history", "answer")

    def __init__(
        self,
        model: RankingModel,
        retrieval: RetrievalModel,
        counts: CountFeatures,
        lookup: Lookup,
        candidates: int,
    ) -> None:
        """`candidates`: the length of the lists in service, which may differ from that in training."""
        super().__init__(name="ranking")
        self._candidates = candidates
        self.counts = counts
        self.lookup = lookup
        self.model = _Untracked(model)
        self.retrieval = _Untracked(retrieval)
        encoders = [model.items, model.users, *retrieval.encoders]
        self.weights = _frozen(model.variables + retrieval.variables, encoders)

    @tf.function(input_signature=[IDS, LISTS])
    def serving_default(self, user_id: tf.Tensor, item_id: tf.Tensor) -> Tensors:
        """A known user's scores, from the history that the bundle stores."""
        user = self.lookup.user_rows(user_id)
        return self._answer(user, self.lookup.stored(user), item_id)

    @tf.function(input_signature=[IDS, LISTS, LISTS])
    def from_history(self, user_id: tf.Tensor, history: tf.Tensor, item_id: tf.Tensor) -> Tensors:
        """Scores from the caller's history. An item that the bundle does not know scores lowest."""
        user = self.lookup.user_rows(user_id)
        return self._answer(user, self.lookup.item_rows(history), item_id)

    @tf.function(input_signature=[IDS, LISTS, LISTS, TIMES])
    def score_at(
        self, user_id: tf.Tensor, history: tf.Tensor, item_id: tf.Tensor, time: tf.Tensor
    ) -> Tensors:
        """Like from_history, at a given time: what an evaluation needs."""
        user = self.lookup.user_rows(user_id)
        return self._answer(user, self.lookup.item_rows(history), item_id, time)

    @tf.function(input_signature=[IDS, LISTS, FLAGS, LISTS])
    def answer(
        self, user_id: tf.Tensor, history: tf.Tensor, is_given: tf.Tensor, item_id: tf.Tensor
    ) -> Tensors:
        """What a server asks: scores from `history` [B, H] where it is given, else from the stored one."""
        user = self.lookup.user_rows(user_id)
        history = self.lookup.history(user, self.lookup.item_rows(history), is_given)
        return self._answer(user, history, item_id)

    @tf.function(input_signature=[IDS, LISTS, FLAGS, ROW_LISTS, SCORES])
    def rank(
        self,
        user_id: tf.Tensor,
        history: tf.Tensor,
        is_given: tf.Tensor,
        rows: tf.Tensor,
        retrieved: tf.Tensor,
    ) -> tf.Tensor:
        """Like `answer`, of candidates by this bundle's rows [B, N], with the retrieval scores that they came with."""
        user = self.lookup.user_rows(user_id)
        history = self.lookup.history(user, self.lookup.item_rows(history), is_given)
        past = recent_items(history, self.model.get.window)
        return self._rank(user, past, rows, retrieved)

    @tf.function(input_signature=[IDS, ROW_LISTS, SCORES])
    def rank_known(self, user_id: tf.Tensor, rows: tf.Tensor, retrieved: tf.Tensor) -> tf.Tensor:
        """As `rank`, for users with their stored histories."""
        user = self.lookup.user_rows(user_id)
        past = self.lookup.stored(user, self.model.get.window)
        return self._rank(user, past, rows, retrieved)

    def _rank(
        self, user: tf.Tensor, past: tf.Tensor, rows: tf.Tensor, retrieved: tf.Tensor
    ) -> tf.Tensor:
        lists = [None, self._candidates]  # known widths save nodes
        return score_candidates(
            self.model.get,
            self.counts,
            user,
            past,
            tf.ensure_shape(rows, lists),
            tf.ensure_shape(retrieved, lists),
        )

    @tf.function(input_signature=[IDS])
    def rows(self, item_id: tf.Tensor) -> tf.Tensor:
        """[N] string -> [N] int32, what `rank` calls these items."""
        return self.lookup.item_rows(item_id)

    def _answer(
        self, user: tf.Tensor, history: tf.Tensor, items: tf.Tensor, time: tf.Tensor | None = None
    ) -> Tensors:
        rows = self.lookup.item_rows(items)
        retrieved = self.retrieval.get.score(user, history, rows, time)
        past = recent_items(history, self.model.get.window)
        return {
            "score": score_candidates(
                self.model.get, self.counts, user, past, rows, retrieved, time
            )
        }
