"""Table `interactions` -> the same filtered, and split into train, val and test.

- `temporal`: two global cut times, 80/10/10 by interaction count. A cut falls between distinct times.
- `leave_one_out`: a user's last interaction is test, the last but one val; users with fewer than three stay in
  train. Without timestamps there is no last: two of the user's interactions are drawn, from the seed.
- `given`: the source's own files. Without one for val, it is a tenth of train, taken as test was: the latest where
  most of test is later than that, otherwise drawn from the seed, such that every user keeps an interaction in train.

With events, val and test may ask for some of them only, such as purchases. `leave_one_out` then takes a user's last two
of these, and puts what lies between them in val and what follows in test, as history that nobody asks for.

All of it is SQL, which DuckDB and Spark run unchanged (engine.py). Every order ends in `source_row`, so ties in time
keep the source's order and threads change nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from rec.data_prep.checks import iso
from rec.data_prep.engine import Engine
from rec.errors import UserError, note, warn

SPLITS = ("train", "val", "test")
STRATEGIES = {  # each with what to do where it leaves a part empty
    "temporal": "there are too few interactions, or too many at one time: use --split leave_one_out",
    "leave_one_out": "no user has three interactions: use --split temporal, or your own files",
    "given": "all its interactions are in an earlier split as well, or were dropped",
}
EARLIEST = {  # columns by which the earliest of several interactions is the first
    "split": "case split when 'train' then 1 when 'val' then 2 else 3 end",
    "timestamp": "timestamp",
    "source_row": "source_row",
}
RARE = {"user": "of_inactive_users", "item": "of_rare_items"}  # why rows are dropped
FEWEST = {"user": "--min-interactions", "item": "--min-item-interactions"}
EXTREMES = {
    "rating": ("lowest rating", "highest rating"),
    "timestamp": ("earliest time", "latest time"),
}
SHOW: dict[str, Callable[[Any], str]] = {"rating": "{:g}".format, "timestamp": iso}
MANY = 0.1  # share of the interactions: more repeats are worth a word
OF_TRAIN = "select {} from interactions where split = 'train'"
# The cases of an SQL expression that gives each row its split, and what dataset.json says of it.
Rule = tuple[str, dict[str, int]]


@dataclass(frozen=True)
class Filters:
    """Which interactions stay."""

    min_rating: float | None = None  # the least rating of one
    min_interactions: int = 1  # the fewest of a user
    min_item_interactions: int = 1  # the fewest of an item
    since: float | None = None  # the first time
    until: float | None = None  # times stay below this one
    repeats: str = "first"  # what stays of a user and an item that come again: first, last or keep


class Bound(NamedTuple):
    """A least value, or the one that all others must stay below."""

    reason: str  # why rows are dropped
    option: str
    column: str
    sign: str
    value: float | None  # None: there is no such bound

    @property
    def sql(self) -> str:
        kind = "float" if self.column == "rating" else "double"  # as they are stored
        return f"{self.column} {self.sign} cast('{self.value}' as {kind})"

    @property
    def text(self) -> str:
        return f"{self.option} {SHOW[self.column](self.value)}"


def filter_interactions(engine: Engine, filters: Filters) -> dict[str, int]:
    """Keeps some rows of table `interactions`; returns how many each filter dropped.

    In this order: ratings below `min_rating`, and times out of range; a (user, item) pair that comes again, of which
    the first or the last is kept (of a given split the one in the earliest or latest split; another event is no
    repeat); users and items with fewer interactions than asked for in all splits together, repeated until all have
    enough. A filter that drops nothing is noted. Raises UserError for one that drops everything.
    """
    bounds = (
        Bound("below_min_rating", "--min-rating", "rating", ">=", filters.min_rating),
        Bound("before_since", "--since", "timestamp", ">=", filters.since),
        Bound("after_until", "--until", "timestamp", "<", filters.until),
    )
    left = engine.count()
    dropped = {"below_min_rating": 0}
    met = "true"
    for bound in bounds:
        if bound.value is not None:
            before = left
            met = f"{met} and {bound.sql}"
            left = engine.count(met)
            dropped[bound.reason] = before - left
            if left in (0, before):
                _report_effect(engine, bound, left, before)
    first = engine.replace(_without_repeats(engine, filters.repeats, met))
    dropped["duplicates"] = left - first
    if left - first > MANY * left:
        note(
            f"{left - first:,} of {left:,} interactions repeat a user and item, and only the"
            f" {filters.repeats} of each counts: --repeats keep keeps all, for what people buy or play again"
        )
    dropped["of_inactive_users"] = 0
    return dropped | _drop_rare(engine, filters)


def _report_effect(engine: Engine, bound: Bound, left: int, before: int) -> None:
    """Notes a bound that drops nothing, with the value that shows it. Raises UserError if it drops all."""
    column = bound.column
    ((*values,),) = engine.rows(f"select min({column}), max({column}) from interactions")
    shows_highest = (bound.sign == ">=") != bool(left)
    extreme = f"the {EXTREMES[column][shows_highest]} is {SHOW[column](values[shows_highest])}"
    if not left:
        raise UserError(f"{bound.text} drops all {before:,} interactions: {extreme}")
    note(f"{bound.text} drops nothing: {extreme}")


def _without_repeats(engine: Engine, repeats: str, met: str) -> str:
    """The rows that meet a condition, one of each user and item (and event) unless repeats are kept."""
    names = ", ".join(engine.columns)
    if repeats == "keep":
        return f"select {names} from interactions where {met}"
    same = [name for name in ("user_id", "item_id", "event") if name in engine.columns]
    direction = "desc" if repeats == "last" else "asc"
    order = [f"{EARLIEST[name]} {direction}" for name in EARLIEST if name in engine.columns]
    nth = f"row_number() over (partition by {', '.join(same)} order by {', '.join(order)})"
    numbered = f"(select *, {nth} as nth from interactions where {met}) as numbered"
    return f"select {names} from {numbered} where nth = 1"


def _drop_rare(engine: Engine, filters: Filters) -> dict[str, int]:
    """Keeps users and items with enough interactions; returns how many it dropped, by reason."""
    fewest = {"user": filters.min_interactions, "item": filters.min_item_interactions}
    active = [kind for kind, least in fewest.items() if least > 1]
    dropped = {RARE[kind]: 0 for kind in active}
    left = engine.count()
    while True:
        start = left
        for kind in active:
            before = left
            left = _keep_frequent(engine, kind, fewest[kind])
            dropped[RARE[kind]] += before - left
        if left == start or len(active) < 2:
            break
    for kind in active:
        if not dropped[RARE[kind]]:
            note(f"{FEWEST[kind]} {fewest[kind]} drops nothing: every {kind} has as many")
    return dropped


def _keep_frequent(engine: Engine, kind: str, fewest: int) -> int:
    """Keeps users, or items, with enough interactions; returns the number of rows left. Raises UserError for none."""
    per_id = f"(select {kind}_id, count(*) as n from interactions group by {kind}_id) as per_id"
    ((most,),) = engine.rows(f"select max(n) from {per_id}")
    if most < fewest:
        best = "most active" if kind == "user" else "most frequent"
        problem = f"drops all {kind}s: the {best} one has {most:,}"
        raise UserError(f"{FEWEST[kind]} {fewest} {problem}")
    frequent = f"select {kind}_id from {per_id} where n >= {fewest}"
    return engine.replace(f"select * from interactions where {kind}_id in ({frequent})")


def split_interactions(
    engine: Engine, strategy: str, seed: int, is_label: str = "true"
) -> dict[str, str | int]:
    """Gives table `interactions` its column `split`. Returns the strategy, and its cut times or seed.

    `is_label` is SQL: which interactions val and test ask for. The others there are history.

    Raises:
      UserError: a split that these data cannot give, or a test set without any item of train.
    """
    decide = {"temporal": _by_time, "leave_one_out": _by_recency, "given": _by_file}[strategy]
    split, facts = decide(engine, seed, is_label)
    others = ", ".join(name for name in engine.columns if name != "split")
    engine.replace(f"select {others}, case when {split} end as split from interactions")
    for part in SPLITS:
        if not engine.count(f"split = '{part}' and {is_label if part != 'train' else 'true'}"):
            hint = STRATEGIES[strategy]
            raise UserError(f"the {strategy} split leaves {part} empty: {hint}")
    asked = f"split = 'test' and {is_label}"
    if not engine.count(f"{asked} and item_id in ({OF_TRAIN.format('item_id')})"):
        hint = "there are too few interactions per item: use more data, or another --split"
        if strategy == "given":
            hint = "compare the item ids of the two files"
        raise UserError(f"no item of test occurs in train, so nothing can be learnt: {hint}")
    if not engine.count(f"{asked} and user_id in ({OF_TRAIN.format('user_id')})"):
        warn("no user of test occurs in train, so all of them are new")
    return {"strategy": strategy, **facts}


def _by_time(engine: Engine, seed: int, is_label: str) -> Rule:
    if "timestamp" not in engine.columns:
        other = (
            "leave_one_out (which then draws at random) or your own files with --train and --test"
        )
        hint = f"name --timestamp-col, or use --split {other}"
        raise UserError(f"the temporal split needs timestamps: {hint}")
    val_from = _second_after(engine, 0.8)
    test_from = _second_after(engine, 0.9)
    split = (
        f"timestamp < {val_from} then 'train' when timestamp < {test_from} then 'val' else 'test'"
    )
    return split, {"val_from": val_from, "test_from": test_from}


def _by_recency(engine: Engine, seed: int, is_label: str) -> Rule:
    is_ordered = "timestamp" in engine.columns
    latest = "timestamp desc, source_row desc" if is_ordered else f"{_drawn(seed)}, source_row"
    user = "over (partition by user_id"
    label = f"case when {is_label} then 1 end"
    after = (
        f"count({label}) {user} order by {latest} rows between unbounded preceding and 1 preceding)"
    )
    stays = f"count(*) {user}) < 3 or count({label}) {user}) < 2 or {after} > 1"
    if not is_ordered:  # other interactions are neither before nor after
        stays += f" or not {is_label}"
    split = f"{stays} then 'train' when {after} = 0 then 'test' else 'val'"
    return split, {} if is_ordered else {"seed": seed}


def _by_file(engine: Engine, seed: int, is_label: str) -> Rule:
    if engine.count("split = 'val'"):
        return "true then split", {}
    if "timestamp" in engine.columns:
        val_from = _second_after(engine, 0.9, "split = 'train'")
        later = engine.count(f"split = 'test' and timestamp >= {val_from}")
        if 2 * later > engine.count("split = 'test'"):
            rule = f"split = 'train' and timestamp >= {val_from} then 'val' else split"
            return rule, {"val_from": val_from}
    nth = "row_number() over (partition by user_id, split order by source_row)"
    # Hexadecimal digits below 199a: one in ten.
    rule = f"split = 'train' and {is_label} and {nth} > 1 and {_drawn(seed)} < '199a'"
    return f"{rule} then 'val' else split", {"seed": seed}


def _drawn(seed: int) -> str:
    """A random text per interaction, the same on every engine, in any order of rows."""
    return f"md5(concat('{seed}', '/', user_id, '/', item_id))"


def _second_after(engine: Engine, share: float, where: str = "true") -> int:
    """The first second after this share of the interactions."""
    cut = f"percentile_disc({share}) within group (order by floor(timestamp))"
    return int(engine.rows(f"select {cut} from interactions where {where}")[0][0]) + 1
