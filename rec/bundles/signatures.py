"""What a bundle computes: tf.Modules whose functions become the signatures of the SavedModels.

- Strings are looked up here and nowhere else: ids become rows at the entrance, rows become ids at the exit.
- Known users' histories and features are inside, so a request needs no feature store. Their queries are too, computed
  at export: only a history that comes with a request goes through the tower (with `query_time`, every request does).
- An answer depends on its request alone: nothing reads how long the batch's other histories and exclusions are, nor
  how many requests it holds. (`query_time` reads the clock.)
- `RetrievalModule` and `RankingModule` wrap the trained models; recommender.py composes two loaded bundles through
  these functions only, and says what their arguments are.
"""

from pathlib import Path

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from rec.bundles.recommender import FLAGS, IDS, LISTS, ROWS, TIMES, AnswersUsers, Tensors
from rec.corpus import Corpus
from rec.features import FIRST_ITEM, FIRST_USER, PAD, UNKNOWN_USER, Encoder, Vocabulary
from rec.numerics import at_least
from rec.ranking.count_features import CountFeatures
from rec.ranking.model import RankingModel, score_candidates
from rec.retrieval.index import ExactIndex, ScannIndex
from rec.retrieval.model import RetrievalModel
from rec.retrieval.scoring import LOWEST, best_unseen
from rec.sequences import Sequences

ROW_LISTS = tf.TensorSpec([None, None], tf.int32)
SCORES = tf.TensorSpec([None, None], tf.float32)
Found = tuple[tf.Tensor, tf.Tensor]  # scores and item rows, [B, N] each
USERS_AT_ONCE = 256  # queries that are computed together


class Lookup(tf.Module):
    """Ids <-> rows, and the stored history of every known user."""

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
        kept = np.arange(len(history.items)) >= (history.offsets[1:] - lengths)[history.users]
        stored = history.select(kept)
        self.users = len(stored.lengths)
        self._offsets = tf.Variable(stored.offsets, trainable=False, name="history_offsets")
        # One item more than there is, so that gathering for a user without a history stays in bounds.
        self._history = tf.Variable(
            np.append(stored.items, PAD).astype(np.int32), trainable=False, name="history"
        )

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

    def stored(self, user: tf.Tensor) -> tf.Tensor:
        """[B] user rows -> [B, S] item rows, oldest first, PAD behind; S is the longest of the batch."""
        begin, end = tf.gather(self._offsets, user), tf.gather(self._offsets, user + 1)
        at = begin[:, None] + tf.range(tf.reduce_max(end - begin, axis=0))
        inside = at < end[:, None]
        return tf.where(inside, tf.gather(self._history, tf.where(inside, at, 0)), PAD)

    def history(self, user: tf.Tensor, rows: tf.Tensor, is_given: tf.Tensor) -> tf.Tensor:
        """[B, H + S]: the caller's history, `rows` [B, H], where it is given, else the stored one; PAD anywhere."""
        told = tf.where(is_given[:, None], rows, PAD)
        return tf.concat([told, tf.where(is_given[:, None], PAD, self.stored(user))], 1)


def _table(vocabulary: Vocabulary, path: Path) -> tf.lookup.StaticHashTable:
    path.write_text("".join(f"{word}\n" for word in vocabulary.ids), encoding="utf-8", newline="\n")
    word, line = tf.lookup.TextFileIndex.WHOLE_LINE, tf.lookup.TextFileIndex.LINE_NUMBER
    initializer = tf.lookup.TextFileInitializer(str(path), tf.string, word, tf.int64, line)
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
    kept = [variable for variable in variables if id(variable) not in replaced]
    return kept + [encoder.freeze() for encoder in encoders]


class RetrievalModule(AnswersUsers):
    """user_id or history -> the k best items that the user has not seen."""

    SIGNATURES = ("serving_default", "from_history", "similar_items", "answer", "history")

    def __init__(
        self, model: RetrievalModel, index: ExactIndex | ScannIndex, lookup: Lookup, k: int
    ) -> None:
        super().__init__(name="retrieval")
        self.index, self.lookup, self.k = index, lookup, k
        self.model = _Untracked(model)
        self.weights = _frozen(model.variables, model.encoders)
        self.popular = tf.Variable(model.most_popular(), trainable=False, name="popular")
        self.known = (
            None
            if model.config.query_time
            else tf.Variable(self._known(), trainable=False, name="known")
        )

    def _known(self) -> tf.Tensor:
        """[user rows, d + 1]: the queries of all users with their stored histories, which a request then looks up."""
        users = np.arange(self.lookup.users, dtype=np.int32)
        parts = tqdm(
            np.array_split(users, 1 + len(users) // USERS_AT_ONCE),
            "all users",
            unit="batch",
            leave=False,
        )
        return tf.concat(
            [self.model.get.query_compiled(part, self.lookup.stored(part)) for part in parts], 0
        )

    def _asked(self, user_id: tf.Tensor, history: tf.Tensor, is_given: tf.Tensor) -> Tensors:
        found = self.answer(user_id, history, is_given, tf.fill([tf.size(user_id), 0], ""))
        return {name: found[name] for name in ("item_id", "score")}

    @tf.function(input_signature=[IDS])
    def similar_items(self, item_id: tf.Tensor) -> Tensors:
        """The items with the nearest vectors by cosine, the item itself left out; nothing for an unknown item."""
        row = self.lookup.item_rows(item_id)
        vector = tf.math.l2_normalize(self.model.get.candidate_tower.items(row), 1)
        query = self.model.get.item_query(vector)
        # The index ranks by dot product, which long vectors win: look deeper, then order by cosine.
        _, found = self.index.search(query, 4 * self.k + 1)
        found = tf.where(found < 0, PAD, found + FIRST_ITEM)
        near = tf.math.l2_normalize(self.model.get.candidate_tower.items(found), 2)
        scores = tf.where(found == PAD, LOWEST, tf.einsum("bd,bnd->bn", vector, near))
        scores = tf.where((found == row[:, None]) | (row == PAD)[:, None], LOWEST, scores)
        return self._named(*self._top(scores, found))

    @tf.function(input_signature=[IDS, LISTS, LISTS, TIMES])
    def retrieve(
        self, user_id: tf.Tensor, history: tf.Tensor, seen: tf.Tensor, time: tf.Tensor
    ) -> Tensors:
        """Like from_history, at a given time, without exactly `seen` [B, S]: what an evaluation needs. As `answer`."""
        user, rows = self.lookup.user_rows(user_id), self.lookup.item_rows(history)
        query = self.model.get.query(user, rows, time)
        return self._described(
            *self._best(query, user, rows, self.lookup.item_rows(seen)), user, rows
        )

    @tf.function(input_signature=[IDS, LISTS, LISTS, TIMES])
    def retrieve_exactly(
        self, user_id: tf.Tensor, history: tf.Tensor, seen: tf.Tensor, time: tf.Tensor
    ) -> Tensors:
        """Like `retrieve`, by brute force over the whole catalogue: what the index approximates."""
        user, rows = self.lookup.user_rows(user_id), self.lookup.item_rows(history)
        scores = self.model.get.score_catalogue(user, rows, self.model.get.candidates(), time)
        return self._named(*best_unseen(scores, self.lookup.item_rows(seen), self.k))

    @tf.function(input_signature=[IDS])
    def history(self, user_id: tf.Tensor) -> tf.Tensor:
        """[B, S] string: the stored history, oldest first, "" behind."""
        return self.lookup.item_ids(self.lookup.stored(self.lookup.user_rows(user_id)))

    @tf.function(input_signature=[IDS, LISTS, FLAGS, LISTS])
    def answer(
        self, user_id: tf.Tensor, history: tf.Tensor, is_given: tf.Tensor, exclude: tf.Tensor
    ) -> Tensors:
        """What a server asks, for requests of every kind in one batch.

        Args:
          is_given: [B] where `history` [B, H] takes the place of the stored one.
          exclude: [B, E] left out, beside what has been seen.

        Returns:
          item_id, score [B, k]; row [B, k], the items' places in items.parquet, -1 where there is none; cold [B] bool.
        """
        user, rows = self.lookup.user_rows(user_id), self.lookup.item_rows(history)
        seen = tf.concat([rows, self.lookup.stored(user), self.lookup.item_rows(exclude)], 1)
        history = self.lookup.history(user, rows, is_given)
        query = self._query(user, history, is_given)
        return self._described(*self._best(query, user, history, seen), user, history)

    @tf.function(input_signature=[IDS, LISTS, FLAGS, ROWS])
    def answer_within(
        self, user_id: tf.Tensor, history: tf.Tensor, is_given: tf.Tensor, within: tf.Tensor
    ) -> Tensors:
        """Like `answer`, with the best of just these items (places in items.parquet), each of them scored."""
        user = self.lookup.user_rows(user_id)
        history = self.lookup.history(user, self.lookup.item_rows(history), is_given)
        within = tf.pad(within + FIRST_ITEM, [[0, self.k]], constant_values=PAD)
        within = tf.broadcast_to(within, [tf.shape(user)[0], tf.shape(within)[0]])
        return self._described(
            *self._top(self.model.get.score(user, history, within), within), user, history
        )

    def _described(
        self, scores: tf.Tensor, rows: tf.Tensor, user: tf.Tensor, history: tf.Tensor
    ) -> Tensors:
        places = tf.where(rows == PAD, -1, rows - FIRST_ITEM)
        return {
            **self._named(scores, rows),
            "row": places,
            "cold": self.model.get.is_cold(user, history),
        }

    @tf.function(input_signature=[IDS, IDS])
    def cosines(self, item_id: tf.Tensor, other: tf.Tensor) -> tf.Tensor:
        """[N] and [H] items -> [N, H] cosines of their vectors, LOWEST where an item is unknown."""
        rows, others = self.lookup.item_rows(item_id), self.lookup.item_rows(other)
        a, b = (
            tf.math.l2_normalize(self.model.get.candidate_tower.items(x), 1) for x in (rows, others)
        )
        return tf.where(
            (rows == PAD)[:, None] | (others == PAD), LOWEST, tf.matmul(a, b, transpose_b=True)
        )

    def _query(self, user: tf.Tensor, history: tf.Tensor, is_given: tf.Tensor) -> tf.Tensor:
        """[B, d + 1]: computed where the history [B, H] is given, looked up where it is the stored one."""
        if self.known is None:
            return self.model.get.query(user, history)
        known, asked = tf.gather(self.known, user), tf.where(is_given)

        def told() -> tf.Tensor:
            inputs = (at_least(2, tf.gather(each, asked[:, 0])) for each in (user, history))
            query = self.model.get.query(*inputs)[: tf.shape(asked)[0]]
            return tf.tensor_scatter_nd_update(known, asked, query)

        return tf.cond(tf.reduce_any(is_given), told, lambda: known)

    def _best(
        self, query: tf.Tensor, user: tf.Tensor, history: tf.Tensor, seen: tf.Tensor
    ) -> Found:
        """query [B, d + 1]; user [B], history [B, H], seen [B, S] as rows -> scores and rows of the k best, [B, k]."""
        scores, found = self.index.search_each(query, self._depths(seen))
        found = tf.where(found < 0, PAD, found + FIRST_ITEM)
        popular = self.popular[: tf.shape(found)[1]]
        popular = tf.pad(popular, [[0, tf.shape(found)[1] - tf.size(popular)]], constant_values=PAD)
        prior = tf.where(popular == PAD, LOWEST, self.model.get.cold_start_score(popular))
        cold = self.model.get.is_cold(user, history)[:, None]
        scores, found = tf.where(cold, prior, scores), tf.where(cold, popular, found)
        # A sorted list of what was seen, binary-searched: [B, depth] x log S instead of [B, depth, S].
        ordered = tf.sort(tf.pad(seen, [[0, 0], [0, 1]], constant_values=PAD), 1)
        at = tf.minimum(tf.searchsorted(ordered, found), tf.shape(ordered)[1] - 1)
        was_seen = tf.gather(ordered, at, batch_dims=1) == found
        return self._top(tf.where(was_seen, LOWEST, scores), found)

    def _depths(self, seen: tf.Tensor) -> tf.Tensor:
        """seen [B, S] -> [B] int32: how deep to search for k items that the user has not seen.

        The room for what was seen comes in few sizes, k times a power of four: each depth in a batch costs a search of
        its own, which is more than to search deeper.
        """
        count = tf.reduce_sum(tf.cast(seen != PAD, tf.int32), 1)
        powers = np.arange((32 - self.k.bit_length()) // 2)
        rooms = tf.constant(self.k * 4**powers, tf.int32)
        return self.k + tf.gather(rooms, tf.searchsorted(rooms, count))

    def _top(self, scores: tf.Tensor, rows: tf.Tensor) -> Found:
        best, at = tf.math.top_k(scores, self.k)
        return best, tf.where(best > LOWEST, tf.gather(rows, at, batch_dims=1), PAD)

    def _named(self, scores: tf.Tensor, rows: tf.Tensor) -> Tensors:
        return {"item_id": self.lookup.item_ids(rows), "score": scores}


class RankingModule(tf.Module):
    """user_id or history, and candidates -> the candidates' scores.

    It holds the retrieval model that it was trained for (its towers, not its index), whose score is one of its inputs.
    """

    SIGNATURES = ("serving_default", "from_history", "answer")

    def __init__(
        self, model: RankingModel, retrieval: RetrievalModel, counts: CountFeatures, lookup: Lookup
    ) -> None:
        super().__init__(name="ranking")
        self.counts, self.lookup = counts, lookup
        self.model, self.retrieval = _Untracked(model), _Untracked(retrieval)
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
        return self._answer(self.lookup.user_rows(user_id), self.lookup.item_rows(history), item_id)

    @tf.function(input_signature=[IDS, LISTS, LISTS, TIMES])
    def score_at(
        self, user_id: tf.Tensor, history: tf.Tensor, item_id: tf.Tensor, time: tf.Tensor
    ) -> Tensors:
        """Like from_history, at a given time: what an evaluation needs."""
        return self._answer(
            self.lookup.user_rows(user_id), self.lookup.item_rows(history), item_id, time
        )

    @tf.function(input_signature=[IDS, LISTS, FLAGS, LISTS])
    def answer(
        self, user_id: tf.Tensor, history: tf.Tensor, is_given: tf.Tensor, item_id: tf.Tensor
    ) -> Tensors:
        """What a server asks: scores from `history` [B, H] where it is given, else from the stored one."""
        user = self.lookup.user_rows(user_id)
        return self._answer(
            user, self.lookup.history(user, self.lookup.item_rows(history), is_given), item_id
        )

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
        return score_candidates(self.model.get, self.counts, user, history, rows, retrieved)

    @tf.function(input_signature=[IDS])
    def rows(self, item_id: tf.Tensor) -> tf.Tensor:
        """[N] string -> [N] int32, what `rank` calls these items."""
        return self.lookup.item_rows(item_id)

    def _answer(
        self, user: tf.Tensor, history: tf.Tensor, items: tf.Tensor, time: tf.Tensor | None = None
    ) -> Tensors:
        rows = self.lookup.item_rows(items)
        retrieved = self.retrieval.get.score(user, history, rows, time)
        return {
            "score": score_candidates(
                self.model.get, self.counts, user, history, rows, retrieved, time
            )
        }
