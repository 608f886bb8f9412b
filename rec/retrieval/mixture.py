"""How much taste counts beside the towers: chosen on validation data.

1. Taste alone: alpha and regularization, by a walk over a grid. Wide factors want more of both than narrow ones.
2. The weight in the sum.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
import tensorflow as tf

from rec.corpus import Corpus
from rec.errors import note
from rec.features import FIRST_ITEM
from rec.metrics import lower_bound
from rec.retrieval.model import ROW_LISTS, RetrievalModel
from rec.retrieval.popularity import judges_of, ndcg_of_scores, validation_users
from rec.retrieval.taste import Taste, TasteSetting

ALPHAS = (1.0, 3.0, 10.0, 30.0, 100.0)
REGULARIZATIONS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
FIRST_PLACE = (2, 2)  # where the walk over both begins
STEPS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, -1))
SEARCH_WIDTH = 64  # of the walk, if full width takes too long
MANY_INTERACTIONS = 1_000_000
DEPTH = 10  # NDCG@10. By NDCG@100 taste counts too little: the towers are better further down
MAX_USERS = 10_000  # validation users that decide
# Of the taste's scores, in units that make them spread like the towers' scores. 50 is nearly taste alone.
WEIGHTS = (0.0, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0, 50.0)

Place = tuple[int, int]  # in ALPHAS and REGULARIZATIONS


def fit_taste(model: RetrievalModel, corpus: Corpus, seed: int) -> None:
    """Fits the taste part of a trained model, and its weight by NDCG@10 on validation users with a history."""
    users = validation_users(corpus, MAX_USERS)
    if model.config.taste_dim == 0 or not len(users):
        return
    note(f"fitting taste, a factorisation of {len(corpus.train.items):,} interactions")
    setting = _best_setting(model, corpus, users, seed)
    model.taste.fit(corpus.train, setting, seed)
    model.taste.set_weight(_best_weight(model, corpus, users))


def _best_setting(
    model: RetrievalModel, corpus: Corpus, users: np.ndarray, seed: int
) -> TasteSetting:
    """The alpha and regularization with the best NDCG of taste alone: uphill on the grid until all around is lower."""
    is_large = len(corpus.train.items) > MANY_INTERACTIONS
    width = min(model.config.taste_dim, SEARCH_WIDTH) if is_large else model.config.taste_dim
    taste = Taste(width, model.trained_items)
    user_factors = tf.function(taste.call, [ROW_LISTS])

    @cache
    def measure(place: Place) -> float:
        taste.fit(corpus.train, _setting(place), seed)
        return _mean_ndcg(taste, user_factors, corpus, users)

    best = FIRST_PLACE
    while True:
        uphill = max([best, *_neighbours(best)], key=measure)
        if uphill == best:
            return _setting(best)
        best = uphill


def _setting(place: Place) -> TasteSetting:
    alpha, regularization = place
    return TasteSetting(ALPHAS[alpha], REGULARIZATIONS[regularization], weight=1.0)


def _neighbours(place: Place) -> list[Place]:
    around = [(place[0] + step[0], place[1] + step[1]) for step in STEPS]
    alphas = range(len(ALPHAS))
    regularizations = range(len(REGULARIZATIONS))
    return [(i, j) for i, j in around if i in alphas and j in regularizations]


def _mean_ndcg(
    taste: Taste, user_factors: Callable[..., tf.Tensor], corpus: Corpus, users: np.ndarray
) -> float:
    """Of taste alone. `user_factors` is `taste` as a compiled function."""
    candidates = taste.candidates(tf.range(FIRST_ITEM, FIRST_ITEM + len(corpus.items.ids)))
    parts = []
    for part in judges_of(corpus, users):
        scores = tf.matmul(user_factors(part.history), candidates, transpose_b=True)
        parts.append(ndcg_of_scores(scores, part, DEPTH))
    return float(np.concatenate(parts).mean())


def _best_weight(model: RetrievalModel, corpus: Corpus, users: np.ndarray) -> float:
    """The weight with the best mean gain over no taste, less one standard error."""
    candidates = model.candidates()
    unit = 0.0  # of WEIGHTS; from the first users
    parts = []
    for part in judges_of(corpus, users):
        queries = model.query_compiled(part.users, part.history)
        by_towers, by_taste = _scores_of_parts(queries, candidates, model.config.taste_dim)
        unit = unit or float(tf.math.reduce_std(by_towers) / tf.math.reduce_std(by_taste))
        sums = (by_towers + weight * unit * by_taste for weight in WEIGHTS)
        parts.append([ndcg_of_scores(scores, part, DEPTH) for scores in sums])
    quality = np.concatenate(parts, axis=1)  # [weights, U]
    gain = quality - quality[0]
    best = int(np.argmax(lower_bound(gain)))
    before, after = quality.mean(1)[[0, best]]
    effect = f"val/ndcg@10 {before:.4f} without taste, {after:.4f} with it"
    if best == 0:
        effect = f"taste would not improve val/ndcg@10 {before:.4f}, so its weight is 0"
    note(effect)
    return WEIGHTS[best] * unit


def _scores_of_parts(
    queries: tf.Tensor, candidates: tf.Tensor, width: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """The scores of the towers and of taste, whose vectors are the last `width` numbers: [B, catalogue] each."""
    by_towers = tf.matmul(queries[:, :-width], candidates[:, :-width], transpose_b=True)
    by_taste = tf.matmul(queries[:, -width:], candidates[:, -width:], transpose_b=True)
    return by_towers, by_taste
