import errno
import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import rec.sequences
from rec.batches import cut_windows, sampling_probability, window_batches
from rec.config import ResolvedRetrieval
from rec.errors import UserError
from rec.features import FIRST_ITEM, PAD, START
from rec.sequences import Sequences, concatenate, on_disk
from tests.small import corpus, sequences

CONFIG = ResolvedRetrieval(window=3, batch_size=2, in_batch_negatives=4, uniform_negatives=2)


def test_last_gives_the_end_of_each_history_left_aligned():
    data = sequences([3, 4, 5], [6])
    assert data.last(np.array([2, 0, 1]), 2).tolist() == [[6, PAD], [PAD, PAD], [4, 5]]


def test_matrix_marks_what_each_user_interacted_with():
    assert sequences([1, 3], [0]).matrix(np.array([2, 1]), 4).toarray().tolist() == [
        [1, 0, 0, 0],
        [0, 1, 0, 1],
    ]


def test_concatenate_puts_the_later_split_behind_the_earlier_for_each_user():
    joined = concatenate(sequences([3, 4], [5]), sequences([6], [7, 8]))
    assert joined.last(np.array([1, 2]), 3).tolist() == [[3, 4, 6], [5, 7, 8]]


def test_select_keeps_users_and_order():
    kept = sequences([3, 4, 5], [], [6, 7]).select(np.array([True, False, True, False, True]))
    assert kept.lengths.tolist() == [0, 2, 0, 1]
    assert kept.items.tolist() == [3, 5, 7]


def test_shuffling_keeps_each_users_items():
    data = replace(sequences(list(range(3, 40)), [50, 51]), times=None)
    mixed = data.shuffled(np.random.default_rng(0))
    assert sorted(mixed.last(np.array([1]), 37)[0]) == list(range(3, 40))
    assert mixed.items.tolist() != data.items.tolist()
    assert set(mixed.last(np.array([2]), 2)[0]) == {50, 51}


def test_only_interactions_of_the_same_second_change_places():
    data = replace(sequences([3, 4, 5, 6]), times=np.array([7, 8, 8, 9]))
    orders = {tuple(data.shuffled(np.random.default_rng(seed)).items) for seed in range(20)}
    assert orders == {(3, 4, 5, 6), (3, 5, 4, 6)}


@pytest.mark.parametrize("seed", range(5))
def test_every_interaction_is_a_target_of_exactly_one_window(seed: int):
    data = sequences([3] * 10, [4] * 3, [], [5])
    cut = cut_windows(data, 3, np.random.default_rng(seed))
    targets = np.concatenate([np.arange(b, e) for b, e in zip(cut.begin, cut.end, strict=True)])
    assert sorted(targets) == list(range(14))
    assert (cut.end - cut.begin <= 3).all()
    assert (data.users[cut.begin] == cut.user).all()
    assert (cut.user == 2).sum() == 1  # what fits one window is never cut


def batches(
    data: Sequences, epoch: int = 0, seed: int = 0, **changes: Any
) -> list[dict[str, np.ndarray]]:
    small = corpus([[3, 4, 5, 6, 7], [6], [7, 8]], **changes)
    return list(window_batches(small, CONFIG, data, seed, epoch).as_numpy_iterator())


def test_a_window_holds_its_context_and_targets():
    data = sequences([3, 4, 5, 6, 7], [6], [7, 8])
    of_user = {1: [3, 4, 5, 6, 7], 2: [6], 3: [7, 8]}
    seen = []
    for batch in batches(data):
        for user, tokens in zip(batch["user"], batch["tokens"], strict=True):
            tokens = tokens[tokens != PAD]
            seen += [(user, item) for item in tokens[1:]]
            items = of_user[user]
            at = items.index(tokens[1])
            assert tokens[0] == (START if at == 0 else items[at - 1])
            assert tokens[1:].tolist() == items[at : at + len(tokens) - 1]
    assert sorted(seen) == [(u, i) for u, items in of_user.items() for i in items]


def test_an_epochs_batches_depend_on_seed_and_epoch_alone():
    data = sequences([3, 4, 5, 6, 7], [6], [7, 8])

    def text(**kwargs: int) -> str:
        return str(
            [{name: value.tolist() for name, value in b.items()} for b in batches(data, **kwargs)]
        )

    assert text(epoch=1) == text(epoch=1)
    assert text(epoch=1) != text(epoch=2)
    assert text(epoch=1) != text(epoch=1, seed=1)


def test_without_timestamps_the_order_is_new_in_every_epoch():
    data = replace(sequences([3, 4, 5], [6], [7, 8]), times=None)
    orders = {
        tuple(row[1:])
        for epoch in range(20)
        for batch in batches(data, epoch, ordered=False)
        for user, row in zip(batch["user"], batch["tokens"], strict=True)
        if user == 1
    }
    assert len(orders) > 2
    assert {tuple(sorted(order)) for order in orders} == {(3, 4, 5)}


def test_the_pool_holds_targets_of_the_batch_and_uniform_items():
    for batch in batches(sequences([3, 4, 5, 6, 7], [6], [7, 8])):
        targets = set(batch["tokens"][:, 1:].ravel()) - {PAD}
        assert set(batch["negatives"][:4]) <= targets
        assert len(batch["negatives"]) == 6


def test_a_small_catalogue_is_the_pool_as_a_whole():
    small = corpus([[3, 4, 5, 6, 7, 8]])
    config = ResolvedRetrieval(window=3, uniform_negatives=6)
    pools = [
        b["negatives"].tolist()
        for b in window_batches(small, config, small.train, 0, 0).as_numpy_iterator()
    ]
    assert pools == [[3, 4, 5, 6, 7, 8]] * len(pools)
    assert sampling_probability(small, config, small.train)[FIRST_ITEM:] == pytest.approx(
        np.full(6, 1 / 6)
    )


def test_the_sampling_probability_is_what_the_pool_is_drawn_with():
    many = corpus([[3] * 8 + [4] * 4, [3] * 8 + [5] * 4] * 20, items=3)
    config = ResolvedRetrieval(
        window=6, batch_size=1000, in_batch_negatives=30_000, uniform_negatives=2
    )
    pool = next(window_batches(many, config, many.train, 0, 0).as_numpy_iterator())["negatives"]
    expected = sampling_probability(many, config, many.train)
    drawn = np.bincount(pool, minlength=many.items.rows) / len(pool)
    assert drawn == pytest.approx(expected, abs=0.01)
    # by hand: 16/24 of the interactions are of item 3; the two uniform slots among 30,002 hardly count
    assert expected[3] == pytest.approx(2 / 3, abs=1e-4)


def test_the_pool_can_come_from_the_batch_alone():
    many = corpus([[3] * 8 + [4] * 4, [3] * 8 + [5] * 4] * 20, items=3)
    config = replace(CONFIG, window=6, in_batch_negatives=30_000, uniform_negatives=0)
    pool = next(window_batches(many, config, many.train, 0, 0).as_numpy_iterator())["negatives"]
    assert len(pool) == 30_000
    # by hand: 16, 4 and 4 of 24 interactions
    assert sampling_probability(many, config, many.train)[FIRST_ITEM:] == pytest.approx(
        [2 / 3, 1 / 6, 1 / 6]
    )


def test_a_disk_without_room_is_one_sentence(monkeypatch: pytest.MonkeyPatch):
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match="No space left on device: set TMPDIR"):
        on_disk(10, np.int32)


def test_an_order_drawn_in_parts_is_that_drawn_at_once(monkeypatch: pytest.MonkeyPatch):
    data = replace(sequences([*range(3, 30)], [], [5, 6], [*range(40, 70)], [7]), times=None)
    once = data.shuffled(np.random.default_rng(3)).items.tolist()
    monkeypatch.setattr(rec.sequences, "BLOCK", 10)
    assert data.shuffled(np.random.default_rng(3)).items.tolist() == once
