"""Recommendations in Python, on the terminal and as a file."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from rec.api import Recommender, make_request
from rec.bundles import files
from rec.errors import UserError
from rec.ops import recommendations
from rec.ops.recommendations import write_recommendations
from rec.recommend import item_line
from rec.serving.schemas import Item, RecommendRequest
from tests.conftest import ROOT, Trained, environment, run

USERS = ["u7", "u1", "nobody", "u1", "u30"]


@pytest.fixture(scope="module")
def recommender(trained: Trained) -> Recommender:
    return Recommender.load(trained.savedmodels)


# ------------------------------------------------------------------------------------------------------------
# In Python


def test_importing_the_package_does_not_import_tensorflow() -> None:
    program = "import rec, sys; assert 'tensorflow' not in sys.modules; rec.Recommender"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment())
    assert done.returncode == 0


def test_python_gets_what_the_engine_answers(recommender: Recommender) -> None:
    answer = recommender.recommend(
        "u7", k=4, history=["i1", "i2"], exclude=["i3"], filter={"genres": ["Drama"]}
    )
    request = RecommendRequest(
        user_id="u7", k=4, history=["i1", "i2"], exclude=["i3"], filter={"genres": ["Drama"]}
    )
    (expected,) = recommender.engine.recommend([request])
    assert answer.model_dump(exclude_unset=True) == expected
    assert len(answer.items) == 4
    (near,) = recommender.engine.similar([("i1", 3)])
    assert recommender.similar("i1", k=3).model_dump(exclude_unset=True) == near


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k: Input should be greater"),
        ({"k": 1000}, "k: must be at most 50"),
        ({"filter": {"genre": ["x"]}}, "did you mean genres"),
    ],
)
def test_what_does_not_fit_is_refused(
    recommender: Recommender, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        recommender.recommend("u7", **options)


# ------------------------------------------------------------------------------------------------------------
# On the terminal


def test_a_known_user_an_unknown_one_and_a_history_are_answered(trained: Trained) -> None:
    done = run("rec.recommend", "--user", "u7", "--user", "x", "--k", 3, "--config", trained.config)
    assert done.returncode == 0, done.stderr
    known, unknown = json.loads(done.stdout)["users"]
    assert (known["user_id"], known["cold_start"]) == ("u7", False)
    assert (unknown["user_id"], unknown["cold_start"]) == ("x", True)
    assert [len(user["items"]) for user in (known, unknown)] == [3, 3]
    assert known["items"][0]["title"] in done.stderr

    done = run("rec.recommend", "--history", "i1", "i2", "--config", trained.config)
    (user,) = json.loads(done.stdout)["users"]
    assert not {"i1", "i2"} & {item["item_id"] for item in user["items"]}


def test_users_can_be_typed(trained: Trained) -> None:
    command = [sys.executable, "-m", "rec.recommend", "--config", str(trained.config)]
    done = subprocess.run(
        command, input="u1\nu2\n", cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert [user["user_id"] for user in json.loads(done.stdout)["users"]] == ["u1", "u2"]


def test_an_item_is_shown_with_its_score_or_with_a_dash_and_without_a_title_by_its_id() -> None:
    scored = Item.model_validate({"item_id": "i1", "score": 1.25, "title": "Iron Drama"})
    assert item_line(scored) == "     1.250  Iron Drama"
    unscored = Item.model_validate({"item_id": "i2", "score": None, "title": None})
    assert item_line(unscored) == "         -  i2"
    assert item_line(Item(item_id="i3", score=None)) == "         -  i3"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--users", "all"], "--users and --output: a file needs both"),
        (["--request", "k"], "--request: this is not JSON"),
        (["--request", "[]"], "--request: must be an object"),
        (["--k", "0"], "k: Input should be greater"),
        (["--request", '{"kk": 3}'], "kk: Extra inputs are not permitted"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rec.recommend import parse, read_request

    monkeypatch.setattr(sys, "argv", ["recommend", *arguments])
    with pytest.raises(UserError, match=message):
        read_request(parse())


# ------------------------------------------------------------------------------------------------------------
# As a file


@pytest.fixture
def users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of USERS, who are answered in parts of two."""
    monkeypatch.setattr(recommendations, "PART", 2)
    monkeypatch.setattr(recommendations, "BATCH", 1)
    path = tmp_path / "users.txt"
    path.write_text("u7\nu1\r\n\nnobody\nu1\nu30")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of any format, with None for an empty score."""
    if path.suffix == ".parquet":
        rows = pd.read_parquet(path).to_dict("records")
    elif path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    else:
        with open(path, newline="") as lines:
            rows = list(csv.DictReader(lines))
    return [
        {
            "user_id": row["user_id"],
            "rank": int(row["rank"]),
            "item_id": row["item_id"],
            "score": None
            if row["score"] in ("", None) or row["score"] != row["score"]
            else np.float32(row["score"]),
            "cold_start": row["cold_start"] in (True, "true"),
        }
        for row in rows
    ]


def expected(recommender: Recommender, request: RecommendRequest) -> list[dict[str, Any]]:
    """The rows that the API's answers have."""
    rows = []
    for user_id in USERS:
        answer = recommender.answer(request.model_copy(update={"user_id": user_id}))
        for rank, item in enumerate(answer.items, 1):
            score = None if item.score is None else np.float32(item.score)
            rows.append(
                {
                    "user_id": user_id,
                    "rank": rank,
                    "item_id": item.item_id,
                    "score": score,
                    "cold_start": answer.cold_start,
                }
            )
    return rows


@pytest.mark.parametrize(
    ("ending", "options"),
    [
        ("parquet", {"filter": {"genres": ["Comedy"]}, "exclude": ["i5"]}),
        ("csv", {}),
        ("jsonl", {"max_per": {"genres": 5}, "diversity": 0.3}),
    ],
)
def test_a_file_has_the_answers_of_the_api(
    recommender: Recommender, users: Path, tmp_path: Path, ending: str, options: dict[str, Any]
) -> None:
    request = make_request({"k": 50, **options})
    output = tmp_path / f"it's.{ending}"
    report = write_recommendations(recommender.engine, users, output, request)
    rows = expected(recommender, request)
    assert read(output) == rows
    assert any(row["score"] is None for row in rows)
    assert (report["users"], report["rows"]) == (len(USERS), len(rows))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([output.name, "users.txt"])


def test_a_file_follows_the_rule_of_its_request(
    recommender: Recommender, users: Path, tmp_path: Path
) -> None:
    output = tmp_path / "recs.csv"
    rows = []
    for rule in (True, False):
        request = make_request({"k": 5, "exclude_seen": rule})
        write_recommendations(recommender.engine, users, output, request)
        rows.append(read(output))
        assert rows[-1] == expected(recommender, request)
    assert rows[0] != rows[1]


class InterruptedByTestError(Exception):
    pass


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int | None) -> list[str]:
    """Lets the answers fail after some users; returns a list of those who have been answered since."""
    answered: list[str] = []
    answer = recommendations.Answers.of

    def counted(answers: recommendations.Answers, users: list[str]) -> Any:
        if after is not None and len(answered) >= after:
            raise InterruptedByTestError
        answered.extend(users)
        return answer(answers, users)

    monkeypatch.setattr(recommendations.Answers, "of", counted)
    return answered


def test_an_interrupted_run_is_resumed_unless_something_has_changed(
    recommender: Recommender, users: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "recs.parquet"
    request = RecommendRequest(k=3)
    rows = expected(recommender, request)
    with monkeypatch.context() as patch:
        interrupt(patch, after=3)
        with pytest.raises(InterruptedByTestError):
            write_recommendations(recommender.engine, users, output, request)
    assert not output.exists()
    with monkeypatch.context() as patch:
        answered = interrupt(patch, after=None)
        write_recommendations(recommender.engine, users, output, request)
    assert answered == USERS[2:]
    assert read(output) == rows

    with monkeypatch.context() as patch:
        interrupt(patch, after=3)
        with pytest.raises(InterruptedByTestError):
            write_recommendations(recommender.engine, users, output, request)
    other = RecommendRequest(k=4)
    write_recommendations(recommender.engine, users, output, other)
    assert read(output) == expected(recommender, other)


def test_no_users_are_a_file_without_rows(recommender: Recommender, tmp_path: Path) -> None:
    (tmp_path / "none").touch()
    for output in (tmp_path / "recs.parquet", tmp_path / "recs.jsonl"):
        report = write_recommendations(
            recommender.engine, tmp_path / "none", output, RecommendRequest()
        )
        assert (report["rows"], read(output)) == (0, [])


def test_what_cannot_be_written_or_read_is_refused(
    recommender: Recommender, tmp_path: Path
) -> None:
    (tmp_path / "users").write_bytes(b"u\xff\n")
    for output, message in (("recs.xlsx", "must end in"), ("recs.csv", "must be UTF-8")):
        with pytest.raises(UserError, match=message):
            write_recommendations(
                recommender.engine, tmp_path / "users", tmp_path / output, RecommendRequest()
            )


def test_all_users_of_the_bundles_are_written(trained: Trained, tmp_path: Path) -> None:
    output = tmp_path / "recs.parquet"
    done = run(
        "rec.recommend", "--users", "all", "--k", 2, "--output", output, "--config", trained.config
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"] == 400
    retrieval, _ = files.find_pair(trained.savedmodels)
    ids = files.user_file(retrieval).read_text().split()
    assert list(dict.fromkeys(pd.read_parquet(output)["user_id"])) == ids
