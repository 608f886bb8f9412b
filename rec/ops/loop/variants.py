"""Variants: several pairs of bundles behind one address, each for a share of the users.

    --variant stable=production:90 --variant canary=canary:10

A user's variant is a hash of the user's id and a salt. So all processes and servers agree, and a user keeps the variant
while the shares stay. Another salt splits the users anew. Requests without a user get the first variant.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

from rec.errors import UserError
from rec.serving.answer import Engine, Json
from rec.serving.schemas import RecommendRequest

PATTERN = re.compile(r"(?P<name>[\w.-]+)=(?P<alias>[^:]+):(?P<share>\d+(\.\d+)?)")


class Variant(NamedTuple):
    name: str
    alias: str  # of the config's bundles
    share: float  # above 0, as a part of the sum of all shares


def parse_variants(texts: Sequence[str]) -> list[Variant]:
    """The variants of NAME=ALIAS:SHARE. Raises UserError for anything else."""
    variants: list[Variant] = []
    for text in texts:
        match = PATTERN.fullmatch(text)
        if match is None or float(match["share"]) == 0:
            raise UserError(f"--variant {text}: write NAME=ALIAS:SHARE, such as canary=canary:10")
        if match["name"] in [each.name for each in variants]:
            raise UserError(f"--variant {text}: there is a variant {match['name']} already")
        variants.append(Variant(match["name"], match["alias"], float(match["share"])))
    return variants


def choose(variants: Sequence[Variant], user: str | None, salt: str) -> int:
    """The place of the user's variant."""
    if not user:
        return 0
    digest = hashlib.blake2b(f"{salt}/{user}".encode(), digest_size=8).digest()
    ends = list(accumulate(each.share for each in variants))
    point = int.from_bytes(digest) / 2**64 * ends[-1]
    return next((at for at, end in enumerate(ends) if point < end), len(ends) - 1)


@dataclass(frozen=True, eq=False)
class SplitEngine(Engine):
    """The engines of several variants as one. What no user asks for is answered by the first."""

    engines: tuple[Engine, ...] = ()
    variants: tuple[Variant, ...] = ()
    salt: str = ""

    @classmethod
    def of(cls, engines: Sequence[Engine], variants: Sequence[Variant], salt: str) -> "SplitEngine":
        first = engines[0]
        return cls(
            first.backend,
            first.catalogue,
            first.observer,
            first.live,
            engines=tuple(engines),
            variants=tuple(variants),
            salt=salt,
        )

    @cached_property
    def versions(self) -> dict[str, int]:
        """Of each stage of the first variant, and of VARIANT/STAGE of the others."""
        versions = dict(self.engines[0].versions)
        for variant, engine in zip(self.variants[1:], self.engines[1:], strict=True):
            for stage, version in engine.versions.items():
                versions[f"{variant.name}/{stage}"] = version
        return versions

    @property
    def max_k(self) -> int:
        return min(engine.max_k for engine in self.engines)

    def check(self, k: int) -> None:
        for engine in self.engines:
            engine.check(k)

    def check_request(self, request: RecommendRequest) -> None:
        for engine in self.engines:
            engine.check_request(request)

    def recommend(
        self, requests: Sequence[RecommendRequest], between: Callable[[], None] | None = None
    ) -> list[Json]:
        chosen = [choose(self.variants, request.user_id, self.salt) for request in requests]
        answers: list[Json] = [{} for _ in requests]
        for number, engine in enumerate(self.engines):
            places = [at for at, each in enumerate(chosen) if each == number]
            if not places:
                continue
            given = engine.recommend([requests[at] for at in places], between)
            for at, answer in zip(places, given, strict=True):
                answers[at] = {**answer, "variant": self.variants[number].name}
        return answers
