"""How much taste counts beside the towers: chosen on validation data.

1. Taste alone: alpha and regularization by a walk over a grid, with narrow factors, which are fitted in seconds.
2. Full width, and the weight of the sum.
"""

import sys
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from rec.corpus import Corpus
from rec.features import FIRST_ITEM
from rec.retrieval.model import ROW_LISTS, RetrievalModel
from rec.retrieval.popularity import ndcg_of_scores, validation_users
from rec.retrieval.scoring import users_per_batch
from rec.retrieval.taste import Taste, TasteSetting

ALPHAS = (1.0, 3.0, 10.0, 30.0, 100.0)
REGULARIZATIONS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
START = (2, 2)  # where the walk over both begins
SEARCH_WIDTH = 64
# Of the taste's score, in units that make both parts spread alike. The last one is taste alone, or nearly so.
WEIGHTS = (0.0, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0, 50.0)


def fit_taste(model: RetrievalModel, corpus: Corpus, seed: int) -> None:
    """Fits the taste part of a trained model, and its weight by NDCG on validation users with a history."""
    width = model.config.taste_dim
    users = validation_users(corpus)
    if width == 0 or not len(users):
        return
    setting = _best_setting(corpus, model.trained_items, min(width, SEARCH_WIDTH), users, seed)
    model.taste.fit(corpus.train, setting, seed)
    model.taste.set_weight(_best_weight(model, corpus, users))
    print(f"taste: {model.taste.setting}", file=sys.stderr)


def _best_setting(
    corpus: Corpus, rows: int, width: int, users: np.ndarray, seed: int
) -> TasteSetting:
    """The alpha and regularization with the best NDCG of taste alone: uphill from START, one step at a time."""
    taste = Taste(width, rows)
    measure_alone = tf.function(taste.call, [ROW_LISTS])
    quality: dict[tuple[int, int], float] = {}

    def measure(place: tuple[int, int]) -> float:
        if place not in quality:
            taste.fit(corpus.train, _setting(place), seed)
            quality[place] = _mean_ndcg(taste, measure_alone, corpus, users)
            print(f"taste {_setting(place)}: {quality[place]:.4f}", file=sys.stderr)
        return quality[place]

    best = START
    while True:
        uphill = max(_neighbours(best), key=measure)
        if measure(uphill) <= measure(best):
            return _setting(best)
        best = uphill


def _neighbours(place: tuple[int, int]) -> list[tuple[int, int]]:
    """The places around `place` on the grid, and itself."""
    steps = ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, -1))
    places = [(place[0] + step[0], place[1] + step[1]) for step in steps]
    return [(i, j) for i, j in places if 0 <= i < len(ALPHAS) and 0 <= j < len(REGULARIZATIONS)]


def _setting(place: tuple[int, int]) -> TasteSetting:
    return TasteSetting(
        alpha=ALPHAS[place[0]], regularization=REGULARIZATIONS[place[1]], weight=1.0
    )


def _mean_ndcg(
    taste: Taste, user_factors: Callable[..., tf.Tensor], corpus: Corpus, users: np.ndarray
) -> float:
    """Of taste alone."""
    catalogue = tf.range(FIRST_ITEM, FIRST_ITEM + len(corpus.items.ids))
    candidates = taste.candidates(catalogue)
    parts = []
    for part in _slices(users, len(corpus.items.ids)):
        query = user_factors(corpus.train.last(part))
        scores = tf.matmul(query, candidates, transpose_b=True)
        parts.append(ndcg_of_scores(scores, corpus, part))
    return float(np.concatenate(parts).mean())


def _best_weight(model: RetrievalModel, corpus: Corpus, users: np.ndarray) -> float:
    """The weight with the best mean gain over no taste, less one standard error."""
    candidates = model.candidates()
    width = model.config.taste_dim
    unit = None
    parts = []
    for part in _slices(users, model.n_items):
        history = corpus.train.last(part)
        queries = model.query_compiled(part, history)
        by_towers = tf.matmul(queries[:, :-width], candidates[:, :-width], transpose_b=True)
        by_taste = tf.matmul(queries[:, -width:], candidates[:, -width:], transpose_b=True)
        if unit is None:
            unit = float(tf.math.reduce_std(by_towers) / tf.math.reduce_std(by_taste))
        parts.append(
            [
                ndcg_of_scores(by_towers + weight * unit * by_taste, corpus, part)
                for weight in WEIGHTS
            ]
        )
    quality = np.concatenate(parts, axis=1)  # [weights, U]
    gain = quality - quality[0]
    print(np.round(quality.mean(1), 4), file=sys.stderr)
    best = int(np.argmax(gain.mean(1) - gain.std(1) / len(users) ** 0.5))
    return WEIGHTS[best] * (unit or 0.0)


def _slices(users: np.ndarray, items: int) -> list[np.ndarray]:
    step = users_per_batch(items)
    return np.array_split(users, np.arange(step, len(users), step))
