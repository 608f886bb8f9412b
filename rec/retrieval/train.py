"""Trains the two towers: one script, from a corpus to a finished checkpoint.

1. Choose what the data decide (`with_data_defaults`), build the model.
2. Fit what cold users get, which needs no training.
3. Train epoch by epoch; validation data say when to stop and which epoch is the best.
4. Add the taste part to the best epoch's towers, then the popularity bias. Decide who is answered by popularity alone.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tensorflow as tf

from rec.batches import window_batches
from rec.checkpoint import RetrievalRun, corpus_files, load_trained_corpus, read_run, write_run
from rec.config import Config, with_data_defaults
from rec.corpus import Corpus
from rec.data_prep.dataset import Dataset
from rec.files import read_whole
from rec.retrieval.mixture import fit_taste
from rec.retrieval.model import RetrievalModel
from rec.retrieval.popularity import fit_answers_from_features, fit_cold_start, fit_popularity_bias
from rec.retrieval.validation import RetrievalValidation
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
    read_description,
    restore,
)


@dataclass(frozen=True)
class TrainedRetrieval:
    """A finished run: the model with its best weights, and how it came about."""

    model: RetrievalModel
    corpus: Corpus
    state: TrainState
    description: RetrievalRun

    def under(self, exclude_seen: Literal["auto"] | bool) -> "TrainedRetrieval":
        """The same model under a rule of `index.exclude_seen`; auto: the rule that it was trained with."""
        return replace(self, corpus=self.corpus.under(exclude_seen))


def train_retrieval(
    config: Config,
    corpus: Corpus,
    *,
    distribution: Distribution | None = None,
    tracker: Tracker | None = None,
) -> TrainedRetrieval:
    """Trains on all training interactions, into CHECKPOINTS/retrieval."""
    return _train(
        config,
        corpus,
        corpus.train,
        Path(config.output.checkpoints) / "retrieval",
        validation=RetrievalValidation(corpus, config.seed),
        distribution=distribution or OneProcess(),
        tracker=tracker or NoTracker(),
    )


def train_miner(
    config: Config,
    corpus: Corpus,
    past: Sequences,
    *,
    epochs: int,
    distribution: Distribution | None = None,
) -> RetrievalModel:
    """Trains a model on `past` only, into CHECKPOINTS/mining: the one that finds candidates for the ranker to train on.

    It stops after the `epochs` that were best for the model it stands for, and looks at no validation data. The same
    miner is trained only once.
    """
    trained = _train(
        config,
        corpus,
        past,
        Path(config.output.checkpoints) / "mining",
        stop_after=epochs,
        distribution=distribution or OneProcess(),
        tracker=NoTracker(),
    )
    return trained.model


def _train(
    config: Config,
    corpus: Corpus,
    train: Sequences,
    directory: Path,
    *,
    validation: RetrievalValidation | None = None,
    stop_after: int | None = None,
    distribution: Distribution,
    tracker: Tracker,
) -> TrainedRetrieval:
    settings = with_data_defaults(config.retrieval, corpus.facts)
    config = replace(config, retrieval=settings)
    description = RetrievalRun(
        dataset=corpus.dataset_id,
        seed=config.seed,
        features=config.features,
        exclude_seen=corpus.exclude_seen,
        retrieval=settings,
        interactions=len(train.items),
        stop_after=stop_after,
    )

    # --------------------------------------------------------------------------------------------------------
    # The model

    tf.keras.utils.set_random_seed(config.seed)
    with distribution.strategy.scope():
        model = RetrievalModel(settings, corpus, train)
    if validation is None and read_description(directory) == write_run(description):
        return TrainedRetrieval(model, corpus, restore(model, directory), description)
    if model.query_tower.reads_sets:
        model.start_from_singular_vectors(train)
    fit_cold_start(model, corpus, train)

    # --------------------------------------------------------------------------------------------------------
    # Training

    def measure() -> Metrics:
        return {} if validation is None else validation.measure(model)

    schedule = Schedule(
        epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        seed=config.seed,
        monitor=None if validation is None else "val/ndcg@10",
        patience=settings.patience,
        stop_after=stop_after,
    )
    run = TrainingRun(
        model,
        directory,
        write_run(description),
        corpus_files(corpus),
        schedule,
        examples=len(train.items),
        distribution=distribution,
        tracker=tracker,
    )
    run.fit(lambda epoch: window_batches(corpus, settings, train, config.seed, epoch), measure)

    # --------------------------------------------------------------------------------------------------------
    # What is fitted after training

    if not distribution.is_chief:  # it alone finishes the run
        return TrainedRetrieval(model, corpus, run.state, description)
    run.restore_best()
    if validation is not None:
        fit_taste(model, corpus, config.seed)
        fit_popularity_bias(model, corpus)
        fit_answers_from_features(model, corpus)
    state = run.finish(measure())
    return TrainedRetrieval(model, corpus, state, description)


def load_retrieval(
    directory: Path, dataset: Dataset, corpus: Corpus | None = None
) -> TrainedRetrieval:
    """The model of a finished checkpoint, for `corpus` if it is loaded already. Raises UserError if there is none.

    All of it comes from one run, even if a training replaces the checkpoint in the meantime.
    """
    return read_whole(directory, lambda: _load_retrieval(directory, dataset, corpus))


def _load_retrieval(directory: Path, dataset: Dataset, corpus: Corpus | None) -> TrainedRetrieval:
    description = read_run(RetrievalRun, directory)
    corpus = corpus or load_trained_corpus(directory, dataset).under(description.exclude_seen)
    model = RetrievalModel(description.retrieval, corpus)
    return TrainedRetrieval(model, corpus, restore(model, directory), description)
