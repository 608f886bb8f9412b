"""What is looked at before a data set is written: names, ids, times and ratings, each said in a sentence with a value.

- `check_tables` is for every source. It prints how many ids of the interactions have a row in the users and items
  files, and the range of the times. It refuses names that answers use, and files of which no id matches.
- `check_times` refuses times that cannot be, and names the unit that they seem to have.

All of it is aggregates in DuckDB, over one list of the distinct ids of users and one of items.
"""

import time
from contextlib import suppress
from datetime import UTC, datetime
from math import isfinite

from duckdb import DuckDBPyConnection as Connection

from rec.data_prep.dataset import RESERVED
from rec.data_prep.engine import only_row
from rec.errors import UserError, note, warn

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

# Numbers that are no seconds since 1970: dates, of which each part but the year has two digits; and what they count,
# the number of seconds in it, and its value at 1970.
DATE = "YYYYMMDDHHMMSS"
DATE_PARTS = ("%Y", "%m", "%d", "%H", "%M", "%S")
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
    tables = [name for (name,) in con.execute("select table_name from duckdb_tables()").fetchall()]
    names = con.table("items").columns if "items" in tables else []
    for name in names:
        if name in RESERVED:
            problem = f"has a column {name}, a name that answers use themselves"
            raise UserError(f"the items file {problem}: rename it, to item_{name} for example")
    for kind in ("user", "item"):
        has_features = f"{kind}s" in tables
        listed = f"from {kind}s" if has_features else "from interactions limit 0"
        con.execute(f"create temp table met as select distinct {kind}_id as id from interactions")
        con.execute(f"create temp table listed as select {kind}_id as id {listed}")
        if has_features:
            _check_join(con, kind)
        _note_lookalikes(con, kind)
        con.execute("drop table met; drop table listed")
    columns = con.table("interactions").columns
    if "timestamp" in columns:
        _describe_times(con)
    if "rating" in columns:
        low, high = only_row(con, "select min(rating), max(rating) from interactions")
        if low == high and low is not None:
            note(f"every rating is {low:g}, so ratings tell nothing apart")


# ------------------------------------------------------------------------------------------------------------
# Ids


def _check_join(con: Connection, kind: str) -> None:
    """Prints how many ids have a row, and how many rows an id. Raises UserError if none has."""
    met, both, listed = only_row(
        con,
        "select count(met.id), count(met.id) filter (where listed.id is not null), count(listed.id)"
        " from met full join listed on met.id = listed.id",
    )
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
    why = f"{count:,} of the ids differ only in {difference}" if count else "no id is like another"
    example = f"interactions have {ascii(mine)}, the {kind}s file has {ascii(theirs)} ({why})"
    if not both:
        hint = f"Write the ids alike in both files, or check --{kind}-col"
        raise UserError(
            f"no {kind} with interactions has a row in the {kind}s file: {example}. {hint}"
        )
    if count or 2 * both < met:
        warn(f"{met - both:,} {kind}s have no row in the {kind}s file: {example}")


def _likely_pairs(con: Connection) -> tuple[int, str, str, str]:
    """How many ids of `unlisted` and `unmet` become equal by the difference that explains most, a pair, its name."""
    mine, theirs = only_row(con, "select (select min(id) from unlisted), min(id) from unmet")
    pairs = [(0, mine, theirs, "")]
    for name, form in DIFFERENCES.items():
        count, mine, theirs = only_row(
            con,
            "select count(distinct unlisted.id), min(unlisted.id), arg_min(unmet.id, unlisted.id) from unlisted"
            f" join unmet on {form.format('unlisted.id')} = {form.format('unmet.id')}",
        )
        pairs.append((count, mine, theirs, name))
    return max(pairs, key=lambda pair: pair[0])


def _note_lookalikes(con: Connection, kind: str) -> None:
    """Notes ids that are different and look alike."""
    every = "(select id from met union select id from listed)"
    alike = f"select count(*) as n, min(id) as one, max(id) as other from {every} group by {SAME.format('id')}"
    count, one, other = only_row(
        con, f"select sum(n), min(one), arg_min(other, one) from ({alike}) where n > 1"
    )
    if count:
        warn(
            f"{count:,} {kind} ids differ from another only in blanks around them or in Unicode form, "
            f"such as {ascii(one)} and {ascii(other)}: they count as different {kind}s"
        )


# ------------------------------------------------------------------------------------------------------------
# Times


def _describe_times(con: Connection) -> None:
    """Prints the range of the times; and those in it that are likely mistakes."""
    tomorrow = time.time() + DAY
    first, last, early, late = only_row(
        con,
        f"select min(timestamp), max(timestamp), count_if(timestamp < {EARLIEST}),"
        f" count_if(timestamp > {tomorrow}) from interactions",
    )
    if first is None:
        return
    note(f"times: {iso(first)} to {iso(last)}")
    if first == last:
        note("all interactions have the same time, so their order is that of the source")
    elif early and last >= EARLIEST:
        example = f"time {first:g}, {iso(first)}"
        warn(f"{early:,} interactions are from before 1990, such as {example}")
    if late and first <= tomorrow:
        warn(f"{late:,} interactions are in the future, such as time {last:.0f}, {iso(last)}")


def check_times(con: Connection) -> None:
    """Raises UserError if the times of table `interactions` end before 1990 or start after tomorrow."""
    first, last = only_row(con, "select min(timestamp), max(timestamp) from interactions")
    if first is None or (last >= EARLIEST and first <= time.time() + DAY):
        return
    unit = likely_unit(first, last)
    problem = f"the times run from {iso(first)} to {iso(last)}, which cannot be"
    if unit:
        problem += f": {unit}"
    raise UserError(f"as seconds since 1970, {problem}. --allow-any-time takes them as they are")


def likely_unit(low: float, high: float) -> str:
    """What numbers from `low` to `high` count if not seconds since 1970, and what to do; "" if nothing is likely."""
    looks = f"{low:.15g} looks like"
    digits = len(str(int(low)))
    form = "".join(DATE_PARTS[: digits // 2 - 1])
    with suppress(ValueError, OverflowError):
        dates = [datetime.strptime(str(int(number)), form) for number in (low, high)]
        if _are_recent([date.replace(tzinfo=UTC).timestamp() for date in dates]):
            hint = f"read it with --timestamp-format '{form}'"
            return f"{looks} a date written {DATE[:digits]}; {hint}"
    for name, seconds, at_1970 in UNITS:
        if _are_recent([(number - at_1970) * seconds for number in (low, high)]):
            if seconds < 1:
                unit = {1e-3: "ms", 1e-6: "us", 1e-9: "ns"}[seconds]
                return f"{looks} {name}; read it with --timestamp-unit {unit}"
            minus = f"subtract {at_1970:,} and " if at_1970 else ""
            return f"{looks} {name}; {minus}multiply by {seconds:,} first"
    return ""


def time_hint(text: str) -> str:
    """How to have a text read as a time that is none yet, to be added to what is wrong with it."""
    try:
        number = float(text)
    except ValueError:
        return "; --timestamp-format reads other forms, such as '%d/%m/%Y'" if text.strip() else ""
    unit = likely_unit(number, number) if isfinite(number) else ""
    return f"; {unit}" if unit else ""


def _are_recent(seconds: list[float]) -> bool:
    """Whether these times, in order, are between 1990 and tomorrow."""
    return seconds[0] >= EARLIEST and seconds[-1] <= time.time() + DAY


def iso(seconds: float) -> str:
    """Seconds since 1970 as a date and time in UTC."""
    return datetime.fromtimestamp(float(seconds), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
