"""Table `interactions` -> the same filtered, and split into train, val and test.

- `temporal`: two global cut times, 80/10/10 by interaction count. A cut falls between distinct times.
- `leave_one_out`: a user's last interaction is test, the last but one val; users with fewer than three stay in
  train. Without timestamps there is no last: two of the user's interactions are drawn, from the seed.
- `given`: the source's own files. Without one for val, it is a tenth of train, taken as test was: the latest where
  most of test is later than that, otherwise drawn from the seed, such that every user keeps an interaction in train.

All of it is SQL, which DuckDB and Spark run unchanged (engine.py). Every order ends in `source_row`, so ties in time
keep the source's order and threads change nothing. Not covered: filtering rare items.
"""

from rec.data_prep.engine import Engine
from rec.errors import UserError, note

SPLITS = ("train", "val", "test")
STRATEGIES = {  # each with what to do where it leaves a part empty
    "temporal": "there are too few interactions, or too many at one time: use --split leave_one_out",
    "leave_one_out": "no user has three interactions: use --split temporal, or your own files",
    "given": "all its interactions are in an earlier split as well, or were dropped",
}


def filter_interactions(
    engine: Engine, min_rating: float | None, min_interactions: int
) -> dict[str, int]:
    """Keeps some rows of table `interactions`; returns how many each filter dropped.

    In this order: ratings below `min_rating`; a (user, item) pair that comes again, of which the earliest is kept
    (of a given split the one in the earliest split, since what a user has seen is not recommended again); users with
    fewer than `min_interactions` in all splits together. A filter that drops nothing is noted. Raises UserError for
    one that drops everything.
    """
    rated = f"rating >= cast('{min_rating}' as float)" if min_rating is not None else "true"
    keys = {
        "split": "case split when 'train' then 1 when 'val' then 2 else 3 end",
        "timestamp": "timestamp",
    }
    order = ", ".join(
        [*(key for name, key in keys.items() if name in engine.columns), "source_row"]
    )
    nth = f"row_number() over (partition by user_id, item_id order by {order})"
    total, good = engine.count(), engine.count(rated)
    if min_rating is not None and good in (0, total):
        lowest, highest = engine.rows("select min(rating), max(rating) from interactions")[0]
        if not good:
            raise UserError(
                f"--min-rating {min_rating:g} drops all {total:,} interactions: "
                f"the highest rating is {highest:g}"
            )
        note(f"--min-rating {min_rating:g} drops nothing: the lowest rating is {lowest:g}")
    numbered = f"(select *, {nth} as nth from interactions where {rated}) as numbered"
    firsts = left = engine.replace(
        f"select {', '.join(engine.columns)} from {numbered} where nth = 1"
    )
    if min_interactions > 1:
        left = _drop_inactive_users(engine, min_interactions)
        if left == firsts:
            note(f"--min-interactions {min_interactions} drops nothing: every user has as many")
    return {
        "below_min_rating": total - good,
        "duplicates": good - firsts,
        "of_inactive_users": firsts - left,
    }


def _drop_inactive_users(engine: Engine, fewest: int) -> int:
    """Keeps users with at least `fewest` interactions; returns the number of rows left. Raises UserError for none."""
    per_user = "select user_id, count(*) as n from interactions group by user_id"
    (most,) = engine.rows(f"select max(n) from ({per_user}) as per_user")[0]
    if most < fewest:
        raise UserError(
            f"--min-interactions {fewest} drops all users: the most active one has {most:,}"
        )
    active = f"select user_id from ({per_user}) as per_user where n >= {fewest}"
    return engine.replace(f"select * from interactions where user_id in ({active})")


def split_interactions(engine: Engine, strategy: str, seed: int) -> dict[str, str | int]:
    """Gives table `interactions` its column `split`. Returns the strategy, and its cut times or seed.

    Raises UserError for a split that these data cannot give, or a test set without any item of train.
    """
    ordered = "timestamp" in engine.columns
    facts: dict[str, str | int] = {"strategy": strategy}
    drawn = f"md5(concat('{seed}', '/', user_id, '/', item_id))"  # the same on every engine, in any order of rows

    def second_after(share: float) -> int:
        cut = f"percentile_disc({share}) within group (order by floor(timestamp))"
        where = "split = 'train'" if strategy == "given" else "true"
        return int(engine.rows(f"select {cut} from interactions where {where}")[0][0]) + 1

    def is_later(second: int) -> bool:
        """Most of test is."""
        return 2 * engine.count(f"split = 'test' and timestamp >= {second}") > engine.count(
            "split = 'test'"
        )

    if strategy == "temporal":
        if not ordered:
            hint = "leave_one_out (which then draws at random) or your own files with --train and --test"
            raise UserError(
                f"the temporal split needs timestamps: name --timestamp-col, or use --split {hint}"
            )
        facts |= {"val_from": second_after(0.8), "test_from": second_after(0.9)}
        when = "timestamp < {val_from} then 'train' when timestamp < {test_from} then 'val' else 'test'".format(
            **facts
        )
    elif strategy == "leave_one_out":
        facts |= {} if ordered else {"seed": seed}
        latest = "timestamp desc, source_row desc" if ordered else f"{drawn}, source_row"
        recency = f"row_number() over (partition by user_id order by {latest})"
        history = "count(*) over (partition by user_id)"
        when = (
            f"{history} < 3 or {recency} > 2 then 'train' when {recency} = 1 then 'test' else 'val'"
        )
    elif engine.count("split = 'val'"):
        when = "true then split"
    elif ordered and is_later(val_from := second_after(0.9)):
        facts["val_from"] = val_from
        when = f"split = 'train' and timestamp >= {val_from} then 'val' else split"
    else:  # hexadecimal digits below 199a: one in ten
        facts["seed"] = seed
        position = "row_number() over (partition by user_id, split order by source_row)"
        when = f"split = 'train' and {position} > 1 and {drawn} < '199a' then 'val' else split"
    others = ", ".join(name for name in engine.columns if name != "split")
    engine.replace(f"select {others}, case when {when} end as split from interactions")
    found = engine.rows("select distinct split from interactions")
    if empty := [part for part in SPLITS if (part,) not in found]:
        raise UserError(f"the {strategy} split leaves {empty[0]} empty: {STRATEGIES[strategy]}")
    if not engine.count(
        "split = 'test' and item_id in (select item_id from interactions where split = 'train')"
    ):
        hint = "there are too few interactions per item: use more data, or another --split"
        if strategy == "given":
            hint = "compare the item ids of the two files"
        raise UserError(f"no item of test occurs in train, so nothing can be learnt: {hint}")
    return facts
