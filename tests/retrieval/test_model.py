from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from rec import LOWEST
from rec.config import ResolvedRetrieval
from rec.errors import UserError
from rec.features import PAD, START, recent_items
from rec.retrieval.encoders import ENCODERS, LENGTH_POWER
from rec.retrieval.loss import UNOBSERVED, SampledSoftmax
from rec.retrieval.model import RetrievalModel
from rec.retrieval.popularity import fit_cold_start
from rec.retrieval.scoring import best_unseen
from rec.retrieval.towers import history_tokens
from tests.small import corpus

SMALL = corpus([[3, 4, 5, 6], [4, 5], [8, 3]], cold_items=2, features=True)


def model(**changes: Any) -> RetrievalModel:
    """A small model with random weights, so that nothing is zero by construction."""
    settings: dict[str, Any] = {
        "arch": "two_tower",
        "embedding_dim": 8,
        "window": 4,
        "in_batch_negatives": 3,
        "uniform_negatives": 3,
        **changes,
    }
    built = RetrievalModel(ResolvedRetrieval(**settings), SMALL)
    rng = np.random.default_rng(0)
    for weight in built.trainable_variables:
        weight.assign(rng.normal(0, 0.5, weight.shape))
    return built


# The loss, against a softmax written out by hand: 2 positions, 3 negatives, 2 dimensions and the bias.

QUERIES = np.array([[1.0, 2.0, 1.0], [0.5, -1.0, 1.0]], np.float32)
TARGETS = np.array([[0.3, 0.1, 0.2], [1.0, 1.0, -0.1]], np.float32)
NEGATIVES = np.array([[0.2, 0.4, 0.0], [-0.3, 0.8, 0.1], [0.7, 0.7, 0.3]], np.float32)
TARGET_Q, NEGATIVE_Q = np.array([0.5, 0.1], np.float32), np.array([0.25, 0.05, 0.6], np.float32)


def by_hand(temperature: float, logq: bool, mask: np.ndarray | None = None) -> float:
    losses = []
    for p in range(2):
        positive = QUERIES[p] @ TARGETS[p] / temperature - logq * np.log(TARGET_Q[p])
        others = NEGATIVES @ QUERIES[p] / temperature - logq * np.log(NEGATIVE_Q)
        if mask is not None:
            others = others[mask[p]]
        losses.append(np.log(np.exp([positive, *others]).sum()) - positive)
    return float(np.mean(losses))


def loss(
    mask: np.ndarray | None = None, temperature: float = 1.0, corrects_sampling: bool = True
) -> float:
    task = SampledSoftmax(temperature, corrects_sampling=corrects_sampling)
    value = task(
        QUERIES,
        TARGETS,
        NEGATIVES,
        target_probability=TARGET_Q,
        negative_probability=NEGATIVE_Q,
        sample_weight=np.ones(2, np.float32),
        negative_mask=np.ones((1, 3), bool) if mask is None else mask,
    )
    return float(value)


@pytest.mark.parametrize("temperature", [1.0, 0.1])
@pytest.mark.parametrize("logq", [True, False])
def test_the_loss_is_the_corrected_softmax(temperature: float, logq: bool):
    value = loss(temperature=temperature, corrects_sampling=logq)
    assert value == pytest.approx(by_hand(temperature, logq), rel=1e-5)


def test_masked_negatives_do_not_count():
    mask = np.array([[True, False, True], [False, False, True]])
    assert loss(mask) == pytest.approx(by_hand(1.0, True, mask), rel=1e-5)


def mask_of(**changes: Any) -> list[list[bool]]:
    """Two windows: one predicts 4 after 3, the other 5, then 8. The pool is 4, 5, 3."""
    batch = {
        "tokens": tf.constant([[3, 4, PAD], [START, 5, 8]]),
        "negatives": tf.constant([4, 5, 3]),
    }
    return model(**changes)._is_negative(batch, tf.constant([4, PAD, 5, 8])).numpy().tolist()


def test_user_positives_are_masked_in_all_of_their_window():
    assert mask_of() == [[False, True, False], [True, False, True]]


def test_accidental_hits_are_masked_at_their_own_position_only():
    everything, own = [True, True, True], [[False, True, True], [True, False, True]]
    assert mask_of(mask_user_positives=False) == [own[0], everything, own[1], everything]


def test_padding_contributes_nothing_to_the_loss():
    built = model(dropout=0.0)
    batch = {
        "user": tf.constant([1]),
        "tokens": tf.constant([[START, 3, 4]]),
        "negatives": tf.constant([5, 6, 7]),
    }
    wider = {**batch, "tokens": tf.constant([[START, 3, 4, PAD, PAD]])}
    assert float(built.compute_loss(wider)) == pytest.approx(
        float(built.compute_loss(batch)), rel=1e-5
    )


def test_the_loss_is_the_mean_by_the_weights_of_the_targets():
    built = model(arch="sasrec")
    batch = {
        "user": tf.constant([2]),
        "tokens": tf.constant([[START, 3, 4, 5]]),
        "negatives": tf.constant([6, 8]),
    }

    def weighed(*weights: float) -> float:
        return float(built.compute_loss(batch | {"weight": tf.constant([weights], tf.float32)}))

    alone = [weighed(1, 0, 0), weighed(0, 1, 0), weighed(0, 0, 1)]
    assert float(built.compute_loss(batch)) == pytest.approx(np.mean(alone), rel=1e-5)
    expected = np.average(alone, weights=[1, 3, 10])
    assert weighed(1, 3, 10) == pytest.approx(expected, rel=1e-5)


def test_windows_share_a_row_of_the_mask():
    mask = np.array([[True, False, True]])
    assert loss(mask) == pytest.approx(by_hand(1.0, True, np.repeat(mask, 2, 0)), rel=1e-5)


# The towers


@pytest.mark.parametrize("arch", ["two_tower", "gru4rec", "sasrec"])
def test_a_position_sees_nothing_behind_it(arch: str):
    built = model(arch=arch)
    one, other = tf.constant([[START, 3, 4, 5]]), tf.constant([[START, 3, 7, 8]])
    first, second = (built.query_tower(tf.constant([1]), tokens).numpy() for tokens in (one, other))
    assert first[:, :2] == pytest.approx(second[:, :2], abs=1e-6)
    assert np.abs(first[:, 2:] - second[:, 2:]).max() > 1e-3


@pytest.mark.parametrize("arch", ENCODERS)
def test_a_query_is_the_same_alone_and_in_a_batch(arch: str):
    built = model(arch=arch)
    alone = built.query(tf.constant([2]), tf.constant([[4, 5]])).numpy()
    together = built.query(
        tf.constant([1, 2]), tf.constant([[3, 4, 5, 6, 7], [PAD, 4, PAD, 5, PAD]])
    ).numpy()
    assert together[1] == pytest.approx(alone[0], abs=1e-5)


@pytest.mark.parametrize("arch", ["gru4rec", "sasrec"])
def test_order_matters_where_the_architecture_says_so(arch: str):
    built = model(arch=arch)
    forth, back = (
        built.query(tf.constant([1]), tf.constant([items])).numpy()
        for items in ([3, 4, 5], [5, 4, 3])
    )
    assert np.abs(forth - back).max() > 1e-3


def test_an_autoencoder_sums_the_history_in_any_order():
    built = model(arch="autoencoder")
    forth, back, one = (
        built.query(tf.constant([1]), tf.constant([h])).numpy() for h in ([3, 4], [4, PAD, 3], [3])
    )
    assert forth == pytest.approx(back, abs=1e-6)
    other = built.query(tf.constant([1]), tf.constant([[4]])).numpy()
    assert forth[0, :-1] == pytest.approx((one + other)[0, :-1] / 2**LENGTH_POWER, abs=1e-5)


def test_an_autoencoder_is_trained_by_the_squared_errors_on_what_it_hides(
    monkeypatch: pytest.MonkeyPatch,
):
    drawn = tf.constant([[0.9, 0.1, 0.2, 0.1]])  # of items 3, 4, 5 and no item: 4 and 5 are hidden
    monkeypatch.setattr(tf.random, "uniform", lambda shape: drawn)
    built = model(arch="autoencoder", dropout=0.0)
    tokens = tf.constant([[START, 3, 4, 5, PAD]])
    batch = {"user": tf.constant([1]), "tokens": tokens, "negatives": tf.constant([4, 6, 7])}
    scores = built.score(tf.constant([1]), tf.constant([[3]]), tf.constant([[4, 5, 6, 7]]))[
        0
    ].numpy()
    chances = 3 * built._probability.numpy()[6:8]  # that 6 and 7 stand in a pool of 3
    by_hand = ((1 - scores[:2]) ** 2).sum() + UNOBSERVED * (scores[2:] ** 2 / chances).sum()
    assert float(built.compute_loss(batch)) == pytest.approx(by_hand / 2, rel=1e-4)
    batch["weight"] = tf.constant([[1.0, 1.0, 6.0, 0.0]])
    by_hand += 5 * (1 - scores[1]) ** 2
    assert float(built.compute_loss(batch)) == pytest.approx(by_hand / 7, rel=1e-4)


def test_an_autoencoder_starts_from_singular_vectors():
    train = SMALL.train
    built = RetrievalModel(ResolvedRetrieval(arch="autoencoder", embedding_dim=2, window=4), SMALL)
    built.start_from_singular_vectors(train)
    vectors = built.candidate_tower.items.ids.embeddings.numpy()
    seen = (
        train.matrix(np.arange(4), len(vectors)).toarray()
        / np.maximum(train.lengths, 1)[:, None] ** LENGTH_POWER
    )
    best = np.linalg.svd(seen)[2][:2]
    projection = vectors @ np.linalg.pinv(vectors)
    assert projection == pytest.approx(best.T @ best, abs=1e-4)


def test_only_the_last_window_of_a_history_is_read():
    built = model()
    long, short = (
        built.query(tf.constant([1]), tf.constant([h])).numpy()
        for h in ([7, 8, 3, 4, 5, 6], [3, 4, 5, 6])
    )
    assert long == pytest.approx(short, abs=1e-6)


def test_history_tokens_drop_padding_and_say_where_the_query_is():
    tokens, last = history_tokens(tf.constant([[PAD, 5, PAD, 6, 7], [3, 4, 5, 6, 7], [PAD] * 5]), 4)
    assert tokens.numpy().tolist() == [[START, 5, 6, 7], [4, 5, 6, 7], [START, PAD, PAD, PAD]]
    assert last.numpy().tolist() == [3, 3, 0]
    assert recent_items(tf.constant([[PAD, 5, PAD, 6, 7]]), 2).numpy().tolist() == [[6, 7]]


def test_the_time_of_the_request_matters_if_configured():
    built = model(query_time=True)
    night, noon = (
        built.query(tf.constant([1]), tf.constant([[3]]), tf.constant([t], tf.int64)).numpy()
        for t in (0, 43_200)
    )
    assert np.abs(night - noon).max() > 1e-3
    still = model()
    assert still.query(tf.constant([1]), tf.constant([[3]])).shape == (1, 9)


def test_heads_must_divide_the_embedding():
    with pytest.raises(
        UserError, match="retrieval.heads: 3 heads do not divide retrieval.embedding_dim 8"
    ):
        model(arch="sasrec", heads=3)


# Scores


def test_listed_and_catalogue_scores_agree():
    built = model()
    user, history = tf.constant([1, 3]), tf.constant([[3, 4], [PAD, 8]])
    everything = built.score_catalogue(user, history, built.candidates()).numpy()
    assert built.score(user, history, tf.constant([[5, 9], [10, PAD]])).numpy() == pytest.approx(
        np.array([[everything[0, 2], everything[0, 6]], [everything[1, 7], LOWEST]]), rel=1e-5
    )


def test_a_user_of_whom_nothing_is_known_gets_the_popular_items():
    built = model()
    fit_cold_start(built, SMALL, SMALL.train)
    scores = built.score_catalogue(
        tf.constant([0, 0]), tf.constant([[PAD], [3]]), built.candidates()
    ).numpy()
    # items 3, 4 and 5 occur twice in training, 6 and 8 once, 7 and the two new ones never
    assert scores[0] == pytest.approx(
        np.log1p((1 + 1 / 9) * np.array([2, 2, 2, 1, 0, 1, 0, 0]))
    )  # 8 interactions
    assert scores[1] != pytest.approx(scores[0])


def test_best_unseen_leaves_out_what_was_seen_and_pads():
    scores = tf.constant([[0.1, 0.9, 0.5], [0.3, 0.2, 0.1]])
    best, rows = best_unseen(scores, tf.constant([[4, PAD, 4], [3, 4, 5]]), 4)
    assert rows.numpy().tolist() == [[5, 3, PAD, PAD], [PAD] * 4]
    assert best.numpy()[0] == pytest.approx([0.5, 0.1, LOWEST, LOWEST])
