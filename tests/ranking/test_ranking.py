from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from rec.config import Ranking, ResolvedRetrieval
from rec.features import PAD
from rec.ops.ratings import RatingModel, rated_lists, squared_error
from rec.optimizer import LazyAdam
from rec.ranking.archs import ARCHS
from rec.ranking.candidates import (
    CandidateLists,
    first_queries,
    hold_out,
    list_batches,
    mine,
    training_queries,
)
from rec.ranking.count_features import COUNT_FEATURES, CountFeatures
from rec.ranking.model import RankingModel, score_candidates, score_lists
from rec.ranking.objectives import OBJECTIVES
from rec.retrieval.model import RetrievalModel
from tests.small import corpus, sequences

SMALL = corpus([[3, 4, 5, 6], [4, 5], [8, 3, 5]], features=True)
COUNTS = CountFeatures(SMALL.train, SMALL.items.rows)
NOW = tf.constant([2000, 2000], tf.int64)


def retrieval(data=SMALL, **changes: Any) -> RetrievalModel:
    settings = {
        "arch": "two_tower",
        "embedding_dim": 8,
        "window": 4,
        "uniform_negatives": 6,
        **changes,
    }
    return RetrievalModel(ResolvedRetrieval(**settings), data)


def ranker(**changes: Any) -> RankingModel:
    return RankingModel(Ranking(hidden=(8,), **changes), 4, 8, SMALL)


def test_labels_are_each_users_last_interactions_and_never_all():
    past, labels = hold_out(corpus([[3, 4, 5, 6], [7], [3, 8]]), 0.3, seed=0)
    assert past.last(np.array([1, 2, 3]), 2).tolist() == [[3, 4], [7, PAD], [3, PAD]]
    assert labels.last(np.array([1, 2, 3]), 2).tolist() == [[5, 6], [PAD, PAD], [8, PAD]]


def test_a_temporal_data_set_is_held_out_by_time_with_its_new_users():
    past, labels = hold_out(corpus([[3, 4, 5, 6], [7, 8]], strategy="temporal"), 0.4, seed=0)
    assert past.items.tolist() == [3, 4, 5, 6]
    assert labels.last(np.array([1, 2]), 2).tolist() == [[PAD, PAD], [7, 8]]


def test_without_order_the_labels_are_drawn():
    drawn = {
        tuple(hold_out(corpus([[3, 4, 5, 6]], ordered=False), 0.25, seed)[1].items)
        for seed in range(20)
    }
    assert drawn == {(3,), (4,), (5,), (6,)}


def test_a_list_is_labelled_by_the_next_item_and_holds_nothing_already_or_later_chosen():
    data = corpus([[3, 4, 5, 6]])
    past, labels = hold_out(data, 0.5, seed=0)
    queries = training_queries(labels, next_item=True, most=9, seed=0)
    lists = mine(retrieval(data), past, labels, queries, 6, next_item=True)
    assert lists.user.tolist() == [1, 1]
    assert [[i for i in row if i] for row in lists.history.tolist()] == [[3, 4], [3, 4, 5]]
    assert [lists.items[j][lists.labels[j] == 1].tolist() for j in (0, 1)] == [[5], [6]]
    assert sorted(lists.items[0]) == [
        PAD,
        PAD,
        PAD,
        5,
        7,
        8,
    ]  # without 3 and 4 (seen) and 6 (chosen later)
    assert sorted(lists.items[1]) == [PAD, PAD, PAD, 6, 7, 8]


def test_with_seen_items_a_list_holds_what_was_met_and_what_comes_again():
    data = corpus([[3, 4, 5, 4, 5]])
    past, labels = hold_out(data, 0.6, seed=0)
    queries = training_queries(labels, next_item=True, most=9, seed=0)
    lists = mine(retrieval(data), past, labels, queries, 6, next_item=True, exclude_seen=False)
    chosen = [lists.items[j][lists.labels[j] == 1].tolist() for j in range(3)]
    assert chosen == [[5], [4], [5]]
    assert sorted(lists.items[0]) == [PAD, 3, 5, 6, 7, 8]  # without 4, which is chosen later
    assert sorted(lists.items[2]) == [3, 4, 5, 6, 7, 8]


def test_a_list_to_train_on_holds_what_is_disliked_as_wrong_and_one_to_serve_does_not():
    data = corpus([[3, 4, 5, 6]])
    weights = np.array([1, 1, 1, 0], np.float32)  # 6 is disliked
    past, labels = hold_out(replace(data, train=replace(data.train, weights=weights)), 0.5, seed=0)
    assert (past.items.tolist(), labels.items.tolist()) == ([3, 4], [5])
    queries = first_queries(labels)
    lists = mine(retrieval(data), past, labels, queries, 6, next_item=True)
    assert 6 in lists.items[0] and lists.items[0][lists.labels[0] == 1].tolist() == [5]
    disliked = sequences([6])
    lists = mine(retrieval(data), past, labels, queries, 6, next_item=True, disliked=disliked)
    assert sorted(lists.items[0]) == [PAD, PAD, PAD, 5, 7, 8]


def test_a_label_is_the_weight_of_what_was_chosen():
    data = corpus([[3, 4, 5, 6]])
    past, labels = hold_out(data, 0.5, seed=0)
    labels = replace(labels, weights=np.array([2, 7], np.float32))
    lists = mine(retrieval(data), past, labels, first_queries(labels), 6, next_item=False)
    by_item = dict(zip(lists.items[0].tolist(), lists.labels[0].tolist(), strict=True))
    assert {item: label for item, label in by_item.items() if label} == {5: 2, 6: 7}


def test_a_right_items_loss_counts_as_much_as_its_weight():
    scores = tf.constant([[0.5, -1.0, 2.0]])
    there = tf.constant([[1.0, 1.0, 0.0]])
    right, wrong = np.log1p(np.exp(-0.5)), np.log1p(np.exp(-1.0))
    for weight in (1.0, 4.0):
        loss = OBJECTIVES["implicit"](tf.constant([[weight, 0.0, 0.0]]), scores, there)
        assert float(loss) == pytest.approx((weight * right + wrong) / (weight + 1))
    both = tf.constant([[3.0, 1.0, 0.0]])
    share = np.log(np.exp(0.5) + np.exp(-1.0)) - (0.75 * 0.5 - 0.25)
    assert float(OBJECTIVES["listwise"](both, scores, there)) == pytest.approx(share)


def test_a_whole_list_is_labelled_by_all_that_follows():
    data = corpus([[3, 4, 5, 6], [3]])
    past, labels = hold_out(data, 0.5, seed=0)
    lists = mine(retrieval(data), past, labels, first_queries(labels), 6, next_item=False)
    assert lists.user.tolist() == [1]
    assert set(lists.items[0][lists.labels[0] == 1]) == {5, 6}


def test_lists_without_a_right_item_are_left_out_of_training():
    labels = np.array([[0, 1], [0, 0], [1, 0]], np.float32)
    two = np.zeros((3, 2), np.int32)
    lists = CandidateLists(np.array([1, 2, 3]), two, two[:, 0], two, labels, labels)
    assert lists.with_hits().user.tolist() == [1, 3]


@pytest.mark.parametrize("arch", ARCHS)
def test_an_untrained_ranker_keeps_the_order_of_retrieval(arch: str):
    lists = mine(
        retrieval(), SMALL.train, SMALL.train, first_queries(SMALL.train), 4, next_item=False
    )
    scores = score_lists(ranker(arch=arch), lists, COUNTS)
    assert (np.argsort(-scores, 1, kind="stable") == np.arange(4)).all()


@pytest.mark.parametrize("arch", ARCHS)
def test_an_architecture_learns_to_prefer_the_labelled_item(arch: str):
    tf.keras.utils.set_random_seed(0)  # of 8 hidden units, an unlucky start may leave too few alive
    model = ranker(arch=arch, dropout=0.0)
    vectors = model.items.trainable_variables[0]
    vectors.assign(np.random.default_rng(0).normal(size=vectors.shape))
    model.compile(LazyAdam(0.01))
    batch = {
        "user": np.array([1, 2], np.int32),
        "history": np.array([[3, 4], [5, PAD]], np.int32),
        "items": np.array([[5, 6, 7], [6, 7, PAD]], np.int32),
        "scores": np.zeros((2, 3), np.float32),
        "counts": np.zeros((2, 3, COUNT_FEATURES), np.float32),
        "labels": np.array([[0, 0, 1], [1, 0, 0]], np.float32),
    }
    model.fit(tf.data.Dataset.from_tensors(batch).repeat(60), verbose=0)
    scores = model.score(
        *(tf.constant(batch[name]) for name in ("user", "history", "items", "scores", "counts"))
    ).numpy()
    assert scores[0].argmax() == 2
    assert scores[1, 0] > scores[1, 1]


def test_candidates_are_scored_the_same_alone_and_in_a_batch():
    model, towers = ranker(), retrieval()
    for weight in model.trainable_variables:
        weight.assign(np.random.default_rng(1).normal(0, 0.3, weight.shape))
    users, histories = tf.constant([1, 3]), tf.constant([[3, 4, 5], [PAD, PAD, 8]])

    def scores(
        users: tf.Tensor, histories: tf.Tensor, items: tf.Tensor, *time: tf.Tensor
    ) -> np.ndarray:
        retrieved = towers.score(users, histories, items)
        return score_candidates(model, COUNTS, users, histories, items, retrieved, *time).numpy()

    both = scores(users, histories, tf.constant([[6, 7], [5, 6]]), NOW)
    assert scores(users[1:], tf.constant([[8]]), tf.constant([[5, 6]]), NOW[1:])[
        0
    ] == pytest.approx(both[1], abs=1e-5)
    assert scores(users, histories, tf.constant([[6, 7], [5, 6]])) == pytest.approx(
        both, abs=1e-5
    )  # now is later


def test_embeddings_can_start_from_retrieval():
    model, towers = ranker(), retrieval(user_id=True)
    model.start_from(towers)
    rows = tf.constant([3, 8])
    assert (model.items(rows).numpy() == towers.candidate_tower.items(rows).numpy()).all()
    assert (model.users(rows[:1]).numpy() == towers.query_tower.users(rows[:1]).numpy()).all()


def test_a_loss_looks_only_at_places_that_hold_a_candidate():
    labels, real = tf.constant([[1.0, 0.0, 0.0]]), tf.constant([[1.0, 1.0, 0.0]])
    losses_of = {**OBJECTIVES, "rating": squared_error}
    for name, loss in losses_of.items():
        near, far = (
            float(loss(labels, tf.constant([[0.5, 0.0, last]]), sample_weight=real))
            for last in (0.0, 9.0)
        )
        assert near == far, name
    scores = tf.constant([[0.0, 0.0, 0.0]])
    losses = {name: float(loss(labels, scores, real)) for name, loss in losses_of.items()}
    assert losses == pytest.approx({"implicit": np.log(2), "listwise": np.log(2), "rating": 0.5})


def test_a_rating_is_predicted_from_the_history_before_it():
    lists = rated_lists(SMALL.train, np.arange(4), None, 2)
    assert [sorted(i for i in row if i) for row in lists.history.tolist()] == [
        [],
        [3],
        [3, 4],
        [4, 5],
    ]
    assert lists.items.tolist() == [[3], [4], [5], [6]]
    later = rated_lists(SMALL.train, np.array([4]), SMALL.train, 2)
    assert sorted(later.history[0]) == [PAD, 5]  # of 4 and 5, without the rated 4 itself


def test_the_rating_objective_starts_at_the_mean_and_ignores_retrieval_scores():
    model = RatingModel(Ranking(hidden=(8,), objective="rating"), 4, 8, SMALL)
    user, history, items = tf.constant([1]), tf.constant([[3]]), tf.constant([[4, 5]])
    scores = [
        model.score(
            user, history, items, tf.constant([[s, s]]), COUNTS(history, items, NOW[:1])
        ).numpy()
        for s in (0.0, 7.0)
    ]
    assert scores[0] == pytest.approx(np.ones((1, 2)), abs=0.05)  # every rating of the corpus is 1
    assert (scores[0] == scores[1]).all()


def test_list_batches_hold_every_list_once():
    lists = mine(
        retrieval(), SMALL.train, SMALL.train, first_queries(SMALL.train), 4, next_item=False
    )
    data = list_batches(lists, COUNTS, 2, np.random.default_rng(0))
    assert sorted(user for batch in data.as_numpy_iterator() for user in batch["user"]) == [1, 2, 3]
