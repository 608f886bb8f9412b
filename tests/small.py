"""Corpora small enough to work out by hand."""

from dataclasses import replace

import numpy as np
import pandas as pd

from rec.corpus import Corpus
from rec.features import FIRST_ITEM, FIRST_USER, Vocabulary, fit_columns
from rec.sequences import Sequences
from tests.conftest import bundle_metadata as bundle_metadata  # there, it needs no TensorFlow


def sequences(*users: list[int], first_time: int = 1000) -> Sequences:
    """One list of item rows a user row (row 0, the unknown user, is added); times count up over all interactions."""
    lists = [[], *users]
    offsets = np.concatenate([[0], np.cumsum([len(items) for items in lists])])
    items = np.array([item for items in lists for item in items], np.int32)
    return Sequences(
        offsets, items, first_time + np.arange(len(items)), np.ones(len(items), np.float32)
    )


def corpus(
    train: list[list[int]],
    val: list[list[int]] | None = None,
    test: list[list[int]] | None = None,
    items: int = 6,
    cold_items: int = 0,
    strategy: str = "leave_one_out",
    ordered: bool = True,
    features: bool = False,
) -> Corpus:
    """A corpus of `items` trained and `cold_items` further items with the rows from FIRST_ITEM on."""
    users = np.array([f"u{j}" for j in range(len(train))], object)
    ids = np.array([f"i{j}" for j in range(items + cold_items)], object)
    user_table = pd.DataFrame({"user_id": users})
    item_table = pd.DataFrame({"item_id": ids})
    if features:
        item_table["genres"] = [["even" if j % 2 == 0 else "odd"] for j in range(len(ids))]
    empty: list[list[int]] = [[] for _ in train]
    splits = [
        sequences(*train),
        sequences(*(val or empty), first_time=2000),
        sequences(*(test or empty), first_time=3000),
    ]
    if not ordered:
        splits = [replace(split, times=None) for split in splits]
    return Corpus(
        "id",
        ordered,
        strategy,
        Vocabulary(users, FIRST_USER, len(users)),
        Vocabulary(ids, FIRST_ITEM, items),
        user_table,
        item_table,
        (),
        fit_columns(item_table, "item_id", "auto", np.arange(len(ids)) < items, "items"),
        train=splits[0],
        val=splits[1],
        test=splits[2],
    )
