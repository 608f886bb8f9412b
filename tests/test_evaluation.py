"""Who is evaluated, and how a recommendation is shown."""

from dataclasses import replace

import numpy as np
import pytest

from rec import evaluation
from rec.features import FIRST_ITEM
from tests.small import corpus


def test_of_more_users_than_there_is_time_for_some_are_drawn_and_only_they_count(
    monkeypatch: pytest.MonkeyPatch,
):
    rows = np.arange(40) % 6 + FIRST_ITEM
    data = corpus(
        [[int(row)] for row in rows],
        test=[[int((row - FIRST_ITEM + 1) % 6) + FIRST_ITEM] for row in rows],
    )
    whole = evaluation.Task(data, "test")
    assert (len(whole.users), whole.out_of, len(whole.held.items)) == (40, 40, 40)
    monkeypatch.setattr(evaluation, "FEWEST_USERS", 2)
    monkeypatch.setattr(evaluation, "MOST_SCORES", 6 * 15)  # of 6 items
    drawn, again = (evaluation.Task(data, "test") for _ in range(2))
    assert (len(drawn.users), drawn.out_of) == (15, 40)
    assert drawn.users.tolist() == again.users.tolist() != list(range(1, 16))
    assert np.flatnonzero(drawn.held.lengths).tolist() == drawn.users.tolist()
    chosen = np.isin(whole.users, drawn.users)
    for part, of_all in ((drawn.relevant, whole.relevant), (drawn.seen, whole.seen)):
        np.testing.assert_array_equal(part.toarray(), of_all[chosen].toarray())


def test_what_was_met_is_barred_by_the_rule_and_still_history():
    data = replace(corpus([[3, 4]], test=[[4]]), has_repeats=True)
    for rule, seen in ((True, [1, 1, 0, 0, 0, 0]), (False, [0] * 6)):
        task = evaluation.Task(data.under(rule), "test")
        assert task.known.toarray().tolist() == [[1, 1, 0, 0, 0, 0]]
        assert task.seen.toarray().tolist() == [seen]
        (batch,) = task.requests()
        assert batch.history.numpy().tolist() == [[b"i0", b"i1"]]
        assert batch.barred.shape[1] == sum(seen)


def test_new_and_rare_items_are_measured_by_what_users_met_and_by_what_is_shown():
    data = corpus([[3, 4, 5], [3, 4], [3]], test=[[9], [5, 9], [4, 10]], cold_items=2)
    data = replace(data, items=replace(data.items, trained=6))
    task = evaluation.Task(data, "test")
    segments = task.item_segments()
    assert segments["new"].tolist() == [False] * 3 + [True] * 5
    ranked = {"system": np.array([[6, 3], [0, 6], [1, -1]])}  # catalogue rows
    new = evaluation._of_items(task, ranked, segments["new"])
    assert (new["items"], new["held_out"]) == (5, 3)
    assert new["systems"]["system"] == {
        "recall@10": pytest.approx(2 / 3),
        "recall@100": pytest.approx(2 / 3),
        "share@10": pytest.approx(3 / 5),
    }
    nobody = evaluation._of_items(task, ranked, np.zeros(8, bool))
    assert nobody["systems"]["system"] == {"recall@10": None, "recall@100": None, "share@10": 0.0}
