"""The tabular command on files as people really have them."""

import json
from collections.abc import Callable
from pathlib import Path

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rec.data_prep import tabular
from rec.data_prep.dataset import Dataset, open_dataset
from rec.data_prep.raw_files import RawFile
from rec.errors import UserError

Run = Callable[..., Dataset]
TIMED = ["--timestamp-col", "time", "--split", "leave_one_out"]
CLICKS = "user_id,item_id,time\nu,a,1\nu,b,2\nu,c,3\nv,c,1\nv,b,2\nv,a,3\n"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command on the files given by name (`clicks.csv=...`) with the other arguments; opens the dataset."""

    def run(*args: str, **files: str | bytes) -> Dataset:
        monkeypatch.chdir(tmp_path)
        for name, content in files.items():
            content = content.encode() if isinstance(content, str) else content
            (tmp_path / name.replace("_", ".")).write_bytes(content)
        monkeypatch.setattr("sys.argv", ["tabular", "--output-dir", "out", *args])
        tabular.main()
        return open_dataset("out")

    return run


def pairs(dataset: Dataset, split: str) -> list[str]:
    frame = dataset.interactions(split)
    return [f"{user} {item}" for user, item in zip(frame["user_id"], frame["item_id"], strict=True)]


def test_csv_with_times(run: Run) -> None:
    dataset = run("--interactions", "clicks.csv", *TIMED, clicks_csv=CLICKS)
    assert [pairs(dataset, part) for part in ("train", "val", "test")] == [
        ["u a", "v c"],
        ["u b", "v b"],
        ["u c", "v a"],
    ]
    assert dataset.manifest["name"] == "clicks"
    assert dataset.manifest["source"] == "clicks.csv"


def test_csv_without_times_is_unordered(run: Run) -> None:
    text = "user_id,item_id\n" + "".join(
        f"u{user},i{item}\n" for user in range(9) for item in range(5)
    )
    dataset = run("--interactions", "clicks.csv", "--split", "leave_one_out", clicks_csv=text)
    assert not dataset.ordered
    assert list(dataset.interactions("train").columns) == ["user_id", "item_id"]
    assert dataset.manifest["split"] == {"strategy": "leave_one_out", "seed": 42}


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_ids_are_kept_exactly_as_written(run: Run, bom: bytes, line_end: str) -> None:
    ids = ["007", '"a,b"', '"say ""hi"""', "Ünïcödé 🎬", "NULL", " x "]
    lines = ["user_id,item_id,time", *(f"0,{item},{time}" for time, item in enumerate(ids))]
    lines += [f"00,{item},{-time}" for time, item in enumerate(ids)]  # the other way round
    dataset = run(
        "--interactions",
        "clicks.csv",
        *TIMED,
        clicks_csv=bom + line_end.join([*lines, ""]).encode(),
    )
    assert set(dataset.items()["item_id"]) == {
        "007",
        "a,b",
        'say "hi"',
        "Ünïcödé 🎬",
        "NULL",
        " x ",
    }
    assert dataset.users()["user_id"].tolist() == ["0", "00"]


def test_tsv_and_parquet_give_the_same_interactions_as_csv(run: Run, tmp_path: Path) -> None:
    dataset = run("--interactions", "clicks.csv", *TIMED, clicks_csv=CLICKS)
    files = dict(dataset.manifest["files"])
    assert (
        run("--interactions", "clicks.tsv", *TIMED, clicks_tsv=CLICKS.replace(",", "\t")).manifest[
            "files"
        ]
        == files
    )
    frame = pd.read_csv(tmp_path / "clicks.csv")
    frame["time"] = pd.to_datetime(frame["time"], unit="s", utc=True)
    frame.to_parquet(tmp_path / "clicks.parquet")
    assert run("--interactions", "clicks.parquet", *TIMED).manifest["files"] == files


def test_other_column_names_some_with_quotes(run: Run) -> None:
    text = CLICKS.replace("user_id,item_id,time", '"the ""user""",it\'s,Time')
    args = [
        "--user-col",
        'the "user"',
        "--item-col",
        "it's",
        "--timestamp-col",
        "Time",
        "--split",
        "leave_one_out",
    ]
    assert pairs(run("--interactions", "clicks.csv", *args, clicks_csv=text), "test") == [
        "u c",
        "v a",
    ]


@pytest.mark.parametrize(
    ("written", "second"),
    [
        ("1700000000", 1700000000),
        ("1.7e9", 1700000000),
        ("1700000000.75", 1700000000),
        ("-1.5", -2),
        ("2023-11-14", 1699920000),
        ("2023-11-14T22:13:20Z", 1700000000),
        ("2023-11-14 22:13:20", 1700000000),
        ("2023-11-15T00:13:20+02:00", 1700000000),
    ],
)
def test_times_are_seconds_or_iso_8601_in_utc(run: Run, written: str, second: int) -> None:
    text = f"user_id,item_id,time\nu,a,{written}\nu,b,1e10\nu,c,2e10\nv,c,1\n"
    train = run("--interactions", "clicks.csv", *TIMED, clicks_csv=text).interactions("train")
    assert train.set_index("user_id")["timestamp"]["u"] == second


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("u,d", "missing columns"),
        ("u,d,4,5,6", "too many columns"),
        (",d,4,5", "user_id '' is empty or holds a line break"),
        ("u,  ,4,5", "item_id '  ' is empty or holds a line break"),
        ("u,\t,4,5", r"item_id '\\t' is empty or holds a line break"),
        ('u,"d\ne",4,5', r"item_id 'd\\ne' is empty or holds a line break"),
        ("u,d,soon,5", "time 'soon' is neither seconds since 1970"),
        ("u,d,,5", "time '' is neither seconds since 1970"),
        ("u,d,nan,5", "time 'nan' is neither"),
        (
            "u,d,1700000000000,5",
            "time '1700000000000' is neither seconds since 1970 .milliseconds are not taken",
        ),
        ("u,d,4,good", "stars 'good' is not a number"),
        ("u,d,4,", "stars '' is not a number"),
        ("u,d,4,nan", "stars 'nan' is not a number"),
        ("u,d,4,inf", "stars 'inf' is not a number"),
        ('u,"d"x,4,5', "unquoted value"),
    ],
)
def test_a_malformed_row_is_named_by_file_and_line_or_skipped_and_counted(
    run: Run, capsys: pytest.CaptureFixture[str], row: str, problem: str
) -> None:
    good = "".join(f"{line},5\n" for line in CLICKS.splitlines()[1:])
    text = f'user_id,item_id,time,stars\n{good}"a ""quoted""",x,1,5\n\n"x","y, z",2,5\n{row}\n{good}{row}\n'
    args = ["--interactions", "clicks.csv", *TIMED, "--rating-col", "stars"]
    with pytest.raises(
        UserError, match=rf"^clicks.csv:11: {problem}.*2 malformed row\(s\) in all.*--skip-bad-rows"
    ):
        run(*args, clicks_csv=text)
    assert not Path("out").exists()
    dataset = run(*args, "--skip-bad-rows")
    assert "d" not in set(dataset.items()["item_id"])
    dropped = json.loads(capsys.readouterr().out.splitlines()[-1])["dropped"]
    assert dropped == {
        "bad_rows": 2,
        "below_min_rating": 0,
        "duplicates": 6,
        "of_inactive_users": 0,
    }


def test_the_line_of_a_malformed_row_counts_line_breaks_inside_fields(run: Run) -> None:
    text = 'user_id,item_id,time,note\nu,a,1,"three\nlines\nlong"\nu,b,soon,x\n'
    with pytest.raises(UserError, match="^clicks.csv:5: time 'soon'"):
        run("--interactions", "clicks.csv", *TIMED, clicks_csv=text)
    with pytest.raises(UserError, match="^clicks.csv:5: missing columns"):
        run("--interactions", "clicks.csv", *TIMED, clicks_csv=text.replace("u,b,soon,x", "u,b"))


def test_the_first_malformed_row_is_named_whatever_is_wrong_with_it(run: Run) -> None:
    text = CLICKS + "u,d,soon\nu,d\n"
    with pytest.raises(UserError, match="^clicks.csv:8: time 'soon'.*2 malformed"):
        run("--interactions", "clicks.csv", *TIMED, clicks_csv=text)


def test_a_row_that_is_not_utf8_is_malformed(run: Run) -> None:
    with pytest.raises(UserError, match="^clicks.csv:8: invalid encoding"):
        run("--interactions", "clicks.csv", *TIMED, clicks_csv=CLICKS.encode() + b"u,caf\xe9,4\n")


def test_a_malformed_row_of_parquet_is_named_by_its_number(run: Run, tmp_path: Path) -> None:
    table = pa.table({"user_id": ["u", "u", None], "item_id": ["a", "b", "c"], "time": [1, 2, 3]})
    pq.write_table(table, tmp_path / "clicks.parquet")
    with pytest.raises(UserError, match="^clicks.parquet:3: user_id '' is empty"):
        run("--interactions", "clicks.parquet", *TIMED)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "clicks.csv is empty"),
        ("user_id,item_id,time\n", "clicks.csv has no rows"),
        ("user_id,item_id,time", "clicks.csv has no rows"),
        ("user_id,itemid,time\nu,a,1\n", "clicks.csv has no column item_id: did you mean itemid?"),
        ("x\nu\n", "clicks.csv has no column user_id: it has x"),
        ("user_id,item_id,time,time\nu,a,1,1\n", "clicks.csv cannot be read: .*"),
    ],
)
def test_a_file_without_content_or_column_is_one_sentence(
    run: Run, text: str, problem: str
) -> None:
    with pytest.raises(UserError, match=problem):
        run("--interactions", "clicks.csv", *TIMED, clicks_csv=text)


def test_parquet_that_is_none_and_ids_that_are_fractions_are_refused(
    run: Run, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="clicks.parquet cannot be read"):
        run("--interactions", "clicks.parquet", clicks_parquet=CLICKS)
    pd.DataFrame({"user_id": [1.0, None], "item_id": [1, 2]}).to_parquet(
        tmp_path / "clicks.parquet"
    )
    with pytest.raises(
        UserError, match="column user_id holds fractions .DOUBLE.; ids are text or whole numbers"
    ):
        run("--interactions", "clicks.parquet")


def test_given_split_by_files(run: Run) -> None:
    text = "user_id,item_id\nu,{}\nu,{}\n"
    files = {
        "a_csv": text.format("a", "b"),
        "b_csv": text.format("c", "a"),
        "c_csv": text.format("d", "b") + "v,a\n",
    }
    dataset = run("--train", "a.csv", "--val", "b.csv", "--test", "c.csv", **files)
    assert [pairs(dataset, part) for part in ("train", "val", "test")] == [
        ["u a", "u b"],
        ["u c"],
        ["u d", "v a"],
    ]
    assert dataset.split_strategy == "given"


def test_min_rating_and_min_interactions(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    text = "user_id,item_id,time,stars\n" + "".join(
        f"{line},5\n" for line in CLICKS.splitlines()[1:]
    )
    args = ["--rating-col", "stars", "--min-rating", "3.5", "--min-interactions", "2"]
    dataset = run("--interactions", "c.csv", *TIMED, *args, c_csv=text + "u,d,4,3\nw,a,1,5\n")
    assert dataset.has_ratings
    assert dataset.users()["user_id"].tolist() == ["u", "v"]
    out, err = capsys.readouterr()
    assert json.loads(out)["dropped"]["below_min_rating"] == 1
    assert "dropped: 1 interactions of users with fewer than --min-interactions" in err
    assert dataset.manifest["filters"] == {"min_rating": 3.5, "min_interactions": 2}


def test_features_of_csv_are_typed_by_how_they_are_written(run: Run) -> None:
    items = (
        "item_id,name,year,price,zip,tags,odd\n"
        'a,"One, two",1999,1.5,02139,x|y z,1\n'
        "b,Zwölf,-5,2e3,10115,,n/a\n"
        "new,,,,,x,2\n"
    )
    users = "user_id,age\nv,30\nstranger,99\n"
    args = ["--items", "items.csv", "--users", "users.csv", "--list-col", "tags"]
    dataset = run(
        "--interactions", "c.csv", *TIMED, *args, c_csv=CLICKS, items_csv=items, users_csv=users
    )
    assert dataset.manifest["columns"]["items"] == {
        "item_id": "string",
        "name": "string",
        "year": "int64",
        "price": "double",
        "zip": "string",
        "tags": "list<string>",
        "odd": "string",
    }
    frame = dataset.items().set_index("item_id").astype(object)
    assert frame.index.tolist() == [
        "a",
        "b",
        "c",
        "new",
    ]  # c has no row in items.csv, new no interaction
    assert frame["year"].tolist()[:2] == [1999, -5]
    assert frame["price"].tolist()[:2] == [1.5, 2000.0]
    assert list(frame["tags"]["a"]) == ["x", "y z"]
    assert list(frame["tags"]["b"]) == []
    assert frame.loc["c"].isna().all()
    assert dataset.users()["user_id"].tolist() == ["u", "v"]


def test_features_of_parquet_keep_their_kind(run: Run, tmp_path: Path) -> None:
    at = pd.to_datetime(pd.Series(["1970-01-02", None]))
    columns = {
        "sku": [1, 2],
        "tags": [["x"], None],
        "at": at,
        "flag": [True, False],
        "price": [1.5, None],
    }
    pd.DataFrame(columns | {"stock": pd.array([3, None], "Int32")}).to_parquet(
        tmp_path / "i.parquet"
    )
    clicks = (
        CLICKS.replace("item_id", "sku").replace("a", "1").replace(",b", ",2").replace(",c", ",3")
    )
    args = ["--item-col", "sku", "--items", "i.parquet", *TIMED]
    dataset = run("--interactions", "c.csv", *args, c_csv=clicks)
    assert dataset.manifest["columns"]["items"] == {
        "item_id": "string",
        "tags": "list<string>",
        "at": "int64",
        "flag": "string",
        "price": "double",
        "stock": "int64",
    }
    row = dataset.items().set_index("item_id").loc["1"]
    assert (row["tags"].tolist(), row["at"], row["flag"], row["price"], row["stock"]) == (
        ["x"],
        86400,
        "true",
        1.5,
        3,
    )


@pytest.mark.parametrize(
    ("items", "problem"),
    [
        ("item_id,x\na,1\nb,2\na,1\n", "^items.csv:4: item_id 'a' came before"),
        ("item_id,x\na,1\n,2\n", "^items.csv:3: item_id '' is empty"),
        ("sku,x\na,1\n", "items.csv has no column item_id"),
        ("item_id,Item_ID\na,1\n", "items.csv cannot be read"),
    ],
)
def test_malformed_features_are_refused(run: Run, items: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        run(
            "--interactions", "c.csv", *TIMED, "--items", "items.csv", c_csv=CLICKS, items_csv=items
        )


def test_a_feature_called_like_the_id_is_refused(run: Run) -> None:
    args = ["--item-col", "sku", "--items", "items.csv", "--timestamp-col", "time"]
    text = CLICKS.replace("item_id", "sku")
    with pytest.raises(
        UserError, match="has a column item_id beside its id column sku: rename one of them"
    ):
        run("--interactions", "c.csv", *args, c_csv=text, items_csv="sku,item_id\na,1\n")


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        ([], "name --interactions, or --train and --test"),
        (
            ["--interactions", "c.csv", "--train", "c.csv"],
            "name --interactions, or --train and --test",
        ),
        (
            ["--interactions", "c.csv", "--split", "given"],
            "name --interactions, or --train and --test",
        ),
        (["--train", "c.csv"], "--test is missing"),
        (["--interactions", "c.csv", "--min-rating", "3"], "--min-rating needs --rating-col"),
        (["--interactions", "none.csv"], "none.csv is not a file"),
        (["--interactions", "c.xlsx"], "must end in .csv, .tsv or .parquet"),
        (["--interactions", "c.csv"], "the temporal split needs timestamps"),
        (["--interactions", "c.csv", "--items", "c.csv", "--list-col", "tme"], "came before"),
        (
            ["--interactions", "c.csv", "--items", "i.csv", "--list-col", "tgas"],
            "--list-col tgas.*did you mean tags?",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_one_sentence(
    run: Run, args: list[str], problem: str
) -> None:
    with pytest.raises(UserError, match=problem):
        run(*args, c_csv=CLICKS, i_csv="item_id,tags\na,x\n")


def test_a_file_name_with_wildcards_is_just_a_name(run: Run, tmp_path: Path) -> None:
    (tmp_path / "x[1]*'.csv").write_text(CLICKS)
    assert pairs(run("--interactions", "x[1]*'.csv", *TIMED), "test") == ["u c", "v a"]


def test_ids_that_look_like_sql_stay_text(run: Run) -> None:
    text = CLICKS.replace("\nu,", "\n'); drop table raw; --,")
    assert (
        pairs(run("--interactions", "c.csv", *TIMED, c_csv=text), "test")[0]
        == "'); drop table raw; -- c"
    )


def test_rows_keep_the_order_of_a_file_that_is_read_in_parallel(tmp_path: Path) -> None:
    path = tmp_path / "big.csv"
    path.write_text("user_id,item_id\n" + "".join(f"user{n},item{n}\n" for n in range(300_000)))
    con = duckdb.connect()
    con.execute("set threads = 4")
    tabular.load_interactions(con, RawFile.of(path), ("user_id", "item_id", None, None))
    wrong = con.execute(
        "select count(*) from interactions where user_id <> 'user' || (source_row - 1)"
    ).fetchall()
    assert wrong == [(0,)]
