import numpy as np
import pytest
import tensorflow as tf

from rec.trend import SHARES, Trend
from tests.small import sequences


def test_a_window_is_a_share_of_the_interactions_before_the_time():
    data = sequences([3, 3, 4, 4, 4], [5, 5, 5, 5, 5])  # at seconds 1000 to 1009
    trend = Trend(data, item_rows=10)
    items = tf.constant([[3, 4, 5]])
    share, everything = SHARES.index(0.3), SHARES.index(1.0)

    def at(second: int) -> np.ndarray:
        return trend(items, tf.constant([second], tf.int64)).numpy()[0]

    def expected(counts: list[int], interactions: int) -> np.ndarray:
        return np.log((np.array(counts) + 1) / (interactions / 10 + 1))

    assert at(5000)[:, everything] == pytest.approx(expected([2, 3, 5], 10))  # after the last, however long after
    assert at(5000)[:, share] == pytest.approx(expected([0, 0, 3], 3))
    assert at(1005)[:, everything] == pytest.approx(expected([2, 3, 0], 5))  # what comes at that second does not count
    assert at(1000)[:, everything] == pytest.approx(np.zeros(3))


def test_without_times_everything_came_before():
    data = sequences([3, 3, 4])
    unordered = Trend(type(data)(data.offsets, data.items, None, None), 10)
    counts = unordered(tf.constant([[3, 4]]), tf.constant([1_700_000_000], tf.int64)).numpy()[0, :, -1]
    assert counts == pytest.approx(np.log(np.array([3, 2]) / 1.3))
