"""A dataset directory, encoded: strings become integers once, here. `Corpus` is everything that training reads."""

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import pandas as pd

from rec.config import DataFacts, Features
from rec.data_prep.dataset import RESERVED, Dataset, check_unchanged, verify
from rec.errors import UserError
from rec.features import (
    FIRST_ITEM,
    FIRST_USER,
    UNKNOWN,
    UNKNOWN_USER,
    Column,
    Vocabulary,
    fit_columns,
)
from rec.sequences import Sequences, concatenate, nothing, on_disk


@dataclass(frozen=True)
class Corpus:
    """An encoded dataset. Item rows are in order of falling training count: FIRST_ITEM is the most popular item."""

    dataset_id: str
    ordered: bool
    split_strategy: str
    users: Vocabulary
    items: Vocabulary
    user_table: pd.DataFrame  # one row per id of `users`, in its order
    item_table: pd.DataFrame
    user_columns: tuple[Column, ...]
    item_columns: tuple[Column, ...]
    train: Sequences  # without negative events; what a user has disliked, too, has weight 0
    val: Sequences  # what val asks for
    test: Sequences  # what test asks for
    met_in_val: Sequences | None = None  # all of val, history for test; None: what val asks for
    has_repeats: bool = False  # whether a user may meet an item again
    exclude_seen: bool = True  # whether what a user has met is not recommended again
    # Negative events before val and before test, by the name of the split
    dislikes: dict[str, Sequences] = field(default_factory=dict)
    events: tuple[str, ...] | None = None  # the kinds that histories hold; None without kinds

    @property
    def popularity(self) -> np.ndarray:
        """[item rows] int64: training interactions of each item."""
        return np.bincount(self.train.items, minlength=self.items.rows)

    @property
    def facts(self) -> DataFacts:
        """What decides whether a key of the config has an effect."""
        return DataFacts(
            ordered=self.ordered,
            interactions=len(self.train.items),
            mean_history=len(self.train.items) / max(int((self.train.lengths > 0).sum()), 1),
            trained_items=self.items.trained,
            items=len(self.items.ids),
            has_user_features=bool(self.user_columns),
        )

    @property
    def until(self) -> int | None:
        """The time of the latest interaction in the histories for test; None without times."""
        parts = (self.train, self.met_in_val or self.val)
        times = [part.times.max(initial=0) for part in parts if part.times is not None]
        return int(max(times)) if times else None

    def history(self, split: str) -> Sequences:
        """What is known of each user before `split`: train for val; train and val for test."""
        return (
            self.train if split == "val" else concatenate(self.train, self.met_in_val or self.val)
        )

    def under(self, exclude_seen: Literal["auto"] | bool) -> "Corpus":
        """The same data under a rule of `index.exclude_seen`; auto: the rule that it has."""
        return self if exclude_seen == "auto" else replace(self, exclude_seen=exclude_seen)

    def barred(self, history: Sequences, split: str) -> Sequences:
        """What must not be recommended to users with this history before `split`: the one rule of all stages."""
        disliked = self.disliked(split)
        if not self.exclude_seen:
            return disliked
        return concatenate(history, disliked) if len(disliked.items) else history

    def disliked(self, split: str) -> Sequences:
        """The items that each user has marked by a negative event before `split`."""
        return self.dislikes.get(split, nothing(self.users.rows))


def load_corpus(
    dataset: Dataset,
    features: Features,
    users: Vocabulary | None = None,
    items: Vocabulary | None = None,
    columns: tuple[tuple[Column, ...], tuple[Column, ...]] | None = None,
) -> Corpus:
    """Encodes a dataset. Vocabularies and columns are learnt from its training data, unless a checkpoint's are given.

    Args:
      users, items: only their trained ids are taken over; ids that only this dataset has come after them.
      columns: the encodings of user and item features.

    Raises:
      UserError: a file is damaged, or a column does not fit: it has a reserved name, is missing, or cannot be encoded
        as `features` or the checkpoint says.
    """
    verify(dataset)
    positives = dataset.positive_events
    labels = dataset.label_events
    users = _vocabulary(
        dataset.counts("train", "user_id", positives), dataset.users()["user_id"], FIRST_USER, users
    )
    items = _vocabulary(
        dataset.counts("train", "item_id", positives), dataset.items()["item_id"], FIRST_ITEM, items
    )
    user_table = _in_order(dataset.users(), "user_id", users)
    item_table = _in_order(dataset.items(), "item_id", items)
    for name in RESERVED:
        if name in item_table:
            raise UserError(
                f"{dataset.path}: the items have a column {name}, a name that answers use themselves: "
                "rename it in the items file, and prepare the dataset again"
            )
    if columns is None:
        is_known_user = np.arange(len(users.ids)) < users.trained
        is_known_item = np.arange(len(items.ids)) < items.trained
        columns = (
            fit_columns(user_table, "user_id", features.users, is_known_user, "features.users"),
            fit_columns(item_table, "item_id", features.items, is_known_item, "features.items"),
        )
    for table, encoded in ((user_table, columns[0]), (item_table, columns[1])):
        for column in encoded:
            column.check(table, str(dataset.path))
    met_in_val = _sequences(dataset, "val", users, items, positives)
    val = met_in_val
    if labels != positives:
        val = _sequences(dataset, "val", users, items, labels)
    test = _sequences(dataset, "test", users, items, labels)
    train = _sequences(dataset, "train", users, items, positives)
    if train.weights is not None:  # what counts is their ratio
        unit = float(train.weights.mean(dtype=np.float64))
        train, val, met_in_val = [part.weighed(unit) for part in (train, val, met_in_val)]
    dislikes = _dislikes(dataset, users, items)
    if dislikes:
        train = _without_weight(train, dislikes["val"])
        val = val.select(~val.among(dislikes["test"]))
        test = test.select(~test.among(dislikes["later"]))
    if dataset.has_repeats:
        val = val.without_repeats()
        test = test.without_repeats()
    corpus = Corpus(
        dataset_id=dataset.id,
        ordered=dataset.ordered,
        split_strategy=dataset.split_strategy,
        users=users,
        items=items,
        user_table=user_table,
        item_table=item_table,
        user_columns=columns[0],
        item_columns=columns[1],
        train=train,
        val=val,
        test=test,
        met_in_val=met_in_val,
        has_repeats=dataset.has_repeats,
        exclude_seen=not dataset.keeps_repeats,
        dislikes=dislikes,
        events=dataset.history_events,
    )
    check_unchanged(dataset)
    return corpus


def _vocabulary(
    counts: pd.Series, listed: pd.Series, first: int, given: Vocabulary | None
) -> Vocabulary:
    """Trained ids by falling count (ties: by id), then the ids that only the table lists."""
    if given is None:
        trained = (-counts).sort_values(kind="stable").index.to_numpy(object)
    else:
        trained = given.ids[: given.trained]
    others = pd.Index(listed).difference(pd.Index(trained), sort=True).to_numpy(object)
    return Vocabulary(np.concatenate([trained, others]).astype(object), first, len(trained))


def _in_order(table: pd.DataFrame, key: str, vocabulary: Vocabulary) -> pd.DataFrame:
    """The rows of a table in the order of a vocabulary."""
    return table.set_index(key).reindex(vocabulary.ids).reset_index(names=key)


def _dislikes(dataset: Dataset, users: Vocabulary, items: Vocabulary) -> dict[str, Sequences]:
    """The negative events before val, before test and later, each with all earlier ones; none if there are none."""
    events = dataset.manifest.get("negative_events")
    if not events:
        return {}
    known = nothing(users.rows)
    dislikes = {}
    for split, following in (("train", "val"), ("val", "test"), ("test", "later")):
        more = _sequences(dataset, split, users, items, events)
        known = concatenate(known, replace(more, weights=None))
        dislikes[following] = known
    return dislikes


def _without_weight(train: Sequences, disliked: Sequences) -> Sequences:
    """Items that a user dislikes stay in the history and are no labels."""
    is_disliked = train.among(disliked)
    weights = np.ones(len(train.items), np.float32) if train.weights is None else train.weights
    return replace(train, weights=np.where(is_disliked, 0, weights)) if is_disliked.any() else train


def _sequences(
    dataset: Dataset,
    split: str,
    users: Vocabulary,
    items: Vocabulary,
    events: Collection[str] | None,
) -> Sequences:
    """Puts each interaction at the next free place of its user, a row group at a time: only the files grow."""
    counts = dataset.counts(split, "user_id", events)
    owners = users.encode(counts.index.to_numpy(object), UNKNOWN_USER)
    lengths = np.bincount(owners, counts, users.rows).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    rows = on_disk(offsets[-1], np.int32)
    times = on_disk(len(rows), np.int64) if dataset.ordered else None
    ratings = on_disk(len(rows), np.float32) if dataset.has_ratings else None
    weights = on_disk(len(rows), np.float32) if "weight" in dataset.columns else None
    next_free = offsets[:-1].copy()
    for frame in dataset.batches(split, events):
        user = users.encode(frame["user_id"], UNKNOWN_USER)
        by_user = np.argsort(user, kind="stable")  # keeps the order of time within a user
        user = user[by_user]
        number = np.arange(len(user)) - np.searchsorted(
            user, user
        )  # 0, 1, .. per user of this part
        places = next_free[user] + number
        next_free[user] = places + 1  # of a user's several places, the last one stays
        rows[places] = items.encode(frame["item_id"], UNKNOWN)[by_user]
        if times is not None:
            times[places] = frame["timestamp"].to_numpy()[by_user]
        if ratings is not None:
            ratings[places] = frame["rating"].to_numpy()[by_user]
        if weights is not None:
            weights[places] = frame["weight"].to_numpy()[by_user]
    return Sequences(offsets, rows, times, ratings, weights)
