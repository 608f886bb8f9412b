"""The synthetic dataset: sizes, sameness, and that it has the structure which it promises."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from rec.data_prep import dummy
from rec.data_prep.dataset import Dataset, open_dataset
from rec.errors import UserError


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def run(*args: str, name: str = "dummy") -> Dataset:
        monkeypatch.setattr("sys.argv", ["dummy", "--output-dir", str(tmp_path / name), *args])
        dummy.main()
        return open_dataset(tmp_path / name)

    return run


def tables(
    seed: int = 0, users: int = 400, items: int = 200, per_user: int = 20
) -> dict[str, pd.DataFrame]:
    return {
        name: table.to_pandas()
        for name, table in dummy.generate(users, items, per_user, seed).items()
    }


def test_same_seed_same_bytes_other_seed_other_bytes(run) -> None:
    sizes = ["--users", "50", "--items", "40"]
    assert run(*sizes).id == run(*sizes, name="again").id
    assert run(*sizes).id != run(*sizes, "--seed", "7", name="other").id


def test_sizes_are_as_asked_for(run) -> None:
    dataset = run(
        "--users", "300", "--items", "200", "--interactions-per-user", "12", "--split", "temporal"
    )
    counts = dataset.manifest["counts"]
    assert (counts["users"], counts["items"]) == (300, 200)
    assert 0.85 < (counts["train"] + counts["val"] + counts["test"]) / (300 * 12) < 1.1
    assert dataset.split_strategy == "temporal"
    assert (dataset.ordered, dataset.has_ratings) == (True, True)


def test_interactions_are_in_order_of_time_within_a_year_and_never_repeat() -> None:
    interactions = tables()["interactions"]
    assert interactions["timestamp"].is_monotonic_increasing
    assert interactions["timestamp"].between(dummy.START, dummy.START + dummy.YEAR).all()
    assert not interactions.duplicated(["user_id", "item_id"]).any()
    assert not interactions.duplicated(["user_id", "timestamp"]).any()
    assert interactions["rating"].isin([1, 2, 3, 4, 5]).all()
    assert interactions.groupby("user_id").size().min() >= 3


def test_an_item_is_often_followed_by_its_sequel() -> None:
    made = tables()
    items = made["items"].set_index("item_id")
    walk = made["interactions"].sort_values(["user_id", "timestamp"], kind="stable")
    number = walk["item_id"].str[1:].astype(int)
    title = walk["item_id"].map(items["title"])
    same_user = walk["user_id"].eq(walk["user_id"].shift(-1))
    followed = (
        same_user
        & (number + 1).eq(number.shift(-1))
        & title.shift(-1).str.contains(r" \d$", na=False)
    )
    assert followed[same_user].mean() > 0.15  # by chance it would be one in 200


def test_users_prefer_genres_and_rate_them_higher() -> None:
    made = tables()
    genre = made["items"].set_index("item_id")["genres"].str[0]
    interactions = made["interactions"].assign(genre=made["interactions"]["item_id"].map(genre))
    counts = pd.crosstab(interactions["user_id"], interactions["genre"])
    shares = counts.div(counts.sum(axis=1), axis=0)
    overall = counts.sum() / counts.to_numpy().sum()
    assert shares.max(axis=1).mean() > 1.5 * overall.max()
    favourite = interactions["genre"].eq(interactions["user_id"].map(shares.idxmax(axis=1)))
    rating = interactions["rating"]
    assert rating[favourite].mean() > rating[~favourite].mean() + 0.3


def test_few_items_take_much_of_the_attention() -> None:
    counts = np.sort(tables()["interactions"]["item_id"].value_counts().to_numpy())[::-1]
    assert counts[:20].sum() > 0.2 * counts.sum()  # a tenth of the items


def test_titles_are_names_and_series_are_numbered() -> None:
    titles = tables()["items"]["title"]
    assert titles.str.fullmatch(r"[A-Z]\w+ [A-Z]\w+( of [A-Z]\w+)?( [2-8])?").all()
    assert titles.is_unique


@pytest.mark.parametrize(
    "size", [("--users", "5"), ("--items", "3"), ("--interactions-per-user", "0"), ("--seed", "-1")]
)
def test_sizes_too_small_for_any_split_are_refused(run, size: tuple[str, str]) -> None:
    with pytest.raises(UserError, match=f"{size[0]} must be at least"):
        run(*size)


def test_a_shop_has_more_views_than_purchases_which_val_and_test_ask_for(run) -> None:
    dataset = run("--shop", "--users", "100", "--items", "60")
    frames = [dataset.interactions(split) for split in ("train", "val", "test")]
    counts = pd.concat(frames)["event"].value_counts()
    assert counts["view"] > 2 * counts["purchase"] > 2 * 100
    assert dataset.label_events == ["purchase"]
    assert dataset.manifest["events"] == {"cart": 3.0, "purchase": 10.0, "view": 1.0}
    weights = dict(zip(frames[0]["event"], frames[0]["weight"], strict=True))
    assert weights == {"view": 1.0, "cart": 3.0, "purchase": 10.0}
