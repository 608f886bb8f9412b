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

from rec.features import PAD
from rec.pipeline import Corpus, Sequences
from rec.retrieval.model import LOWEST, RetrievalModel, best_unseen
from rec.retrieval.towers import recent_items

BATCH = 256  # users ranked at a time


@dataclass(frozen=True)
class CandidateLists:
    """One row a query: who asks, with which history, what retrieval returned, and what of it was right."""

    user: np.ndarray  # [Q] int32 user rows
    history: np.ndarray  # [Q, H] int32 item rows, oldest first, PAD behind
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
        order = train if corpus.ordered else train.shuffled(np.random.default_rng(seed))
        lengths = order.lengths
        kept = lengths - np.clip(np.ceil(share * lengths), 1, np.maximum(lengths - 1, 0)).astype(np.int64)
        train = order
        held = np.arange(len(train.items)) - train.offsets[train.users] >= kept[train.users]
    return train.select(~held), train.select(held)


def mine(
    model: RetrievalModel, corpus: Corpus, past: Sequences, labels: Sequences, n: int, whole: bool
) -> CandidateLists:
    """Candidate lists for the users of `labels`, from a model that was trained on `past`.

    Args:
      n: length of a list.
      whole: one list a user, with all its labels right (`temporal`: a query stands for all that follows it). Otherwise
        one list a label: that label is right, the user's other labels that follow are left out.
    """
    lengths = labels.lengths
    if whole:
        user = np.flatnonzero(lengths).astype(np.int32)
        nth = np.zeros(len(user), np.int64)
    else:
        user = labels.users
        nth = np.arange(len(user)) - labels.offsets[user]
    matrix = model.candidates()
    parts: list[CandidateLists] = []
    for begin in tqdm(range(0, len(user), BATCH), desc="mining candidates", unit="batch", leave=False):
        rows, position = user[begin : begin + BATCH], nth[begin : begin + BATCH]
        before = np.concatenate([past.last(rows, past.longest(rows)), _between(labels, rows, 0, position)], 1)
        right = _between(labels, rows, position, lengths[rows] if whole else position + 1)
        later = _between(labels, rows, position + 1, position + 1 if whole else lengths[rows])
        seen = np.concatenate([before, later], 1)
        best, found = best_unseen(model.score_catalogue_compiled(rows, before, matrix), seen, n)
        scores, items = best.numpy(), found.numpy()
        hit = ((items[:, :, None] == right[:, None, :]) & (items != PAD)[:, :, None]).any(-1)
        history = recent_items(tf.constant(before), model.config.window).numpy()
        parts.append(CandidateLists(rows, history, items, scores, hit.astype(np.float32)))
    return CandidateLists(*(np.concatenate([vars(p)[name] for p in parts]) for name in vars(parts[0])))


def _between(sequences: Sequences, users: np.ndarray, begin: np.ndarray | int, end: np.ndarray) -> np.ndarray:
    """Items number begin to end - 1 of each user: [len(users), widest] int32, PAD behind."""
    begin = np.broadcast_to(begin, len(users))
    length = np.minimum(end, sequences.lengths[users]) - begin
    columns = np.arange(max(0, int(length.max(initial=0))))
    inside = columns < length[:, None]
    at = (sequences.offsets[users] + begin)[:, None] + columns
    return np.where(inside, sequences.items[np.where(inside, at, 0)], PAD).astype(np.int32)


def rated_lists(sequences: Sequences, at: np.ndarray, before: Sequences | None, width: int) -> CandidateLists:
    """Interactions number `at` as lists of one, labelled with their ratings.

    The history is the `width` interactions before it; or, where `before` is given, the user's last ones of that.
    """
    assert sequences.ratings is not None
    user = sequences.users[at]
    if before is not None:
        history = before.last(user, width)
    else:
        earlier = at[:, None] + np.arange(-width, 0)
        inside = earlier >= sequences.offsets[user][:, None]
        history = np.where(inside, sequences.items[np.where(inside, earlier, 0)], PAD).astype(np.int32)
    items, labels = sequences.items[at][:, None], sequences.ratings[at][:, None]
    return CandidateLists(user, history, items, np.full(items.shape, LOWEST, np.float32), labels)


def list_batches(
    take: Callable[[np.ndarray], CandidateLists], n: int, batch_size: int, rng: np.random.Generator
) -> tf.data.Dataset:
    """Lists 0..n-1 in shuffled batches: dicts of `CandidateLists`' fields. `take` makes lists from their numbers."""
    signature = {
        name: tf.TensorSpec([None, *values.shape[1:]], values.dtype)
        for name, values in vars(take(np.arange(0))).items()
    }
    order = rng.permutation(n)

    def batches() -> Iterator[dict[str, np.ndarray]]:
        for rows in np.array_split(order, max(1, round(n / batch_size))):
            yield vars(take(rows))

    return tf.data.Dataset.from_generator(batches, output_signature=signature).prefetch(4)
