"""The retrieval model: two towers, joined by a dot product, trained by a sampled softmax over windows.

- `SampledSoftmax` is TFRS's Retrieval task for one pool of negatives that the whole batch shares: its cost is linear in
  the batch, where in-batch softmax is quadratic.
- A model of sets (`Autoencoder`) has a loss of its own: one query a user, trained on items that are hidden from it.
- `RetrievalModel` is the tfrs.Model. Validation, mining, evaluation and the bundle all score with its `score*`.
"""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_recommenders as tfrs
from scipy.sparse.linalg import svds

from rec.config import Retrieval
from rec.counts import SHARES
from rec.features import FIRST_ITEM, PAD, UNKNOWN_USER, Encoder
from rec.metrics import per_user
from rec.pipeline import Corpus, Sequences, sampling_probability
from rec.retrieval.index import LOWEST
from rec.retrieval.towers import LENGTH_POWER, CandidateTower, QueryTower, history_tokens
from rec.workers import of_all_workers

CALIBRATION_USERS = 2000
LEANINGS = (0.25, 0.5, 1.0, 2.0, 4.0)  # on the log of popularity
UNOBSERVED = 0.5  # of the weight of an interaction, what an item without one has in the loss of a model of sets
MASKED = LOWEST / 100  # a logit that must not count; far from overflow when losses add up


class SampledSoftmax(tfrs.tasks.Retrieval):
    """Softmax cross-entropy of each position's target against a shared pool of negatives.

    Logits are divided by `temperature`; `logq` subtracts the log of each candidate's sampling probability (Bengio and
    Senecal 2008; Yi et al. 2019), without which popular items, often drawn as negatives, are pushed down.
    """

    def __init__(self, config: Retrieval) -> None:
        super().__init__(temperature=config.temperature, name="sampled_softmax")
        self._logq = config.logq

    def sampled_loss(
        self,
        queries: tf.Tensor,
        targets: tf.Tensor,
        negatives: tf.Tensor,
        target_probability: tf.Tensor,
        negative_probability: tf.Tensor,
        weights: tf.Tensor,
        score_mask: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """The mean loss over P positions, each of its weight; of several workers' positions, this one's part of it.

        Args:
          queries, targets: [P, d] float32. The last dimension is the bias: 1 in every query.
          negatives: [C, d] float32, the pool.
          target_probability, negative_probability: [P], [C] float32, of each item to fill a slot of the pool.
          weights: [P] float32.
          score_mask: [G, C] bool, false where a pool item must not count as a negative; each row is for as many of the
            positions in turn (G = P, or positions that lie together share one).
        """
        positive = tf.reduce_sum(queries * targets, 1, keepdims=True) / self._temperature
        if self._logq:
            # The pool's correction rides in its bias, which saves a pass over [P, C].
            correction = self._temperature * tf.math.log(negative_probability)
            negatives = tf.concat([negatives[:, :-1], negatives[:, -1:] - correction[:, None]], 1)
            positive -= tf.math.log(target_probability)[:, None]
        pool = tf.matmul(queries / self._temperature, negatives, transpose_b=True)
        if score_mask is not None:
            grouped = tf.reshape(pool, [tf.shape(score_mask)[0], -1, tf.shape(pool)[1]])
            pool = tf.reshape(tf.where(score_mask[:, None], grouped, MASKED), tf.shape(pool))
        logits = tf.concat([positive, pool], 1)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(
            tf.zeros([tf.shape(logits)[0]], tf.int32), logits
        )
        return tf.reduce_sum(weights * losses) / tf.maximum(
            of_all_workers(tf.reduce_sum(weights)), 1.0
        )


class RetrievalModel(tfrs.Model):
    """Two towers and their task."""

    def __init__(self, config: Retrieval, corpus: Corpus, train: Sequences | None = None) -> None:
        """`train`: the interactions it will be trained on, where they are not all of corpus.train."""
        super().__init__(name="retrieval")
        self.config = config
        self.candidate_tower = CandidateTower(config, corpus)
        self.query_tower = QueryTower(config, corpus, self.candidate_tower.items)
        self.task = SampledSoftmax(config)
        self.trained_users = corpus.users.first + corpus.users.trained
        self.n_items = len(corpus.items.ids)
        train = corpus.train if train is None else train
        prior = best_prior(corpus, train)
        self._prior = tf.Variable(prior, trainable=False, name="prior")
        popular = FIRST_ITEM + np.argsort(-prior[FIRST_ITEM:], kind="stable")
        self.popular = tf.Variable(
            popular.astype(np.int32), trainable=False, name="popular"
        )  # rows, best prior first
        probability = sampling_probability(corpus, config, train)
        self.probability = tf.Variable(probability, trainable=False, name="probability")
        self.leaning = {"lean_share": 1.0, "lean_weight": 0.0}
        self._build()
        rows, lists = tf.TensorSpec([None], tf.int32), tf.TensorSpec([None, None], tf.int32)
        self.query_compiled = tf.function(self.query, [rows, lists])
        signature = [
            rows,
            lists,
            tf.TensorSpec([None, None], tf.float32),
            tf.TensorSpec([None], tf.int64),
        ]
        self.score_catalogue_compiled = tf.function(self.score_catalogue, signature)

    @property
    def encoders(self) -> list[Encoder]:
        users = self.query_tower.users
        return [self.candidate_tower.items] + ([] if users is None else [users])

    def _build(self) -> None:
        """Creates every weight, so that a checkpoint can be restored before the first batch."""
        one = tf.ones([1, 1], tf.int32)
        self.query_tower(one[0], one, tf.zeros([1, 1], tf.int64))
        self.candidate_tower(one)

    def start(self, train: Sequences) -> None:
        """Starts the item vectors of a model of sets from the singular vectors of `train`, with lengths of about .1."""
        if self.query_tower.of_sets:
            embeddings = self.candidate_tower.items.ids.embeddings
            table = tf.convert_to_tensor(embeddings).numpy()
            seen = train.matrix(np.arange(len(train.lengths)), table.shape[0])
            rank = min(*seen.shape, table.shape[1] + 1) - 1
            scaled = seen.multiply(np.maximum(train.lengths, 1.0)[:, None] ** -LENGTH_POWER).tocsr()
            vectors = svds(scaled, rank, v0=np.ones(min(seen.shape)))[2].T
            table[:, :rank] = 0.1 * (self.n_items / rank) ** 0.5 * vectors
            embeddings.assign(table)

    def compute_loss(self, batch: dict[str, tf.Tensor], training: bool = False) -> tf.Tensor:
        """The loss of a batch of `pipeline.window_batches` (shapes there)."""
        if self.query_tower.of_sets:
            return self._hidden_loss(batch, training)
        inputs, targets = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
        queries = self.query_tower(batch["user"], inputs, batch.get("time"), training=training)
        rows = tf.concat([tf.reshape(targets, [-1]), batch["negatives"]], 0)
        p, c = tf.size(targets), tf.size(batch["negatives"])
        wanted, pool = tf.split(self.candidate_tower(rows, training=training), [p, c])
        probability = tf.nn.embedding_lookup(self.probability, rows)
        # Targets of PAD have weight 0: to leave them out costs more than to compute them.
        return self.task.sampled_loss(
            tf.reshape(queries, [p, -1]),
            wanted,
            pool,
            probability[:p],
            probability[p:],
            tf.cast(rows[:p] != PAD, tf.float32),
            self._score_mask(batch, rows[:p]),
        )

    def _hidden_loss(self, batch: dict[str, tf.Tensor], training: bool) -> tf.Tensor:
        """Hides half of each user's items, at random; 1 is the right score for them, 0 for items of no interaction.

        Squared errors, the latter weighing UNOBSERVED (Hu et al. 2008, iALS). An item of the pool stands for as many as
        it was improbable to be drawn.
        """
        items, pool = batch["tokens"][:, 1:], batch["negatives"]
        is_hidden = tf.random.uniform(tf.shape(items)) < 0.5
        inputs, weights = (
            tf.where(is_hidden, PAD, items),
            tf.cast(is_hidden & (items != PAD), tf.float32),
        )
        time = batch["time"][:, :1] if "time" in batch else None
        query = self.query_tower(batch["user"], inputs, time, training=training)[:, 0]
        wanted = tf.einsum("bd,bld->bl", query, self.candidate_tower(items, training=training))
        others = tf.matmul(query, self.candidate_tower(pool, training=training), transpose_b=True)
        is_other = ~tf.reduce_any(batch["tokens"][:, :, None] == pool, 1)
        stands_for = UNOBSERVED / (
            tf.nn.embedding_lookup(self.probability, pool) * tf.cast(tf.size(pool), tf.float32)
        )
        errors = tf.reduce_sum(tf.where(is_other, tf.square(others) * stands_for, 0.0))
        hidden = of_all_workers(tf.reduce_sum(weights))
        return (tf.reduce_sum(weights * tf.square(1 - wanted)) + errors) / tf.maximum(hidden, 1.0)

    def _score_mask(self, batch: dict[str, tf.Tensor], targets: tf.Tensor) -> tf.Tensor:
        """False where a pool item is no negative: it stands in the position's own window [B, C], or is its target."""
        if self.config.mask_user_positives:  # the target stands in the window too
            return ~tf.reduce_any(batch["tokens"][:, :, None] == batch["negatives"], 1)
        return targets[:, None] != batch["negatives"]

    def query(
        self, user: tf.Tensor, history: tf.Tensor, time: tf.Tensor | None = None
    ) -> tf.Tensor:
        """user [B] rows, history [B, H] item rows (oldest first, PAD anywhere) -> queries [B, d + 1].

        Of two users or more, a query does not depend on the others, down to the last bit. So it is computed from the
        whole window: sums over a shorter one, to the batch's longest history, would be rounded differently.

        time: [B] int64 seconds, of the request; now if not given.
        """
        tokens, last = history_tokens(history, self.config.window)
        time = now(user) if time is None else time
        return self.query_tower(user, tokens, time[:, None], last)[:, 0]

    def candidates(self) -> tf.Tensor:
        """[catalogue, d + 1]: every item, from FIRST_ITEM on."""
        return self.candidate_tower(tf.range(FIRST_ITEM, FIRST_ITEM + self.n_items))

    def lean(self, train: Sequences, lean_share: float, lean_weight: float) -> None:
        """Adds to each item's bias `lean_weight` times the log of its popularity in the last `lean_share`."""
        self.leaning = {"lean_share": lean_share, "lean_weight": lean_weight}
        popularity = recent_popularity(train, lean_share, self.candidate_tower.lean.shape[0])
        self.candidate_tower.lean.assign(lean_weight * popularity[:, None])

    def is_cold(self, user: tf.Tensor, history: tf.Tensor) -> tf.Tensor:
        """[B] bool: the query tower would know nothing of the user. Such a row is answered by `prior`."""
        trained = (user > UNKNOWN_USER) & (user < self.trained_users) & self.config.user_id
        return ~trained & tf.reduce_all(history == PAD, 1)

    def prior(self, rows: tf.Tensor) -> tf.Tensor:
        """The score of items for a cold user: how popular they are (`best_prior`)."""
        return tf.nn.embedding_lookup(self._prior, rows)

    def score(
        self, user: tf.Tensor, history: tf.Tensor, rows: tf.Tensor, time: tf.Tensor | None = None
    ) -> tf.Tensor:
        """The scores of given items: rows [B, N] -> [B, N], LOWEST where a row is PAD. The rest as for `query`."""
        scores = tf.einsum(
            "bd,bnd->bn", self.query(user, history, time), self.candidate_tower(rows)
        )
        scores = tf.where(self.is_cold(user, history)[:, None], self.prior(rows), scores)
        return tf.where(rows == PAD, LOWEST, scores)

    def score_catalogue(
        self,
        user: tf.Tensor,
        history: tf.Tensor,
        candidates: tf.Tensor,
        time: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """The scores of the whole catalogue, whose vectors are `self.candidates()`: [B, catalogue]."""
        scores = tf.matmul(self.query(user, history, time), candidates, transpose_b=True)
        prior = self.prior(tf.range(FIRST_ITEM, FIRST_ITEM + self.n_items))
        return tf.where(self.is_cold(user, history)[:, None], prior, scores)


def best_prior(corpus: Corpus, train: Sequences) -> np.ndarray:
    """[item rows] float32: the log of the popularity of each item in the last share of `train`.

    The share is the one whose order has the best NDCG@100 on validation users without a history, or on all where there
    are fewer than 30 of those. (Of few users NDCG@100 is known better than NDCG@10, and it sees all candidates.)
    """
    users = np.flatnonzero(corpus.val.lengths)
    cold = users[train.lengths[users] == 0]
    users = (cold if len(cold) >= 30 else users)[:CALIBRATION_USERS]
    relevant, seen = (
        corpus.val.matrix(users, corpus.items.rows),
        train.matrix(users, corpus.items.rows).astype(bool),
    )
    depth = 100 + int(
        train.lengths[users].max(initial=0)
    )  # of one order for all, from which each leaves out the seen

    def ndcg(prior: np.ndarray) -> float:
        order = FIRST_ITEM + np.argsort(-prior[FIRST_ITEM:], kind="stable")[:depth]
        is_seen = seen[:, order].toarray()
        at = np.argsort(is_seen, 1, kind="stable")[:, :100]
        ranked = np.where(np.take_along_axis(is_seen, at, 1), -1, order[at])
        k = ranked.shape[1]  # 100, or a smaller catalogue
        return float(per_user(ranked, relevant, ks=(k,))[f"ndcg@{k}"].sum())

    return max(
        (recent_popularity(train, share, corpus.items.rows) for share in _shares(train)), key=ndcg
    )


def calibrate(model: RetrievalModel, corpus: Corpus) -> dict[str, float]:
    """Has the scores lean on recent popularity, as far as that betters NDCG@100 on validation users with a history.

    The towers learn what comes next. What a user does in the weeks after leans more on what is popular then: most on
    a `temporal` split, and often not at all where only the next item is asked for.
    """
    train, candidates = corpus.train, model.candidates()
    users = np.flatnonzero((corpus.val.lengths > 0) & (train.lengths > 0)).astype(np.int32)
    users = np.random.default_rng(0).permutation(users)[:CALIBRATION_USERS]
    choices = [(1.0, 0.0), *product(_shares(train), LEANINGS)]
    popularity = {
        share: recent_popularity(train, share, corpus.items.rows)[FIRST_ITEM:]
        for share in _shares(train)
    }
    leans = [weight * popularity[share] for share, weight in choices]

    def scores(part: np.ndarray) -> Iterator[tf.Tensor]:
        history = train.last(part, model.config.window)
        without = model.score_catalogue_compiled(part, history, candidates, now(part))
        return (without + lean for lean in leans)

    best = 0
    if len(users):
        ndcg = _ndcg(corpus, train, users, scores)
        gain = (
            ndcg - ndcg[0]
        )  # the best of many choices is often luck: what counts is the gain less a standard error
        best = int(np.argmax(gain.mean(1) - gain.std(1) / len(users) ** 0.5))
    model.lean(train, *choices[best])
    return model.leaning


def recent_popularity(train: Sequences, share: float, item_rows: int) -> np.ndarray:
    """[item rows] float32: the log of 1 + the interactions of each item in the last share of `train`.

    Where these are equal, the count of all interactions decides.
    """
    order = (
        np.arange(len(train.items))
        if train.times is None
        else np.argsort(train.times, kind="stable")
    )
    recent = np.bincount(train.items[order[round((1 - share) * len(order)) :]], minlength=item_rows)
    all_time = np.bincount(train.items, minlength=item_rows) / (len(order) + 1)
    return np.log1p(recent + all_time).astype(np.float32)


def _shares(train: Sequences) -> tuple[float, ...]:
    return (
        (1.0,) if train.times is None else SHARES[::-1]
    )  # where several are as good, the largest is taken


def _ndcg(
    corpus: Corpus,
    train: Sequences,
    users: np.ndarray,
    scores: Callable[[np.ndarray], Iterator[Any]],
) -> np.ndarray:
    """[choices, U]: NDCG@100 on validation data; `scores` gives some users' by each choice, [part, catalogue]."""
    parts = []
    step = users_at_once(len(corpus.items.ids))
    for part in np.array_split(users, np.arange(step, len(users), step)):
        seen, relevant = train.last(part), corpus.val.matrix(part, corpus.items.rows)
        ranked = (
            best_unseen(tf.cast(each, tf.float32), seen, 100)[1].numpy() for each in scores(part)
        )
        parts.append(
            [per_user(np.where(r == PAD, -1, r), relevant, ks=(100,))["ndcg@100"] for r in ranked]
        )
    return np.concatenate(parts, 1)


def users_at_once(items: int) -> int:
    """How many users' scores of the whole catalogue are computed together: at most 128 MB of float32."""
    return min(256, max(1, 2**25 // items))


def now(users: tf.Tensor) -> tf.Tensor:
    """[B] anything -> [B] int64: the clock, in seconds."""
    return tf.fill(tf.shape(users), tf.cast(tf.timestamp(), tf.int64))


def best_unseen(scores: tf.Tensor, seen: tf.Tensor, k: int) -> tuple[tf.Tensor, tf.Tensor]:
    """The k best items of the whole catalogue that a user has not seen, best first.

    Args:
      scores: [B, catalogue]; seen: [B, S] item rows, PAD where none.

    Returns:
      scores [B, k] and item rows [B, k]; LOWEST and PAD where nothing is left.
    """
    catalogue = tf.shape(scores)[1]
    which = tf.where(seen >= FIRST_ITEM)
    at = tf.stack([which[:, 0], tf.cast(tf.gather_nd(seen, which), tf.int64) - FIRST_ITEM], 1)
    scores = tf.tensor_scatter_nd_update(scores, at, tf.fill([tf.shape(at)[0]], LOWEST))
    scores = tf.pad(scores, [[0, 0], [0, tf.maximum(k - catalogue, 0)]], constant_values=LOWEST)
    best, rows = tf.math.top_k(scores, k)
    return best, tf.where(best > LOWEST, rows + FIRST_ITEM, PAD)
