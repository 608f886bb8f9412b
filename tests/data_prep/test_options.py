"""Options of the tabular command that could have no effect, and what is said in each case."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rec.data_prep import tabular
from rec.data_prep.dataset import Dataset, open_dataset
from rec.errors import UserError

Run = Callable[..., Dataset]
CLICKS = "user_id,item_id,time,stars\n" + "".join(
    f"{user},{item},2021-04-{17 + at},{3 + at}\n"
    for user, items in (("u", "abc"), ("v", "cba"))
    for at, item in enumerate(items)
)
FILES = ["--interactions", "clicks.csv", "--split", "leave_one_out"]
TIMED = [*FILES, "--timestamp-col", "time"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command on clicks.csv, and items.csv if its text is given; opens the dataset."""

    def run(*args: str, clicks: str = CLICKS, items: str = "") -> Dataset:
        monkeypatch.chdir(tmp_path)
        Path("clicks.csv").write_text(clicks)
        Path("items.csv").write_text(items)
        more = ["--items", "items.csv"] if items else []
        monkeypatch.setattr("sys.argv", ["tabular", "--output-dir", "out", *args, *more])
        tabular.main()
        return open_dataset("out")

    return run


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        ([*FILES, "--allow-any-time"], "--allow-any-time needs --timestamp-col"),
        ([*FILES, "--timestamp-format", "%Y"], "--timestamp-format needs --timestamp-col"),
        ([*FILES, "--list-separator", ","], "--list-separator needs --list-col"),
        ([*FILES, "--min-interactions", "0"], "--min-interactions must be at least 1, not 0"),
        ([*FILES, "--item-col", "user_id"], "--user-col and --item-col name the same column"),
        ([*TIMED, "--timestamp-format", "YYYY"], "'YYYY' has no %: write YYYYMMDD as '%Y%m%d'"),
        ([*TIMED, "--timestamp-format", "%Q"], "--timestamp-format '%Q': .*specifier %Q"),
        (
            [*TIMED, "--rating-col", "stars", "--min-rating", "6"],
            "--min-rating 6 drops all 6 interactions: the highest rating is 5",
        ),
    ],
)
def test_an_option_that_could_have_no_effect_is_refused(
    run: Run, args: list[str], problem: str
) -> None:
    with pytest.raises(UserError, match=problem):
        run(*args)


def test_the_id_column_is_no_list_column(run: Run) -> None:
    with pytest.raises(UserError, match="--list-col item_id: neither --users nor --items has such"):
        run(*TIMED, "--list-col", "item_id", items="item_id,x\na,1\n")


@pytest.mark.parametrize(("args", "is_used"), [(TIMED, False), (FILES, True)])
def test_a_seed_without_anything_to_draw_is_said(
    run: Run, capsys: pytest.CaptureFixture[str], args: list[str], is_used: bool
) -> None:
    dataset = run(*args, "--seed", "7")
    assert (dataset.manifest["split"].get("seed") == 7) == is_used
    assert ("--seed 7 has no effect" in capsys.readouterr().err) != is_used


def test_times_in_another_form_are_read_and_a_wrong_one_is_named(run: Run) -> None:
    written = CLICKS.replace("2021-04-", "202104")
    with pytest.raises(
        UserError, match="20210417 looks like a date written YYYYMMDD; read it with"
    ):
        run(*TIMED, clicks=written)
    days = run(*TIMED, "--timestamp-format", "%Y%m%d", clicks=written)
    assert days.interactions("train")["timestamp"].tolist() == [1_618_617_600] * 2
    with pytest.raises(
        UserError, match="^clicks.csv:2: time '2021-04-17' is not a time written '%Y%m%d' .6"
    ):
        run(*TIMED, "--timestamp-format", "%Y%m%d")


def test_any_time_is_taken_if_asked_for(run: Run) -> None:
    written = CLICKS.replace("2021-04-", "")
    with pytest.raises(UserError, match="from 1970-01-01T00:00:17Z to 1970-01-01T00:00:19Z"):
        run(*TIMED, clicks=written)
    dataset = run(*TIMED, "--allow-any-time", clicks=written)
    assert dataset.interactions("test")["timestamp"].tolist() == [19, 19]


def test_a_table_of_columns_is_printed_and_stdout_is_the_json_alone(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run(*TIMED, items="item_id,year,note\na,1990,\nb,n/a,\nc,1991,\n")
    out, err = capsys.readouterr()
    assert json.loads(out)["items"] == 3
    lines = err.splitlines()
    at = lines.index("items: columns of 3 rows")
    assert lines[at + 1 : at + 5] == [
        "  column  kind    filled  example  why",
        "  year    string  100%    '1990'   'n/a' on line 3 is not a number",
        "  note    string  0%      -        it is empty",
        "warning: items: column note is empty in all 3 rows",
    ]


def test_a_file_without_features_is_said(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run(*TIMED, items="item_id\na\nb\nc\nnew\n")
    err = capsys.readouterr().err
    assert "items.csv has no column beside item_id, so it adds no features" in err
    assert "1 of its 4 rows have no interactions" in err


def test_a_reserved_name_is_refused_before_anything_is_written(run: Run) -> None:
    with pytest.raises(UserError, match="has a column score, a name that answers use .*item_score"):
        run(*TIMED, items="item_id,score\na,1\n")
    assert not Path("out").exists()
