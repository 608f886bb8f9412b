"""Rating prediction (`ranking.objective: rating`): a model and a training protocol in the place of the ranker's.

- Ratings are about taste and not about what comes next. The base of a score is a factorisation with biases (Koren 2008,
  SVD++). Retrieval scores and counts are not read: they have seen the very interactions that are rated.
- A bundle of this model has the signatures of a ranking bundle. Its scores are ratings.
"""

from dataclasses import replace

import numpy as np
import tensorflow as tf

from rec import LOWEST, metrics
from rec.config import Config, Ranking
from rec.corpus import Corpus
from rec.errors import UserError, note
from rec.features import PAD, UNKNOWN, UNKNOWN_USER
from rec.ranking.candidates import CandidateLists
from rec.ranking.count_features import COUNT_FEATURES
from rec.ranking.model import RankingModel, log_length, mean_of_history, score_lists
from rec.ranking.objectives import weighted_mean
from rec.ranking.train import MODELS, RankingData, TrainedRanking, fit_ranking, untrained_ranking
from rec.retrieval.model import RetrievalModel
from rec.retrieval.train import TrainedRetrieval
from rec.sequences import Sequences
from rec.training import Distribution, Metrics, OneProcess, Schedule, Tracker


class RatingModel(RankingModel):
    """Predicts the rating of each candidate."""

    def __init__(self, config: Ranking, window: int, dim: int, corpus: Corpus) -> None:
        """Raises UserError if the data have no ratings. The rest as for RankingModel."""
        ratings = corpus.train.ratings
        if ratings is None:
            raise UserError(
                "ranking.objective: rating needs a rating column, and this dataset has none"
            )
        self._user_rows = corpus.users.first + corpus.users.trained
        self._item_rows = corpus.items.first + corpus.items.trained
        super().__init__(config, window, dim, corpus)
        self._bias.assign(float(np.mean(ratings)))

    def _loss(self) -> object:
        return squared_error

    def _create_weights(self) -> None:
        self._user_bias = tf.keras.layers.Embedding(self._user_rows, 1, "zeros")
        self._item_bias = tf.keras.layers.Embedding(self._item_rows, 1, "zeros")
        super()._create_weights()

    def score(
        self,
        user: tf.Tensor,
        history: tf.Tensor,
        items: tf.Tensor,
        retrieval_scores: tf.Tensor,
        counts: tf.Tensor,
        training: bool = False,
    ) -> tf.Tensor:
        """The candidates' ratings, [B, N] float32. Arguments as for RankingModel.score."""
        candidates = self.items(items, training=training)
        past = self.items(history, training=training)
        about_user = self.users(user, training=training)
        length = tf.reduce_sum(tf.cast(history != PAD, tf.float32), 1)
        taste = about_user + mean_of_history(past, history) * tf.sqrt(length)[:, None]
        lengths = log_length(history, items)
        nothing = tf.zeros_like(lengths)
        numbers = tf.stack([nothing, nothing, lengths], 2)
        numbers = tf.concat([numbers, tf.zeros_like(counts)], 2)
        added = self.architecture_score(
            candidates, past, history, tf.stop_gradient(about_user), numbers, training=training
        )
        factorised = tf.einsum("bd,bnd->bn", taste, candidates)
        return factorised + self._biases(user, items) + added + self._bias

    def _biases(self, user: tf.Tensor, items: tf.Tensor) -> tf.Tensor:
        """[B, N]: what the user gives on average, plus what the item gets, over the mean rating."""
        known_user = tf.where(user < self._user_rows, user, UNKNOWN_USER)
        known_items = tf.where(items < self._item_rows, items, UNKNOWN)
        return self._user_bias(known_user) + self._item_bias(known_items)[..., 0]

    def compute_loss(self, batch: dict[str, tf.Tensor], training: bool = False) -> tf.Tensor:
        """The loss of a batch of rated items (lists of one), with a penalty on the vectors that it reads."""
        vectors = tf.concat([self.users(batch["user"]), self.items(batch["items"][:, 0])], 1)
        penalty = self.config.l2 * tf.reduce_mean(tf.reduce_sum(tf.square(vectors), 1))
        replicas = self.distribute_strategy.num_replicas_in_sync
        return super().compute_loss(batch, training) + penalty / replicas


def squared_error(y_true: tf.Tensor, y_pred: tf.Tensor, sample_weight: tf.Tensor) -> tf.Tensor:
    return weighted_mean(tf.square(y_true - y_pred), sample_weight)


def no_counts(history: tf.Tensor, items: tf.Tensor, time: tf.Tensor) -> tf.Tensor:
    """Zeros in the place of CountFeatures: the model does not read them."""
    return tf.zeros([*items.shape, COUNT_FEATURES])


# ----------------------------------------------------------------------------------------------------------------
# Training


def train_ratings(
    config: Config,
    retrieval: TrainedRetrieval,
    *,
    init_from: RetrievalModel | None = None,
    init_name: str | None = None,
    distribution: Distribution | None = None,
    tracker: Tracker | None = None,
) -> TrainedRanking:
    """Trains on every training rating, and stops by the RMSE on validation ratings. As `train_ranking`."""
    distribution = distribution or OneProcess()
    settings, model = untrained_ranking(config, retrieval, distribution)
    config = replace(config, ranking=settings)
    if init_from is not None:
        model.start_from(init_from)
    corpus = retrieval.corpus
    train = corpus.train
    known = train if tests_follow_training(corpus) else None
    val = rated_lists(corpus.val, np.arange(len(corpus.val.items)), train, model.window)
    note(
        f"ranking.objective rating: {settings.batch_size:,} ratings per step, learning rate "
        f"{settings.learning_rate:g}, histories of {settings.window} items"
    )

    schedule = Schedule(
        epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        seed=config.seed,
        monitor="val/rmse",
        patience=settings.patience,
    )
    size = settings.batch_size
    return fit_ranking(
        model,
        config,
        retrieval,
        RankingData(
            schedule,
            examples=len(train.items),
            batches=lambda rng: rating_batches(train, known, model.window, size, rng),
            measure=lambda: rating_error(model, val),
        ),
        init_name=init_name,
        distribution=distribution,
        tracker=tracker,
    )


def tests_follow_training(corpus: Corpus) -> bool:
    """Whether, in a user's history, the test comes after all training interactions."""
    return corpus.split_strategy == "given" or not corpus.ordered


def rating_error(model: RankingModel, lists: CandidateLists) -> Metrics:
    return {"val/rmse": metrics.rmse(score_lists(model, lists, no_counts), lists.labels)}


def rated_lists(
    sequences: Sequences, at: np.ndarray, known: Sequences | None, width: int
) -> CandidateLists:
    """Interactions number `at` as lists of one, labelled with their ratings.

    The history is the `width` interactions before it. If `known` is given, it is the user's last ones there, without
    the rated item itself.
    """
    assert sequences.ratings is not None
    user = sequences.users[at]
    items = sequences.items[at][:, None]
    place = at - sequences.offsets[user]
    if known is None:
        history = sequences.between(user, place - width, place, width)
    else:
        history = known.last(user, width)
        history = np.where(history == items, PAD, history)
    return CandidateLists(
        user=user,
        history=history,
        time=sequences.times_at(user, place),
        items=items,
        scores=np.full(items.shape, LOWEST, np.float32),
        labels=sequences.ratings[at][:, None],
    )


def rating_batches(
    train: Sequences, known: Sequences | None, width: int, batch_size: int, rng: np.random.Generator
) -> tf.data.Dataset:
    """One epoch of all ratings in shuffled batches. They are made as they are needed: together they are too large."""
    order = rng.permutation(len(train.items))
    batches = np.array_split(order, max(1, round(len(order) / batch_size)))

    def batch(at: np.ndarray) -> dict[str, np.ndarray]:
        lists = rated_lists(train, at, known, width)
        counts = no_counts(lists.history, lists.items, lists.time)
        return {**lists.as_batch(), "counts": counts.numpy()}

    signature = {
        name: tf.TensorSpec([None, *values.shape[1:]], values.dtype)
        for name, values in batch(order[:0]).items()
    }
    return tf.data.Dataset.from_generator(
        lambda: map(batch, batches), output_signature=signature
    ).prefetch(4)


MODELS["rating"] = RatingModel
