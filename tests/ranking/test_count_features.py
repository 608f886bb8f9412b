import numpy as np
import pytest
import tensorflow as tf

from rec.ranking.count_features import RECENT, SHARES, CountFeatures
from tests.small import sequences


def test_a_window_is_a_share_of_the_interactions_before_the_time():
    data = sequences([3, 3, 4, 4, 4], [5, 5, 5, 5, 5])  # at seconds 1000 to 1009
    counts = CountFeatures(data, item_rows=10)
    items = tf.constant([[3, 4, 5]])
    share, everything = SHARES.index(0.3), SHARES.index(1.0)

    def at(second: int) -> np.ndarray:
        return counts(tf.zeros([1, 0], tf.int32), items, tf.constant([second], tf.int64)).numpy()[0]

    def expected(counts: list[int], interactions: int) -> np.ndarray:
        return np.log((np.array(counts) + 1) / (interactions / 10 + 1))

    assert at(5000)[:, everything] == pytest.approx(
        expected([2, 3, 5], 10)
    )  # after the last, however long after
    assert at(5000)[:, share] == pytest.approx(expected([0, 0, 3], 3))
    assert at(1005)[:, everything] == pytest.approx(
        expected([2, 3, 0], 5)
    )  # what comes at that second does not count
    assert at(1000)[:, everything] == pytest.approx(np.zeros(3))
    assert counts(tf.zeros([1, 0], tf.int32), items).numpy()[0] == pytest.approx(at(5000))


def test_without_times_everything_came_before():
    data = sequences([3, 3, 4])
    counts = CountFeatures(type(data)(data.offsets, data.items, None, None), 10)
    found = counts(
        tf.zeros([1, 0], tf.int32), tf.constant([[3, 4]]), tf.constant([1_700_000_000], tf.int64)
    )
    assert found.numpy()[0, :, len(SHARES) - 1] == pytest.approx(np.log(np.array([3, 2]) / 1.3))


def test_counts_what_came_soon_after_the_latest_items():
    # 3 is followed by 4 within REACH of the first user and by 5 of the second; 9 of the third is too far from 3.
    data = sequences([3, 4], [3, 5], [3, 6, 6, 6, 6, 6, 9])
    counts = CountFeatures(data, item_rows=10)
    last, three, mean, most = len(SHARES) + np.arange(4)

    def of(history: list[int]) -> np.ndarray:
        return counts(
            tf.constant([history]), tf.constant([[4, 9]]), tf.constant([5000], tf.int64)
        ).numpy()[0]

    pairs = 1 + 1 + 5 * 1 + 4 + 3 + 2 + 1 + 5  # 3-4, 3-5, 3-6, 6-6, 6-9
    after_3 = np.log([(1 + 1) / (7 * 1 / pairs + 1), (0 + 1) / (7 * 5 / pairs + 1)])
    after_6 = np.log([(0 + 1) / (15 * 1 / pairs + 1), (5 + 1) / (15 * 5 / pairs + 1)])
    assert of([6, 3])[:, last] == pytest.approx(after_3)
    assert of([0, 6, 0, 3, 0])[:, last] == pytest.approx(after_3)  # PAD may stand anywhere
    assert of([6, 3])[:, three] == pytest.approx((after_3 + after_6) / 3)
    assert of([6, 3])[:, mean] == pytest.approx((after_3 + after_6) / RECENT)
    assert of([6, 3])[:, most] == pytest.approx(np.maximum(np.maximum(after_3, after_6), 0))
    assert of([6, *[3] * RECENT])[:, mean] == pytest.approx(
        after_3
    )  # only the latest are looked at
    assert not of([0, 0])[:, last:].any()
