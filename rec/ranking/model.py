"""The ranking model: how likely a user chooses each candidate, or which rating it would get.

- Fields (vectors): the user, the candidate, the history's mean, and the history as the candidate sees it (attention,
  as in Zhou et al. 2018, DIN). Numbers: the retrieval score and the candidate's popularity.
- The score is a scaled retrieval score plus what the architecture adds, which is zero at the start: training starts
  from retrieval's own order and can only learn to better it.
- Pointwise, through tfrs.tasks.Ranking: binary cross-entropy on clicks, or squared error on ratings.
"""

import numpy as np
import tensorflow as tf
import tensorflow_recommenders as tfrs

from rec.config import Ranking
from rec.errors import UserError
from rec.features import PAD, UNKNOWN, UNKNOWN_USER, Encoder
from rec.pipeline import Corpus, Sequences
from rec.ranking.archs import build_arch
from rec.ranking.candidates import CandidateLists
from rec.retrieval.model import LOWEST, RetrievalModel
from rec.retrieval.towers import recent_items


class RankingModel(tfrs.Model):
    """Scores lists of candidates."""

    def __init__(self, config: Ranking, dim: int, corpus: Corpus, train: Sequences) -> None:
        """`dim` is the width of the embeddings (the retrieval model's, so that either can start from the other);
        `train` the interactions that popularity and the mean rating are counted on."""
        super().__init__(name="ranking")
        self.config = config
        self.items = Encoder(
            corpus.items, corpus.item_columns, corpus.item_table, dim, UNKNOWN, id_dropout=0.02, name="items"
        )
        self.users = Encoder(
            corpus.users, corpus.user_columns, corpus.user_table, dim, UNKNOWN_USER, id_dropout=0.1, name="users"
        )
        self._dim = dim
        self._arch = build_arch(config, dim)
        self._out = tf.keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros", name="out")
        is_rating = config.objective == "rating"
        if is_rating and train.ratings is None:
            raise UserError("ranking.objective: rating needs ratings, which the dataset has not")
        start = float(np.mean(train.ratings)) if is_rating and train.ratings is not None else 0.0
        self._bias = self.add_weight(name="bias", shape=[], initializer=tf.keras.initializers.Constant(start))
        self._scale = self.add_weight(name="scale", shape=[], initializer="zeros" if is_rating else "ones")
        self._item_bias = tf.keras.layers.Embedding(corpus.items.first + corpus.items.trained, 1, "zeros")
        self._trained_rows = corpus.items.first + corpus.items.trained
        popularity = np.log1p(np.bincount(train.items, minlength=corpus.items.rows)).astype(np.float32)
        self.popularity = tf.Variable(popularity / max(popularity.max(), 1), trainable=False, name="popularity")
        loss = tf.keras.losses.MeanSquaredError() if is_rating else tf.keras.losses.BinaryCrossentropy(from_logits=True)
        self.task = tfrs.tasks.Ranking(loss=loss)
        one = tf.ones([1, 1], tf.int32)
        self.score(one[0], one, one, tf.zeros([1, 1]))  # creates every weight
        self.score_compiled = tf.function(self.score, reduce_retracing=True)

    def score(
        self, user: tf.Tensor, history: tf.Tensor, items: tf.Tensor, scores: tf.Tensor, training: bool = False
    ) -> tf.Tensor:
        """The candidates' scores: logits, or ratings.

        Args:
          user: [B] int32 user rows.
          history: [B, H] int32 item rows, PAD anywhere (towers.recent_items); read as a set.
          items: [B, N] int32 item rows.
          scores: [B, N] float32, the candidates' retrieval scores (LOWEST where there is none).

        Returns:
          [B, N] float32.
        """
        candidate, past = self.items(items, training=training), self.items(history, training=training)
        present = tf.cast(history != PAD, tf.float32)
        mean = tf.reduce_sum(past * present[..., None], 1) / tf.maximum(tf.reduce_sum(present, 1), 1.0)[:, None]
        affinity = tf.einsum("bnd,bhd->bnh", candidate, past) / candidate.shape[-1] ** 0.5
        affinity = tf.ensure_shape(affinity + (1 - present)[:, None] * -1e9, [None, None, None])
        attended = tf.einsum("bnh,bhd->bnd", tf.nn.softmax(affinity), past * present[..., None])
        about_user = self.users(user, training=training)
        fields = tf.stack(
            [candidate, attended, *(tf.broadcast_to(x[:, None], tf.shape(candidate)) for x in (mean, about_user))], 2
        )
        # Ratings are learnt without retrieval scores, so they must not come in later either.
        scores = (
            tf.where(scores > LOWEST, scores, 0.0) if self.config.objective == "implicit" else tf.zeros_like(scores)
        )
        numbers = tf.stack([scores, tf.gather(self.popularity, items)], 2)
        fields = tf.reshape(fields, [-1, 4, candidate.shape[-1]])
        added = self._out(self._arch(fields, tf.reshape(numbers, [-1, 2]), training=training))
        added = tf.reshape(added, tf.shape(items))
        known = tf.where(items < self._trained_rows, items, UNKNOWN)
        return added + self._item_bias(known)[..., 0] + self._scale * scores + self._bias

    def compute_loss(self, batch: dict[str, tf.Tensor], training: bool = False) -> tf.Tensor:
        """The loss of a batch of candidate lists (`candidates.list_batches`), or of ratings (lists of one)."""
        scores = self.score(batch["user"], batch["history"], batch["items"], batch["scores"], training=training)
        real = batch["items"] != PAD
        return self.task(labels=tf.boolean_mask(batch["labels"], real), predictions=tf.boolean_mask(scores, real))

    def start_from(self, retrieval: RetrievalModel) -> None:
        """Takes over the retrieval model's item embeddings, and its user embeddings where it has them.

        Raises:
          UserError: the two models' embeddings are of different sizes.
        """
        if retrieval.config.embedding_dim != self._dim:
            raise UserError(
                "--init-from-retrieval: that checkpoint's embeddings have another size than the model's: "
                "name a checkpoint with the same retrieval.embedding_dim and data set"
            )
        self.items.set_weights(retrieval.candidate_tower.items.get_weights())
        users = retrieval.query_tower.users
        if users is not None and users.ids is not None:
            self.users.set_weights(users.get_weights())


def score_candidates(
    model: RankingModel, retrieval: RetrievalModel, user: tf.Tensor, history: tf.Tensor, items: tf.Tensor
) -> tf.Tensor:
    """The ranker's scores of candidates, given the retrieval model that it ranks for.

    Args:
      user: [B] user rows; history: [B, H] item rows, oldest first, PAD anywhere; items: [B, N] item rows.

    Returns:
      [B, N] float32.
    """
    retrieved = retrieval.score(user, history, items)
    return model.score(user, recent_items(history, retrieval.config.window), items, retrieved)


def score_lists(model: RankingModel, lists: CandidateLists, batch_size: int = 256) -> np.ndarray:
    """The model's scores of all lists, [Q, N] float32, LOWEST at empty places."""
    parts = []
    for begin in range(0, len(lists.user), batch_size):
        part = lists.take(np.arange(begin, min(begin + batch_size, len(lists.user))))
        scores = model.score_compiled(part.user, part.history, part.items, part.scores).numpy()
        parts.append(np.where(part.items == PAD, LOWEST, scores))
    return np.concatenate(parts)
