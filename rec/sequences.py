"""Users' interactions in order of time, as flat arrays: `Sequences`.

They lie in files without a name that are mapped into memory: training streams from the disk what does not fit.
"""

import os
import tempfile
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import DTypeLike

from rec.errors import UserError
from rec.features import PAD

BLOCK = 2**22  # interactions that are shuffled at a time, to bound the memory that it takes


@dataclass(frozen=True)
class Sequences:
    """The interactions of each user in order of time, one user after the other.

    User row u owns the places from offsets[u] up to offsets[u + 1]. With offsets [0, 0, 2, 5], user 0 has no
    interaction, user 1 has items[0:2] and user 2 has items[2:5].
    """

    offsets: np.ndarray  # [user rows + 1] int64
    items: np.ndarray  # [n] int32 item rows
    times: np.ndarray | None  # [n] int64 seconds since 1970
    ratings: np.ndarray | None  # [n] float32
    weights: np.ndarray | None = None  # [n] float32; None: all are 1

    @property
    def lengths(self) -> np.ndarray:
        """[user rows] int64: the number of interactions of each user."""
        return np.diff(self.offsets)

    @property
    def users(self) -> np.ndarray:
        """[n] int32: the user row of each interaction."""
        return np.repeat(np.arange(len(self.lengths), dtype=np.int32), self.lengths)

    def last(self, users: np.ndarray, width: int | None = None) -> np.ndarray:
        """The last `width` items of each of these users, or all: [U, width] int32, left-aligned, PAD behind."""
        lengths = self.lengths[users]
        begin = np.zeros_like(lengths) if width is None else lengths - width
        return self.between(users, begin, lengths, width)

    def between(
        self, users: np.ndarray, begin: np.ndarray, end: np.ndarray, width: int | None = None
    ) -> np.ndarray:
        """Items number begin to end - 1 of each user, as far as there are any.

        Returns [U, width] int32, left-aligned, PAD behind; without a width as wide as the longest.
        """
        places, is_item = self._places(users, begin, end, width)
        if not len(self.items):
            return np.full(is_item.shape, PAD, np.int32)
        return np.where(is_item, self.items[places], PAD).astype(np.int32)

    def weights_between(self, users: np.ndarray, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
        """The weights of what `between` returns: [U, width] float32, 0 for PAD."""
        places, is_item = self._places(users, begin, end, None)
        if self.weights is None:
            return is_item.astype(np.float32)
        return np.where(is_item, self.weights[places], 0)

    def _places(
        self, users: np.ndarray, begin: np.ndarray, end: np.ndarray, width: int | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Where interactions number begin to end - 1 of each user lie, and whether there is one: [U, width] both."""
        begin = np.maximum(begin, 0)
        length = np.minimum(end, self.lengths[users]) - begin
        if width is None:
            width = max(0, int(length.max(initial=0)))
        columns = np.arange(width)
        is_item = columns < length[:, None]
        places = (self.offsets[users] + begin)[:, None] + columns
        return np.where(is_item, places, 0), is_item

    def times_at(self, users: np.ndarray, place: np.ndarray | int = 0) -> np.ndarray:
        """[U] int64 seconds of each user's interaction number `place`; 0 if the data have no times."""
        if self.times is None:
            return np.zeros(len(users), np.int64)
        return self.times[self.offsets[users] + place]

    def matrix(self, users: np.ndarray, item_rows: int) -> sp.csr_matrix:
        """Float32 [len(users), item_rows]: the weight of each interaction of each of these users."""
        lengths = self.lengths[users]
        row_starts = np.concatenate([[0], np.cumsum(lengths)])
        shift = self.offsets[users] - row_starts[:-1]
        places = np.arange(row_starts[-1]) + np.repeat(shift, lengths)
        weights = np.ones(len(places), np.float32) if self.weights is None else self.weights[places]
        shape = (len(users), item_rows)
        return sp.csr_matrix((weights, self.items[places], row_starts), shape=shape)

    def select(self, keep: np.ndarray) -> "Sequences":
        """The interactions for which `keep` [n] is true, still by user and in order."""
        kept_before = np.concatenate([[0], np.cumsum(keep)])
        return Sequences(
            offsets=kept_before[self.offsets],
            items=self.items[keep],
            times=None if self.times is None else self.times[keep],
            ratings=None if self.ratings is None else self.ratings[keep],
            weights=None if self.weights is None else self.weights[keep],
        )

    def weighed(self, unit: float) -> "Sequences":
        """The weights divided by `unit`."""
        return self if self.weights is None else replace(self, weights=self.weights / unit)

    def among(self, other: "Sequences") -> np.ndarray:
        """[n] bool: whether the user has an interaction with the item in `other`, too."""
        own = self.users.astype(np.int64) << 32 | self.items
        others = other.users.astype(np.int64) << 32 | other.items
        return np.isin(own, others)

    def without_repeats(self) -> "Sequences":
        """The first interaction of each user with each item."""
        pairs = pd.DataFrame({"user": self.users, "item": self.items})
        return self.select(~pairs.duplicated().to_numpy())

    def shuffled(self, rng: np.random.Generator) -> "Sequences":
        """Each user's interactions of the same second in a new random order; without times, all of the user's."""
        items = on_disk(len(self.items), np.int32)
        ratings = None if self.ratings is None else on_disk(len(items), np.float32)
        weights = None if self.weights is None else on_disk(len(items), np.float32)
        for first_user, end_user in self._blocks_of_users():
            part = slice(self.offsets[first_user], self.offsets[end_user])
            order = self._new_order(first_user, end_user, rng)
            items[part] = self.items[order]
            if ratings is not None and self.ratings is not None:
                ratings[part] = self.ratings[order]
            if weights is not None and self.weights is not None:
                weights[part] = self.weights[order]
        return Sequences(self.offsets, items, self.times, ratings, weights)

    def _new_order(self, first_user: int, end_user: int, rng: np.random.Generator) -> np.ndarray:
        """The places of these users' interactions, as `shuffled` puts them."""
        part = slice(self.offsets[first_user], self.offsets[end_user])
        owner = np.repeat(np.arange(end_user - first_user), self.lengths[first_user:end_user])
        starts_group = np.diff(owner, prepend=0) != 0
        if self.times is not None:
            starts_group |= np.diff(self.times[part], prepend=0) != 0
        # Within a group in random order, the groups as they are. A third of the time of np.lexsort.
        key = np.cumsum(starts_group) + rng.random(len(owner))
        return part.start + np.argsort(key)

    def _blocks_of_users(self) -> list[tuple[int, int]]:
        """Ranges of users with about BLOCK interactions each."""
        cuts = np.searchsorted(self.offsets, np.arange(0, len(self.items), BLOCK))
        return list(pairwise(np.unique([*cuts, len(self.lengths)])))


def nothing(users: int) -> Sequences:
    """No interactions of so many user rows."""
    return Sequences(np.zeros(users + 1, np.int64), np.zeros(0, np.int32), None, None)


def concatenate(first: Sequences, second: Sequences) -> Sequences:
    """Each user's interactions of `first`, then those of `second`."""
    users = np.concatenate([first.users, second.users])
    order = np.argsort(users, kind="stable")

    def join(a: np.ndarray | None, b: np.ndarray | None) -> np.ndarray | None:
        return None if a is None or b is None else np.concatenate([a, b])[order]

    return Sequences(
        offsets=first.offsets + second.offsets,
        items=np.concatenate([first.items, second.items])[order],
        times=join(first.times, second.times),
        ratings=join(first.ratings, second.ratings),
        weights=join(first.weights, second.weights),
    )


def on_disk(n: int, dtype: DTypeLike) -> np.ndarray:
    """[n] zeros in a file without a name, in TMPDIR. Their memory is the page cache's, which the system may take back.

    Raises UserError if the disk has no room for them.
    """
    size = max(n, 1) * np.dtype(dtype).itemsize
    with tempfile.TemporaryFile() as file:
        try:
            # Reserves the room: on a full disk, a later write into the map would kill the process.
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise UserError(
                f"{tempfile.gettempdir()}: {error.strerror}: set TMPDIR to a larger place"
            ) from None
        return np.asarray(np.memmap(file, dtype, "r+", shape=max(n, 1)))[:n]
