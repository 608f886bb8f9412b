"""What popularity adds to the towers: it has to act where it helps, and to stay out where it does not."""

from dataclasses import replace

import numpy as np
import pytest
import tensorflow as tf

from rec.config import ResolvedRetrieval
from rec.corpus import Corpus
from rec.features import FIRST_ITEM
from rec.retrieval.model import RetrievalModel
from rec.retrieval.popularity import fit_cold_start, fit_popularity_bias, recent_popularity
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
