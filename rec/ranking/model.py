"""The ranking model: how likely a user chooses each candidate, or which rating it would get.

- Vectors: the candidate, the history as the candidate sees it (attention, as in Zhou et al. 2018, DIN), the history's
  mean, and the user. Numbers: the candidate's retrieval score and rank, the length of the history, how
  popular the candidate is at the time and how often it came soon after the latest items (counts.py).
- The score is a scaled retrieval score plus what the architecture adds, which is zero at the start: training starts
  from retrieval's own order and can only learn to better it.
- Through tfrs.tasks.Ranking, pointwise: binary cross-entropy on clicks (`implicit`), or squared error on ratings
  (`rating`); or a softmax over each list (`listwise`).
"""

from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_recommenders as tfrs

from rec.config import Ranking
from rec.counts import NUMBERS, Counter, Counts
from rec.errors import UserError
from rec.features import PAD, UNKNOWN, UNKNOWN_USER, Encoder, fill_lanes, log_softmax, recent_items
from rec.pipeline import Corpus
from rec.ranking.archs import ARCHS
from rec.ranking.candidates import CandidateLists
from rec.retrieval.model import LOWEST, RetrievalModel

RATED_WINDOW = 300  # with 50, as retrieval reads, the RMSE on MovieLens 100K is .01 higher


def _implicit(y_true: tf.Tensor, y_pred: tf.Tensor, sample_weight: tf.Tensor) -> tf.Tensor:
    """Chosen or not, each candidate by itself: binary cross-entropy."""
    return _mean(tf.nn.sigmoid_cross_entropy_with_logits(y_true, y_pred), sample_weight)


def _listwise(y_true: tf.Tensor, y_pred: tf.Tensor, sample_weight: tf.Tensor) -> tf.Tensor:
    """Which of the list: softmax cross-entropy, divided between the right ones."""
    shares = y_true / tf.reduce_sum(y_true, 1, keepdims=True)
    return tf.reduce_mean(
        tf.nn.softmax_cross_entropy_with_logits(shares, tf.where(sample_weight > 0, y_pred, -1e9))
    )


def _rating(y_true: tf.Tensor, y_pred: tf.Tensor, sample_weight: tf.Tensor) -> tf.Tensor:
    """Squared error."""
    return _mean(tf.square(y_true - y_pred), sample_weight)


def _mean(losses: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(losses * weights) / tf.reduce_sum(weights)


# ranking.objective -> the loss of lists, as a Keras loss: labels, scores and where there is a candidate (1 or 0), all
# [B, N] float32 -> a scalar.
OBJECTIVES: dict[str, Any] = {"implicit": _implicit, "listwise": _listwise, "rating": _rating}


class RankingModel(tfrs.Model):
    """Scores lists of candidates."""

    def __init__(self, config: Ranking, window: int, dim: int, corpus: Corpus) -> None:
        """`window`, the longest history, and `dim`, the width of the embeddings, are the retrieval model's.

        Ratings are about taste rather than what comes next: they get RATED_WINDOW at least.
        """
        super().__init__(name="ranking")
        self.config = config
        self._is_rating = config.objective == "rating"
        self.window = max(window, RATED_WINDOW) if self._is_rating else window
        items = corpus.items, corpus.item_columns, corpus.item_table
        users = corpus.users, corpus.user_columns, corpus.user_table
        self.items = Encoder(*items, dim, UNKNOWN, id_dropout=0.02, name="items")
        self.users = Encoder(*users, dim, UNKNOWN_USER, id_dropout=0.1, name="users")
        self._dim = dim
        self._arch = ARCHS[config.arch](config, dim)
        self._out = tf.keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros", name="out")
        self._recency = self.add_weight(name="recency", shape=[self.window], initializer="zeros")
        ratings = corpus.train.ratings
        if self._is_rating and ratings is None:
            raise UserError(
                "ranking.objective: rating needs a column of ratings, and this dataset has none"
            )
        start = float(np.mean(ratings)) if self._is_rating and ratings is not None else 0.0
        self._bias = self.add_weight(
            name="bias", shape=[], initializer=tf.keras.initializers.Constant(start)
        )
        self._scale = self.add_weight(name="scale", shape=[], initializer="ones")
        if self._is_rating:
            rows = [
                vocabulary.first + vocabulary.trained for vocabulary in (corpus.users, corpus.items)
            ]
            self._user_bias, self._item_bias = (
                tf.keras.layers.Embedding(n, 1, "zeros") for n in rows
            )
        self.task = tfrs.tasks.Ranking(loss=OBJECTIVES[config.objective])
        one = tf.ones([1, 1], tf.int32)
        self.score(
            one[0], one, one, tf.zeros([1, 1]), tf.zeros([1, 1, NUMBERS])
        )  # creates every weight
        self.score_compiled = tf.function(self.score, reduce_retracing=True)

    def score(
        self,
        user: tf.Tensor,
        history: tf.Tensor,
        items: tf.Tensor,
        scores: tf.Tensor,
        counts: tf.Tensor,
        training: bool = False,
    ) -> tf.Tensor:
        """The candidates' scores: logits, or ratings.

        Args:
          user: [B] int32 user rows.
          history: [B, H] int32 item rows, H <= window, oldest first, PAD anywhere.
          items: [B, N] int32 item rows.
          scores: [B, N] float32, the candidates' retrieval scores (LOWEST where there is none).
          counts: [B, N, NUMBERS] float32, as counts.Counts gives them.

        Returns:
          [B, N] float32.
        """
        candidate, past = (
            self.items(items, training=training),
            self.items(history, training=training),
        )
        present = tf.cast(history != PAD, tf.float32)
        length = tf.reduce_sum(present, 1)
        mean = tf.reduce_sum(past * present[..., None], 1) / tf.maximum(length, 1.0)[:, None]
        about_user = self.users(user, training=training)
        if (
            self._is_rating
        ):  # retrieval scores and counts have seen the very interactions that are rated
            base = self._factorised(
                user, items, about_user + mean * tf.sqrt(length)[:, None], candidate
            )
            retrieved, rank, counts = (
                tf.zeros_like(scores),
                tf.zeros_like(scores),
                tf.zeros_like(counts),
            )
            about_user = tf.stop_gradient(about_user)
        else:
            retrieved, rank = _retrieved(scores)
            base = self._scale * retrieved
        # The architecture reads the items' vectors as they are: trained with it, they would fit the few labels' noise.
        candidate, past, mean = (tf.stop_gradient(vectors) for vectors in (candidate, past, mean))
        back = tf.cast(
            tf.cumsum(present, 1, exclusive=True, reverse=True), tf.int32
        )  # how many items came since
        affinity = (
            tf.einsum("bnd,bhd->bnh", candidate, past) / self._dim**0.5
            + tf.gather(self._recency, back)[:, None]
        )
        attention = tf.nn.softmax(affinity + (1 - present)[:, None] * -1e9)
        attended = tf.einsum(
            "bnh,bhd->bnd",
            tf.ensure_shape(attention, [None, None, None]),
            past * present[..., None],
        )
        lengths = tf.broadcast_to(length[:, None], tf.shape(rank))
        numbers = [retrieved, rank, tf.math.log1p(lengths)]
        numbers = tf.concat([tf.stack(numbers, 2), counts], 2)
        added = self._out(
            self._arch([candidate, attended], [mean, about_user], numbers, training=training)
        )
        return tf.reshape(added, tf.shape(items)) + base + self._bias

    def _factorised(
        self, user: tf.Tensor, items: tf.Tensor, taste: tf.Tensor, candidate: tf.Tensor
    ) -> tf.Tensor:
        """Biases and the product of the user's taste [B, d] with candidates [B, N, d] (Koren 2008, SVD++): [B, N]."""
        parts = (self._user_bias, user[:, None], UNKNOWN_USER), (self._item_bias, items, UNKNOWN)
        biases = [
            layer(tf.where(rows < layer.input_dim, rows, unknown))[..., 0]
            for layer, rows, unknown in parts
        ]
        return biases[0] + biases[1] + tf.einsum("bd,bnd->bn", taste, candidate)

    def compute_loss(self, batch: dict[str, tf.Tensor], training: bool = False) -> tf.Tensor:
        """The loss of a batch of candidate lists (`candidates.list_batches`), or of ratings (lists of one)."""
        user, history, items = batch["user"], batch["history"], batch["items"]
        scores = self.score(user, history, items, batch["scores"], batch["counts"], training)
        loss = self.task(batch["labels"], scores, sample_weight=tf.cast(items != PAD, tf.float32))
        if self._is_rating:
            vectors = tf.concat([self.users(user), self.items(items[:, 0])], 1)
            loss += self.config.l2 * tf.reduce_mean(tf.reduce_sum(tf.square(vectors), 1))
        return (
            loss / self.distribute_strategy.num_replicas_in_sync
        )  # the mean of the workers' means

    def start_from(self, retrieval: RetrievalModel) -> None:
        """Takes over the retrieval model's item embeddings, and its user embeddings if it has them.

        Both models must have the same vocabularies, feature columns and width.
        """
        self.items.start_from(retrieval.candidate_tower.items)
        users = retrieval.query_tower.users
        if users is not None and users.ids is not None:
            self.users.start_from(users)


def _retrieved(scores: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Retrieval scores [B, N] as log-probabilities among the candidates, and the logs of their ranks, both [B, N]."""
    found = scores > LOWEST
    better = tf.reduce_sum(tf.cast(scores[:, None] > scores[:, :, None], tf.float32), 2)
    probability = log_softmax(tf.where(found, scores, -1e9))
    return tf.where(found, probability, 0.0), tf.math.log1p(better)


def score_candidates(
    model: RankingModel,
    counts: Counts,
    user: tf.Tensor,
    history: tf.Tensor,
    items: tf.Tensor,
    retrieved: tf.Tensor,
    time: tf.Tensor | None = None,
) -> tf.Tensor:
    """The ranker's scores of candidates.

    Args:
      user: [B] user rows; history: [B, H] item rows, oldest first, PAD anywhere; items: [B, N] item rows.
      retrieved: [B, N] float32, their scores by the retrieval model that is ranked for.
      time: [B] int64 seconds, of the request; now if not given.

    Returns:
      [B, N] float32, LOWEST where a row is PAD.
    """
    past = recent_items(history, model.window)  # as wide in every batch: see features.LANES
    offered = fill_lanes(items, PAD)
    retrieved = fill_lanes(retrieved, LOWEST)
    scores = model.score(user, past, offered, retrieved, counts(past, offered, time))
    return tf.where(items == PAD, LOWEST, scores[:, : tf.shape(items)[1]])


def score_lists(
    model: RankingModel, lists: CandidateLists, counts: Counter, batch_size: int = 256
) -> np.ndarray:
    """The model's scores of all lists, [Q, N] float32, LOWEST at empty places."""
    parts = [np.zeros((0, lists.items.shape[1]), np.float32)]
    for begin in range(0, len(lists.user), batch_size):
        part = lists.take(np.arange(begin, min(begin + batch_size, len(lists.user))))
        inputs = (
            part.user,
            part.history,
            part.items,
            part.scores,
            counts(part.history, part.items, part.time),
        )
        parts.append(np.where(part.items == PAD, LOWEST, model.score_compiled(*inputs).numpy()))
    return np.concatenate(parts)
