"""Trains the ranker: one script, from a trained retrieval model to a finished checkpoint.

1. Hold out the latest training interactions. They will be the labels.
2. Train a second retrieval model, the miner, on the rest: a model that has not seen the labels.
3. Mine candidate lists with the miner, as they would be in service, and label them.
4. Put the lists of every fifth user aside, to choose the epoch by.
5. Choose the weight of the neighbours' scores on the others: the order that training begins with.
6. Train on them, and keep the epoch that gains most over retrieval's own order.

Point 2 is where two-stage systems leak: a ranker that is trained on lists of a model that knows their labels learns to
trust the retrieval score, and fails in service.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tensorflow as tf

from rec import metrics
from rec.checkpoint import RankingRun, read_run, write_run
from rec.config import Config, Ranking, ResolvedRanking, with_ranking_defaults
from rec.corpus import Corpus
from rec.errors import UserError, note, warn
from rec.files import read_whole
from rec.ranking.candidates import (
    CandidateLists,
    first_queries,
    hold_out,
    list_batches,
    mine,
    no_lists,
    training_queries,
)
from rec.ranking.count_features import CountFeatures
from rec.ranking.model import RankingModel, score_lists
from rec.retrieval.model import RetrievalModel
from rec.retrieval.popularity import set_popularity_bias
from rec.retrieval.train import TrainedRetrieval, train_miner
from rec.retrieval.validation import MAX_USERS, mean_metrics
from rec.sequences import Sequences
from rec.training import (
    Distribution,
    Metrics,
    NoTracker,
    OneProcess,
    Schedule,
    Tracker,
    TrainingRun,
    TrainState,
    restore,
)

MAX_LISTS = 50_000  # that a ranker is trained on
HOLDOUT_EVERY = 5  # of the users: their lists choose the epoch and do not train
WEIGHTS = (0.1, 0.2, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0)  # of the neighbours' scores
# The lower bound of the mean gain in NDCG@10 over retrieval's order: the mean less one standard error. Keeping
# retrieval's order scores 0. The best of several epochs by NDCG on validation data alone is often luck.
GAIN = "val/ndcg@10_gain_lcb"


@dataclass(frozen=True)
class TrainedRanking:
    """A finished run: the model with its best weights, and how it came about."""

    model: RankingModel
    retrieval: TrainedRetrieval
    state: TrainState
    description: RankingRun


@dataclass(frozen=True)
class MinedLists:
    """Candidate lists whose labels the miner has not seen, and the counts that were known then."""

    train: CandidateLists
    holdout: CandidateLists
    counts: CountFeatures
    miner: RetrievalModel


def train_ranking(
    config: Config,
    retrieval: TrainedRetrieval,
    *,
    init_from: RetrievalModel | None = None,
    init_name: str | None = None,
    distribution: Distribution | None = None,
    tracker: Tracker | None = None,
) -> TrainedRanking:
    """Trains a ranker for a trained retrieval model, into CHECKPOINTS/ranking.

    Args:
      init_from: the model whose embeddings the ranker starts from; by default the miner's, which have not seen the
        labels. `init_name` says in the run's description which one it is.
    """
    distribution = distribution or OneProcess()
    settings, model = untrained_ranking(config, retrieval, distribution)
    config = replace(config, ranking=settings)
    mined = mine_training_lists(config, retrieval, distribution)
    model.start_from(init_from or mined.miner)
    model.neighbours_weight.assign(best_weight(mined.train, mined.counts))
    validation = RankingValidation(config, retrieval, mined)
    schedule = Schedule(
        epochs=settings.epochs if len(mined.train) else 0,
        learning_rate=settings.learning_rate,
        seed=config.seed,
        monitor=GAIN,
        patience=settings.patience,
    )
    return fit_ranking(
        model,
        config,
        retrieval,
        RankingData(
            schedule,
            examples=mined.train.items.size,
            batches=lambda rng: list_batches(mined.train, mined.counts, settings.batch_size, rng),
            measure=lambda: validation.measure(model),
        ),
        init_name=init_name,
        distribution=distribution,
        tracker=tracker,
    )


@dataclass(frozen=True)
class RankingData:
    """What a ranker learns from, and what its epochs are judged by."""

    schedule: Schedule
    examples: int  # per epoch
    batches: Callable[[np.random.Generator], tf.data.Dataset]  # one epoch's
    measure: Callable[[], Metrics]


def untrained_ranking(
    config: Config, retrieval: TrainedRetrieval, distribution: Distribution
) -> tuple[ResolvedRanking, RankingModel]:
    """The settings without `auto`, and a model with them, initialised from the config's seed."""
    settings = with_ranking_defaults(config.ranking, retrieval.model.config.window)
    tf.keras.utils.set_random_seed(config.seed)
    with distribution.strategy.scope():
        model = build_ranking_model(settings, retrieval)
    return settings, model


def fit_ranking(
    model: RankingModel,
    config: Config,
    retrieval: TrainedRetrieval,
    data: RankingData,
    *,
    init_name: str | None,
    distribution: Distribution,
    tracker: Tracker | None,
) -> TrainedRanking:
    """Trains a ranker into CHECKPOINTS/ranking, and keeps its best epoch."""
    description = describe_ranking(config, retrieval, init_name)
    run = TrainingRun(
        model,
        Path(config.output.checkpoints) / "ranking",
        write_run(description),
        {},
        data.schedule,
        examples=data.examples,
        distribution=distribution,
        tracker=tracker or NoTracker(),
    )
    run.fit(lambda epoch: data.batches(np.random.default_rng([config.seed, epoch])), data.measure)
    if not distribution.is_chief:  # it alone finishes the run
        return TrainedRanking(model, retrieval, run.state, description)
    run.restore_best()
    return TrainedRanking(model, retrieval, run.finish({}), description)


def describe_ranking(
    config: Config, retrieval: TrainedRetrieval, init_name: str | None
) -> RankingRun:
    return RankingRun(
        dataset=retrieval.corpus.dataset_id,
        seed=config.seed,
        features=config.features,
        exclude_seen=retrieval.corpus.exclude_seen,
        ranking=config.ranking,
        retrieval_run=retrieval.description,
        init_from=init_name,
    )


# ranking.objective -> the class of its model
MODELS: dict[str, type[RankingModel]] = {"implicit": RankingModel, "listwise": RankingModel}


def build_ranking_model(config: Ranking, retrieval: TrainedRetrieval) -> RankingModel:
    """An untrained ranker for the candidates of a retrieval model."""
    model_class = MODELS[config.objective]
    settings = with_ranking_defaults(config, retrieval.model.config.window)
    dim = retrieval.model.config.embedding_dim
    return model_class(settings, settings.window, dim, retrieval.corpus)


def mine_training_lists(
    config: Config, retrieval: TrainedRetrieval, distribution: Distribution
) -> MinedLists:
    """Steps 1 to 4: holds labels out, trains the miner on the rest, mines and labels its lists.

    Without a list to train on, the ranker stays what it is at the start: retrieval's order.
    """
    corpus = retrieval.corpus
    past, labels = hold_out(corpus, config.ranking.holdout, config.seed)
    lists = no_lists(config.ranking.candidates)
    miner = retrieval.model
    if len(labels.items):
        miner = _train_miner(config, retrieval, past, distribution)
        next_item = asks_for_next_item(corpus)
        queries = training_queries(labels, next_item=next_item, most=MAX_LISTS, seed=config.seed)
        n = config.ranking.candidates
        lists = mine(
            miner, past, labels, queries, n, next_item=next_item, exclude_seen=corpus.exclude_seen
        ).with_hits()
    if not len(lists):
        warn(
            "no candidate list holds a right item, so the ranker keeps retrieval's order: "
            "it needs users with two or more training interactions, or a better retrieval model"
        )
    is_held_out = lists.user % HOLDOUT_EVERY == 0
    if is_held_out.all():  # of very few users, all are trained on
        is_held_out = np.zeros_like(is_held_out)
    return MinedLists(
        train=lists.take(np.flatnonzero(~is_held_out)),
        holdout=lists.take(np.flatnonzero(is_held_out)),
        counts=CountFeatures(past, corpus.items.rows),
        miner=miner,
    )


def _train_miner(
    config: Config, retrieval: TrainedRetrieval, past: Sequences, distribution: Distribution
) -> RetrievalModel:
    """The retrieval model's twin that has seen `past` only, with the same taste weight and popularity bias."""
    note("training a retrieval model without the ranker's labels, to mine its candidates")
    miner = train_miner(
        replace(config, retrieval=retrieval.model.config),
        retrieval.corpus,
        past,
        epochs=max(1, retrieval.state.best_epoch),
        distribution=distribution,
    )
    taste = retrieval.model.taste.setting
    if taste.weight > 0:
        miner.taste.fit(past, taste, config.seed)
    bias = retrieval.model.candidate_tower.popularity_bias.setting
    set_popularity_bias(miner, past, **bias)
    miner.answers_from_features = retrieval.model.answers_from_features
    return miner


def best_weight(lists: CandidateLists, counts: CountFeatures) -> float:
    """The weight of the neighbours' scores with the best mean gain over retrieval's order, less one standard error."""
    gains = {0.0: 0.0}
    if len(lists):
        batches = np.array_split(np.arange(len(lists)), len(lists) // 256 + 1)
        parts = [lists.take(rows) for rows in batches]
        added = np.concatenate([counts.neighbours(part.history, part.items) for part in parts])
        for weight in WEIGHTS:
            order = np.argsort(-(lists.scores + weight * added), axis=1, kind="stable")
            gain = ndcg_gain(lists, order)
            gains[weight] = float(metrics.lower_bound(gain))
    return max(gains, key=gains.__getitem__)


def asks_for_next_item(corpus: Corpus) -> bool:
    """Whether the test asks for the next item, and not for all that follow."""
    return corpus.split_strategy == "leave_one_out"


class RankingValidation:
    """What a ranker gains over retrieval's order, on validation lists and on held-out training lists."""

    def __init__(self, config: Config, retrieval: TrainedRetrieval, mined: MinedLists) -> None:
        corpus = retrieval.corpus
        queries = first_queries(corpus.val, MAX_USERS, config.seed)
        self._relevant = corpus.val.matrix(queries.user, corpus.items.rows)
        self._val_lists = mine(
            retrieval.model,
            corpus.train,
            corpus.val,
            queries,
            config.ranking.candidates,
            next_item=False,
            exclude_seen=corpus.exclude_seen,
            disliked=corpus.disliked("val"),
        )
        self._val_counts = CountFeatures(corpus.train, corpus.items.rows)
        self._mined = mined

    def measure(self, model: RankingModel) -> Metrics:
        """The mean metrics on validation data, and GAIN."""
        val = self._val_lists
        order = ranked_order(model, val, self._val_counts)
        ranked = np.take_along_axis(val.items, order, 1)
        holdout = self._mined.holdout
        holdout_order = ranked_order(model, holdout, self._mined.counts)
        gain = np.concatenate([ndcg_gain(holdout, holdout_order), ndcg_gain(val, order)])
        return mean_metrics(ranked, self._relevant) | {GAIN: float(metrics.lower_bound(gain))}


def ranked_order(model: RankingModel, lists: CandidateLists, counts: CountFeatures) -> np.ndarray:
    """[Q, N] places in the lists, in the ranker's order."""
    return np.argsort(-score_lists(model, lists, counts), axis=1, kind="stable")


def ndcg_gain(lists: CandidateLists, order: np.ndarray) -> np.ndarray:
    """[Q]: NDCG@10 of lists in another order [Q, N], less that of retrieval's order."""
    is_right = lists.labels > 0
    reordered = np.take_along_axis(is_right, order, 1)
    return metrics.ndcg_of_lists(reordered, 10) - metrics.ndcg_of_lists(is_right, 10)


def load_ranking(directory: Path, retrieval: TrainedRetrieval) -> TrainedRanking:
    """The model of a finished checkpoint.

    Raises:
      UserError: there is no finished ranking checkpoint, or it was trained for another retrieval model.
    """
    return read_whole(directory, lambda: _load_ranking(directory, retrieval))


def _load_ranking(directory: Path, retrieval: TrainedRetrieval) -> TrainedRanking:
    description = read_run(RankingRun, directory)
    if description.retrieval_run != retrieval.description:
        raise UserError(f"{directory} was trained for another retrieval model: train ranking again")
    model = build_ranking_model(description.ranking, retrieval)
    return TrainedRanking(model, retrieval, restore(model, directory), description)
