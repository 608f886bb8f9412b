"""Events, weights, repeats and rare items, from a file to what a dataset directory says of them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rec.data_prep import tabular
from rec.data_prep.dataset import Dataset, open_dataset
from rec.errors import UserError

Run = Callable[..., Dataset]
# Of each user in order of time, a second apart. "+" is a purchase, "-" a dislike, otherwise a view.
WALKS = {"u": "a b a+ c b+ d", "v": "b c- a+ b+ d", "w": "d c b a"}
EVENTS = {"+": "purchase", "-": "dislike"}
COLUMNS = ["--timestamp-col", "time", "--allow-any-time", "--event-col", "event"]
LAST = ["--split", "leave_one_out"]


def clicks(walks: dict[str, str]) -> str:
    rows = ["user_id,item_id,time,event,amount"]
    for user, walk in walks.items():
        for time, step in enumerate(walk.split(), 1):
            rows.append(f"{user},{step[0]},{time},{EVENTS.get(step[1:], 'view')},{time / 2}")
    return "\n".join([*rows, ""])


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command on the walks, or another text; opens the dataset."""

    def run(*args: str, text: str = clicks(WALKS)) -> Dataset:
        monkeypatch.chdir(tmp_path)
        Path("clicks.csv").write_text(text)
        options = ["--interactions", "clicks.csv", *COLUMNS, *args]
        monkeypatch.setattr("sys.argv", ["tabular", "--output-dir", "out", *options])
        tabular.main()
        return open_dataset("out")

    return run


def steps(dataset: Dataset, split: str) -> dict[str, str]:
    """Of each user, the items and events of a split, as in WALKS."""
    marks = {event: mark for mark, event in EVENTS.items()} | {"view": ""}
    rows = dataset.interactions(split)
    rows["step"] = rows["item_id"] + rows["event"].astype(object).map(marks)
    return {str(user): " ".join(group["step"]) for user, group in rows.groupby("user_id")}


def test_events_are_kept_and_another_event_is_no_repeat(run: Run) -> None:
    dataset = run(*LAST)
    assert steps(dataset, "train") == {"u": "a b a+ c", "v": "b c- a+", "w": "d c"}
    assert dataset.manifest["events"] == {"dislike": 1.0, "purchase": 1.0, "view": 1.0}
    assert dataset.manifest["negative_events"] == dataset.manifest["target_events"] == []
    assert "weight" not in dataset.columns
    assert (dataset.positive_events, dataset.label_events) == (None, None)
    assert dataset.has_repeats


def test_weights_of_events_are_written_and_weight_0_drops_and_is_counted(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = run(*LAST, "--event-weights", "view=0.5, purchase=3,dislike=0")
    rows = dataset.interactions("train")
    assert rows["weight"].dtype == "float32"
    weights = dict(zip(rows["event"], rows["weight"], strict=True))
    assert weights == {"view": 0.5, "purchase": 3.0}
    assert dataset.manifest["events"] == {"purchase": 3.0, "view": 0.5}
    out, err = capsys.readouterr()
    assert json.loads(out)["dropped"]["of_weight_0"] == 1
    assert "dropped: 1 interactions of weight 0" in err


def test_a_column_of_weights_is_multiplied_by_the_event(run: Run) -> None:
    weights = ["--weight-col", "amount", "--event-weights", "view=1,purchase=10,dislike=1"]
    rows = run(*LAST, *weights).interactions("train").query("user_id == 'u'")
    assert rows["weight"].tolist() == [0.5, 1.0, 15.0, 2.0]
    rows = run(*LAST, "--weight-col", "amount").interactions("train").query("user_id == 'u'")
    assert rows["weight"].tolist() == [0.5, 1.0, 1.5, 2.0]
    with pytest.raises(UserError, match="^clicks.csv:2: amount '-1' is not a number of at least 0"):
        run(*LAST, "--weight-col", "amount", text=clicks(WALKS).replace("view,0.5", "view,-1"))


def test_val_and_test_ask_for_target_events_and_all_others_are_history(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = run(*LAST, "--target-events", "purchase", "--negative-events", "dislike")
    assert steps(dataset, "train") == {"u": "a b", "v": "b c-", "w": "d c b a"}
    assert steps(dataset, "val") == {"u": "a+ c", "v": "a+"}
    assert steps(dataset, "test") == {"u": "b+ d", "v": "b+ d"}
    assert dataset.label_events == ["purchase"]
    assert dataset.positive_events == ["purchase", "view"]
    assert "test asks for 2 of its 4 interactions (purchase)" in capsys.readouterr().err


def test_negative_events_are_asked_for_by_nobody(run: Run) -> None:
    walks = WALKS | {"u": "a b c d-"}
    dataset = run(*LAST, "--negative-events", "dislike", text=clicks(walks))
    assert steps(dataset, "train")["u"] == "a"
    assert steps(dataset, "test")["u"] == "c d-"
    assert dataset.label_events == dataset.positive_events == ["purchase", "view"]


def test_a_temporal_split_asks_for_targets_too(run: Run) -> None:
    walk = " ".join(["a b+ c d+"] * 5)
    dataset = run("--target-events", "purchase", "--repeats", "keep", text=clicks({"u": walk}))
    assert (steps(dataset, "val"), steps(dataset, "test")) == ({"u": "a b+"}, {"u": "c d+"})
    assert dataset.label_events == ["purchase"]
    with pytest.raises(UserError, match="the temporal split leaves val empty"):
        run("--target-events", "dislike", text=clicks({"u": f"a b- {walk}"}))


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        (
            ["--event-weights", "view=1,purchase=2"],
            r"does not name dislike: the events are view \(10\), purchase \(4\), dislike \(1\);"
            " give dislike a weight",
        ),
        (["--event-weights", "view=1,buy=2"], "--event-weights names buy, which does not occur"),
        (["--event-weights", "view"], "'view' is no event with its weight: write view=1,cart=3"),
        (["--event-weights", "view=-1"], "'view=-1' is no event with its weight"),
        (["--target-events", "purchases"], "--target-events names purchases, which does not"),
        (["--negative-events", "skip"], r"--negative-events names skip, .*dislike \(1\)"),
        (["--negative-events", "view", "--target-events", "view"], "view has weight 0, or is both"),
        (["--event-weights", "view=0,purchase=0,dislike=0"], "all 15 interactions have weight 0"),
        (["--event-weights", "view=1", "--event-col", ""], "--event-weights needs --event-col"),
    ],
)
def test_an_event_that_is_forgotten_or_misspelt_is_refused_with_the_counts(
    run: Run, args: list[str], problem: str
) -> None:
    with pytest.raises(UserError, match=problem):
        run(*LAST, *args)


def test_a_row_without_an_event_is_malformed(run: Run) -> None:
    with pytest.raises(UserError, match="^clicks.csv:2: event '' is empty"):
        run(*LAST, text=clicks(WALKS).replace("view", "", 1))


# ------------------------------------------------------------------------------------------------------------
# Repeats, rare items, ranges of time

AGAIN = {"u": "a b a c a", "v": "b a b c", "w": "c a b"}


@pytest.mark.parametrize(
    ("repeats", "expected", "has_repeats"),
    [("first", "a b c", False), ("last", "b c a", False), ("keep", "a b a c a", True)],
)
def test_repeats_stay_as_asked_for(
    run: Run, capsys: pytest.CaptureFixture[str], repeats: str, expected: str, has_repeats: bool
) -> None:
    dataset = run(*LAST, "--repeats", repeats, text=clicks(AGAIN))
    parts = [steps(dataset, part)["u"] for part in ("train", "val", "test")]
    assert " ".join(parts) == expected
    assert dataset.manifest["repeats"] == repeats
    assert dataset.has_repeats == has_repeats
    said = f"3 of 12 interactions repeat a user and item, and only the {repeats} of each counts"
    assert (said in capsys.readouterr().err) == (repeats != "keep")


def test_few_repeats_are_only_counted(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run(*LAST, text=clicks({"u": "a b c d e f a", "v": "f e d c b a"}))
    err = capsys.readouterr().err
    assert "dropped: 1 duplicate interactions" in err
    assert "repeat a user and item, and" not in err


def test_rare_users_and_items_are_dropped_until_all_are_frequent(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    # x has item e alone, without which it has two interactions; without x, item d has one.
    walks = {"u": "a b c", "v": "b a c", "w": "c a b d", "x": "a d e"}
    core = ["--min-interactions", "3", "--min-item-interactions", "2"]
    dataset = run(*LAST, *core, text=clicks(walks))
    assert dataset.users()["user_id"].tolist() == ["u", "v", "w"]
    assert dataset.items()["item_id"].tolist() == ["a", "b", "c"]
    dropped = json.loads(capsys.readouterr().out)["dropped"]
    assert (dropped["of_inactive_users"], dropped["of_rare_items"]) == (2, 2)
    with pytest.raises(
        UserError, match="^--min-item-interactions 9 drops all items: the most freq"
    ):
        run(*LAST, "--min-item-interactions", "9")
    run(*LAST, "--min-item-interactions", "2")
    assert "--min-item-interactions 2 drops nothing: every item" in capsys.readouterr().err


def test_a_range_of_time_is_kept(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = run(*LAST, "--since", "2", "--until", "1970-01-01T00:00:05Z")
    rows = [dataset.interactions(part)["timestamp"] for part in ("train", "val", "test")]
    assert {int(time) for times in rows for time in times} == {2, 3, 4}
    dropped = json.loads(capsys.readouterr().out)["dropped"]
    assert (dropped["before_since"], dropped["after_until"]) == (3, 3)
    run(*LAST, "--since", "1970-01-01")
    said = "--since 1970-01-01T00:00:00Z drops nothing: the earliest time is 1970-01-01T00:00:01Z"
    assert said in capsys.readouterr().err
    with pytest.raises(
        UserError, match="drops all 15 interactions: the latest time is 1970-01-01T"
    ):
        run(*LAST, "--since", "2024-01-31")
    with pytest.raises(UserError, match="'soon' is no time for --since or --until: write 2024-"):
        run(*LAST, "--until", "soon")
