"""Training batches of retrieval, as tf.data.

An epoch is made in four steps, in NumPy, so that tf.data only hands over finished tensors:

1. Cut each user's sequence into windows of at most W targets (`cut_windows`).
2. Shuffle the windows, sort a few batches' worth of them by length, and group them into batches: less padding, and
   still shuffled.
3. Gather the tokens of a batch. A window of the items a b c, which begins a sequence, is START a b c: each token
   predicts the next one.
4. Draw the negatives that the whole batch shares.

Randomness comes from (seed, epoch) alone: an epoch's batches are the same after a resume as in an unbroken run.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from rec.config import ResolvedRetrieval
from rec.corpus import Corpus
from rec.features import FIRST_ITEM, PAD, START, Vocabulary
from rec.sequences import Sequences

POSITIONS_PER_WINDOW = (
    50  # a batch has batch_size x this many targets: more windows if they are shorter
)
SORTED_BATCHES = 20  # batches' worth of windows that are sorted by length together

Batch = dict[str, np.ndarray]


def window_batches(
    corpus: Corpus, config: ResolvedRetrieval, train: Sequences, seed: int, epoch: int
) -> tf.data.Dataset:
    """One epoch of retrieval training, in shuffled batches.

    Yields dicts of
      user: [B] int32 rows.
      tokens: [B, L + 1] int32 item rows, L <= window, left-aligned, PAD behind. tokens[:, t] predicts tokens[:, t + 1];
        tokens[:, 0] is START, or the interaction before the window.
      negatives: [C] int32 item rows, shared by the whole batch: targets of the batch, then uniform ones.
      time: [B, L] int64 seconds, of each target (only with `query_time`).
      weight: [B, L] float32, of each target, 0 behind (only if the data have weights).
    """

    def generate() -> Iterator[Batch]:
        rng = np.random.default_rng([seed, epoch])
        sequences = train.shuffled(rng)
        windows = cut_windows(sequences, config.window, rng)
        for rows in _group_by_length(windows, config.batch_size * POSITIONS_PER_WINDOW, rng):
            part = windows.take(rows)
            batch = _gather(sequences, part, with_time=config.query_time)
            targets = batch["tokens"][:, 1:]
            batch["negatives"] = _negatives(targets[targets != PAD], config, corpus.items, rng)
            yield batch

    signature = _signature(with_time=config.query_time, with_weight=train.weights is not None)
    return tf.data.Dataset.from_generator(generate, output_signature=signature).prefetch(4)


def _signature(*, with_time: bool, with_weight: bool) -> dict[str, tf.TensorSpec]:
    """The tensors of a batch, by name."""
    signature = {
        "user": tf.TensorSpec([None], tf.int32),
        "tokens": tf.TensorSpec([None, None], tf.int32),
        "negatives": tf.TensorSpec([None], tf.int32),
    }
    if with_time:
        signature["time"] = tf.TensorSpec([None, None], tf.int64)
    if with_weight:
        signature["weight"] = tf.TensorSpec([None, None], tf.float32)
    return signature


@dataclass(frozen=True)
class Windows:
    """Training examples: window j predicts the interactions at places begin[j] to end[j] - 1, which are user[j]'s."""

    user: np.ndarray  # [J] int32 user rows
    begin: np.ndarray  # [J] int64
    end: np.ndarray  # [J] int64

    def take(self, rows: np.ndarray) -> "Windows":
        return Windows(user=self.user[rows], begin=self.begin[rows], end=self.end[rows])


def cut_windows(sequences: Sequences, width: int, rng: np.random.Generator) -> Windows:
    """Cuts every user's sequence into windows of at most `width` targets; every interaction is a target once.

    A long sequence is cut at a random phase: its first window has 1 to `width` targets, the next ones `width`. So the
    cuts, behind which less history is visible, fall elsewhere in every epoch. A sequence that fits one window is
    never cut.
    """
    lengths = sequences.lengths
    drawn = rng.integers(1, width + 1, len(lengths))
    phase = np.where(lengths > width, drawn, width)
    behind_first = np.ceil(np.maximum(lengths - phase, 0) / width)
    counts = np.where(lengths > 0, 1 + behind_first, 0).astype(np.int64)
    user = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(user)) - np.repeat(
        np.cumsum(counts) - counts, counts
    )  # 0, 1, .. per user
    begin = np.where(number == 0, 0, phase[user] + (number - 1) * width)
    end = np.minimum(phase[user] + number * width, lengths[user])
    start = sequences.offsets[user]
    return Windows(user=user.astype(np.int32), begin=start + begin, end=start + end)


def _group_by_length(
    windows: Windows, targets_per_batch: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """The rows of each batch: windows of similar length with about `targets_per_batch` targets, in random order."""
    length = windows.end - windows.begin
    order = rng.permutation(len(length))
    pools = max(1, length.sum() // (targets_per_batch * SORTED_BATCHES))
    batches: list[np.ndarray] = []
    for pool in np.array_split(order, pools):
        by_length = pool[np.argsort(length[pool], kind="stable")]
        batch_number = np.cumsum(length[by_length]) // targets_per_batch
        cuts = np.flatnonzero(np.diff(batch_number)) + 1
        batches += np.split(by_length, cuts)
    return [batches[j] for j in rng.permutation(len(batches))]


def _gather(sequences: Sequences, windows: Windows, *, with_time: bool) -> Batch:
    """The tokens (and times, and weights) of a batch's windows: see `window_batches`."""
    begin = windows.begin[:, None]
    columns = np.arange((windows.end - windows.begin).max() + 1)
    places = begin + columns - 1  # one before the first target, up to the last one
    is_token = places < windows.end[:, None]
    safe_places = np.where(is_token, np.maximum(places, 0), 0)
    tokens = np.where(is_token, sequences.items[safe_places], PAD)
    starts_sequence = windows.begin == sequences.offsets[windows.user]
    tokens[starts_sequence, 0] = START
    batch = {"user": windows.user, "tokens": tokens}
    if with_time and sequences.times is not None:
        batch["time"] = np.where(is_token, sequences.times[safe_places], 0)[:, 1:]
    if sequences.weights is not None:
        batch["weight"] = np.where(is_token, sequences.weights[safe_places], 0)[:, 1:]
    return batch


def _negatives(
    targets: np.ndarray, config: ResolvedRetrieval, items: Vocabulary, rng: np.random.Generator
) -> np.ndarray:
    """A batch's shared pool: random targets of the batch, which are as popular as items are, then uniform items.

    A catalogue no larger than the uniform share is taken whole instead: the softmax is then the full one.
    """
    end = FIRST_ITEM + items.trained
    if config.uniform_negatives >= items.trained:
        return np.arange(FIRST_ITEM, end, dtype=np.int32)
    popular = targets[:0]
    if config.in_batch_negatives:
        popular = rng.choice(targets, config.in_batch_negatives)
    uniform = rng.integers(FIRST_ITEM, end, config.uniform_negatives, dtype=np.int32)
    return np.concatenate([popular.astype(np.int32), uniform])


def sampling_probability(corpus: Corpus, config: ResolvedRetrieval, train: Sequences) -> np.ndarray:
    """[item rows] float32: the probability that a slot of the shared pool holds this item, under `_negatives`.

    The pool is a sample of a mixture (Yang et al. 2020, "Mixed Negative Sampling"): an item's probability counts both
    ways of being drawn, whichever happened.
    """
    trained = corpus.items.trained
    uniform = np.zeros(corpus.items.rows)
    uniform[FIRST_ITEM : FIRST_ITEM + trained] = 1 / trained
    counts = np.bincount(train.items, minlength=corpus.items.rows)
    if config.uniform_negatives >= trained:
        in_batch_share = 0.0
    else:
        in_batch = config.in_batch_negatives
        in_batch_share = in_batch / (in_batch + config.uniform_negatives)
    probability = in_batch_share * counts / counts.sum() + (1 - in_batch_share) * uniform
    return np.maximum(probability, np.finfo(np.float32).tiny).astype(np.float32)
