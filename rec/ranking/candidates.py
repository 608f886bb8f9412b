"""Training lists for the ranker: what a retrieval model really returns, labelled by what the user did next.

The labels come from the latest share of the training interactions, and the lists from a retrieval model that was
trained on the rest only. So the ranker meets in training what it meets in service: candidates that retrieval could not
have known to be right. Lists from a model that has seen their labels would teach it to trust the retrieval score.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from rec.counts import NUMBERS, Counter
from rec.features import PAD, recent_items
from rec.pipeline import Corpus, Sequences
from rec.retrieval.model import LOWEST, RetrievalModel, best_unseen, users_at_once

Queries = tuple[
    np.ndarray, np.ndarray
]  # users [Q], and the places among their labels before which they ask [Q]


@dataclass(frozen=True)
class CandidateLists:
    """One row a query: who asks, with which history, what retrieval returned, and what of it was right."""

    user: np.ndarray  # [Q] int32 user rows
    history: np.ndarray  # [Q, H] int32 item rows, oldest first, PAD behind
    time: np.ndarray  # [Q] int64 seconds, when the query is made; 0 where the data have no times
    items: np.ndarray  # [Q, N] int32 item rows, best first, PAD behind
    scores: np.ndarray  # [Q, N] float32, the retrieval scores
    labels: np.ndarray  # [Q, N] float32, 1 = the user chose it

    def take(self, rows: np.ndarray) -> "CandidateLists":
        return CandidateLists(*(values[rows] for values in vars(self).values()))

    def with_hits(self) -> "CandidateLists":
        """Only the lists that hold a right item: the others say nothing about order."""
        return self.take(np.flatnonzero(self.labels.any(1)))


def hold_out(corpus: Corpus, share: float, seed: int) -> tuple[Sequences, Sequences]:
    """Splits the training interactions into (past, labels), as the data set's own split does.

    `temporal`: by one global time, so that the labels have the new users that a test has. Otherwise each user's last
    `share`, at least one and never all (at random where the data has no order).
    """
    train = corpus.train
    if corpus.ordered and corpus.split_strategy == "temporal":
        assert train.times is not None
        held = train.times > np.quantile(train.times, 1 - share)
    else:
        train = train if corpus.ordered else train.shuffled(np.random.default_rng(seed))
        lengths = train.lengths
        kept = lengths - np.clip(np.ceil(share * lengths), 1, np.maximum(lengths - 1, 0)).astype(
            np.int64
        )
        held = np.arange(len(train.items)) - train.offsets[train.users] >= kept[train.users]
    return train.select(~held), train.select(held)


def first_queries(labels: Sequences, most: int | None = None, seed: int = 0) -> Queries:
    """One query a user, or of at most so many drawn users, before the first label: what an evaluation asks."""
    user = np.flatnonzero(labels.lengths).astype(np.int32)
    user = np.sort(np.random.default_rng(seed).permutation(user)[:most])
    return user, np.zeros(len(user), np.int64)


def all_queries(labels: Sequences, every: bool, most: int, seed: int) -> Queries:
    """Queries to train on, at most so many: before every label, or before number 0, 1, 3, 7, ... of each user."""
    place = np.arange(len(labels.items)) - labels.offsets[labels.users]
    at = np.flatnonzero(every | ((place + 1) & place == 0))
    at = np.sort(np.random.default_rng(seed).permutation(at)[:most])
    return labels.users[at], place[at]


def mine(
    model: RetrievalModel, past: Sequences, labels: Sequences, queries: Queries, n: int, whole: bool
) -> CandidateLists:
    """Candidate lists from a model that was trained on `past`.

    Args:
      queries: users [Q] and places [Q]; the query comes before label number `place`, the earlier ones being known.
      n: length of a list.
      whole: all of the user's labels from the place on are right. Otherwise only the first of them is, and the others
        are left out of the list.
    """
    lengths, matrix = labels.lengths, model.candidates()
    parts: list[CandidateLists] = []
    step = users_at_once(len(matrix))
    for begin in tqdm(
        range(0, len(queries[0]), step), desc="mining candidates", unit="batch", leave=False
    ):
        user, place = (part[begin : begin + step] for part in queries)
        before = np.concatenate(
            [past.last(user), labels.between(user, np.zeros_like(place), place)], 1
        )
        right = labels.between(user, place, lengths[user] if whole else place + 1)
        later = labels.between(user, place + 1, place + 1 if whole else lengths[user])
        seen = np.concatenate([before, later], 1)
        time = (
            np.zeros(len(user), np.int64)
            if labels.times is None
            else labels.times[labels.offsets[user] + place]
        )
        scores = model.score_catalogue_compiled(user, before, matrix, time)
        best, items = (part.numpy() for part in best_unseen(scores, seen, n))
        hit = ((items[:, :, None] == right[:, None, :]) & (items != PAD)[:, :, None]).any(-1)
        history = recent_items(tf.constant(before), model.config.window).numpy()
        parts.append(CandidateLists(user, history, time, items, best, hit.astype(np.float32)))
    joined = {name: np.concatenate([vars(part)[name] for part in parts]) for name in vars(parts[0])}
    longest = (joined["history"] != PAD).sum(1).max(initial=1)
    return CandidateLists(**{**joined, "history": joined["history"][:, :longest]})


def rated_lists(
    sequences: Sequences, at: np.ndarray, known: Sequences | None, width: int
) -> CandidateLists:
    """Interactions number `at` as lists of one, labelled with their ratings.

    The history is the `width` interactions before it; or, where `known` is given, the user's last ones of that, without
    the rated item itself.
    """
    assert sequences.ratings is not None
    user, items = sequences.users[at], sequences.items[at][:, None]
    if known is not None:
        history = known.last(user, width)
        history = np.where(history == items, PAD, history)
    else:
        place = at - sequences.offsets[user]
        history = sequences.between(user, place - width, place, width)
    time = np.zeros(len(at), np.int64) if sequences.times is None else sequences.times[at]
    scores = np.full(items.shape, LOWEST, np.float32)
    return CandidateLists(user, history, time, items, scores, sequences.ratings[at][:, None])


def list_batches(
    take: Callable[[np.ndarray], CandidateLists],
    counts: Counter,
    n: int,
    batch_size: int,
    rng: np.random.Generator,
) -> tf.data.Dataset:
    """Lists 0..n-1 in shuffled batches: dicts of `CandidateLists`' fields and their `counts` [B, N, NUMBERS].

    `take` makes lists from their numbers."""
    first = take(np.arange(0))
    signature = {
        name: tf.TensorSpec([None, *values.shape[1:]], values.dtype)
        for name, values in vars(first).items()
    }
    signature["counts"] = tf.TensorSpec([None, first.items.shape[1], NUMBERS], tf.float32)
    order = rng.permutation(n)

    def batches() -> Iterator[dict[str, np.ndarray]]:
        for rows in np.array_split(order, max(1, round(n / batch_size))):
            lists = take(rows)
            yield {**vars(lists), "counts": counts(lists.history, lists.items, lists.time).numpy()}

    return tf.data.Dataset.from_generator(batches, output_signature=signature).prefetch(4)
