"""dataset.md: its numbers against those worked out by hand, and when it warns."""

from collections.abc import Callable
from pathlib import Path

import pytest
from duckdb import DuckDBPyConnection as Connection

from rec.data_prep.events import Events
from rec.data_prep.split import Filters
from rec.data_prep.write import prepare

Report = Callable[..., str]
NOON = 1_700_000_000
# User, item, event, split: user w and item d are new in test, c is new in val.
ROWS = [
    ("u", "a", "view", "train"),
    ("u", "a", "buy", "train"),
    ("u", "b", "view", "train"),
    ("v", "a", "view", "train"),
    ("v", "c", "view", "val"),
    ("u", "c", "buy", "val"),
    ("v", "b", "buy", "test"),
    ("w", "d", "skip", "test"),
]
EVENTS = Events({"view": 1, "buy": 3, "skip": 1}, negatives=("skip",), targets=("buy",))


@pytest.fixture
def report(tmp_path: Path) -> Report:
    """The text of dataset.md for these rows, and items a to e with a column that most of them lack."""

    def report(rows: list[tuple[str, str, str, str]], repeats: str = "keep") -> str:
        def load(con: Connection, scratch: Path) -> dict[str, int]:
            con.execute(
                "create table interactions (user_id text, item_id text, event text, split text,"
                " timestamp double, source_row bigint)"
            )
            numbered = [(*row, NOON + at, at) for at, row in enumerate(rows)]
            con.executemany("insert into interactions values (?, ?, ?, ?, ?, ?)", numbered)
            con.execute("create table items as select unnest(['a', 'b', 'c', 'd', 'e']) as item_id")
            con.execute("alter table items add x text")
            con.execute("update items set x = 'one|two' where item_id = 'b'")
            return {"bad_rows": 7}

        output = tmp_path / "a=b[1]"
        filters = Filters(repeats=repeats)
        prepare(output, load, "shop", "a test", "given", 0, filters=filters, events=EVENTS)
        return (output / "dataset.md").read_text()

    return report


def test_the_counts_are_those_of_the_rows(report: Report) -> None:
    lines = report(ROWS).splitlines()
    for line in (
        "| interactions | 4 | 2 | 2 |",
        "| users | 2 | 2 | 2 |",
        "| new users | 0 | 0 | 1 |",
        "| items | 2 | 1 | 2 |",
        "| new items | 0 | 1 | 1 |",
        "| first time | 2023-11-14T22:13:20Z | 2023-11-14T22:13:24Z | 2023-11-14T22:13:26Z |",
        "- Interactions per user: 2.7 on average, median 3, at most 4",
        "- Interactions per item: 2.0 on average, median 2, at most 3",
        "- Of all pairs of a user and an item, 58.333% have met",  # 7 of 3 x 4
        "- Long tail: 1 % of the items has 38% of the interactions, 10 % has 38%",  # a has 3 of 8
        "- Repeats of a user and item: 12.5% of the interactions",
        "- Items that nobody has met: 1 of 5",
        "| 7 | malformed rows |",
        "| buy | 3 | asked for | 1 | 1 | 1 |",
        "| skip | 1 | negative | 0 | 0 | 1 |",
        "| view | 1 | history | 3 | 1 | 0 |",
        r"| x | string | 20% | 'one\|two' |  |",
    ):
        assert line in lines


def test_it_warns_of_what_is_unusual_and_the_command_says_so_too(
    report: Report, capsys: pytest.CaptureFixture[str]
) -> None:
    text = report(ROWS)
    err = capsys.readouterr().err
    for warning in (
        "50% of the test items are new: use item features",
        "12% of the interactions repeat a user and item",
        "test has only 2 interactions, so its metrics have wide intervals",
        "items: only 20% of the rows have a value of x",
    ):
        assert f"- {warning}\n" in text
        assert f"warning: {warning}\n" in err
    assert "of the test users are new" not in text
    assert "a=b[1]/dataset.md describes it" in err


def test_known_users_and_items_in_large_parts_are_no_warning(report: Report) -> None:
    parts = ("train", "val", "test")
    rows = [(f"u{at % 40}", "abcde"[at % 5], "buy", part) for part in parts for at in range(1000)]
    text = report([("u0", "e", "view", "train"), *rows, ("u0", "e", "skip", "test")])
    assert "are new" not in text
    assert "has only" not in text
