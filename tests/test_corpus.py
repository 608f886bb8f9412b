"""What training reads of a data set with events: what is learnt from, what is asked for, what is history."""

from pathlib import Path

import pytest

from rec.batches import window_batches
from rec.config import Features, Retrieval, with_data_defaults
from rec.corpus import Corpus, load_corpus
from rec.data_prep import tabular
from rec.data_prep.dataset import open_dataset
from rec.sequences import Sequences

# Of each user in order of time: an item and its event.
WALKS = {
    "u": "a view, b view, c skip, a buy, a view, c view, b buy, a view, b buy, d view",
    "v": "b view, a view, b buy, c view, a buy",
    "w": "a view, b view, a buy, b skip, b buy, c skip, a buy",
}


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Corpus:
    rows = ["user_id,item_id,event,time"]
    for user, walk in WALKS.items():
        for time, step in enumerate(walk.split(", ")):
            rows.append(f"{user},{step.replace(' ', ',')},{time}")
    path = tmp_path / "clicks.csv"
    path.write_text("\n".join([*rows, ""]))
    options = ["--timestamp-col", "time", "--allow-any-time", "--split", "leave_one_out"]
    options += ["--event-col", "event", "--target-events", "buy", "--negative-events", "skip"]
    options += ["--event-weights", "view=1,buy=5", "--repeats", "keep"]
    where = ["--interactions", str(path), "--output-dir", str(tmp_path / "data")]
    monkeypatch.setattr("sys.argv", ["tabular", *where, *options])
    tabular.main()
    return load_corpus(open_dataset(tmp_path / "data"), Features())


def of_user(corpus: Corpus, sequences: Sequences, user: str) -> str:
    """The items of a user in order of time."""
    rows = sequences.items[sequences.users == corpus.users.encode([user], 0)[0]]
    return " ".join(corpus.items.ids[row - corpus.items.first] for row in rows)


def test_negatives_are_left_out_and_val_and_test_ask_for_targets_once(corpus: Corpus) -> None:
    assert of_user(corpus, corpus.train, "u") == "a b a a c"
    assert of_user(corpus, corpus.val, "u") == "b"
    assert of_user(corpus, corpus.test, "u") == "b"
    assert of_user(corpus, corpus.val, "v") == "b"
    assert of_user(corpus, corpus.test, "v") == "a"


def test_each_target_of_a_batch_has_its_weight(corpus: Corpus) -> None:
    config = with_data_defaults(Retrieval(), corpus.facts)
    (batch,) = window_batches(corpus, config, corpus.train, 0, 0).as_numpy_iterator()
    row = batch["user"].tolist().index(corpus.users.encode(["u"], 0)[0])
    targets = corpus.items.ids[batch["tokens"][row, 1:] - corpus.items.first]
    assert " ".join(targets) == "a b a a c"
    unit = batch["weight"][row][0]  # the mean of all weights is 1
    assert batch["weight"][row] / unit == pytest.approx([1, 1, 5, 1, 0])  # c was skipped
    row = batch["user"].tolist().index(corpus.users.encode(["v"], 0)[0])
    assert batch["weight"][row] / unit == pytest.approx([1, 1, 0, 0, 0])  # b and a, then padding


def test_the_history_of_test_is_everything_before_it(corpus: Corpus) -> None:
    assert of_user(corpus, corpus.history("val"), "v") == "b a"
    assert of_user(corpus, corpus.history("test"), "v") == "b a b c"
    assert of_user(corpus, corpus.history("test"), "u") == "a b a a c b a"


def test_what_was_met_may_be_recommended_again_if_repeats_are_kept(corpus: Corpus) -> None:
    assert corpus.has_repeats and not corpus.exclude_seen
    assert of_user(corpus, corpus.barred(corpus.train, "val"), "v") == ""
    assert corpus.under("auto") is corpus
    unseen = corpus.under(True)
    assert of_user(corpus, unseen.barred(corpus.train, "val"), "v") == "b a"


def test_what_a_user_dislikes_is_no_label_and_is_never_recommended(corpus: Corpus) -> None:
    assert of_user(corpus, corpus.train, "w") == "a b a"
    assert of_user(corpus, corpus.val, "w") == ""  # b, which was skipped before
    assert of_user(corpus, corpus.test, "w") == "a"
    for rule, before in ((False, ""), (True, "a b a b ")):
        under = corpus.under(rule)
        assert of_user(corpus, under.barred(under.train, "val"), "u").endswith("c")
        barred = under.barred(under.history("test"), "test")
        assert of_user(corpus, barred, "w") == f"{before}b c"
