"""Recommendations in Python, from the published bundles: what the server answers, without a server.

    from rec import Recommender

    recommender = Recommender.load("savedmodels")
    for item in recommender.recommend("u7", k=5).items:
        print(item.item_id, item.score, item.model_extra)

`python -m rec.recommend` is the same on the terminal, and writes files for many users.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from rec.bundles import files
from rec.bundles.recommender import Recommender as Pair
from rec.config import first_problem
from rec.errors import UserError
from rec.serving.answer import Catalogue, Engine
from rec.serving.schemas import Recommendations, RecommendRequest, Similar


@dataclass(frozen=True, eq=False)
class Recommender:
    """A loaded pair of bundles. Its answers are those of the HTTP API. Use it from one thread at a time."""

    engine: Engine

    @classmethod
    def load(cls, savedmodels: str | Path = "savedmodels", alias: str = "latest") -> "Recommender":
        """Loads the retrieval bundle, and the ranking bundle if there is one, that an alias names.

        Raises:
          UserError: there are no such bundles, or they are damaged.
        """
        return cls.of(files.find_pair(Path(savedmodels), alias))

    @classmethod
    def of(cls, bundles: files.Pair) -> "Recommender":
        """Loads these bundles. Raises UserError as `load`."""
        pair = Pair.load(*bundles)
        return cls(Engine(pair, Catalogue(pair.items)))

    def recommend(
        self,
        user_id: str | None = None,
        *,
        history: Sequence[str] | None = None,
        k: int = 10,
        exclude: Sequence[str] = (),
        filter: Mapping[str, Sequence[object]] | None = None,
        max_per: Mapping[str, int] | None = None,
        diversity: float | None = None,
    ) -> Recommendations:
        """The k best items for a user, the best first: `.items`, each with `.item_id` and `.score`.

        Args:
          user_id: None or an unknown id: an anonymous user.
          history: item ids, oldest first, instead of the stored history.
          exclude: item ids that must not be in the answer.
          filter: {column: values}: only items that have one of the values in each column.
          max_per: {column: n}: at most n items per value of the column. None: the bundle's index.max_per.
          diversity: from 0, the best items, to 1, items unlike each other. None: the bundle's index.diversity.

        Raises:
          UserError: k is more than the bundle retrieves, or an option does not fit the columns.
        """
        request = make_request(
            {
                "user_id": user_id,
                "history": None if history is None else list(history),
                "k": k,
                "exclude": list(exclude),
                "filter": {name: list(values) for name, values in (filter or {}).items()},
                "max_per": None if max_per is None else dict(max_per),
                "diversity": diversity,
            }
        )
        return self.answer(request)

    def answer(self, request: RecommendRequest) -> Recommendations:
        """The answer to a request with any of the options of POST /v1/recommend. Raises UserError as `recommend`."""
        self.engine.check_request(request)
        (answer,) = self.engine.recommend([request])
        return Recommendations.model_validate(answer)

    def similar(self, item_id: str, k: int = 10) -> Similar:
        """The k items nearest to an item; none if it is unknown. Raises UserError as `recommend`."""
        self.engine.check(k)
        (answer,) = self.engine.similar([(item_id, k)])
        return Similar.model_validate(answer)


def make_request(fields: Mapping[str, object]) -> RecommendRequest:
    """Checks the options of a request. Raises UserError, which names the first one that does not fit."""
    try:
        return RecommendRequest.model_validate(fields)
    except ValidationError as error:
        raise UserError(first_problem(error)) from None
