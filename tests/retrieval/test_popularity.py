"""What popularity adds to the towers: it has to act where it helps, and to stay out where it does not."""

from dataclasses import replace

import numpy as np
import pytest
import tensorflow as tf

from rec.batches import window_batches
from rec.config import ResolvedRetrieval
from rec.corpus import Corpus
from rec.features import FIRST_ITEM, fit_columns
from rec.retrieval.model import RetrievalModel
from rec.retrieval.popularity import (
    _ndcg_without_history,
    fit_answers_from_features,
    fit_cold_start,
    fit_popularity_bias,
    recent_popularity,
)
from tests.small import corpus, sequences

ITEMS = 20
OLD = (3, 5, 6)  # item rows that many chose at the beginning
NEW = 4  # and one that fewer chose, at the end


def model_of(data: Corpus) -> RetrievalModel:
    tf.keras.utils.set_random_seed(0)
    config = ResolvedRetrieval(arch="two_tower", embedding_dim=8, window=4, uniform_negatives=ITEMS)
    return RetrievalModel(config, data)


def shifting_taste(next_items: list[int]) -> Corpus:
    """40 users with one of OLD and another item each, then 8 users with NEW. Validation asks for `next_items`."""
    train = [[OLD[user % 3], 8 + user % 10] for user in range(40)] + [[NEW] for _ in range(8)]
    val = [[next_items[user % len(next_items)]] for user in range(40)] + [[] for _ in range(8)]
    return corpus(train, val=val, items=ITEMS, strategy="temporal")


def test_the_bias_follows_what_is_popular_now():
    data = shifting_taste([NEW])
    model = model_of(data)
    fit_popularity_bias(model, data)
    setting = model.candidate_tower.popularity_bias.setting
    assert setting["weight"] > 0
    assert setting["share"] < 1  # the last interactions, not all
    scores = model.score_catalogue(tf.constant([1]), tf.constant([[OLD[0]]]), model.candidates())
    assert int(tf.argmax(scores[0])) == NEW - FIRST_ITEM


def test_the_bias_stays_away_if_the_next_item_is_not_popular():
    rare = [19, 20, 21, 22]  # never met in training
    data = shifting_taste(rare)
    model = model_of(data)
    fit_popularity_bias(model, data)
    assert model.candidate_tower.popularity_bias.setting["weight"] == 0
    rows = tf.range(FIRST_ITEM, FIRST_ITEM + ITEMS)
    assert (model.candidate_tower(rows)[:, -1].numpy() == 0).all()


def test_cold_users_get_the_window_that_suits_new_users():
    newcomers = 40
    train = [[OLD[0], OLD[1]] for _ in range(30)] + [[NEW] for _ in range(4)]
    val: list[list[int]] = [[] for _ in train] + [[NEW] for _ in range(newcomers)]
    data = corpus(train + [[] for _ in range(newcomers)], val=val, items=ITEMS, strategy="temporal")
    model = model_of(data)
    fit_cold_start(model, data, data.train)
    assert model.most_popular()[0] == NEW


def test_equal_counts_are_ordered_by_all_interactions():
    data = sequences([3, 3, 4], [4, 3])  # the last two: 4 and 3, once each
    popularity = recent_popularity(data, 0.4, 6)
    assert popularity[3] > popularity[4] > popularity[5] == 0
    assert np.floor(np.expm1(popularity[3:5])).tolist() == [1, 1]


def test_without_times_there_is_one_window():
    data = corpus([[3, 4], [4]], val=[[4], [3]], ordered=False)
    model = model_of(data)
    fit_cold_start(model, data, data.train)
    expected = np.log1p(np.array([1, 2]) * (1 + 1 / 4))
    assert model.cold_start_score(tf.constant([3, 4])).numpy() == pytest.approx(expected)


def test_popularity_is_the_sum_of_weights_and_weights_of_1_change_no_bit():
    train = corpus([[OLD[0], OLD[1]], [OLD[0], NEW]], items=ITEMS).train
    plain = recent_popularity(train, 0.5, FIRST_ITEM + ITEMS)
    ones = replace(train, weights=np.ones(4, np.float32))
    np.testing.assert_array_equal(recent_popularity(ones, 0.5, FIRST_ITEM + ITEMS), plain)
    weights = np.array([1, 1, 1, 4], np.float32)
    weighed = recent_popularity(replace(train, weights=weights), 0.5, FIRST_ITEM + ITEMS)
    assert weighed[NEW] == pytest.approx(np.log1p(4 + 4 / 8))
    assert weighed[OLD[0]] == pytest.approx(np.log1p(1 + 2 / 8))


def shoppers(features: bool = True) -> Corpus:
    """Users of five kinds, each of which likes four items of its own; the last 40 have no history."""
    likes = [[3 + 4 * (user % 5) + (user // 5 + j) % 4 for j in range(4)] for user in range(120)]
    empty: list[list[int]] = [[] for _ in likes]
    train = likes[:80] + empty[80:]
    val = empty[:80] + [[items[0]] for items in likes[80:]]
    data = corpus(train, val=val, items=ITEMS, strategy="temporal")
    table = data.user_table.assign(kind=[f"kind {user % 5}" for user in range(120)])
    columns = fit_columns(table, "user_id", "auto", np.ones(120, bool), "users")
    return replace(data, user_table=table, user_columns=columns if features else ())


def trained(data: Corpus) -> RetrievalModel:
    """A model after 60 steps, each on all interactions."""
    model = model_of(data)
    optimizer = tf.keras.optimizers.Adam(0.02)

    @tf.function(reduce_retracing=True)
    def step(batch: dict[str, tf.Tensor]) -> None:
        with tf.GradientTape() as tape:
            loss = model.compute_loss(batch, training=True)
        weights = model.trainable_variables
        gradients = zip(tape.gradient(loss, weights), weights, strict=True)
        optimizer.apply_gradients([pair for pair in gradients if pair[0] is not None])

    for epoch in range(60):
        for batch in window_batches(data, model.config, data.train, 0, epoch):
            step(batch)
    return model


def test_users_with_features_and_no_history_are_answered_from_them_if_they_tell():
    data = shoppers()
    model = trained(data)
    fit_cold_start(model, data, data.train)
    fit_answers_from_features(model, data)
    assert model.answers_from_features
    users = tf.constant([81, 82])
    nothing = tf.zeros([2, 0], tf.int32)
    assert not model.is_cold(users, nothing).numpy().any()
    assert model.is_cold(tf.constant([0]), nothing[:1]).numpy().all()  # an unknown user
    scores = model.score_catalogue(users, nothing, model.candidates())
    best = np.sort(tf.math.top_k(scores, 4)[1].numpy() + FIRST_ITEM, axis=1)
    assert best.tolist() == [[3, 4, 5, 6], [7, 8, 9, 10]]  # of kinds 0 and 1
    judges = np.arange(81, 121)
    by_popularity, by_features = (
        _ndcg_without_history(model, data, judges, from_features=value).mean()
        for value in (False, True)
    )
    assert by_features > 1.5 * by_popularity


def test_features_that_tell_nothing_leave_users_without_a_history_to_popularity():
    data = shoppers()
    model = model_of(data)  # without training
    fit_cold_start(model, data, data.train)
    fit_answers_from_features(model, data)
    assert not model.answers_from_features
    nobody = model_of(shoppers(features=False))
    fit_answers_from_features(nobody, shoppers(features=False))
    assert nobody.is_cold(tf.constant([81]), tf.zeros([1, 0], tf.int32)).numpy().all()
