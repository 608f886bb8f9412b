"""Recommendations on the terminal."""

import json

import pandas as pd
import pytest

from rec.recommend import RecommendedItem, item_line, title_of
from tests.conftest import Trained, run_here


def test_a_known_user_an_unknown_one_and_a_history_are_answered(trained: Trained):
    done = run_here(
        "rec.recommend", "--user", "u7", "--user", "x", "--k", 3, "--config", trained.config
    )
    assert done.returncode == 0, done.stderr
    known, unknown = json.loads(done.stdout)["users"]
    assert (known["user_id"], known["cold_start"]) == ("u7", False)
    assert (unknown["user_id"], unknown["cold_start"]) == ("x", True)
    assert [len(user["items"]) for user in (known, unknown)] == [3, 3]
    assert known["items"][0]["title"] in done.stderr

    done = run_here("rec.recommend", "--history", "i1", "i2", "--config", trained.config)
    (user,) = json.loads(done.stdout)["users"]
    assert not {"i1", "i2"} & {item["item_id"] for item in user["items"]}


def test_users_can_be_typed(trained: Trained):
    done = run_here("rec.recommend", "--config", trained.config, stdin="u1\nu2\n")
    assert [user["user_id"] for user in json.loads(done.stdout)["users"]] == ["u1", "u2"]


def test_more_than_the_bundle_retrieves_is_refused(trained: Trained):
    done = run_here("rec.recommend", "--user", "u1", "--k", 1000, "--config", trained.config)
    assert done.returncode == 1
    assert "error: --k: must be from 1 to 50" in done.stderr


@pytest.mark.parametrize("missing", [None, float("nan"), pd.NA])
def test_an_item_without_a_title_is_shown_by_its_id(missing: object):
    items = pd.DataFrame({"title": ["A film", missing]}, index=["i1", "i2"])
    assert [title_of(items, item) for item in ("i1", "i2", "gone")] == ["A film", "i2", "gone"]
    assert title_of(items.drop(columns="title"), "i1") == "i1"


def test_an_item_is_shown_with_its_score_or_with_a_dash():
    assert item_line(RecommendedItem("i1", 1.25, "Iron Drama")) == "     1.250  Iron Drama"
    assert item_line(RecommendedItem("i2", None, "i2")) == "         -  i2"
