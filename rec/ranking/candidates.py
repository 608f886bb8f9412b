"""Training lists for the ranker: what a retrieval model really returns, labelled by what the user did next.

The labels are the latest share of the training interactions. The lists come from a retrieval model that was trained on
the rest only. So the ranker meets in training what it meets in service: candidates that retrieval could not have known
to be right. Lists from a model that has seen their labels would teach it to trust the retrieval score.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from rec.corpus import Corpus
from rec.features import PAD, recent_items
from rec.ranking.count_features import COUNT_FEATURES, CountFeatures
from rec.retrieval.model import RetrievalModel
from rec.retrieval.scoring import best_unseen, users_per_batch
from rec.sequences import Sequences, nothing


@dataclass(frozen=True)
class Queries:
    """Who asks, and when: before the user's label number `place`, with the earlier labels known."""

    user: np.ndarray  # [Q] int32 user rows
    place: np.ndarray  # [Q] int64

    def part(self, begin: int, end: int) -> "Queries":
        return Queries(user=self.user[begin:end], place=self.place[begin:end])


@dataclass(frozen=True)
class CandidateLists:
    """One row per query: who asks, with which history, what retrieval returned, and which of it was right."""

    user: np.ndarray  # [Q] int32 user rows
    history: np.ndarray  # [Q, H] int32 item rows, oldest first, PAD behind
    time: np.ndarray  # [Q] int64 seconds of the query; 0 if the data have no times
    items: np.ndarray  # [Q, N] int32 item rows, best first, PAD behind
    scores: np.ndarray  # [Q, N] float32 retrieval scores
    labels: np.ndarray  # [Q, N] float32, the weight of what the user chose, 0 for the other items

    def __len__(self) -> int:
        return len(self.user)

    def take(self, rows: np.ndarray) -> "CandidateLists":
        return CandidateLists(
            user=self.user[rows],
            history=self.history[rows],
            time=self.time[rows],
            items=self.items[rows],
            scores=self.scores[rows],
            labels=self.labels[rows],
        )

    def with_hits(self) -> "CandidateLists":
        """Only the lists that hold a right item. The others say nothing about order."""
        return self.take(np.flatnonzero(self.labels.any(1)))

    def as_batch(self) -> dict[str, np.ndarray]:
        """The fields by name, as RankingModel.compute_loss takes them."""
        return {
            "user": self.user,
            "history": self.history,
            "time": self.time,
            "items": self.items,
            "scores": self.scores,
            "labels": self.labels,
        }


def concatenate_lists(parts: list[CandidateLists]) -> CandidateLists:
    """Lists with equally wide histories, one part after the other."""
    return CandidateLists(
        user=np.concatenate([part.user for part in parts]),
        history=np.concatenate([part.history for part in parts]),
        time=np.concatenate([part.time for part in parts]),
        items=np.concatenate([part.items for part in parts]),
        scores=np.concatenate([part.scores for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
    )


def no_lists(n: int) -> CandidateLists:
    """No lists, of length `n`."""
    nobody = np.zeros(0, np.int32)
    return CandidateLists(
        user=nobody,
        history=np.zeros((0, 1), np.int32),
        time=np.zeros(0, np.int64),
        items=np.zeros((0, n), np.int32),
        scores=np.zeros((0, n), np.float32),
        labels=np.zeros((0, n), np.float32),
    )


def hold_out(corpus: Corpus, share: float, seed: int) -> tuple[Sequences, Sequences]:
    """Splits the training interactions into (past, labels), in the way of the data set's own split.

    - `temporal`: at one global time, so that the labels have new users, as a test has.
    - Otherwise each user's last `share`, at least one and never all. Without times, a random share.
    """
    train = corpus.train
    if corpus.ordered and corpus.split_strategy == "temporal":
        assert train.times is not None
        is_label = train.times > np.quantile(train.times, 1 - share)
    else:
        if not corpus.ordered:
            train = train.shuffled(np.random.default_rng(seed))
        lengths = train.lengths
        most = np.maximum(lengths - 1, 0)
        labels = np.clip(np.ceil(share * lengths), 1, most).astype(np.int64)
        first_label = lengths - labels
        place = np.arange(len(train.items)) - train.offsets[train.users]
        is_label = place >= first_label[train.users]
    past = train.select(~is_label)
    if train.weights is not None:  # 0: the user dislikes it
        is_label &= train.weights > 0
    return past, train.select(is_label)


def first_queries(labels: Sequences, most: int | None = None, seed: int = 0) -> Queries:
    """One query per user, before the first label, as an evaluation asks. At most `most` users, drawn by `seed`."""
    user = np.flatnonzero(labels.lengths).astype(np.int32)
    user = np.sort(np.random.default_rng(seed).permutation(user)[:most])
    return Queries(user=user, place=np.zeros(len(user), np.int64))


def training_queries(labels: Sequences, *, next_item: bool, most: int, seed: int) -> Queries:
    """Queries to train on, at most `most`, drawn by `seed`.

    `next_item`: before every label. Otherwise before label number 0, 1, 3, 7, ... of each user, because a query is
    then labelled with all that follow.
    """
    place = np.arange(len(labels.items)) - labels.offsets[labels.users]
    is_power_of_two = ((place + 1) & place) == 0
    at = np.arange(len(place)) if next_item else np.flatnonzero(is_power_of_two)
    at = np.sort(np.random.default_rng(seed).permutation(at)[:most])
    return Queries(user=labels.users[at], place=place[at])


def mine(
    model: RetrievalModel,
    past: Sequences,
    labels: Sequences,
    queries: Queries,
    n: int,
    *,
    next_item: bool,
    exclude_seen: bool = True,
    disliked: Sequences | None = None,
) -> CandidateLists:
    """Candidate lists: the `n` best items that the user has not seen, by a model that was trained on `past`.

    `next_item`: only the first label after the query is right, and the later ones are left out of the list.
    Otherwise all labels after the query are right. `exclude_seen`: what the user has met is left out, too.
    So is what is `disliked`. A ranker is trained without it: dislikes that retrieval returns are wrong items of a list.
    """
    candidates = model.candidates()
    step = users_per_batch(model.n_items)
    starts = range(0, len(queries.user), step)
    parts = []
    for begin in tqdm(starts, desc="mining candidates", unit="batch", leave=False):
        part = queries.part(begin, begin + step)
        parts.append(
            _mine_part(
                model,
                candidates,
                past,
                labels,
                part,
                n,
                next_item=next_item,
                exclude_seen=exclude_seen,
                disliked=disliked or nothing(len(past.lengths)),
            )
        )
    lists = concatenate_lists(parts)
    longest = int((lists.history != PAD).sum(1).max(initial=1))
    return replace(lists, history=lists.history[:, :longest])


def _mine_part(
    model: RetrievalModel,
    candidates: tf.Tensor,
    past: Sequences,
    labels: Sequences,
    queries: Queries,
    n: int,
    *,
    next_item: bool,
    exclude_seen: bool,
    disliked: Sequences,
) -> CandidateLists:
    user = queries.user
    place = queries.place
    end = labels.lengths[user]
    known_labels = labels.between(user, np.zeros_like(place), place)
    before = np.concatenate([past.last(user), known_labels], 1)
    right_end = place + 1 if next_item else end
    right = labels.between(user, place, right_end)
    weights = labels.weights_between(user, place, right_end)
    left_out = disliked.last(user)
    if exclude_seen:
        left_out = np.concatenate([before, left_out], 1)
    if next_item:
        later = labels.between(user, place + 1, end)
        later = np.where(later == right, PAD, later)  # the right item may come again
        left_out = np.concatenate([left_out, later], 1)
    time = labels.times_at(user, place)
    scores = model.score_catalogue_compiled(user, before, candidates, time)
    best, rows = best_unseen(scores, left_out, n)
    items = rows.numpy()
    is_right = (items[:, :, None] == right[:, None, :]) & (items != PAD)[:, :, None]
    return CandidateLists(
        user=user,
        history=recent_items(tf.constant(before), model.config.window).numpy(),
        time=time,
        items=items,
        scores=best.numpy(),
        labels=np.where(is_right, weights[:, None], 0).max(-1, initial=0),
    )


def list_batches(
    lists: CandidateLists, counts: CountFeatures, batch_size: int, rng: np.random.Generator
) -> tf.data.Dataset:
    """One epoch of lists in shuffled batches: dicts of their fields and `counts` [B, N, COUNT_FEATURES]."""
    signature = {
        name: tf.TensorSpec([None, *values.shape[1:]], values.dtype)
        for name, values in lists.as_batch().items()
    }
    width = lists.items.shape[1]
    signature["counts"] = tf.TensorSpec([None, width, COUNT_FEATURES], tf.float32)
    order = rng.permutation(len(lists))
    batches = np.array_split(order, max(1, round(len(lists) / batch_size)))

    def generate() -> Iterator[dict[str, np.ndarray]]:
        for rows in batches:
            part = lists.take(rows)
            features = counts(part.history, part.items, part.time)
            yield {**part.as_batch(), "counts": features.numpy()}

    return tf.data.Dataset.from_generator(generate, output_signature=signature).prefetch(4)
