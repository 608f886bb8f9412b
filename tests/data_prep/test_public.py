"""Each public set in the format of its files, on a few made-up rows."""

import gzip
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from rec.data_prep import public
from rec.data_prep.dataset import Dataset, open_dataset
from rec.errors import UserError

Run = Callable[..., Dataset]
Line = Callable[[str, str, datetime], str]
# Users, items and days of May 2018. Each user meets each item, and all of them are in train.
MET = [("u1", "0101", 1), ("u1", "202", 2), ("u1", "303", 3)]
MET += [("u2", "303", 4), ("u2", "202", 5), ("u2", "0101", 6)]
EVENTS = {"0101": "view", "202": "addtocart", "303": "transaction"}
EVERYTHING = ["--split", "leave_one_out", "--min-interactions", "1", "--min-item-interactions", "1"]


def amazon_2023(user: str, item: str, time: datetime) -> str:
    review: dict[str, object] = {
        "rating": 5.0,
        "title": "Good",
        "text": "a, b",
        "images": [],
        "asin": f"{item}x",
    }
    review |= {"parent_asin": item, "user_id": user, "timestamp": int(time.timestamp() * 1000)}
    return json.dumps(review | {"helpful_vote": 0, "verified_purchase": True})


def amazon_2014(user: str, item: str, time: datetime) -> str:
    review: dict[str, object] = {
        "reviewerID": user,
        "asin": item,
        "reviewerName": 'J. "K"',
        "helpful": [0, 0],
    }
    review |= {"reviewText": "Ok", "overall": 4.0, "summary": "S", "reviewTime": "05 1, 2018"}
    return json.dumps(review | {"unixReviewTime": int(time.timestamp())})


def steam(user: str, item: str, time: datetime) -> str:
    day = f"{time:%Y-%m-%d}"
    return (
        f"{{u'username': u'{user}', u'hours': 0.1, u'product_id': u'{item}', u'date': u'{day}',"
        " u'text': u'Don\\'t \\u2665 \"it\"', u'early_access': False, u'page': 1}"
    )


def yelp(user: str, item: str, time: datetime) -> str:
    review: dict[str, object] = {
        "review_id": "r",
        "user_id": user,
        "business_id": item,
        "stars": 3.0,
        "text": "x\ny",
    }
    return json.dumps(review | {"date": f"{time:%Y-%m-%d %H:%M:%S}"})


def goodreads(user: str, item: str, time: datetime) -> str:
    shelf: dict[str, object] = {
        "user_id": user,
        "book_id": item,
        "review_id": "r",
        "is_read": True,
        "rating": 5,
    }
    written = f"{time:%a %b %d %H:%M:%S} -0700 {time:%Y}"
    return json.dumps(shelf | {"date_added": written, "read_at": ""})


FORMATS: dict[str, tuple[str, str, Line]] = {  # file, its first line, and a line per interaction
    "amazon-2023": ("All_Beauty.jsonl.gz", "", amazon_2023),
    "amazon-2014": ("reviews_Beauty_5.json.gz", "", amazon_2014),
    "steam": ("steam_reviews.json.gz", "", steam),
    "yelp": ("yelp_academic_dataset_review.json", "", yelp),
    "goodreads": ("goodreads_interactions_poetry.json.gz", "", goodreads),
    "lastfm-1k": (
        "userid-timestamp-artid-artname-traid-traname.tsv",
        "",
        lambda user, item, time: f'{user}\t{time:%Y-%m-%dT%H:%M:%SZ}\t\t{item}\t\tA "song',
    ),
    "retailrocket": (
        "events.csv",
        "timestamp,visitorid,event,itemid,transactionid",
        lambda user, item, time: f"{int(time.timestamp() * 1000)},{user},{EVENTS[item]},{item},",
    ),
    "hm": (
        "transactions_train.csv",
        "t_dat,customer_id,article_id,price,sales_channel_id",
        lambda user, item, time: f"{time:%Y-%m-%d},{user},{item},0.05,2",
    ),
    "kuairand": (
        "data/log_standard_4_08_to_4_21_pure.csv",
        "user_id,video_id,date,hourmin,time_ms,is_click,is_like\nu1,404,20180501,100,1525132800000,0,0",
        lambda user, item, time: f"{user},{item},20180501,100,{int(time.timestamp() * 1000)},1,0",
    ),
}
# Features: set -> file and text, and a column of the dataset with the values of the three items or two users.
FEATURES: dict[str, tuple[str, list[str], str, list[object]]] = {
    "amazon-2023": (
        "meta_All_Beauty.jsonl.gz",
        [
            json.dumps({"parent_asin": item, "title": f"T{item}", "categories": ["A", "B"]})
            for item in ("0101", "202", "303")
        ],
        "items.title",
        ["T0101", "T202", "T303"],
    ),
    "amazon-2014": (
        "meta_Beauty.json.gz",
        [f"{{'asin': '{item}', 'title': \"It's {item}\"}}" for item in ("0101", "202", "303")],
        "items.title",
        ["It's 0101", "It's 202", "It's 303"],
    ),
    "yelp": (
        "yelp_academic_dataset_business.json",
        [
            json.dumps({"business_id": item, "categories": "Food, Tea", "hours": {"Monday": "1"}})
            for item in ("0101", "202", "303")
        ],
        "items.categories",
        [["Food", "Tea"]] * 3,
    ),
    "goodreads": (
        "goodreads_books_poetry.json.gz",
        [
            json.dumps({"book_id": item, "title_without_series": "T", "authors": [{"id": "1"}]})
            for item in ("0101", "202", "303")
        ],
        "items.title_without_series",
        ["T", "T", "T"],
    ),
    "lastfm-1k": (
        "userid-profile.tsv",
        ["#id\tgender\tage\tcountry\tregistered", "u1\tm\t\tPeru\tJan 1, 2007", "u2\tf\t30\t\t"],
        "users.gender",
        ["m", "f"],
    ),
    "hm": (
        "articles.csv",
        ["article_id,prod_name", *(f'{item},"Top, {item}"' for item in ("0101", "202", "303"))],
        "items.prod_name",
        ["Top, 0101", "Top, 202", "Top, 303"],
    ),
    "kuairand": (
        "data/user_features_pure.csv",
        ["user_id,user_active_degree", "u1,high_active", "u2,full_active"],
        "users.user_active_degree",
        ["high_active", "full_active"],
    ),
}


def write(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    content = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Writes the files of a set, runs the command, and opens the dataset."""

    def run(name: str, options: list[str] = EVERYTHING) -> Dataset:
        file, header, line = FORMATS[name]
        rows = [line(user, item, datetime(2018, 5, day, tzinfo=UTC)) for user, item, day in MET]
        write(tmp_path / file, [*filter(None, [header]), *rows])
        if name in FEATURES:
            write(tmp_path / FEATURES[name][0], FEATURES[name][1])
        command = ["public", "--name", name, "--source", str(tmp_path), "--output-dir"]
        command += [str(tmp_path / "out"), "--", *options]
        monkeypatch.setattr("sys.argv", command)
        public.main()
        return open_dataset(tmp_path / "out")

    return run


@pytest.mark.parametrize("name", FORMATS)
def test_the_files_of_a_set_become_its_dataset(run: Run, name: str) -> None:
    dataset = run(name)
    assert dataset.manifest["name"] == name
    rows = [
        tuple(row)
        for part in ("train", "val", "test")
        for row in dataset.interactions(part)[["user_id", "item_id", "timestamp"]].to_numpy()
    ]
    shift = 7 * 3600 if name == "goodreads" else 0  # its times are in a zone
    expected = [
        (user, item, int(datetime(2018, 5, day, tzinfo=UTC).timestamp()) + shift)
        for user, item, day in MET
    ]
    assert sorted(rows) == sorted(expected)
    if name in FEATURES:
        table, _, column = FEATURES[name][2].partition(".")
        values = getattr(dataset, table)()[column]
        assert [v if isinstance(v, str) else list(v) for v in values] == FEATURES[name][3]


def test_every_set_is_tested_and_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = public.load_sets()
    assert FORMATS.keys() == sets.keys()
    monkeypatch.setattr("sys.argv", ["public", "--list"])
    public.main()
    listed = capsys.readouterr().out
    for name, each in sets.items():
        assert all(text in listed for text in (name, each.title, each.url, each.licence))


def test_events_are_weighed_and_those_of_weight_0_are_dropped(run: Run) -> None:
    assert run("retailrocket").manifest["events"] == {"view": 1, "addtocart": 3, "transaction": 10}
    assert "404" not in set(run("kuairand").items()["item_id"])


def test_options_after_the_dashes_replace_those_of_the_set(run: Run) -> None:
    weights = "view=1,addtocart=1,transaction=7"
    dataset = run("retailrocket", options=[*EVERYTHING, "--event-weights", weights])
    assert dataset.manifest["events"]["transaction"] == 7
    with pytest.raises(UserError, match="--min-item-interactions 3 drops all items"):
        run("retailrocket", options=["--split", "leave_one_out"])


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        ([], "name --name, --source and --output-dir, or --list"),
        (["--name", "hm", "--source", "none", "--output-dir", "out"], "none does not exist"),
        (
            ["--name", "hm", "--source", ".", "--output-dir", "out"],
            "--source has no file transactions_train.csv.: get it from https://www.kaggle",
        ),
    ],
)
def test_what_is_missing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], problem: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["public", *args])
    with pytest.raises(UserError, match=problem):
        public.main()
