"""The taste part of a query: exact factors of a history, and a weight only if it helps."""

import numpy as np
import tensorflow as tf

from rec.config import ResolvedRetrieval
from rec.corpus import Corpus
from rec.features import FIRST_ITEM, PAD
from rec.retrieval.mixture import fit_taste
from rec.retrieval.model import RetrievalModel
from rec.retrieval.taste import Taste, TasteSetting
from tests.small import corpus, sequences

ITEMS = 40
SETTING = TasteSetting(alpha=5.0, regularization=2.0, weight=3.0)


def two_groups(rng: np.random.Generator, users: int, length: int) -> list[list[int]]:
    """Users who choose from the first or the second half of the items, in random order."""
    half = ITEMS // 2
    return [
        (FIRST_ITEM + half * (user % 2) + rng.permutation(half)[:length]).tolist()
        for user in range(users)
    ]


def fitted(train: list[list[int]]) -> Taste:
    taste = Taste(4, FIRST_ITEM + ITEMS)
    taste.fit(sequences(*train), SETTING, seed=0)
    return taste


def test_a_users_factors_are_the_exact_solution():
    taste = fitted(two_groups(np.random.default_rng(0), users=30, length=8))
    items = taste.candidates(tf.range(FIRST_ITEM, FIRST_ITEM + ITEMS)).numpy().astype(float)
    history = [0, 7, 11]
    chosen = items[history]
    system = items.T @ items + (5 - 1) * chosen.T @ chosen + 2 * np.eye(4)
    expected = 3 * np.linalg.solve(system, 5 * chosen.sum(0))
    rows = tf.constant([[PAD, *(FIRST_ITEM + item for item in history), PAD]])
    np.testing.assert_allclose(taste(rows)[0], expected, rtol=1e-4)


def test_a_user_is_scored_higher_for_items_of_the_own_group():
    taste = fitted(two_groups(np.random.default_rng(0), users=30, length=8))
    scores = taste(tf.constant([[FIRST_ITEM, FIRST_ITEM + 1]])) @ tf.transpose(
        taste.candidates(tf.range(FIRST_ITEM, FIRST_ITEM + ITEMS))
    )
    half = ITEMS // 2
    assert scores[0, :half].numpy().mean() > 3 * abs(scores[0, half:].numpy().mean())


def test_an_item_without_interactions_has_no_taste():
    taste = fitted([[FIRST_ITEM, FIRST_ITEM + 1], [FIRST_ITEM + 1, FIRST_ITEM + 2]])
    beyond = FIRST_ITEM + ITEMS  # a row that was added after training
    rows = tf.constant([PAD, FIRST_ITEM + 30, beyond])
    assert (taste.candidates(rows).numpy() == 0).all()
    assert (taste(rows[None]).numpy() == 0).all()


def untrained_model(data: Corpus) -> RetrievalModel:
    tf.keras.utils.set_random_seed(0)
    config = ResolvedRetrieval(
        arch="two_tower", embedding_dim=8, taste_dim=4, window=4, uniform_negatives=ITEMS
    )
    return RetrievalModel(config, data)


def test_taste_counts_if_it_helps():
    rng = np.random.default_rng(1)
    chosen = two_groups(rng, users=60, length=9)
    data = corpus(
        [items[:-1] for items in chosen], val=[items[-1:] for items in chosen], items=ITEMS
    )
    model = untrained_model(data)
    fit_taste(model, data, seed=0)
    assert model.taste.setting.weight > 0
    scores = model.score_catalogue(
        tf.constant([1]), tf.constant([chosen[0][:4]]), model.candidates()
    )
    best = tf.math.top_k(scores[0], 10).indices.numpy()
    assert (best < ITEMS // 2).mean() > 0.8


def test_taste_stays_out_if_the_next_items_are_new():
    rng = np.random.default_rng(2)
    train = two_groups(rng, users=60, length=9)
    train = [[item for item in items if item != FIRST_ITEM] for items in train]
    data = corpus(train, val=[[FIRST_ITEM] for _ in train], items=ITEMS)
    model = untrained_model(data)
    fit_taste(model, data, seed=0)
    assert model.taste.setting.weight == 0
