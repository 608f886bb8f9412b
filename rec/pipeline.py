"""A dataset directory -> integers -> tf.data: everything that training reads, encoded once.

- `Corpus` holds the vocabularies, the feature tables and one `Sequences` (users' interactions, in order) a split. Those
  are files that are read in parts and mapped into memory: training streams from the disk what does not fit.
- `windows` cuts the sequences into training examples: W + 1 tokens of which each predicts the next.
- `window_batches` is the tf.data of retrieval training. It shuffles and assembles whole batches in NumPy, so that
  tf.data only hands over finished tensors: bench/input_pipeline.py measures it against the training step.

Randomness comes from (seed, epoch) alone: an epoch's batches are the same after a resume as in an unbroken run.
"""

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import tensorflow as tf

from rec.config import Features, Retrieval
from rec.data_prep.dataset import Dataset, verify
from rec.errors import UserError
from rec.features import (
    FIRST_ITEM,
    FIRST_USER,
    PAD,
    START,
    UNKNOWN,
    UNKNOWN_USER,
    Column,
    Vocabulary,
    fit_columns,
)

BLOCK = 2**22  # interactions that are shuffled at a time, to bound the memory that it takes
WINDOW_POSITIONS = 50  # a batch holds batch_size times so many targets
SORT_BATCHES = 20  # windows of so many batches are sorted by length before batching: less padding, still shuffled


@dataclass(frozen=True)
class Sequences:
    """The interactions of each user in time order, concatenated. User row u owns [offsets[u], offsets[u + 1])."""

    offsets: np.ndarray  # [user rows + 1] int64
    items: np.ndarray  # [n] int32 item rows
    times: np.ndarray | None  # [n] int64 seconds
    ratings: np.ndarray | None  # [n] float32

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @property
    def users(self) -> np.ndarray:
        """[n] int32: the user row of each interaction."""
        return np.repeat(np.arange(len(self.lengths), dtype=np.int32), self.lengths)

    def last(self, users: np.ndarray, width: int | None = None) -> np.ndarray:
        """The last `width` items of each of these users, or all: [U, width] int32, left-aligned, PAD behind."""
        lengths = self.lengths[users]
        return self.between(
            users, np.zeros_like(lengths) if width is None else lengths - width, lengths, width
        )

    def between(
        self, users: np.ndarray, begin: np.ndarray, end: np.ndarray, width: int | None = None
    ) -> np.ndarray:
        """Items number begin to end - 1 (those that there are) of each user: [U, width] int32, or [U, widest]."""
        begin = np.maximum(begin, 0)
        length = np.minimum(end, self.lengths[users]) - begin
        columns = np.arange(max(0, int(length.max(initial=0))) if width is None else width)
        inside = columns < length[:, None]
        at = np.where(inside, (self.offsets[users] + begin)[:, None] + columns, 0)
        return np.where(inside, self.items[at] if len(self.items) else PAD, PAD).astype(np.int32)

    def times_at(self, users: np.ndarray, place: np.ndarray | int = 0) -> np.ndarray:
        """[U] int64 seconds of each user's interaction number `place`; 0 if the data have no times."""
        if self.times is None:
            return np.zeros(len(users), np.int64)
        return self.times[self.offsets[users] + place]

    def matrix(self, users: np.ndarray, item_rows: int) -> sp.csr_matrix:
        """Binary [len(users), item_rows] of what each of these users interacted with."""
        lengths = self.lengths[users]
        indptr = np.concatenate([[0], np.cumsum(lengths)])
        at = np.arange(indptr[-1]) + np.repeat(self.offsets[users] - indptr[:-1], lengths)
        shape = (len(users), item_rows)
        return sp.csr_matrix((np.ones(len(at), np.float32), self.items[at], indptr), shape=shape)

    def select(self, keep: np.ndarray) -> "Sequences":
        """The interactions at which `keep` [n] is true, still by user and in order."""
        lengths = np.add.reduceat(np.append(keep, False).astype(np.int64), self.offsets[:-1]) * (
            self.lengths > 0
        )
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        parts = [None if part is None else part[keep] for part in (self.times, self.ratings)]
        return Sequences(offsets, self.items[keep], *parts)

    def shuffled(self, rng: np.random.Generator) -> "Sequences":
        """Each user's interactions of one and the same second in a new random order; without times, all of them."""
        items = on_disk(len(self.items), np.int32)
        ratings = None if self.ratings is None else on_disk(len(items), np.float32)
        cuts = np.searchsorted(
            self.offsets, np.arange(0, len(items), BLOCK)
        )  # some users at a time
        for begin, end in pairwise(np.unique([*cuts, len(self.lengths)])):
            part = slice(self.offsets[begin], self.offsets[end])
            is_new = (
                np.diff(np.repeat(np.arange(end - begin), self.lengths[begin:end]), prepend=0) != 0
            )
            if self.times is not None:
                is_new |= np.diff(self.times[part], prepend=0) != 0
            order = part.start + np.argsort(
                np.cumsum(is_new) + rng.random(len(is_new))
            )  # a third of lexsort's time
            items[part] = self.items[order]
            if ratings is not None and self.ratings is not None:
                ratings[part] = self.ratings[order]
        return Sequences(self.offsets, items, self.times, ratings)


@dataclass(frozen=True)
class Corpus:
    """A dataset, encoded. Item rows are in order of falling training count, so FIRST_ITEM is the most popular item."""

    dataset_id: str
    ordered: bool
    split_strategy: str
    users: Vocabulary
    items: Vocabulary
    user_table: pd.DataFrame  # one row an id of `users`, in its order
    item_table: pd.DataFrame
    user_columns: tuple[Column, ...]
    item_columns: tuple[Column, ...]
    train: Sequences
    val: Sequences
    test: Sequences

    @property
    def popularity(self) -> np.ndarray:
        """[item rows] int64: training interactions of each item."""
        return np.bincount(self.train.items, minlength=self.items.rows)

    def history(self, split: str) -> Sequences:
        """What is known of each user before `split`: train for val; train and val for test."""
        return self.train if split == "val" else concatenate(self.train, self.val)


def concatenate(first: Sequences, second: Sequences) -> Sequences:
    """Each user's interactions of `first`, then those of `second`."""
    users = np.concatenate([first.users, second.users])
    order = np.argsort(users, kind="stable")

    def join(a: np.ndarray | None, b: np.ndarray | None) -> np.ndarray | None:
        return None if a is None or b is None else np.concatenate([a, b])[order]

    items = np.concatenate([first.items, second.items])[order]
    return Sequences(
        first.offsets + second.offsets,
        items,
        join(first.times, second.times),
        join(first.ratings, second.ratings),
    )


def load_corpus(
    dataset: Dataset,
    features: Features,
    users: Vocabulary | None = None,
    items: Vocabulary | None = None,
    columns: tuple[tuple[Column, ...], tuple[Column, ...]] | None = None,
) -> Corpus:
    """Encodes a dataset, if its files are whole (else UserError). Vocabularies and columns are learnt from its training
    data, unless a checkpoint's are given.

    Args:
      users, items: only their trained ids are taken over; ids that only this dataset has come after them.
      columns: the encodings of user and item features.
    """
    verify(dataset)
    users = _vocabulary(
        dataset.counts("train", "user_id"), dataset.users()["user_id"], FIRST_USER, users
    )
    items = _vocabulary(
        dataset.counts("train", "item_id"), dataset.items()["item_id"], FIRST_ITEM, items
    )
    user_table = (
        dataset.users().set_index("user_id").reindex(users.ids).reset_index(names="user_id")
    )
    item_table = (
        dataset.items().set_index("item_id").reindex(items.ids).reset_index(names="item_id")
    )
    if columns is None:
        known_users = np.arange(len(users.ids)) < users.trained
        known_items = np.arange(len(items.ids)) < items.trained
        columns = (
            fit_columns(user_table, "user_id", features.users, known_users, "features.users"),
            fit_columns(item_table, "item_id", features.items, known_items, "features.items"),
        )
    splits = [_sequences(dataset, split, users, items) for split in ("train", "val", "test")]
    return Corpus(
        dataset.id,
        dataset.ordered,
        dataset.split_strategy,
        users,
        items,
        user_table,
        item_table,
        *columns,
        *splits,
    )


def _vocabulary(
    counts: pd.Series, listed: pd.Series, first: int, given: Vocabulary | None
) -> Vocabulary:
    """Trained ids by falling count (ties: by id), then the ids that only the table lists."""
    if given is None:
        trained = (-counts).sort_values(kind="stable").index.to_numpy(object)
    else:
        trained = given.ids[: given.trained]
    others = pd.Index(listed).difference(pd.Index(trained), sort=True).to_numpy(object)
    return Vocabulary(np.concatenate([trained, others]).astype(object), first, len(trained))


def _sequences(dataset: Dataset, split: str, users: Vocabulary, items: Vocabulary) -> Sequences:
    """Puts each interaction where its user's come, a row group at a time: nothing grows with the data but the files."""
    counts = dataset.counts(split, "user_id")
    owners = users.encode(counts.index.to_numpy(object), UNKNOWN_USER)
    offsets = np.concatenate(
        [[0], np.cumsum(np.bincount(owners, counts, users.rows).astype(np.int64))]
    )
    rows = on_disk(offsets[-1], np.int32)
    times = on_disk(len(rows), np.int64) if dataset.ordered else None
    ratings = on_disk(len(rows), np.float32) if dataset.has_ratings else None
    free = offsets[:-1].copy()  # where the next interaction of each user goes
    for frame in dataset.batches(split):
        user = users.encode(frame["user_id"], UNKNOWN_USER)
        order = np.argsort(user, kind="stable")  # keeps the order in time within a user
        user = user[order]
        at = free[user] + np.arange(len(user)) - np.searchsorted(user, user)
        free[user] = at + 1  # of a user's several, the last one stays
        rows[at] = items.encode(frame["item_id"], UNKNOWN)[order]
        for values, column in ((times, "timestamp"), (ratings, "rating")):
            if values is not None:
                values[at] = frame[column].to_numpy()[order]
    return Sequences(offsets, rows, times, ratings)


def on_disk(n: int, dtype: Any) -> np.ndarray:
    """[n] zeros in a file without a name, in TMPDIR: the memory that they take is the page cache's, to give back.

    Raises UserError where the disk has no room for them.
    """
    size = max(n, 1) * np.dtype(dtype).itemsize
    with tempfile.TemporaryFile() as file:
        try:
            os.posix_fallocate(
                file.fileno(), 0, size
            )  # without room of its own, a full disk would kill us later
        except OSError as error:
            raise UserError(
                f"{tempfile.gettempdir()}: {error.strerror}: set TMPDIR to a larger place"
            ) from None
        return np.asarray(np.memmap(file, dtype, "r+", shape=max(n, 1)))[:n]


@dataclass(frozen=True)
class Windows:
    """Training examples: number j is user[j]'s interactions [begin[j], end[j]), each predicted from those before."""

    user: np.ndarray
    begin: np.ndarray
    end: np.ndarray


def windows(sequences: Sequences, width: int, rng: np.random.Generator) -> Windows:
    """Cuts every user's sequence into windows of at most `width` targets; every interaction is a target once.

    A long sequence is cut at a random phase, so that the cuts (behind which less history is visible) fall elsewhere
    in every epoch. A sequence that fits one window is never cut.
    """
    lengths = sequences.lengths
    phase = np.where(lengths > width, rng.integers(1, width + 1, len(lengths)), width)
    counts = np.where(lengths > 0, 1 + np.ceil(np.maximum(lengths - phase, 0) / width), 0).astype(
        np.int64
    )
    user = np.repeat(np.arange(len(lengths)), counts)
    nth = np.arange(len(user)) - np.repeat(np.cumsum(counts) - counts, counts)
    begin = np.where(nth == 0, 0, phase[user] + (nth - 1) * width)
    end = np.minimum(phase[user] + nth * width, lengths[user])
    return Windows(
        user.astype(np.int32), sequences.offsets[user] + begin, sequences.offsets[user] + end
    )


def window_batches(
    corpus: Corpus, config: Retrieval, train: Sequences, seed: int, epoch: int
) -> tf.data.Dataset:
    """One epoch of retrieval training, in shuffled batches.

    Yields dicts of
      user: [B] int32 rows.
      tokens: [B, L + 1] int32 item rows, L <= window, left-aligned, PAD behind. tokens[:, t] predicts tokens[:, t + 1];
        tokens[:, 0] is START, or the interaction before the window.
      negatives: [C] int32 item rows, shared by the whole batch: targets of the batch, then uniform ones.
      time: [B, L] int64 seconds, of each target (only where `query_time` is set).
    """
    shapes = {"user": [None], "tokens": [None, None], "negatives": [None]}
    signature = {name: tf.TensorSpec(shape, tf.int32) for name, shape in shapes.items()}
    if config.query_time:
        signature["time"] = tf.TensorSpec([None, None], tf.int64)

    def batches() -> Iterator[dict[str, np.ndarray]]:
        rng = np.random.default_rng([seed, epoch])
        yield from _batches(train.shuffled(rng), config, corpus.items, rng)

    return tf.data.Dataset.from_generator(batches, output_signature=signature).prefetch(4)


def _batches(
    sequences: Sequences, config: Retrieval, items: Vocabulary, rng: np.random.Generator
) -> Iterator[dict[str, np.ndarray]]:
    cut = windows(sequences, config.window, rng)
    size = config.batch_size * WINDOW_POSITIONS
    length = cut.end - cut.begin
    order = rng.permutation(len(length))
    batches: list[np.ndarray] = []
    for pool in np.array_split(order, max(1, length.sum() // (size * SORT_BATCHES))):
        by_length = pool[np.argsort(length[pool], kind="stable")]
        positions = np.cumsum(length[by_length])
        batches += np.split(by_length, np.flatnonzero(np.diff(positions // size)) + 1)
    for j in rng.permutation(len(batches)):
        user, begin, end = (part[batches[j]] for part in (cut.user, cut.begin, cut.end))
        columns = np.arange((end - begin).max() + 1)
        at = begin[:, None] + columns - 1
        inside = at < end[:, None]
        tokens = np.where(inside, sequences.items[np.where(inside, np.maximum(at, 0), 0)], PAD)
        tokens[:, 0] = np.where(begin > sequences.offsets[user], tokens[:, 0], START)
        targets = tokens[:, 1:][inside[:, 1:]]
        batch = {
            "user": user,
            "tokens": tokens,
            "negatives": _negatives(targets, config, items, rng),
        }
        if config.query_time and sequences.times is not None:
            batch["time"] = np.where(inside, sequences.times[np.where(inside, at, 0)], 0)[:, 1:]
        yield batch


def _negatives(
    targets: np.ndarray, config: Retrieval, items: Vocabulary, rng: np.random.Generator
) -> np.ndarray:
    """A batch's shared pool: random targets of the batch (drawn as popular as they are), then uniform items.

    A catalogue no larger than the uniform share is taken whole instead: the softmax is then the full one.
    """
    if config.uniform_negatives >= items.trained:
        return np.arange(FIRST_ITEM, FIRST_ITEM + items.trained, dtype=np.int32)
    popular = (
        rng.choice(targets, config.in_batch_negatives) if config.in_batch_negatives else targets[:0]
    )
    uniform = rng.integers(
        FIRST_ITEM, FIRST_ITEM + items.trained, config.uniform_negatives, dtype=np.int32
    )
    return np.concatenate([popular.astype(np.int32), uniform])


def sampling_probability(corpus: Corpus, config: Retrieval, train: Sequences) -> np.ndarray:
    """[item rows] float32: the probability that a slot of the shared pool holds this item, under `_negatives`.

    The pool is a sample of a mixture (Yang et al. 2020, "Mixed Negative Sampling"): an item's probability counts both
    ways of being drawn, whichever happened.
    """
    uniform = np.zeros(corpus.items.rows)
    uniform[FIRST_ITEM : FIRST_ITEM + corpus.items.trained] = 1 / corpus.items.trained
    counts = np.bincount(train.items, minlength=corpus.items.rows)
    is_whole = config.uniform_negatives >= corpus.items.trained
    share = (
        0.0
        if is_whole
        else config.in_batch_negatives / (config.in_batch_negatives + config.uniform_negatives)
    )
    probability = share * counts / counts.sum() + (1 - share) * uniform
    return np.maximum(probability, np.finfo(np.float32).tiny).astype(np.float32)
