"""What was shown, joined with events; and comparisons that are right as often as they say."""

import json
import time
from pathlib import Path

import numpy as np
import pytest

from rec.errors import UserError
from rec.ops.loop.events import Event
from rec.ops.loop.feedback import Counts, Feedback, compare, wilson
from rec.ops.loop.shown import Shown, ShownLog
from rec.ops.loop.stores import open_store
from tests.conftest import run

NOW = time.time()


def shown(name: str, items: list[str], variant: str | None = None, **more: object) -> Shown:
    fields = {"time": NOW - 60, "user_id": f"user of {name}", "cold_start": False, **more}
    return Shown(
        request_id=name,
        items=items,
        variant=variant,
        model={"retrieval": 1},
        scores=[None] * len(items),
        **fields,  # type: ignore[arg-type]
    )


def choice(request: str | None, item: str, kind: str = "click") -> Event:
    return Event(f"{request} {item} {kind}", "u", item, kind, NOW, None, request)


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """Four answers, of which the first two items of the first and the second of the second were chosen."""
    log = ShownLog(tmp_path / "shown", days=1)
    log.add(shown("r1", ["a", "b", "c"], "stable"))
    log.add(shown("r2", ["a", "b"], "canary", cold_start=True))
    log.add(shown("r3", ["a"], "stable"))
    log.add(shown("r4", ["c"], "canary"))
    log.add(shown("old", ["a"], "stable", time=NOW - 20 * 3600))
    log.close()
    events = [
        choice("r1", "a"),
        choice("r1", "a", "purchase"),  # once is enough
        choice("r1", "b"),
        choice("r2", "b"),
        choice("r3", "z"),  # it was not shown
        choice("r9", "a"),  # nor was this answer
        choice(None, "a"),
    ]
    open_store(str(tmp_path / "events.sqlite")).add([events])
    return tmp_path


def feedback(kept: Path, hours: float, *kinds: str) -> Feedback:
    store = open_store(str(kept / "events.sqlite"))
    return Feedback(kept / "shown", store, NOW - hours * 3600, NOW + 1, kinds)


def counts(joined: Feedback, dimension: str) -> dict[str, tuple[int, int]]:
    return {each.name: (each.shown, each.chosen) for each in joined.rates(dimension)}


def test_choices_are_counted_where_they_were_shown(kept: Path) -> None:
    joined = feedback(kept, 1)
    assert (joined.total().shown, joined.total().chosen, joined.unattributed) == (7, 3, 1)
    assert counts(joined, "variant") == {"canary": (3, 1), "stable": (4, 2)}
    assert counts(joined, "position") == {"1": (4, 1), "2": (2, 2), "3": (1, 0)}
    assert counts(joined, "segment") == {"cold start": (2, 1), "known": (5, 2)}


def test_answers_of_the_time_and_events_of_the_kinds_count(kept: Path) -> None:
    assert feedback(kept, 24).total().shown == 8
    assert feedback(kept, 1, "purchase").total().chosen == 1


def test_the_command_reports_and_compares(kept: Path) -> None:
    options = ["--shown", kept / "shown", "--events", kept / "events.sqlite"]
    done = run("rec.feedback", *options, "--days", 0.5, "--compare", "stable", "canary")
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["comparison"]["better"] == "neither"
    assert report["comparison"]["rates"] == pytest.approx([2 / 4, 1 / 3])
    assert [row["name"] for row in report["variant"]] == ["canary", "stable"]
    refused = run("rec.feedback", *options, "--compare", "stable", "other")
    assert refused.stderr.splitlines()[-1] == (
        "error: --compare: fewer than two users were shown anything by 'other'"
    )


def test_nothing_shown_is_said(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "events.sqlite"))
    with pytest.raises(UserError, match="holds nothing that was shown: start rec.serve with --sh"):
        Feedback(tmp_path, store, 0, NOW)


@pytest.mark.parametrize(
    ("chosen", "total", "low", "high"),  # Agresti and Coull (1998) and Newcombe (1998) have these
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662), (0, 0, 0.0, 1.0)],
)
def test_intervals_of_wilson(chosen: int, total: int, low: float, high: float) -> None:
    assert wilson(chosen, total) == pytest.approx((low, high), abs=1e-4)


# ------------------------------------------------------------------------------------------------------------
# Simulated users: each has a rate of their own, and sees another number of items


def simulate(generator: np.random.Generator, users: int, factor: float) -> Counts:
    rates = generator.beta(2, 18, users) * factor
    seen = 10 * generator.geometric(0.2, users)
    return Counts(seen, generator.binomial(seen, rates))


def test_equal_variants_raise_false_alarms_as_rarely_as_promised() -> None:
    generator = np.random.default_rng(1)
    alarms = 0
    naive = 0
    for _ in range(200):
        first, second = (simulate(generator, 1000, 1.0) for _ in range(2))
        alarms += compare(first, second).verdict != "neither"
        ends = [wilson(int(each.chosen.sum()), int(each.shown.sum())) for each in (first, second)]
        naive += ends[0][1] < ends[1][0] or ends[1][1] < ends[0][0]
    assert 3 <= alarms <= 16  # 95 % of experiments with 200 comparisons at 5 %
    assert naive > 16  # intervals over items, even if they must not overlap, claim too much


def test_a_difference_of_a_tenth_is_found() -> None:
    generator = np.random.default_rng(2)
    pairs = [
        (simulate(generator, 20_000, 1.0), simulate(generator, 20_000, 1.1)) for _ in range(20)
    ]
    found = [compare(first, second) for first, second in pairs]
    assert [each.verdict for each in found] == ["second"] * 20
    assert sum(each.low < 0.01 < each.high for each in found) >= 17


def test_a_comparison_by_hand() -> None:
    found = compare(
        Counts(np.array([10, 10]), np.array([1, 3])), Counts(np.array([20, 20]), np.array([8, 8]))
    )
    assert found.rates == (0.2, 0.4)
    # The first: residuals -1 and 1, so variance 2 / 1 * 2 / 20^2. The second has none.
    assert (found.low, found.high) == pytest.approx((0.2 - 0.196, 0.2 + 0.196), abs=1e-4)
    assert found.verdict == "second"
