"""What was shown, joined with the events that followed: how often each item is chosen, and which variant is better.

- An event belongs to the answer that its `request_id` names, and to the place at which that answer has its item. Events
  without a `request_id` count for nobody.
- Rates are shares of shown items that were chosen, with 95 % intervals of Wilson (1927), which take each shown item as
  an observation of its own.
- A comparison takes each user as an observation, because the choices of one user are alike: with intervals over shown
  items, far more than 5 % of comparisons of equal variants would claim a difference. Its interval is that of the
  difference of two ratios, by the delta method. Answers without a user are left out.
"""

import argparse
import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import duckdb
import numpy as np
import pyarrow as pa

from rec.errors import UserError, note
from rec.ops.loop.events import Event, EventStore
from rec.ops.loop.stores import open_store

Z = 1.959964  # 95 %
DIMENSIONS = {
    "variant": "coalesce(variant, '')",
    "position": "position",
    "segment": "case when cold_start then 'cold start' else 'known' end",
}
JOIN = """
    create table shown as
    with answers as (
        select request_id, user_id, variant, cold_start, items,
            unnest(items) as item_id, generate_subscripts(items, 1) as position
        from read_parquet($files) where time >= $begin and time < $end),
    chosen as (select distinct request_id, item_id from events)
    select answers.* exclude (items), chosen.request_id is not null as is_chosen
    from answers left join chosen using (request_id, item_id)"""
BY_USER = """
    select count(*), count(*) filter (is_chosen) from shown
    where variant = $variant and user_id is not null group by user_id order by user_id"""
EVENT_ROWS = 50_000  # that are read at once


@dataclass(frozen=True)
class Rate:
    """How many of the shown items were chosen."""

    name: str
    shown: int
    chosen: int
    rate: float
    low: float
    high: float


def wilson(chosen: int, shown: int) -> tuple[float, float]:
    """The 95 % interval of a share."""
    if shown == 0:
        return 0.0, 1.0
    share = chosen / shown
    weight = Z * Z / shown
    centre = share + weight / 2
    spread = Z * math.sqrt(share * (1 - share) / shown + weight / (4 * shown))
    low = (centre - spread) / (1 + weight)
    high = (centre + spread) / (1 + weight)
    return max(low, 0.0), min(high, 1.0)


class Counts(NamedTuple):
    """Of each user of a variant: [U] items that were shown, and of them chosen."""

    shown: np.ndarray
    chosen: np.ndarray


@dataclass(frozen=True)
class Comparison:
    """Of a second variant with a first."""

    users: tuple[int, int]
    rates: tuple[float, float]
    difference: float  # second - first
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """first, second or neither: which one is better, if the interval of 95 % says so."""
        if self.low > 0:
            return "second"
        return "first" if self.high < 0 else "neither"


def compare(first: Counts, second: Counts) -> Comparison:
    """The difference of the rates of two variants, each with two users or more."""
    rates = []
    variance = 0.0
    for counts in (first, second):
        rate = counts.chosen.sum() / counts.shown.sum()
        residuals = counts.chosen - rate * counts.shown
        n = len(residuals)
        variance += n / (n - 1) * (residuals**2).sum() / counts.shown.sum() ** 2
        rates.append(float(rate))
    difference = rates[1] - rates[0]
    spread = Z * math.sqrt(variance)
    return Comparison(
        users=(len(first.shown), len(second.shown)),
        rates=(rates[0], rates[1]),
        difference=difference,
        low=difference - spread,
        high=difference + spread,
    )


class Feedback:
    """The joined table `shown`: request_id, user_id, variant, cold_start, item_id, position, is_chosen."""

    def __init__(
        self, shown: Path, store: EventStore, begin: float, end: float, kinds: Sequence[str] = ()
    ) -> None:
        """
        Args:
          begin, end: of the answers, in seconds since 1970. Events count from `begin` on, whenever they came.
          kinds: of the events that choose an item; none: all.

        Raises:
          UserError: nothing was shown.
        """
        files = [str(path) for path in sorted(shown.glob("*/*.parquet"))]
        if not files:
            raise UserError(f"{shown} holds nothing that was shown: start rec.serve with --shown")
        self._database = duckdb.connect()
        self._database.execute("create table events (request_id text, item_id text)")
        self.unattributed = 0  # events without a request
        for table in self._tables(store.read(begin, math.inf), {*kinds}):
            self._database.register("more", table)
            self._database.execute("insert into events select * from more")
        arguments = {"files": files, "begin": begin, "end": end}
        self._database.execute(JOIN, arguments)

    def _tables(self, events: Iterator[Event], kinds: set[str]) -> Iterator[pa.Table]:
        while part := list(islice(events, EVENT_ROWS)):
            wanted = [each for each in part if not kinds or each.event in kinds]
            named = [each for each in wanted if each.request_id is not None]
            self.unattributed += len(wanted) - len(named)
            yield pa.table(
                {
                    "request_id": pa.array([each.request_id for each in named], pa.string()),
                    "item_id": pa.array([each.item_id for each in named], pa.string()),
                }
            )

    def rates(self, dimension: str) -> list[Rate]:
        """By variant, position or segment."""
        rows = self._database.execute(
            f"select cast({DIMENSIONS[dimension]} as text), count(*), count(*) filter (is_chosen) "
            f"from shown group by {DIMENSIONS[dimension]} order by {DIMENSIONS[dimension]}"
        )
        return [make_rate(*row) for row in rows.fetchall()]

    def total(self) -> Rate:
        counts = "select count(*), count(*) filter (is_chosen) from shown"
        (row,) = self._database.execute(counts).fetchall()
        return make_rate("all", *row)

    def counts(self, variant: str) -> Counts:
        """Of the variant's users. Raises UserError if there are fewer than two."""
        rows = self._database.execute(BY_USER, {"variant": variant}).fetchall()
        if len(rows) < 2:
            raise UserError(f"--compare: fewer than two users were shown anything by {variant!r}")
        shown, chosen = np.array(rows).T
        return Counts(shown, chosen)


def make_rate(name: str, shown: int, chosen: int) -> Rate:
    low, high = wilson(chosen, shown)
    return Rate(name, shown, chosen, chosen / max(shown, 1), low, high)


def table_of(rates: Iterable[Rate]) -> str:
    """Lines for a person."""
    lines = [f"{'':14}{'shown':>12}{'chosen':>10}{'rate':>9}   95 %"]
    for each in rates:
        interval = f"{each.low:.4f} - {each.high:.4f}"
        lines.append(
            f"{each.name:14}{each.shown:>12,}{each.chosen:>10,}{each.rate:>9.4f}   {interval}"
        )
    return "\n".join(lines)


def report(args: argparse.Namespace) -> None:
    """Prints what `python -m rec.feedback` prints."""
    now = time.time()
    begin = now - args.days * 86_400
    feedback = Feedback(args.shown, open_store(args.events), begin, now, args.kinds)
    found: dict[str, object] = {"all": asdict(feedback.total())}
    for dimension in DIMENSIONS:
        rates = feedback.rates(dimension)
        note(f"by {dimension}\n{table_of(rates)}\n")
        found[dimension] = [asdict(rate) for rate in rates]
    found["unattributed"] = feedback.unattributed
    if args.compare:
        found["comparison"] = _report_comparison(feedback, *args.compare)
    print(json.dumps(found))


def _report_comparison(feedback: Feedback, first: str, second: str) -> dict[str, object]:
    found = compare(feedback.counts(first), feedback.counts(second))
    better = {"first": first, "second": second, "neither": "neither"}[found.verdict]
    interval = f"{found.low:+.4f} to {found.high:+.4f}"
    note(f"{second} less {first}: {found.difference:+.4f}, 95 %: {interval}")
    note(f"better: {better}")
    return {**asdict(found), "better": better}
