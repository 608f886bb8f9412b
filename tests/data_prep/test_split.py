"""Filters and splits, on tables small enough to work out by hand."""

from collections.abc import Sequence
from pathlib import Path

import duckdb
import pandas as pd
import pytest

from rec.data_prep.engine import Engine
from rec.data_prep.split import Filters, filter_interactions, split_interactions
from rec.errors import UserError

Row = tuple[str | float | int | None, ...]


def database(columns: str, rows: Sequence[Row]) -> Engine:
    con = duckdb.connect()
    con.execute(f"create table interactions ({columns}, source_row bigint)")
    con.register("rows", pd.DataFrame([(*row, number) for number, row in enumerate(rows, 1)]))
    con.execute("insert into interactions select * from rows")
    return Engine(con, Path())


ORDERED = "user_id varchar, item_id varchar, timestamp double"
UNORDERED = "user_id varchar, item_id varchar"
GIVEN = "user_id varchar, item_id varchar, split varchar"


def split_of(engine: Engine, strategy: str, seed: int = 0) -> dict[str, set[str]]:
    """Split -> its interactions, written "user item"."""
    filter_interactions(engine, Filters())
    split_interactions(engine, strategy, seed)
    rows = engine.rows("select split, user_id || ' ' || item_id from interactions")
    return {
        part: {pair for split, pair in rows if split == part} for part in ("train", "val", "test")
    }


def test_temporal_cuts_at_80_and_90_percent_of_the_interactions() -> None:
    engine = database(ORDERED, [(f"u{number}", "i", 100.0 + number) for number in range(20)])
    parts = split_of(engine, "temporal")
    assert [len(parts[part]) for part in ("train", "val", "test")] == [16, 2, 2]
    assert engine.rows("select max(timestamp) from interactions where split = 'train'") == [
        (115.0,)
    ]


def test_temporal_cut_never_falls_between_equal_times() -> None:
    times = [
        1,
        2,
        3,
        4,
        5,
        6,
        7,
        8,
        8,
        8,
        9,
        10,
    ]  # 80 % of 12 lie at or before the tenth, the last of the eights
    engine = database(
        ORDERED, [(f"u{number}", "i", float(time)) for number, time in enumerate(times)]
    )
    filter_interactions(engine, Filters())
    assert split_interactions(engine, "temporal", 0) == {
        "strategy": "temporal",
        "val_from": 9,
        "test_from": 10,
    }
    eights = engine.rows("select distinct split from interactions where timestamp = 8")
    assert eights == [("train",)]


def test_temporal_cut_keeps_fractions_of_a_second_together() -> None:
    times = [1, 2, 3, 4, 5, 6, 7, 8.25, 9.5, 10.75]
    engine = database(
        ORDERED, [(f"u{number}", "i", float(time)) for number, time in enumerate(times)]
    )
    assert split_of(engine, "temporal") == {
        "train": {f"u{number} i" for number in range(8)},
        "val": {"u8 i"},
        "test": {"u9 i"},
    }


def test_temporal_without_timestamps_says_what_to_do() -> None:
    with pytest.raises(UserError, match="--timestamp-col.*--split leave_one_out"):
        split_of(database(UNORDERED, [("u", "a"), ("u", "b")]), "temporal")


def test_temporal_with_one_time_only_is_refused() -> None:
    engine = database(ORDERED, [("u", "a", 5.0), ("u", "b", 5.0), ("v", "a", 5.0)])
    with pytest.raises(UserError, match="the temporal split leaves val empty"):
        split_of(engine, "temporal")


def test_leave_one_out_takes_the_last_and_the_last_but_one() -> None:
    rows = [
        ("u", "c", 3.0),
        ("u", "a", 1.0),
        ("u", "b", 2.0),
        ("v", "b", 9.0),
        ("v", "c", 8.0),
        ("w", "c", 1.0),
    ]
    parts = split_of(database(ORDERED, rows + [("w", "b", 2.0), ("w", "a", 0.0)]), "leave_one_out")
    assert parts["test"] == {"u c", "w b"}
    assert parts["val"] == {"u b", "w c"}
    assert parts["train"] == {
        "u a",
        "w a",
        "v b",
        "v c",
    }  # v has two interactions, which stay in train


def test_leave_one_out_resolves_ties_in_time_by_the_order_of_the_source() -> None:
    parts = split_of(
        database(ORDERED, [("u", "b", 1.0), ("u", "c", 1.0), ("u", "a", 1.0), ("v", "a", 0.0)]),
        "leave_one_out",
    )
    assert parts == {"train": {"u b", "v a"}, "val": {"u c"}, "test": {"u a"}}


def test_leave_one_out_without_timestamps_draws_from_the_seed() -> None:
    rows: list[Row] = [(f"u{user}", f"i{item}") for user in range(30) for item in range(6)]
    parts = split_of(database(UNORDERED, rows), "leave_one_out", seed=1)
    assert [len(parts[part]) for part in ("train", "val", "test")] == [120, 30, 30]
    assert {pair.split()[0] for pair in parts["test"]} == {f"u{user}" for user in range(30)}
    assert parts == split_of(database(UNORDERED, rows[::-1]), "leave_one_out", seed=1)
    assert parts != split_of(database(UNORDERED, rows), "leave_one_out", seed=2)


def test_leave_one_out_needs_a_user_with_three_interactions() -> None:
    with pytest.raises(UserError, match="no user has three interactions"):
        split_of(database(UNORDERED, [("u", "a"), ("u", "b")]), "leave_one_out")


def test_given_split_keeps_a_pair_only_in_its_earliest_split() -> None:
    rows: list[Row] = [
        ("u", "a", "test"),
        ("u", "b", "test"),
        ("u", "a", "train"),
        ("u", "c", "val"),
        ("u", "b", "val"),
    ]
    engine = database(GIVEN, [*rows, ("v", "b", "train"), ("v", "a", "test")])
    assert filter_interactions(engine, Filters())["duplicates"] == 2
    split_interactions(engine, "given", 0)
    kept = engine.rows("select split, user_id, item_id from interactions order by all")
    assert kept == [
        ("test", "v", "a"),
        ("train", "u", "a"),
        ("train", "v", "b"),
        ("val", "u", "b"),
        ("val", "u", "c"),
    ]


@pytest.mark.parametrize(("test_time", "is_latest"), [(99, True), (30, False)])
def test_given_split_without_val_takes_a_tenth_of_train_as_test_was_taken(
    test_time: int, is_latest: bool
) -> None:
    rows = [(f"u{n % 10}", f"i{n}", float(n), "train") for n in range(100)]
    engine = database(f"{ORDERED}, split varchar", rows)
    engine.con.execute(f"insert into interactions values ('u1', 'i2', {test_time}, 'test', 999)")
    parts = split_of(engine, "given")
    assert parts["test"] == {"u1 i2"}
    assert 3 <= len(parts["val"]) <= 20
    assert (parts["val"] == {f"u{n % 10} i{n}" for n in range(90, 100)}) == is_latest


def test_given_split_without_val_or_times_draws_a_tenth_and_leaves_every_user_in_train() -> None:
    rows: list[Row] = [
        (f"u{user}", f"i{item}", "train") for user in range(100) for item in range(user % 20 + 1)
    ]
    parts = split_of(database(GIVEN, [*rows, ("u1", "i9", "test")]), "given", seed=3)
    assert 0.06 < len(parts["val"]) / len(rows) < 0.12
    assert {pair.split()[0] for pair in parts["train"]} == {f"u{user}" for user in range(100)}


def test_test_set_that_repeats_train_is_refused() -> None:
    engine = database(GIVEN, [("u", "a", "train"), ("u", "b", "val"), ("u", "a", "test")])
    with pytest.raises(
        UserError, match="leaves test empty: all its interactions are in an earlier split"
    ):
        split_of(engine, "given")


def test_test_set_without_an_item_of_train_is_refused() -> None:
    engine = database(GIVEN, [("u", "a", "train"), ("u", "b", "val"), ("u", "c", "test")])
    with pytest.raises(UserError, match="no item of test occurs in train"):
        split_of(engine, "given")


def test_duplicates_keep_the_earliest_time_and_are_counted() -> None:
    engine = database(ORDERED, [("u", "a", 5.0), ("u", "a", 2.0), ("u", "b", 3.0), ("u", "a", 2.0)])
    assert filter_interactions(engine, Filters()) == {
        "below_min_rating": 0,
        "duplicates": 2,
        "of_inactive_users": 0,
    }
    kept = engine.rows("select item_id, timestamp, source_row from interactions order by item_id")
    assert kept == [("a", 2.0, 2), ("b", 3.0, 3)]


def test_min_rating_applies_before_duplicates_and_min_interactions_after() -> None:
    columns = "user_id varchar, item_id varchar, rating float"
    rows: list[Row] = [
        ("u", "a", 1.0),
        ("u", "a", 4.0),
        ("u", "b", 3.0),
        ("v", "a", 5.0),
        ("v", "a", 4.0),
        ("v", "b", 2.0),
    ]
    engine = database(columns, rows)
    dropped = filter_interactions(engine, Filters(3.0, 2))
    assert dropped == {
        "below_min_rating": 2,
        "duplicates": 1,
        "of_inactive_users": 1,
    }  # v is left with one
    assert engine.rows("select user_id, item_id, rating from interactions order by item_id") == [
        ("u", "a", 4.0),
        ("u", "b", 3.0),
    ]


def test_a_filter_that_drops_everything_is_refused_with_a_value() -> None:
    columns = "user_id varchar, item_id varchar, rating float"
    rows: list[Row] = [("u", "a", 1.0), ("u", "b", 3.5), ("v", "a", 2.0)]
    with pytest.raises(
        UserError, match="^--min-rating 4 drops all 3 interactions: the highest rating is 3.5$"
    ):
        filter_interactions(database(columns, rows), Filters(4.0, 1))
    with pytest.raises(
        UserError, match="^--min-interactions 3 drops all users: the most active one has 2$"
    ):
        filter_interactions(database(columns, rows), Filters(min_interactions=3))


def test_a_filter_that_drops_nothing_is_said_with_a_value(
    capsys: pytest.CaptureFixture[str],
) -> None:
    columns = "user_id varchar, item_id varchar, rating float"
    rows: list[Row] = [("u", "a", 1.0), ("u", "b", 3.5), ("v", "a", 2.0), ("v", "b", 2.0)]
    filter_interactions(database(columns, rows), Filters(0.5, 2))
    assert capsys.readouterr().err.splitlines() == [
        "--min-rating 0.5 drops nothing: the lowest rating is 1",
        "--min-interactions 2 drops nothing: every user has as many",
    ]
    filter_interactions(database(columns, rows), Filters(1.5, 2))
    assert capsys.readouterr().err == ""


def test_min_rating_compares_as_the_ratings_are_stored() -> None:
    engine = database(
        "user_id varchar, item_id varchar, rating float", [("u", "a", 3.3), ("u", "b", 3.2)]
    )
    assert (
        filter_interactions(engine, Filters(3.3, 1))["below_min_rating"] == 1
    )  # 3.3 in 32 bits is less than in 64
