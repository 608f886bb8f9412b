"""How a ranker is chosen: by what it gains over retrieval's order, less a standard error."""

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest

import rec.ops.ratings  # noqa: F401  (registers an objective)
from rec.checkpoint import RetrievalRun
from rec.config import Config, Features, Ranking, ResolvedRetrieval
from rec.ranking.candidates import CandidateLists, first_queries, mine, no_lists
from rec.ranking.count_features import CountFeatures
from rec.ranking.model import RankingModel
from rec.ranking.train import (
    GAIN,
    MinedLists,
    RankingValidation,
    best_weight,
    build_ranking_model,
    ndcg_gain,
)
from rec.retrieval.model import RetrievalModel
from rec.retrieval.train import TrainedRetrieval
from rec.training import TrainState
from tests.small import corpus, sequences

DATA = corpus([[3, 4, 5], [4, 5], [5, 3], [8, 6]], val=[[6], [7], [8], [3]])
CONFIG = Config(dataset="d", ranking=Ranking(hidden=(8,), candidates=4))


def lists_of(labels: list[list[int]]) -> CandidateLists:
    array = np.array(labels, np.float32)
    users = np.arange(1, 1 + len(labels), dtype=np.int32)
    items = np.tile(np.arange(3, 3 + array.shape[1], dtype=np.int32), (len(labels), 1))
    return CandidateLists(
        user=users,
        history=items[:, :1],
        time=np.zeros(len(labels), np.int64),
        items=items,
        scores=-np.tile(np.arange(array.shape[1], dtype=np.float32), (len(labels), 1)),
        labels=array,
    )


def test_the_gain_is_the_new_ndcg_less_retrievals():
    lists = lists_of([[0, 1, 0], [1, 0, 0]])
    order = np.array([[1, 0, 2], [2, 1, 0]])  # the right item first; the right item last
    second, third = 1 / np.log2(3), 1 / np.log2(4)
    assert ndcg_gain(lists, order) == pytest.approx([1 - second, third - 1])


def test_neighbours_get_a_weight_only_if_they_gain_something() -> None:
    counts = CountFeatures(sequences(*[[20, 5]] * 50), item_rows=25)  # who met 20 met 5, the third
    history = np.full((4, 1), 20, np.int32)
    third = replace(lists_of([[0, 0, 1]] * 4), history=history)
    first = replace(lists_of([[1, 0, 0]] * 4), history=history)
    assert best_weight(third, counts) > 0
    assert best_weight(first, counts) == 0
    assert best_weight(no_lists(3), counts) == 0


@pytest.fixture(scope="module")
def retrieval() -> TrainedRetrieval:
    settings = ResolvedRetrieval(arch="two_tower", embedding_dim=8, window=4, uniform_negatives=6)
    model = RetrievalModel(settings, DATA)
    run = RetrievalRun(dataset="d", seed=0, features=Features(), retrieval=settings, interactions=1)
    return TrainedRetrieval(model, DATA, TrainState(1, [{}]), run)


@pytest.mark.parametrize(
    ("objective", "window", "read"),
    [("implicit", "auto", 4), ("rating", "auto", 300), ("rating", 9, 9)],
)
def test_a_ranker_reads_histories_of_its_window(
    objective: str, window: int | Literal["auto"], read: int, retrieval: TrainedRetrieval
):
    settings = Ranking(objective=objective, window=window)
    assert build_ranking_model(settings, retrieval).window == read


@pytest.fixture(scope="module")
def validation(retrieval: TrainedRetrieval) -> RankingValidation:
    model = retrieval.model
    queries = first_queries(DATA.val)
    lists = mine(model, DATA.train, DATA.val, queries, 4, next_item=False)
    counts = CountFeatures(DATA.train, DATA.items.rows)
    mined = MinedLists(train=lists, holdout=lists, counts=counts, miner=model)
    return RankingValidation(CONFIG, retrieval, mined)


def test_retrievals_own_order_gains_nothing(validation: RankingValidation):
    """An untrained ranker keeps retrieval's order. Training has to be better than that to be used."""
    untrained = RankingModel(CONFIG.ranking, 4, 8, DATA)
    assert validation.measure(untrained)[GAIN] == 0


def test_a_ranker_that_turns_the_order_round_is_refused(validation: RankingValidation):
    """The epoch with the highest lower bound is kept, and number 0, before training, has 0."""
    lists = validation._val_lists
    first_is_right = np.zeros_like(lists.labels)
    first_is_right[:, 0] = 1
    judged = RankingValidation.__new__(RankingValidation)
    judged.__dict__.update(vars(validation))
    judged._val_lists = replace(lists, labels=first_is_right)
    judged._mined = replace(validation._mined, holdout=judged._val_lists)
    worse = RankingModel(CONFIG.ranking, 4, 8, DATA)
    worse._scale.assign(-1.0)
    assert judged.measure(worse)[GAIN] < 0


def test_a_ranker_that_is_right_by_luck_is_refused(validation: RankingValidation):
    """One list is better, another one worse: the mean gain is within its standard error."""
    gains = ndcg_gain(lists_of([[0, 1, 0], [1, 0, 0], [0, 1, 0]]), np.array([[1, 0, 2]] * 3))
    assert gains.mean() > 0
    assert gains.mean() - gains.std() / len(gains) ** 0.5 < 0
