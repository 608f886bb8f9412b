"""Table `interactions` -> the same filtered, and split into train, val and test.

- `temporal`: two global cut times, 80/10/10 by interaction count. A cut falls between distinct times.
- `leave_one_out`: a user's last interaction is test, the last but one val; users with fewer than three stay in
  train. Without timestamps there is no last: two of the user's interactions are drawn, from the seed.
- `given`: the source's own files. Without one for val, it is a tenth of train, taken as test was: the latest where
  most of test is later than that, otherwise drawn from the seed, such that every user keeps an interaction in train.

All of it is SQL, which DuckDB and Spark run unchanged (engine.py). Every order ends in `source_row`, so ties in time
keep the source's order and threads change nothing. Not covered: filtering rare items.
"""

from dataclasses import dataclass

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
OF_TRAIN = "select {} from interactions where split = 'train'"
# The cases of an SQL expression that gives each row its split, and what dataset.json says of it.
Rule = tuple[str, dict[str, int]]


@dataclass(frozen=True)
class Filters:
    """Which interactions stay."""

    min_rating: float | None = None  # the least rating of one
    min_interactions: int = 1  # the fewest of a user


def filter_interactions(engine: Engine, filters: Filters) -> dict[str, int]:
    """Keeps some rows of table `interactions`; returns how many each filter dropped.

    In this order: ratings below `min_rating`; a (user, item) pair that comes again, of which the earliest is kept
    (of a given split the one in the earliest split, since what a user has seen is not recommended again); users with
    fewer than `min_interactions` in all splits together. A filter that drops nothing is noted. Raises UserError for
    one that drops everything.
    """
    total = rated = engine.count()
    condition = "true"
    if filters.min_rating is not None:
        condition = f"rating >= cast('{filters.min_rating}' as float)"
        rated = _count_rated(engine, condition, f"--min-rating {filters.min_rating:g}", total)
    order = ", ".join(EARLIEST[name] for name in EARLIEST if name in engine.columns)
    nth = f"row_number() over (partition by user_id, item_id order by {order})"
    numbered = f"select *, {nth} as nth from interactions where {condition}"
    names = ", ".join(engine.columns)
    firsts = engine.replace(f"select {names} from ({numbered}) as numbered where nth = 1")
    active = firsts
    if filters.min_interactions > 1:
        active = _drop_inactive_users(engine, filters.min_interactions)
        if active == firsts:
            option = f"--min-interactions {filters.min_interactions}"
            note(f"{option} drops nothing: every user has as many")
    return {
        "below_min_rating": total - rated,
        "duplicates": rated - firsts,
        "of_inactive_users": firsts - active,
    }


def _count_rated(engine: Engine, condition: str, option: str, total: int) -> int:
    """The number of rows with a high rating. Prints that it is all of them. Raises UserError for none."""
    rated = engine.count(condition)
    lowest, highest = engine.rows("select min(rating), max(rating) from interactions")[0]
    if not rated:
        problem = f"drops all {total:,} interactions: the highest rating is {highest:g}"
        raise UserError(f"{option} {problem}")
    if rated == total:
        note(f"{option} drops nothing: the lowest rating is {lowest:g}")
    return rated


def _drop_inactive_users(engine: Engine, fewest: int) -> int:
    """Keeps users with at least `fewest` interactions; returns the number of rows left. Raises UserError for none."""
    per_user = "(select user_id, count(*) as n from interactions group by user_id) as per_user"
    ((most,),) = engine.rows(f"select max(n) from {per_user}")
    if most < fewest:
        problem = f"drops all users: the most active one has {most:,}"
        raise UserError(f"--min-interactions {fewest} {problem}")
    active = f"select user_id from {per_user} where n >= {fewest}"
    return engine.replace(f"select * from interactions where user_id in ({active})")


def split_interactions(engine: Engine, strategy: str, seed: int) -> dict[str, str | int]:
    """Gives table `interactions` its column `split`. Returns the strategy, and its cut times or seed.

    Raises UserError for a split that these data cannot give, or a test set without any item of train.
    """
    decide = {"temporal": _by_time, "leave_one_out": _by_recency, "given": _by_file}[strategy]
    split, facts = decide(engine, seed)
    others = ", ".join(name for name in engine.columns if name != "split")
    engine.replace(f"select {others}, case when {split} end as split from interactions")
    for part in SPLITS:
        if not engine.count(f"split = '{part}'"):
            hint = STRATEGIES[strategy]
            raise UserError(f"the {strategy} split leaves {part} empty: {hint}")
    if not engine.count(f"split = 'test' and item_id in ({OF_TRAIN.format('item_id')})"):
        hint = "there are too few interactions per item: use more data, or another --split"
        if strategy == "given":
            hint = "compare the item ids of the two files"
        raise UserError(f"no item of test occurs in train, so nothing can be learnt: {hint}")
    if not engine.count(f"split = 'test' and user_id in ({OF_TRAIN.format('user_id')})"):
        warn("no user of test occurs in train, so all of them are new")
    return {"strategy": strategy, **facts}


def _by_time(engine: Engine, seed: int) -> Rule:
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


def _by_recency(engine: Engine, seed: int) -> Rule:
    is_ordered = "timestamp" in engine.columns
    latest = "timestamp desc, source_row desc" if is_ordered else f"{_drawn(seed)}, source_row"
    recency = f"row_number() over (partition by user_id order by {latest})"
    stays = f"count(*) over (partition by user_id) < 3 or {recency} > 2"
    split = f"{stays} then 'train' when {recency} = 1 then 'test' else 'val'"
    return split, {} if is_ordered else {"seed": seed}


def _by_file(engine: Engine, seed: int) -> Rule:
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
    rule = f"split = 'train' and {nth} > 1 and {_drawn(seed)} < '199a' then 'val' else split"
    return rule, {"seed": seed}


def _drawn(seed: int) -> str:
    """A random text per interaction, the same on every engine, in any order of rows."""
    return f"md5(concat('{seed}', '/', user_id, '/', item_id))"


def _second_after(engine: Engine, share: float, where: str = "true") -> int:
    """The first second after this share of the interactions."""
    cut = f"percentile_disc({share}) within group (order by floor(timestamp))"
    return int(engine.rows(f"select {cut} from interactions where {where}")[0][0]) + 1
