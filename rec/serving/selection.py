"""Chooses the items of an answer from candidates: the best ones, or with variety among them.

- `max_per` {column: n}: at most n items per value of a column. Each value of a list counts. An item without a value is
  not limited.
- `diversity` d, maximal marginal relevance (Carbonell and Goldstein, SIGIR 1998): each next item is the one with the
  highest (1 - d) * relevance - d * similarity. Relevance is the score, scaled to 0..1 over the candidates (0 without a
  score), similarity the highest cosine with an item that is already chosen. 0 keeps the order of the candidates.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from rec import LOWEST

Value = tuple[str, object]  # a column, and what an item has there
UNLIKE = -1.0  # the lowest cosine


class Place(NamedTuple):
    """An item of an answer; without its scores where it fills up."""

    row: int
    score: float | None = None
    rank: int | None = None
    retrieved: float | None = None


class Variety(NamedTuple):
    """What is asked of an answer beside its items being good."""

    max_per: Mapping[str, int]
    diversity: float

    @property
    def is_wanted(self) -> bool:
        return bool(self.max_per or self.diversity)


@dataclass
class Selection:
    """The items of one answer, chosen one after the other.

    Attributes:
      values: the values of a row of the catalogue in a column.
      vectors: [items, d] of length 1.
    """

    k: int
    variety: Variety
    values: Callable[[int, str], Iterable[object]]
    vectors: np.ndarray
    chosen: list[Place] = field(default_factory=list)
    _counts: Counter[Value] = field(default_factory=Counter)

    @property
    def is_complete(self) -> bool:
        return len(self.chosen) == self.k

    @property
    def full(self) -> set[Value]:
        """The values that no further item may have."""
        max_per = self.variety.max_per
        return {value for value, n in self._counts.items() if n >= max_per[value[0]]}

    def add(self, candidates: Sequence[Place]) -> None:
        """Chooses from candidates, the best first, as many as are missing and as fit."""
        if self.variety.diversity:
            self._add_unlike(candidates)
        elif self.variety.max_per:
            self.add_in_order(candidates)
        else:
            self.chosen += candidates[: self.k - len(self.chosen)]

    def add_in_order(self, candidates: Iterable[Place]) -> None:
        """As `add`, without `diversity`."""
        for place in candidates:
            if self.is_complete:
                return
            self._take(place)

    def _add_unlike(self, candidates: Sequence[Place]) -> None:
        diversity = self.variety.diversity
        relevance = (1 - diversity) * _scale([place.score for place in candidates])
        vectors = self.vectors[[place.row for place in candidates]]
        similarity = np.full(len(candidates), UNLIKE)
        is_left = np.ones(len(candidates), bool)
        while is_left.any() and not self.is_complete:
            values = np.where(is_left, relevance - diversity * similarity, -np.inf)
            best = int(values.argmax())
            is_left[best] = False
            if self._take(candidates[best]):
                similarity = np.maximum(similarity, vectors @ vectors[best])

    def _take(self, place: Place) -> bool:
        """Chooses an item if it fits; whether it does."""
        values = {
            (column, value)
            for column in self.variety.max_per
            for value in self.values(place.row, column)
        }
        if any(self._counts[value] >= self.variety.max_per[value[0]] for value in values):
            return False
        self._counts.update(values)
        self.chosen.append(place)
        return True


def _scale(scores: Sequence[float | None]) -> np.ndarray:
    """[N] the scores from 0, the lowest, to 1; 0 where there is none."""
    known = np.array([LOWEST if score is None else score for score in scores])
    is_known = known > LOWEST
    if not is_known.any():
        return np.zeros(len(known))
    least = known[is_known].min()
    spread = known.max() - least
    return np.where(is_known, (known - least) / (spread or 1), 0)
