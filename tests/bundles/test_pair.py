"""Retrieve, then rank: worked out by hand, on NumPy's arrays and on tensors."""

import rec  # noqa: F401  isort: skip  # before tensorflow
import numpy as np
import pytest
import tensorflow as tf

from rec import LOWEST
from rec.bundles.pair import NUMPY, Arrays, pad_left, rerank
from rec.bundles.recommender import TENSORS

ROWS = np.array([[4, 2, 7, 1], [5, 3, -1, -1], [0, 1, 2, 3]])
FOUND = np.array([[9, 8, 7, 6], [5, 4, LOWEST, LOWEST], [4, 3, 2, 1]], np.float32)
COLD = np.array([False, False, True])
RANKED = np.array([[0.1, 0.3, 0.3], [0.2, 0.7, LOWEST], [0.1, 0.2, 0.3]], np.float32)


def answer(arrays: Arrays, ranked: np.ndarray, candidates: int | None) -> list[list]:
    retrieved = {"row": ROWS, "score": FOUND, "cold": COLD}
    if arrays is NUMPY:
        return [values.tolist() for values in rerank(NUMPY, retrieved, ranked, candidates)]
    tensors = {name: tf.constant(values) for name, values in retrieved.items()}
    graph = tf.function(lambda scores: rerank(TENSORS, tensors, scores, candidates))
    return [values.numpy().tolist() for values in graph(tf.constant(ranked))]


@pytest.mark.parametrize("arrays", [NUMPY, TENSORS])
def test_the_candidates_come_in_the_rankers_order_and_the_others_behind(arrays: Arrays) -> None:
    rows, scores, ranks, retrieved, cold = answer(arrays, RANKED, 3)
    assert rows == [
        [2, 7, 4, 1],  # equal scores keep retrieval's order
        [3, 5, -1, -1],  # empty places stay behind
        [0, 1, 2, 3],  # nothing is known about this user: retrieval's order
    ]
    assert ranks == [[2, 3, 1, 4], [2, 1, 3, 4], [1, 2, 3, 4]]
    assert scores[0] == pytest.approx([0.3, 0.3, 0.1, LOWEST])
    assert scores[1][2:] == [LOWEST, LOWEST] and scores[2] == [4, 3, 2, LOWEST]
    assert retrieved[0] == [8, 7, 9, 6] and cold == COLD.tolist()


@pytest.mark.parametrize("arrays", [NUMPY, TENSORS])
def test_without_a_ranker_the_order_is_retrievals(arrays: Arrays) -> None:
    rows, scores, ranks, retrieved, _ = answer(arrays, FOUND, None)
    assert rows == ROWS.tolist() and ranks == [[1, 2, 3, 4]] * 3
    assert scores == retrieved == FOUND.tolist()


def test_lists_are_padded_on_the_left() -> None:
    assert pad_left([["a"], ["b", "c"]]) == [["", "a"], ["b", "c"]]
    assert pad_left([[], []]) == [[], []]
    assert pad_left([[], []], width=1) == [[""], [""]]
    assert pad_left([]) == []
