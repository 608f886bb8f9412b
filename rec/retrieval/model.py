"""The retrieval model: two towers and the task that trains them. A score is the dot product of both.

Validation, mining, evaluation and the bundle all score with the functions here.
"""

import numpy as np
import tensorflow as tf
import tensorflow_recommenders as tfrs
from scipy.sparse.linalg import svds

from rec import LOWEST
from rec.batches import sampling_probability
from rec.config import ResolvedRetrieval
from rec.corpus import Corpus
from rec.features import FIRST_ITEM, PAD, UNKNOWN, UNKNOWN_USER, Encoder
from rec.retrieval.encoders import LENGTH_POWER
from rec.retrieval.loss import HiddenItems, SampledSoftmax
from rec.retrieval.taste import Taste
from rec.retrieval.towers import CandidateTower, QueryTower, history_tokens
from rec.sequences import Sequences

ROWS = tf.TensorSpec([None], tf.int32)
ROW_LISTS = tf.TensorSpec([None, None], tf.int32)
VECTORS = tf.TensorSpec([None, None], tf.float32)
SECONDS = tf.TensorSpec([None], tf.int64)


class RetrievalModel(tfrs.Model):
    """Two towers and their task."""

    def __init__(
        self, config: ResolvedRetrieval, corpus: Corpus, train: Sequences | None = None
    ) -> None:
        """`train`: the interactions it will be trained on, if that is not all of corpus.train."""
        super().__init__(name="retrieval")
        self.config = config
        self.candidate_tower = CandidateTower(config, corpus)
        self.query_tower = QueryTower(config, corpus, self.candidate_tower.items)
        self.hidden_items = HiddenItems(name="hidden_items")
        self.sampled_softmax = SampledSoftmax(config.temperature, corrects_sampling=config.logq)
        self.n_items = len(corpus.items.ids)
        self.trained_items = corpus.items.first + corpus.items.trained
        self.taste = Taste(config.taste_dim, self.trained_items)
        self._trained_users = corpus.users.first + corpus.users.trained
        self._probability = tf.Variable(
            sampling_probability(corpus, config, corpus.train if train is None else train),
            trainable=False,
            name="probability",
        )
        self._add_cold_start(corpus)
        self._create_weights()
        self._compile_functions()

    def _add_cold_start(self, corpus: Corpus) -> None:
        """What users without a history are answered with: see popularity.py."""
        self._cold_start_popularity = self.add_weight(
            name="cold_start_popularity",
            shape=[self.trained_items],
            initializer="zeros",
            trainable=False,
        )
        self._reads_user_features = bool(corpus.user_columns)
        self._has_features = tf.Variable(has_features(corpus), trainable=False, name="has_features")
        self._answers_from_features = self.add_weight(
            name="answers_from_features", shape=[], initializer="zeros", trainable=False
        )

    def _create_weights(self) -> None:
        """Runs both towers once, so that a checkpoint can be restored before the first batch."""
        row = tf.ones([1, 1], tf.int32)
        self.query_tower(row[0], row, tf.zeros([1, 1], tf.int64))
        self.candidate_tower(row)
        self.taste(row)

    def _compile_functions(self) -> None:
        self.query_compiled = tf.function(self.query, [ROWS, ROW_LISTS])
        self.score_catalogue_compiled = tf.function(
            self.score_catalogue, [ROWS, ROW_LISTS, VECTORS, SECONDS]
        )

    @property
    def encoders(self) -> list[Encoder]:
        """The encoders of items and, if the model knows anything of users but their histories, of users."""
        users = self.query_tower.users
        return [self.candidate_tower.items] + ([] if users is None else [users])

    @property
    def fitted_variables(self) -> list[tf.Variable]:
        """What is set after training and not by gradients: see popularity.py."""
        bias = self.candidate_tower.popularity_bias.variables
        fitted = [*bias, *self.taste.variables, self._cold_start_popularity]
        return [*fitted, self._answers_from_features] if self._reads_user_features else fitted

    # ------------------------------------------------------------------------------------------------------------
    # Training

    def start_from_singular_vectors(self, train: Sequences) -> None:
        """Starts the item vectors of a model of sets from the singular vectors of `train`, at lengths of about .1."""
        embeddings = self.candidate_tower.items.ids.embeddings
        table = tf.convert_to_tensor(embeddings).numpy()
        interactions = train.matrix(np.arange(len(train.lengths)), table.shape[0])
        per_user = np.maximum(train.lengths, 1.0)[:, None] ** -LENGTH_POWER
        rank = min(*interactions.shape, table.shape[1] + 1) - 1
        first_vector = np.ones(min(interactions.shape))  # makes the result repeatable
        scaled = interactions.multiply(per_user).tocsr()
        _, _, vectors = svds(scaled, rank, v0=first_vector)
        table[:, :rank] = 0.1 * (self.n_items / rank) ** 0.5 * vectors.T
        embeddings.assign(table)

    def compute_loss(self, batch: dict[str, tf.Tensor], training: bool = False) -> tf.Tensor:
        """The loss of a batch of `batches.window_batches`, which says the shapes."""
        if self.query_tower.reads_sets:
            return self._loss_of_sets(batch, training)
        return self._loss_of_sequences(batch, training)

    def _loss_of_sequences(self, batch: dict[str, tf.Tensor], training: bool) -> tf.Tensor:
        """Every position of a window predicts the item after it."""
        inputs = batch["tokens"][:, :-1]
        targets = tf.reshape(batch["tokens"][:, 1:], [-1])  # [P]
        negatives = batch["negatives"]  # [C]
        queries = self.query_tower(batch["user"], inputs, batch.get("time"), training=training)
        rows = tf.concat([targets, negatives], 0)
        sizes = [tf.size(targets), tf.size(negatives)]
        target_vectors, negative_vectors = tf.split(self.candidate_tower(rows, training), sizes)
        probability = tf.nn.embedding_lookup(self._probability, rows)
        target_probability, negative_probability = tf.split(probability, sizes)
        return self.sampled_softmax(
            tf.reshape(queries, [sizes[0], -1]),
            target_vectors,
            negative_vectors,
            target_probability=target_probability,
            negative_probability=negative_probability,
            sample_weight=_target_weights(batch, targets),
            negative_mask=self._is_negative(batch, targets),
        )

    def _is_negative(self, batch: dict[str, tf.Tensor], targets: tf.Tensor) -> tf.Tensor:
        """False for a pool item in the position's own window [B, C], or with the mask off for its target [P, C]."""
        if self.config.mask_user_positives:
            return ~_contains(batch["tokens"], batch["negatives"])
        return targets[:, None] != batch["negatives"]

    def _loss_of_sets(self, batch: dict[str, tf.Tensor], training: bool) -> tf.Tensor:
        """A random half of each user's items is hidden, and predicted from the other half."""
        items = batch["tokens"][:, 1:]
        pool = batch["negatives"]
        is_drawn = tf.random.uniform(tf.shape(items)) < 0.5
        weight = tf.reshape(_target_weights(batch, tf.reshape(items, [-1])), tf.shape(items))
        visible = tf.where(is_drawn, PAD, items)
        time = batch["time"][:, :1] if "time" in batch else None
        query = self.query_tower(batch["user"], visible, time, training=training)[:, 0]
        item_vectors = self.candidate_tower(items, training=training)
        pool_vectors = self.candidate_tower(pool, training=training)
        return self.hidden_items(
            tf.einsum("bd,bld->bl", query, item_vectors),
            tf.matmul(query, pool_vectors, transpose_b=True),
            hidden_weight=tf.where(is_drawn, weight, 0.0),
            is_other=~_contains(batch["tokens"], pool),
            other_probability=tf.nn.embedding_lookup(self._probability, pool),
        )

    # ------------------------------------------------------------------------------------------------------------
    # Scores

    def query(
        self, user: tf.Tensor, history: tf.Tensor, time: tf.Tensor | None = None
    ) -> tf.Tensor:
        """Queries of users with their histories.

        Of two users or more, a query does not depend on the others, down to the last bit (numerics.py). So it is
        computed from the whole window: sums over a shorter one would be rounded differently.

        Args:
          user: [B] int32 user rows.
          history: [B, H] int32 item rows, oldest first, PAD anywhere.
          time: [B] int64 seconds, of the request. Default: now.

        Returns:
          [B, D] float32: the query tower's d + 1 dimensions, and those of the taste.
        """
        tokens, last = history_tokens(history, self.config.window)
        time = current_time(user) if time is None else time
        query = self.query_tower(user, tokens, time[:, None], last)[:, 0]
        return tf.concat([query, self.taste(history)], 1)

    def candidates(self) -> tf.Tensor:
        """[catalogue, D] float32: the vectors of all items, from row FIRST_ITEM on."""
        return self.candidates_of(tf.range(FIRST_ITEM, FIRST_ITEM + self.n_items))

    def candidates_of(self, rows: tf.Tensor) -> tf.Tensor:
        """int32 item rows [...] -> [..., D] float32, what a query is multiplied with."""
        return tf.concat([self.candidate_tower(rows), self.taste.candidates(rows)], -1)

    def item_query(self, vectors: tf.Tensor) -> tf.Tensor:
        """[B, d] vectors of items as queries for items like them: [B, D], without bias and taste."""
        others = 1 + self.config.taste_dim
        return tf.pad(vectors, [[0, 0], [0, others]])

    def score(
        self, user: tf.Tensor, history: tf.Tensor, rows: tf.Tensor, time: tf.Tensor | None = None
    ) -> tf.Tensor:
        """The scores of given items: rows [B, N] -> [B, N], LOWEST for PAD. The rest as for `query`."""
        scores = tf.einsum("bd,bnd->bn", self.query(user, history, time), self.candidates_of(rows))
        is_cold = self.is_cold(user, history)[:, None]
        scores = tf.where(is_cold, self.cold_start_score(rows), scores)
        return tf.where(rows == PAD, LOWEST, scores)

    def score_catalogue(
        self,
        user: tf.Tensor,
        history: tf.Tensor,
        candidates: tf.Tensor,
        time: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """The scores of all items, whose vectors are `self.candidates()`: [B, catalogue]. The rest as for `query`."""
        scores = tf.matmul(self.query(user, history, time), candidates, transpose_b=True)
        catalogue = tf.range(FIRST_ITEM, FIRST_ITEM + self.n_items)
        is_cold = self.is_cold(user, history)[:, None]
        return tf.where(is_cold, self.cold_start_score(catalogue), scores)

    # ------------------------------------------------------------------------------------------------------------
    # Cold start

    def is_cold(self, user: tf.Tensor, history: tf.Tensor) -> tf.Tensor:
        """[B] bool: no history, no trained embedding, and no features that say more than popularity.

        Such users are answered by popularity.
        """
        has_embedding = (user > UNKNOWN_USER) & (user < self._trained_users) & self.config.user_id
        is_described = tf.gather(self._has_features, user) & (self._answers_from_features > 0)
        return ~has_embedding & ~is_described & tf.reduce_all(history == PAD, 1)

    @property
    def answers_from_features(self) -> bool:
        """Whether users with features and no history are answered from their features (popularity.py)."""
        return bool(self._answers_from_features > 0)

    @answers_from_features.setter
    def answers_from_features(self, value: bool) -> None:
        self._answers_from_features.assign(float(value))

    def cold_start_score(self, rows: tf.Tensor) -> tf.Tensor:
        """int32 item rows [...] -> float32 [...]: how popular they are (popularity.fit_cold_start)."""
        known = tf.where(rows < self.trained_items, rows, UNKNOWN)
        return tf.nn.embedding_lookup(self._cold_start_popularity, known)

    def most_popular(self) -> np.ndarray:
        """[catalogue] int32: all item rows in the order that a cold user gets."""
        rows = np.arange(FIRST_ITEM, FIRST_ITEM + self.n_items, dtype=np.int32)
        order = np.argsort(-self.cold_start_score(rows).numpy(), kind="stable")
        return rows[order]

    def set_cold_start_popularity(self, popularity: np.ndarray) -> None:
        """Sets the scores for cold users, [item rows] float32. Those of untrained items are not kept: they are 0."""
        self._cold_start_popularity.assign(popularity[: self.trained_items])


def has_features(corpus: Corpus) -> np.ndarray:
    """[user rows] bool: whether a value is known in one of the columns that the model reads."""
    names = [column.name for column in corpus.user_columns]
    is_described = corpus.user_table[names].notna().any(axis=1)
    return np.concatenate([np.zeros(corpus.users.first, bool), is_described])


def current_time(like: tf.Tensor) -> tf.Tensor:
    """[B] anything -> [B] int64: the clock, in seconds since 1970."""
    return tf.fill(tf.shape(like), tf.cast(tf.timestamp(), tf.int64))


def _target_weights(batch: dict[str, tf.Tensor], targets: tf.Tensor) -> tf.Tensor:
    """[P] float32: how much each target counts, 0 for PAD."""
    is_item = tf.cast(targets != PAD, tf.float32)
    if "weight" not in batch:
        return is_item
    return is_item * tf.reshape(batch["weight"], [-1])


def _contains(rows: tf.Tensor, wanted: tf.Tensor) -> tf.Tensor:
    """[B, L] rows and [C] wanted ones -> [B, C] bool: whether each wanted row occurs."""
    return tf.reduce_any(rows[:, :, None] == wanted, 1)
