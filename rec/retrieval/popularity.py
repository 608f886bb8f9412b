"""What popularity adds to the two towers. Both parts are weights of the model, fitted on validation data.

- Cold start: a user of whom nothing is known (`RetrievalModel.is_cold`) gets the popular items of the last days, weeks
  or years. `fit_cold_start` sets the score of each item; bundles and the API answer all such users in their order.
  Users with features and no history are answered by the towers, if that is better for such users in validation data.
- Popularity bias: a term for recent popularity in the items' biases. The towers learn what comes next. What a user
  does in the weeks after follows more from what is popular then: most on a `temporal` split, and often not at all if
  only the next item is asked for.

Windows of time are shares of the training interactions, from the latest: the same few suit a data set of one week and
one of twenty years.
"""

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from scipy.sparse import csr_matrix

from rec import metrics
from rec.corpus import Corpus
from rec.errors import note
from rec.features import FIRST_ITEM, PAD
from rec.retrieval.model import RetrievalModel, current_time, has_features
from rec.retrieval.scoring import best_unseen, split_users
from rec.sequences import Sequences

SHARES = (1.0, 0.3, 0.1, 0.03, 0.01)  # of several that are equally good, the first is taken
WEIGHTS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the log of popularity
DEPTH = 100  # NDCG@100: of few users it is known better than NDCG@10, and it sees all candidates
MAX_USERS = 2000  # validation users that decide
MIN_COLD_USERS = 30  # with fewer, all validation users decide on the cold-start popularity


def recent_popularity(train: Sequences, share: float, item_rows: int) -> np.ndarray:
    """[item rows] float32: log(1 + weight of each item's interactions in the last `share` of `train`).

    Items with equal counts are ordered by all of their interactions.
    """
    order = np.arange(len(train.items))
    if train.times is not None:
        order = np.argsort(train.times, kind="stable")
    first = round((1 - share) * len(order))

    def count(at: np.ndarray) -> np.ndarray:
        weights = None if train.weights is None else train.weights[at]
        return np.bincount(train.items[at], weights, item_rows)

    all_time = count(order)
    below_1 = all_time / (all_time.sum() + 1)
    return np.log1p(count(order[first:]) + below_1).astype(np.float32)


def fit_cold_start(model: RetrievalModel, corpus: Corpus, train: Sequences) -> None:
    """Sets the scores for users without a history: the popularity in the share of `train` with the best NDCG@100."""
    users = np.flatnonzero(corpus.val.lengths)
    cold = users[train.lengths[users] == 0]
    judges = cold if len(cold) >= MIN_COLD_USERS else users
    judges = judges[:MAX_USERS]
    candidates = [recent_popularity(train, share, corpus.items.rows) for share in _shares(train)]
    quality = [_ndcg_of_one_order(scores, corpus, train, judges) for scores in candidates]
    model.set_cold_start_popularity(candidates[int(np.argmax(quality))])


def fit_popularity_bias(model: RetrievalModel, corpus: Corpus) -> None:
    """Sets the share and the weight of the popularity bias by NDCG@100 on validation users with a history.

    The best of many choices is often luck. What counts is the mean gain over no bias, less one standard error.
    """
    train = corpus.train
    users = validation_users(corpus, MAX_USERS)
    choices = [(1.0, 0.0), *product(_shares(train), WEIGHTS)]
    best = 0
    if len(users):
        quality = _ndcg_of_biases(model, corpus, users, choices)
        gain = quality - quality[0]
        best = int(np.argmax(metrics.lower_bound(gain)))
    share, weight = choices[best]
    set_popularity_bias(model, train, share=share, weight=weight)


def fit_answers_from_features(model: RetrievalModel, corpus: Corpus) -> None:
    """Decides whether users with features and no history are answered by the towers, by NDCG@100.

    Validation users without a history decide; if they are few, all validation users, as if they had none.
    """
    users = np.flatnonzero((corpus.val.lengths > 0) & has_features(corpus)).astype(np.int32)
    cold = users[corpus.train.lengths[users] == 0]
    judges = cold if len(cold) >= MIN_COLD_USERS else users
    judges = np.random.default_rng(0).permutation(judges)[:MAX_USERS]
    if not len(judges):
        return
    by_popularity = _ndcg_without_history(model, corpus, judges, from_features=False)
    from_features = _ndcg_without_history(model, corpus, judges, from_features=True)
    gain = from_features - by_popularity
    model.answers_from_features = bool(metrics.lower_bound(gain) > 0)
    note(
        f"users with features and no history: val/ndcg@100 {by_popularity.mean():.4f} by popularity, "
        f"{from_features.mean():.4f} from their features"
    )


def _ndcg_without_history(
    model: RetrievalModel, corpus: Corpus, users: np.ndarray, *, from_features: bool
) -> np.ndarray:
    """[U] NDCG@100 of what users get if their histories are not known."""
    model.answers_from_features = from_features
    candidates = model.candidates()
    parts = []
    for part in judges_of(corpus, users):
        time = current_time(part.users)
        no_history = part.history[:, :0]
        scores = model.score_catalogue_compiled(part.users, no_history, candidates, time)
        parts.append(ndcg_of_scores(scores, part, DEPTH))
    return np.concatenate(parts)


def validation_users(corpus: Corpus, most: int) -> np.ndarray:
    """[U] user rows: up to `most` validation users with a history, drawn at random."""
    users = np.flatnonzero((corpus.val.lengths > 0) & (corpus.train.lengths > 0)).astype(np.int32)
    return np.random.default_rng(0).permutation(users)[:most]


def set_popularity_bias(
    model: RetrievalModel, train: Sequences, *, share: float, weight: float
) -> None:
    """Adds to each item's bias `weight` times the log of its popularity in the last `share` of `train`."""
    popularity = recent_popularity(train, share, model.trained_items)
    model.candidate_tower.popularity_bias.assign(popularity, share=share, weight=weight)


def _shares(train: Sequences) -> tuple[float, ...]:
    """Without times there is one window: all interactions."""
    return SHARES if train.times is not None else (1.0,)


def _ndcg_of_one_order(
    scores: np.ndarray, corpus: Corpus, train: Sequences, users: np.ndarray
) -> float:
    """The sum of NDCG@100 over `users` if all get the same scores [item rows]."""
    relevant = corpus.val.matrix(users, corpus.items.rows)
    barred = corpus.barred(train, "val")
    seen = barred.matrix(users, corpus.items.rows).astype(bool)
    depth = DEPTH + int(barred.lengths[users].max(initial=0))
    order = FIRST_ITEM + np.argsort(-scores[FIRST_ITEM:], kind="stable")[:depth]
    is_seen = seen[:, order].toarray()
    unseen_first = np.argsort(is_seen, axis=1, kind="stable")[:, :DEPTH]
    ranked = np.where(np.take_along_axis(is_seen, unseen_first, 1), -1, order[unseen_first])
    k = ranked.shape[1]  # DEPTH, or the size of a smaller catalogue
    return float(metrics.per_user(ranked, relevant, ks=(k,))[f"ndcg@{k}"].sum())


def _ndcg_of_biases(
    model: RetrievalModel, corpus: Corpus, users: np.ndarray, choices: list[tuple[float, float]]
) -> np.ndarray:
    """[choices, U] NDCG@100 of the model's scores plus each choice of (share, weight)."""
    train = corpus.train
    popularity = {
        share: recent_popularity(train, share, corpus.items.rows)[FIRST_ITEM:]
        for share in _shares(train)
    }
    biases = [weight * popularity[share] for share, weight in choices]
    candidates = model.candidates()
    parts = []
    for part in judges_of(corpus, users):
        time = current_time(part.users)
        scores = model.score_catalogue_compiled(part.users, part.history, candidates, time)
        parts.append([ndcg_of_scores(scores + bias, part, DEPTH) for bias in biases])
    return np.concatenate(parts, axis=1)


class Judges(NamedTuple):
    """Some validation users: what they have met, what must not be recommended, what they chose."""

    users: np.ndarray  # [U] user rows
    history: np.ndarray  # [U, H] item rows
    barred: np.ndarray  # [U, S] item rows
    relevant: csr_matrix  # [U, item rows]


def judges_of(corpus: Corpus, users: np.ndarray) -> Iterator[Judges]:
    """These users in parts, whose scores of all items are computed together."""
    barred = corpus.barred(corpus.train, "val")
    for part in split_users(users, len(corpus.items.ids)):
        relevant = corpus.val.matrix(part, corpus.items.rows)
        yield Judges(part, corpus.train.last(part), barred.last(part), relevant)


def ndcg_of_scores(scores: tf.Tensor, judges: Judges, k: int) -> np.ndarray:
    """[U] NDCG@k of scores [U, catalogue]."""
    _, rows = best_unseen(scores, judges.barred, k)
    ranked = np.where(rows.numpy() == PAD, -1, rows.numpy())
    return metrics.per_user(ranked, judges.relevant, ks=(k,))[f"ndcg@{k}"]
