"""Interactions in a database -> the same interactions filtered, and split into train, val and test.

- `temporal`: two global cut times, 80/10/10 by interaction count. A cut falls between distinct times.
- `leave_one_out`: a user's last interaction is test, the last but one val; users with fewer than three stay in
  train. Without timestamps there is no last: two of the user's interactions are drawn, from the seed.
- `given`: the source's own files. Without one for val, it is a tenth of train: the latest where there are
  timestamps, otherwise drawn from the seed, such that every user keeps an interaction in train.

Filter, split, order and count are SQL in standard forms: DuckDB runs it out of core, a cluster could. Every order ends
in `source_row`, so ties in time keep the source's order and threads change nothing. Not covered: filtering rare items.
"""

import duckdb

from rec.errors import UserError

SPLITS = ("train", "val", "test")
STRATEGIES = ("temporal", "leave_one_out", "given")


def columns_of(con: duckdb.DuckDBPyConnection, table: str) -> dict[str, str]:
    """The table's columns and their SQL types; empty if there is no such table."""
    try:
        return {name: kind for name, kind, *_ in con.execute(f"describe {table}").fetchall()}
    except duckdb.CatalogException:
        return {}


def count_rows(con: duckdb.DuckDBPyConnection, table: str, where: str = "true") -> int:
    """How many rows of the table fulfil the SQL condition."""
    return con.execute(f"select count(*) from {table} where {where}").fetchall()[0][0]


def quoted(name: str) -> str:
    """A column name as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def filter_interactions(
    con: duckdb.DuckDBPyConnection, min_rating: float | None, min_interactions: int
) -> dict[str, int]:
    """Replaces table `interactions` by table `kept`; returns how many rows each filter dropped.

    In this order: ratings below `min_rating`; a (user, item) pair that comes again, of which the earliest is kept
    (of a given split the one in the earliest split, since what a user has seen is not recommended again); users with
    fewer than `min_interactions` in all splits together.

    Raises:
        UserError: nothing is left.
    """
    columns = columns_of(con, "interactions")
    names = ", ".join(columns)
    rated = f"rating >= cast('{min_rating}' as float)" if min_rating is not None else "true"
    order = ["case split when 'train' then 1 when 'val' then 2 else 3 end"] if "split" in columns else []
    order += ["timestamp", "source_row"] if "timestamp" in columns else ["source_row"]
    con.execute(f"""
        create table firsts as select {names} from (
            select {names}, row_number() over (
                partition by user_id, item_id order by {", ".join(order)}) as occurrence
            from interactions where {rated}) as numbered
        where occurrence = 1""")
    total, good = count_rows(con, "interactions"), count_rows(con, "interactions", rated)
    con.execute("drop table interactions")
    active = f"select user_id from firsts group by user_id having count(*) >= {min_interactions}"
    where = f"where user_id in ({active})" if min_interactions > 1 else ""
    con.execute(f"create view kept as select {names} from firsts {where}")
    firsts, left = count_rows(con, "firsts"), count_rows(con, "kept")
    if not left:
        raise UserError(f"nothing is left of {total:,} interactions: loosen --min-rating or --min-interactions")
    return {"below_min_rating": total - good, "duplicates": good - firsts, "of_inactive_users": firsts - left}


def split_interactions(con: duckdb.DuckDBPyConnection, strategy: str, seed: int) -> dict[str, str | int]:
    """Creates table `splits`: `kept` with a column `split`. Returns the strategy, and its cut times or seed.

    Raises:
        UserError: a split that these data cannot give, or a test set without any item of train.
    """
    columns = columns_of(con, "kept")
    ordered = "timestamp" in columns
    names = ", ".join(name for name in columns if name != "split")
    drawn = f"md5(concat('{seed}', '/', user_id, '/', item_id))"  # the same on every engine, in any order of rows
    facts: dict[str, str | int] = {"strategy": strategy} | ({} if ordered else {"seed": seed})

    def second_after(share: float, where: str = "true") -> int:
        disc = f"percentile_disc({share}) within group (order by floor(timestamp))"
        return int(con.execute(f"select {disc} from kept where {where}").fetchall()[0][0]) + 1

    if strategy == "temporal":
        if not ordered:
            raise UserError(
                "the temporal split needs timestamps: name their column with --timestamp-col, or use --split "
                "leave_one_out (which then draws at random) or your own files with --train and --test"
            )
        val, test = facts["val_from"], facts["test_from"] = second_after(0.8), second_after(0.9)
        split = f"case when timestamp < {val} then 'train' when timestamp < {test} then 'val' else 'test' end"
        query = f"select {names}, {split} as split from kept"
    elif strategy == "leave_one_out":
        recent = "timestamp desc, source_row desc" if ordered else f"{drawn}, source_row"
        query = f"""
            select {names}, case when history < 3 or recency > 2 then 'train'
                                 when recency = 1 then 'test' else 'val' end as split
            from (select {names}, row_number() over (partition by user_id order by {recent}) as recency,
                         count(*) over (partition by user_id) as history from kept) as numbered"""
    elif count_rows(con, "kept", "split = 'val'"):
        query = "select * from kept"
    else:
        late = f"position > 1 and {drawn} < '199a'"  # hexadecimal digits: one in ten
        if ordered:
            facts["val_from"] = second_after(0.9, "split = 'train'")
            late = f"timestamp >= {facts['val_from']}"
        query = f"""
            select {names}, case when split = 'train' and {late} then 'val' else split end as split
            from (select *, row_number() over (partition by user_id, split order by source_row) as position
                  from kept) as numbered"""
    con.execute(f"create table splits as {query}")
    hints = {
        "temporal": "there are too few interactions, or too many at one time: use --split leave_one_out",
        "leave_one_out": "no user has three interactions: use --split temporal, or your own files",
        "given": "all its interactions are in an earlier split as well, or were dropped",
    }
    for part in SPLITS:
        if not count_rows(con, "splits", f"split = '{part}'"):
            raise UserError(f"the {strategy} split leaves {part} empty: {hints[strategy]}")
    shared = "split = 'test' and item_id in (select item_id from splits where split = 'train')"
    if not count_rows(con, "splits", shared):
        raise UserError("no item of test occurs in train, so nothing can be learnt: compare the item ids of both")
    return facts
