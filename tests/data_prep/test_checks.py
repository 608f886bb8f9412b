"""What is said of a source's tables before they are written, and what is refused."""

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import duckdb
import pandas as pd
import pytest

from rec.data_prep.checks import check_tables, check_times, likely_unit, time_hint
from rec.data_prep.dataset import RESERVED
from rec.errors import UserError

Said = Callable[[], list[str]]
NOW = 1_700_000_000


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    return lambda: capsys.readouterr().err.splitlines()


def database(
    items: Sequence[str],
    listed: Sequence[str] = (),
    times: Sequence[float] = (),
    ratings: Sequence[float] = (),
) -> duckdb.DuckDBPyConnection:
    """An interaction of one user per item, at the times and with the ratings given; and the rows of the items file."""
    columns: dict[str, Sequence[object]] = {"user_id": ["u"] * len(items), "item_id": items}
    columns |= {"timestamp": times} if times else {}
    columns |= {"rating": ratings} if ratings else {}
    con = duckdb.connect()
    con.register("rows", pd.DataFrame(columns))
    con.execute("create table interactions as from rows")
    if listed:
        con.register("features", pd.DataFrame({"item_id": list(listed), "colour": "red"}))
        con.execute("create table items as from features")
    return con


# ------------------------------------------------------------------------------------------------------------
# Ids


def test_both_shares_of_a_join_are_always_printed(said: Said) -> None:
    check_tables(database(["a", "b", "c", "a"], listed=["a", "b", "c", "new"]))
    assert said() == [
        "items: 3 of 3 with interactions have a row in the items file; "
        "1 of its 4 rows have no interactions"
    ]


def test_the_users_are_joined_as_the_items_are(said: Said) -> None:
    con = database(["a"])
    con.execute("create table users as select 'u' as user_id union all select 'stranger'")
    check_tables(con)
    assert said() == [
        "users: 1 of 1 with interactions have a row in the users file; "
        "1 of its 2 rows have no interactions"
    ]
    con.execute("delete from users where user_id = 'u'")
    with pytest.raises(
        UserError, match="no user .* interactions have 'u', the users file has 'stranger'"
    ):
        check_tables(con)


@pytest.mark.parametrize(
    ("mine", "theirs", "difference"),
    [
        ("7", "0007", "leading zeros"),
        ("38.0", "38", "an ending .0"),
        ("a", " a", "blanks around them"),
        ("a\u00a0", "a", "blanks around them"),
        ("SKU-1", "sku-1", "upper and lower case"),
        ("caf\u00e9", "cafe\u0301", "Unicode form"),
        ("007.0", " 7", "zeros, blanks and case"),
    ],
)
def test_a_file_without_a_single_id_is_refused_with_the_likely_reason(
    mine: str, theirs: str, difference: str
) -> None:
    with pytest.raises(UserError) as refused:
        check_tables(database([mine, "other"], listed=[theirs, "another"]))
    assert f"interactions have {ascii(mine)}, the items file has {ascii(theirs)}" in str(
        refused.value
    )
    assert f"1 of the ids differ only in {difference}" in str(refused.value)


def test_ids_of_another_kind_are_refused_with_one_of_each_side() -> None:
    with pytest.raises(
        UserError,
        match="interactions have 'a', the items file has 'x' .no id is like another.*check --item-col",
    ):
        check_tables(database(["a", "b"], listed=["x", "y"]))


def test_fewer_than_half_that_match_are_a_warning_with_one_of_each_side(said: Said) -> None:
    check_tables(database(["a", "b", "c"], listed=["a", "x"]))
    assert said()[1:] == [
        "warning: 2 items have no row in the items file: interactions have 'b', "
        "the items file has 'x' (no id is like another)"
    ]
    check_tables(database(["a", "b", "c"], listed=["a", "b", "x"]))
    assert len(said()) == 1


def test_a_few_ids_that_are_written_otherwise_are_a_warning_too(said: Said) -> None:
    check_tables(database(["1", "2", "3"], listed=["1", "2", "03"]))
    assert said()[1:] == [
        "warning: 1 items have no row in the items file: interactions have '3', "
        "the items file has '03' (1 of the ids differ only in leading zeros)"
    ]


def test_ids_that_look_alike_are_noted_with_an_example(said: Said) -> None:
    check_tables(database(["a", "b", " b", "caf\u00e9", "cafe\u0301", "A"]))
    assert said() == [
        "warning: 4 item ids differ from another only in blanks around them or in Unicode form, "
        "such as ' b' and 'b': they count as different items"
    ]


def test_a_million_healthy_ids_say_nothing(said: Said) -> None:
    con = duckdb.connect()
    con.execute(
        "create table interactions as select 'u' as user_id, cast(n as varchar) as item_id from range(1000000) t (n)"
    )
    check_tables(con)
    assert said() == []


# ------------------------------------------------------------------------------------------------------------
# Names


@pytest.mark.parametrize("name", RESERVED)
def test_a_name_that_answers_use_is_refused_with_another_one(name: str) -> None:
    con = database(["a"], listed=["a"])
    con.execute(f"alter table items rename colour to {name}")
    with pytest.raises(UserError, match=f"column {name}, .* to item_{name} for example"):
        check_tables(con)


# ------------------------------------------------------------------------------------------------------------
# Times and ratings


def test_the_range_of_times_is_printed_in_iso_8601(said: Said) -> None:
    check_tables(database(["a", "b"], times=[NOW, NOW + 86_400]))
    assert said() == ["times: 2023-11-14T22:13:20Z to 2023-11-15T22:13:20Z"]


def test_one_time_for_all_and_times_far_off_are_said(said: Said) -> None:
    check_tables(database(["a", "b"], times=[NOW, NOW]))
    assert said()[1] == "all interactions have the same time, so their order is that of the source"
    check_tables(database(["a", "b", "c"], times=[0, NOW, 4_000_000_000]))
    assert said()[1:] == [
        "warning: 1 interactions are from before 1990, such as time 0, 1970-01-01T00:00:00Z",
        "warning: 1 interactions are in the future, such as time 4000000000, 2096-10-02T07:06:40Z",
    ]


def test_ratings_that_are_all_the_same_are_said(said: Said) -> None:
    check_tables(database(["a", "b"], ratings=[4.5, 4.5]))
    assert said() == ["every rating is 4.5, so ratings tell nothing apart"]
    check_tables(database(["a", "b"], ratings=[4.5, 4]))
    assert said() == []


DAY = datetime(2021, 4, 17, tzinfo=UTC)


@pytest.mark.parametrize(
    ("number", "unit"),
    [
        (20210417, "20210417 looks like a date written YYYYMMDD; .*--timestamp-format '%Y%m%d'"),
        (202104, "written YYYYMM; "),
        (2021, "written YYYY; "),
        (2021041712, "written YYYYMMDDHH; "),
        (202104171230, "written YYYYMMDDHHMM; "),
        (44303.37, "44303.37 looks like days as spreadsheets .*subtract 25,569 and multiply by 86"),
        (DAY.timestamp() / 86_400, "looks like days since 1970; multiply by 86,400 first"),
        (DAY.timestamp() / 3600, "looks like hours since 1970; multiply by 3,600 first"),
        (DAY.timestamp() / 60, "looks like minutes since 1970; multiply by 60 first"),
    ],
)
def test_times_that_cannot_be_are_refused_by_their_likely_unit(number: float, unit: str) -> None:
    with pytest.raises(UserError, match=f"which cannot be: .*{unit}.*--allow-any-time"):
        check_times(database(["a", "b"], times=[number, number]))


@pytest.mark.parametrize(
    ("factor", "unit", "option"),
    [(1e3, "milli", "ms"), (1e6, "micro", "us"), (1e9, "nano", "ns")],
    ids=str,
)
def test_a_malformed_time_is_told_by_its_unit(factor: float, unit: str, option: str) -> None:
    hint = f"looks like {unit}seconds since 1970; read it with --timestamp-unit {option}"
    assert time_hint(str(NOW * factor)).endswith(hint)


def test_a_malformed_time_that_is_no_number_names_the_option() -> None:
    assert "--timestamp-format" in time_hint("17/04/2021")
    assert time_hint("") == time_hint("nan") == ""


def test_times_that_can_be_pass_and_no_unit_is_made_up(said: Said) -> None:
    check_times(database(["a"], times=[NOW]))
    check_times(database(["a", "b"], times=[0, NOW]))
    check_times(database(["a"], times=[time.time() + 3600]))
    assert likely_unit(1.0, 3.0) == ""
    assert "minutes" in likely_unit(20211399, 20211399)  # no month is 13
    with pytest.raises(UserError, match="00:00:01Z to 1970-01-01T00:00:03Z, which cannot be[.] --"):
        check_times(database(["a", "b"], times=[1, 3]))
