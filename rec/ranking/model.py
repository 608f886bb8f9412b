"""The ranking model: how likely a user chooses each candidate.

- Vectors: the candidate, the history as the candidate sees it (attention, as in Zhou et al. 2018, DIN), the mean of the
  history, and the user.
- Numbers: the candidate's retrieval score and rank, the length of the history, and the count features.
- The score is the scaled retrieval score, plus the weighted score of the neighbours, plus what the architecture adds.
  The latter is zero at the start: training begins at an order that is good already, and can only learn to improve it.
"""

import math
from collections.abc import Callable

import numpy as np
import tensorflow as tf
import tensorflow_recommenders as tfrs

from rec import LOWEST
from rec.config import Ranking
from rec.corpus import Corpus
from rec.features import PAD, UNKNOWN, UNKNOWN_USER, Encoder
from rec.numerics import LANES, fill_lanes, log1p, log_softmax, width_of
from rec.ranking.archs import ARCHS
from rec.ranking.candidates import CandidateLists
from rec.ranking.count_features import COUNT_FEATURES, NEIGHBOURS_COLUMN, RECENT, CountFeatures
from rec.ranking.objectives import NOT_THERE, OBJECTIVES
from rec.retrieval.model import RetrievalModel


class RankingModel(tfrs.Model):
    """Scores lists of candidates."""

    def __init__(self, config: Ranking, window: int, dim: int, corpus: Corpus) -> None:
        """`window` is the longest history that is read. `dim` is the width of the retrieval model's embeddings."""
        super().__init__(name="ranking")
        self.config = config
        self.window = window
        self._dim = dim
        self.items = Encoder(
            corpus.items,
            corpus.item_columns,
            corpus.item_table,
            dim,
            UNKNOWN,
            id_dropout=0.02,
            name="items",
        )
        self.users = Encoder(
            corpus.users,
            corpus.user_columns,
            corpus.user_table,
            dim,
            UNKNOWN_USER,
            id_dropout=0.1,
            name="users",
        )
        self._arch = ARCHS[config.arch](config, dim)
        self._out = tf.keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros", name="out")
        self._recency = self.add_weight(name="recency", shape=[window], initializer="zeros")
        self._bias = self.add_weight(name="bias", shape=[], initializer="zeros")
        self._scale = self.add_weight(name="scale", shape=[], initializer="ones")
        self.neighbours_weight = self.add_weight(name="neighbours", shape=[], initializer="zeros")
        self.task = tfrs.tasks.Ranking(loss=self._loss())
        self.score_compiled = tf.function(self.score, reduce_retracing=True)
        self._create_weights()

    def _loss(self) -> object:
        return OBJECTIVES[self.config.objective]

    def _create_weights(self) -> None:
        """Scores one candidate, so that a checkpoint can be restored before the first batch."""
        row = tf.ones([1, 1], tf.int32)
        self.score(row[0], row, row, tf.zeros([1, 1]), tf.zeros([1, 1, COUNT_FEATURES]))

    # ------------------------------------------------------------------------------------------------------------
    # Scores

    def score(
        self,
        user: tf.Tensor,
        history: tf.Tensor,
        items: tf.Tensor,
        retrieval_scores: tf.Tensor,
        counts: tf.Tensor,
        training: bool = False,
    ) -> tf.Tensor:
        """The candidates' scores, as logits.

        Args:
          user: [B] int32 user rows.
          history: [B, H] int32 item rows, H <= window, oldest first, PAD anywhere.
          items: [B, N] int32 item rows.
          retrieval_scores: [B, N] float32, LOWEST for an empty place.
          counts: [B, N, COUNT_FEATURES] float32, from CountFeatures.

        Returns:
          [B, N] float32.
        """
        log_probability, log_rank = retrieval_features(retrieval_scores)
        about_user = self.users(user, training=training)
        candidates = self.items(items, training=training)
        past = self.items(history, training=training)
        from_retrieval = [log_probability, log_rank, log_length(history, items)]
        numbers = tf.concat([tf.stack(from_retrieval, 2), counts], 2)
        added = self.architecture_score(
            candidates, past, history, about_user, numbers, training=training
        )
        from_neighbours = self.neighbours_weight * counts[..., NEIGHBOURS_COLUMN]
        return self._scale * log_probability + from_neighbours + added + self._bias

    def architecture_score(
        self,
        candidates: tf.Tensor,
        past: tf.Tensor,
        history: tf.Tensor,
        about_user: tf.Tensor,
        numbers: tf.Tensor,
        *,
        training: bool,
    ) -> tf.Tensor:
        """What the architecture adds to the score: [B, N] float32.

        The items' vectors do not learn from it: trained with it, they would fit the noise of the few labels.

        Args:
          candidates: [B, N, d]; past: [B, H, d]; about_user: [B, d]; numbers: [B, N, M], all float32.
          history: [B, H] int32 item rows, those of `past`.
        """
        candidates = tf.stop_gradient(candidates)
        past = tf.stop_gradient(past)
        attended = self._attend(candidates, past, history)
        mean = mean_of_history(past, history)
        hidden = self._arch([candidates, attended], [mean, about_user], numbers, training=training)
        return tf.reshape(self._out(hidden), tf.shape(candidates)[:2])

    def _attend(self, candidates: tf.Tensor, past: tf.Tensor, history: tf.Tensor) -> tf.Tensor:
        """[B, N, d]: the history as each candidate sees it; the more like the candidate and the newer, the more."""
        is_item = tf.cast(history != PAD, tf.float32)
        newer_items = tf.cast(tf.cumsum(is_item, 1, exclusive=True, reverse=True), tf.int32)
        from_place = tf.gather(self._recency, newer_items) + (1 - is_item) * NOT_THERE
        affinity = tf.einsum("bnd,bhd->bnh", candidates, past / self._dim**0.5)
        affinity += from_place[:, None]
        attention = tf.ensure_shape(tf.nn.softmax(affinity), [None, None, None])
        return tf.einsum("bnh,bhd->bnd", attention, past * is_item[..., None])

    # ------------------------------------------------------------------------------------------------------------
    # Training

    def compute_loss(self, batch: dict[str, tf.Tensor], training: bool = False) -> tf.Tensor:
        """The loss of a batch of candidate lists (`candidates.list_batches`)."""
        scores = self.score(
            batch["user"],
            batch["history"],
            batch["items"],
            batch["scores"],
            batch["counts"],
            training=training,
        )
        is_candidate = tf.cast(batch["items"] != PAD, tf.float32)
        loss = self.task(batch["labels"], scores, sample_weight=is_candidate)
        # Replicas add up their losses. The sum has to be the mean of all lists.
        return loss / self.distribute_strategy.num_replicas_in_sync

    def start_from(self, retrieval: RetrievalModel) -> None:
        """Takes over the retrieval model's item embeddings, and its user embeddings if it has any.

        Both models must have the same vocabularies, feature columns and width.
        """
        self.items.start_from(retrieval.candidate_tower.items)
        users = retrieval.query_tower.users
        if users is not None and users.ids is not None:
            self.users.start_from(users)


def retrieval_features(scores: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Retrieval scores [B, N] -> log-probabilities among the candidates and logs of their ranks, both [B, N]."""
    is_candidate = scores > LOWEST
    log_probability = log_softmax(tf.where(is_candidate, scores, NOT_THERE))
    is_better = scores[:, None] > scores[:, :, None]
    rank = tf.reduce_sum(tf.cast(is_better, tf.int32), 2)  # from 0
    return tf.where(is_candidate, log_probability, 0.0), log1p(rank)


def mean_of_history(past: tf.Tensor, history: tf.Tensor) -> tf.Tensor:
    """[B, d]: the mean of the items' vectors, `past` [B, H, d], where `history` [B, H] is not PAD."""
    is_item = tf.cast(history != PAD, tf.float32)
    length = tf.reduce_sum(is_item, 1, keepdims=True)
    return tf.reduce_sum(past * is_item[..., None], 1) / tf.maximum(length, 1.0)


def log_length(history: tf.Tensor, items: tf.Tensor) -> tf.Tensor:
    """[B, N], the shape of `items`: the log of 1 + the number of items in each history [B, H]."""
    length = tf.reduce_sum(tf.cast(history != PAD, tf.int32), 1)
    return tf.broadcast_to(log1p(length)[:, None], tf.shape(items))


def score_candidates(
    model: RankingModel,
    counts: CountFeatures,
    user: tf.Tensor,
    past: tf.Tensor,
    items: tf.Tensor,
    retrieval_scores: tf.Tensor,
    time: tf.Tensor | None = None,
) -> tf.Tensor:
    """The ranker's scores of candidates in service.

    Args:
      user: [B] user rows; items: [B, N] item rows.
      past: [B, model.window] item rows, as `recent_items` returns them: equally wide in every batch, see numerics.py.
      retrieval_scores: [B, N] float32, from the retrieval model that the ranker was trained for.
      time: [B] int64 seconds, of the request. Default: now.

    Returns:
      [B, N] float32, LOWEST for PAD.
    """
    # LANES must divide a list's attention [N, window] and its counts of pairs [N, RECENT].
    multiple = LANES // math.gcd(LANES, model.window, RECENT)
    candidates = fill_lanes(items, PAD, multiple)
    filled_scores = fill_lanes(retrieval_scores, LOWEST, multiple)
    features = counts(past, candidates, time)
    scores = model.score(user, past, candidates, filled_scores, features)
    return tf.where(items == PAD, LOWEST, scores[:, : width_of(items)])


def score_lists(
    model: RankingModel,
    lists: CandidateLists,
    counts: Callable[..., tf.Tensor],
    batch_size: int = 256,
) -> np.ndarray:
    """The model's scores of all lists, [Q, N] float32, LOWEST for empty places. `counts`: CountFeatures, or alike."""
    parts = [np.zeros((0, lists.items.shape[1]), np.float32)]
    for begin in range(0, len(lists), batch_size):
        part = lists.take(np.arange(begin, min(begin + batch_size, len(lists))))
        features = counts(part.history, part.items, part.time)
        scores = model.score_compiled(part.user, part.history, part.items, part.scores, features)
        parts.append(np.where(part.items == PAD, LOWEST, scores.numpy()))
    return np.concatenate(parts)
