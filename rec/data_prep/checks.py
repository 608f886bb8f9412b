"""What is looked at before a data set is written: names, ids, times and ratings, each said in a sentence with a value.

- `check_tables` is for every source. It prints how many ids of the interactions have a row in the users and items
  files, and the range of the times. It refuses names that answers use, and files of which no id matches.
- `check_times` refuses times that cannot be, and names the unit that they seem to have.

All of it is aggregates in DuckDB, over one list of the distinct ids of users and one of items.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from math import isfinite

from duckdb import DuckDBPyConnection as Connection

from rec.data_prep.dataset import RESERVED
from rec.errors import UserError, note

DAY = 86_400
EARLIEST = 631_152_000  # 1990-01-01: nothing that recommenders learn from is older

# How ids that mean the same may differ: what one says of it -> SQL that makes them equal.
EDGES = r"regexp_replace({}, '^[\s\p{{Z}}\x{{200b}}\x{{feff}}]+|[\s\p{{Z}}\x{{200b}}\x{{feff}}]+$', '', 'g')"
DIFFERENCES = {
    "leading zeros": "ltrim({}, '0')",
    "an ending .0, which whole numbers get when they are read as fractions": "regexp_replace({}, '[.]0+$', '')",
    "blanks around them": EDGES,
    "upper and lower case": "lower({})",
    "Unicode form": "nfc_normalize({})",
    "zeros, blanks and case": f"ltrim(regexp_replace(lower({EDGES}), '[.]0+$', ''), '0')",
}
SAME = f"nfc_normalize({EDGES})"  # ids that look alike

# Numbers that are no seconds since 1970: by the length of their digits; or what they count, the number of seconds in
# it, and its value at 1970.
DATES = {14: "%Y%m%d%H%M%S", 12: "%Y%m%d%H%M", 10: "%Y%m%d%H", 8: "%Y%m%d", 6: "%Y%m", 4: "%Y"}
UNITS = (
    ("days as spreadsheets count them, from 1899-12-30", DAY, 25_569),
    ("days since 1970", DAY, 0),
    ("hours since 1970", 3600, 0),
    ("minutes since 1970", 60, 0),
    ("milliseconds since 1970", 1e-3, 0),
    ("microseconds since 1970", 1e-6, 0),
    ("nanoseconds since 1970", 1e-9, 0),
)


def check_tables(con: Connection) -> None:
    """Prints what is known of ids, times and ratings of the tables that a source has loaded.

    Raises UserError for a column of items with a reserved name, or a table of users or items without a single id of
    the interactions.
    """
    for (name,) in con.execute(
        "select column_name from duckdb_columns() where table_name = 'items' order by column_index"
    ).fetchall():
        if name in RESERVED:
            raise UserError(
                f"the items file has a column {name}, a name that answers use themselves: "
                f"rename it, to item_{name} for example"
            )
    for kind in ("user", "item"):
        _check_ids(con, kind)
    columns = con.table("interactions").columns
    if "timestamp" in columns:
        _describe_times(con)
    if "rating" in columns:
        low, high = con.execute("select min(rating), max(rating) from interactions").fetchall()[0]
        if low == high and low is not None:
            note(f"every rating is {low:g}, so ratings tell nothing apart")


# ------------------------------------------------------------------------------------------------------------
# Ids


def _check_ids(con: Connection, kind: str) -> None:
    """Of one kind, user or item: whether the interactions and the file of features mean the same ones."""
    key, table = f"{kind}_id", f"{kind}s"
    has_features = (table,) in con.execute("select table_name from duckdb_tables()").fetchall()
    con.execute(f"create temp table met as select distinct {key} as id from interactions")
    source = f"select {key} as id from {table}" if has_features else "select id from met limit 0"
    con.execute(f"create temp table listed as {source}")
    if con.execute("select count(*) from listed").fetchall() != [(0,)]:
        _check_join(con, kind)
    _note_lookalikes(con, kind)
    con.execute("drop table met; drop table listed")


def _check_join(con: Connection, kind: str) -> None:
    """Prints how many ids have a row, and how many rows an id. Raises UserError if none has."""
    met, both, listed = con.execute(
        """select count(met.id), count(met.id) filter (where listed.id is not null), count(listed.id)
           from met full join listed on met.id = listed.id"""
    ).fetchall()[0]
    note(
        f"{kind}s: {both:,} of {met:,} with interactions have a row in the {kind}s file; "
        f"{listed - both:,} of its {listed:,} rows have no interactions"
    )
    if both in (met, listed):
        return
    con.execute("create temp table unlisted as from met anti join listed using (id)")
    con.execute("create temp table unmet as from listed anti join met using (id)")
    count, mine, theirs, difference = _likely_pairs(con)
    con.execute("drop table unlisted; drop table unmet")
    example = f"interactions have {ascii(mine)}, the {kind}s file has {ascii(theirs)}"
    why = f"{count:,} of the ids differ only in {difference}" if count else "no id is like another"
    if not both:
        raise UserError(
            f"no {kind} with interactions has a row in the {kind}s file: {example} ({why}). "
            f"Write the ids alike in both files, or check --{kind}-col"
        )
    if count or 2 * both < met:
        note(f"warning: {met - both:,} {kind}s have no row in the {kind}s file: {example} ({why})")


def _likely_pairs(con: Connection) -> tuple[int, str, str, str]:
    """How many ids of `unlisted` and `unmet` become equal by the difference that explains most, a pair, its name."""
    best = (
        0,
        *con.execute("select (select min(id) from unlisted), min(id) from unmet").fetchall()[0],
        "",
    )
    for name, form in DIFFERENCES.items():
        pairs = f"unlisted join unmet on {form.format('unlisted.id')} = {form.format('unmet.id')}"
        count, mine, theirs = con.execute(
            f"select count(distinct unlisted.id), min(unlisted.id), arg_min(unmet.id, unlisted.id) from {pairs}"
        ).fetchall()[0]
        if count > best[0]:
            best = (count, mine, theirs, name)
    return best


def _note_lookalikes(con: Connection, kind: str) -> None:
    """Notes ids that are different and look alike."""
    every = "(select id from met union select id from listed)"
    alike = f"(select count(*) as n, min(id) as one, max(id) as other from {every} group by {SAME.format('id')})"
    count, one, other = con.execute(
        f"select sum(n), min(one), arg_min(other, one) from {alike} where n > 1"
    ).fetchall()[0]
    if count:
        note(
            f"warning: {count:,} {kind} ids differ from another only in blanks around them or in Unicode form, "
            f"such as {ascii(one)} and {ascii(other)}: they count as different {kind}s"
        )


# ------------------------------------------------------------------------------------------------------------
# Times


def _describe_times(con: Connection) -> None:
    """Prints the range of the times; and those in it that are likely mistakes."""
    tomorrow = time.time() + DAY
    first, last, early, late = con.execute(
        f"""select min(timestamp), max(timestamp), count_if(timestamp < {EARLIEST}),
            count_if(timestamp > {tomorrow}) from interactions"""
    ).fetchall()[0]
    if first is None:
        return
    note(f"times: {iso(first)} to {iso(last)}")
    if first == last:
        note("all interactions have the same time, so their order is that of the source")
    elif early and last >= EARLIEST:
        note(
            f"warning: {early:,} interactions are from before 1990, such as time {first:g}, {iso(first)}"
        )
    if late and first <= tomorrow:
        note(
            f"warning: {late:,} interactions are in the future, such as time {last:.0f}, {iso(last)}"
        )


def check_times(con: Connection) -> None:
    """Raises UserError if the times of table `interactions` end before 1990 or start after tomorrow."""
    first, last = con.execute("select min(timestamp), max(timestamp) from interactions").fetchall()[
        0
    ]
    if first is None or (last >= EARLIEST and first <= time.time() + DAY):
        return
    unit = likely_unit(first, last)
    raise UserError(
        f"as seconds since 1970, the times run from {iso(first)} to {iso(last)}, which cannot be"
        f"{f': {unit}' if unit else ''}. --allow-any-time takes them as they are"
    )


def likely_unit(low: float, high: float) -> str:
    """What numbers from `low` to `high` count if not seconds since 1970, and what to do; "" if nothing is likely."""
    shown = f"{low:.15g}"
    form = DATES.get(len(str(int(low))))
    if form and _are_recent(lambda number: _seconds_of_date(number, form), low, high):
        digits = form.replace("%Y", "YYYY").replace("%m", "MM").replace("%d", "DD")
        digits = digits.replace("%H", "HH").replace("%M", "MM").replace("%S", "SS")
        return (
            f"{shown} looks like a date written {digits}; read it with --timestamp-format '{form}'"
        )
    for name, seconds, at_1970 in UNITS:
        if _are_recent(lambda number: (number - at_1970) * seconds, low, high):  # noqa: B023
            minus = f"subtract {at_1970:,} and " if at_1970 else ""
            scale = f"multiply by {seconds:,}" if seconds > 1 else f"divide by {1 / seconds:,.0f}"
            return f"{shown} looks like {name}; {minus}{scale} first"
    return ""


def time_hint(text: str) -> str:
    """How to have a text read as a time that is none yet, to be added to what is wrong with it."""
    try:
        number = float(text)
    except ValueError:
        return "; --timestamp-format reads other forms, such as '%d/%m/%Y'" if text.strip() else ""
    unit = likely_unit(number, number) if isfinite(number) else ""
    return f"; {unit}" if unit else ""


def _are_recent(seconds_of: Callable[[float], float], low: float, high: float) -> bool:
    """Whether numbers, once they are seconds since 1970, are between 1990 and tomorrow."""
    with suppress(ValueError, OverflowError):
        return seconds_of(low) >= EARLIEST and seconds_of(high) <= time.time() + DAY
    return False


def _seconds_of_date(number: float, form: str) -> float:
    """Of a date as digits. Raises ValueError for what is no such date."""
    return datetime.strptime(str(int(number)), form).replace(tzinfo=UTC).timestamp()


def iso(seconds: float) -> str:
    """Seconds since 1970 as a date and time in UTC."""
    return datetime.fromtimestamp(float(seconds), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
