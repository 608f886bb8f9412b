"""The tabular command on files as people really have them."""

import gzip
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
TIMED = ["--timestamp-col", "time", "--allow-any-time", "--split", "leave_one_out"]
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
        "--allow-any-time",
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
        ("u,d", "has fewer fields than the file has columns"),
        ("u,d,4,5,6", "has more fields than the file has columns"),
        (",d,4,5", "user_id '' is empty or holds a line break"),
        ("u,  ,4,5", "item_id '  ' is empty or holds a line break"),
        ("u,\t,4,5", r"item_id '\\t' is empty or holds a line break"),
        ("u,d,soon,5", "time 'soon' is neither seconds since 1970"),
        ("u,d,,5", "time '' is neither seconds since 1970"),
        ("u,d,nan,5", "time 'nan' is neither"),
        (
            "u,d,1700000000000,5",
            "time '1700000000000' is neither .* looks like milliseconds since 1970; read it with --timestamp-unit ms",
        ),
        ("u,d,4,good", "stars 'good' is not a number"),
        ("u,d,4,", "stars '' is not a number"),
        ("u,d,4,nan", "stars 'nan' is not a number"),
        ("u,d,4,inf", "stars 'inf' is not a number"),
        ('u,"d"x,4,5', "a quote opens a field, and does not close at its end"),
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


def test_a_field_of_items_may_go_on_to_another_line_which_is_said(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--interactions", "c.csv", *TIMED, "--items", "i.csv"]
    items = 'item_id,note\na,x\nb,"three\n\nlines"\nc,"two\r\nlines"\n'
    notes = run(*args, c_csv=CLICKS, i_csv=items).items()["note"].tolist()
    assert notes == ["x", "three\n\nlines", "two\r\nlines"]
    said = "i.csv:3: a field goes on to another line; 2 such line(s) in all"
    assert said in capsys.readouterr().err
    with pytest.raises(UserError, match="^i.csv:8: item_id '' is empty"):
        run(*args, i_csv=items + ",x\n")
    with pytest.raises(UserError, match="^i.csv:8: has fewer fields"):
        run(*args, i_csv=items + "d\n")


def test_the_first_malformed_row_is_named_whatever_is_wrong_with_it(run: Run) -> None:
    text = CLICKS + "u,d,soon\nu,d\n"
    with pytest.raises(UserError, match="^clicks.csv:8: time 'soon'.*2 malformed"):
        run("--interactions", "clicks.csv", *TIMED, clicks_csv=text)


def test_a_row_that_is_not_utf8_is_malformed(run: Run) -> None:
    with pytest.raises(UserError, match="^clicks.csv:8: is not UTF-8; .* Latin-1"):
        run("--interactions", "clicks.csv", *TIMED, clicks_csv=CLICKS.encode() + b"u,caf\xe9,4\n")


def test_a_file_of_malformed_rows_alone_is_refused_even_if_they_may_be_skipped(run: Run) -> None:
    with pytest.raises(UserError, match="^clicks.csv:2: has fewer fields .* no row is well-formed"):
        run(
            "--interactions",
            "clicks.csv",
            *TIMED,
            "--skip-bad-rows",
            clicks_csv=CLICKS.splitlines()[0] + "\n" + "u\n",
        )


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
        ("user_id,item_id,time,Time\nu,a,1,1\n", "two of its columns have the name time"),
        ("\nuser_id,item_id,time\nu,a,1\n", "clicks.csv:1: the first line is blank"),
        ('user_id,"item_id,time\nu,a,1\n', "clicks.csv:1: a quote opens a name that goes on"),
        ("u1,i1,5\nu2,i2,6\n", "the first line seems to be data .u1, i1, 5.; put a line of names"),
        ("p,item;id;time\nu;a;1\n", "no column user_id: it has p, item;id;time"),
        ("user;item;when\nu;a;1\n", "it has user;item;when, where fields seem .* by ';'"),
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
    with pytest.raises(UserError, match="clicks.parquet is not Parquet, it seems to be text"):
        run("--interactions", "clicks.parquet", clicks_parquet=CLICKS)
    with pytest.raises(UserError, match="clicks.parquet cannot be read: .*magic bytes"):
        run("--interactions", "clicks.parquet", clicks_parquet=b"PAR1" + CLICKS.encode())
    pd.DataFrame({"user_id": [1.0, None], "item_id": [1, 2]}).to_parquet(
        tmp_path / "clicks.parquet"
    )
    with pytest.raises(
        UserError, match="column user_id holds DOUBLE; ids are text or whole numbers"
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
    assert dataset.manifest["filters"] == {
        "min_rating": 3.5,
        "min_interactions": 2,
        "min_item_interactions": 1,
        "since": None,
        "until": None,
    }
    assert dataset.manifest["repeats"] == "first"


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
        "flag": "bool",
        "price": "double",
        "stock": "int64",
    }
    row = dataset.items().set_index("item_id").loc["1"]
    assert (row["tags"].tolist(), row["at"], row["flag"], row["price"], row["stock"]) == (
        ["x"],
        86400,
        True,
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
    args = ["--item-col", "sku", "--items", "items.csv", *TIMED]
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
        (["--interactions", "c.xlsx"], "must end in .csv, .tsv, .jsonl, .json .* or .parquet"),
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


# ---------------------------------------------------------------------------------------------------------------------
# Quotes, separators, encodings


OPEN_QUOTE = CLICKS.replace("u,b,2", 'u,"b,2')


@pytest.mark.parametrize("skip", [[], ["--skip-bad-rows"]])
@pytest.mark.parametrize(
    "text",
    [
        OPEN_QUOTE,  # to the end of the file
        OPEN_QUOTE.replace("v,b,2", 'v,b",2'),  # to a quote that closes it: 3 lines are one row
        OPEN_QUOTE.replace("v,b,2", 'v,b"x,2'),
        CLICKS.replace("u,b,2", 'u,"b\n",2'),
    ],
)
def test_a_quote_that_swallows_lines_of_interactions_is_refused_with_its_line(
    run: Run, text: str, skip: list[str]
) -> None:
    args = ["--interactions", "c.csv", *TIMED, *skip]
    with pytest.raises(UserError, match="^c.csv:3: a quote opens a field .* --quote none"):
        run(*args, c_csv=text)


@pytest.mark.parametrize("skip", [[], ["--skip-bad-rows"]])
def test_a_quote_of_items_that_is_never_closed_is_refused_with_its_line(
    run: Run, skip: list[str]
) -> None:
    items = 'item_id,name\na,"x\ny"\nb,"z\nc,w\n'
    args = ["--interactions", "c.csv", *TIMED, "--items", "i.csv", *skip]
    with pytest.raises(UserError, match="^i.csv:4: a quote opens a field .* is not closed"):
        run(*args, c_csv=CLICKS, i_csv=items)


def test_in_a_tsv_and_with_quote_none_quotes_are_characters(run: Run) -> None:
    text = OPEN_QUOTE.replace(",c,3", ',"c,3')
    for name, args in (("c.csv", ["--quote", "none"]), ("c.tsv", [])):
        content = text.replace(",", "\t") if name == "c.tsv" else text
        dataset = run("--interactions", name, *TIMED, *args, **{name.replace(".", "_"): content})
        assert dataset.items()["item_id"].tolist() == ['"b', '"c', "a", "b", "c"]


def test_a_tsv_may_have_quotes_if_they_are_asked_for(run: Run) -> None:
    text = '"user_id"\t"item_id"\t"time"\nu\t"a\tb"\t1\nu\tb\t2\nu\tc\t3\nv\tb\t1\nv\tc\t2\nv\t"a\tb"\t3\n'
    args = ["--interactions", "c.tsv", *TIMED]
    with pytest.raises(UserError, match="its names are in quotes: use --quote"):
        run(*args, c_tsv=text)
    assert run(*args, "--quote", '"').items()["item_id"].tolist() == ["a\tb", "b", "c"]


@pytest.mark.parametrize("skip", [[], ["--skip-bad-rows"]])
@pytest.mark.parametrize(
    ("usual", "odd"), [("\n", "\r\n"), ("\r\n", "\n"), ("\n", "\r"), ("\r", "\n")]
)
def test_an_odd_line_end_is_refused_with_its_line(
    run: Run, usual: str, odd: str, skip: list[str]
) -> None:
    text = CLICKS.replace("\n", usual).replace(f"u,c,3{usual}", f"u,c,3{odd}")
    with pytest.raises(UserError, match="^c.csv:4: the line ends in .* let all of them end alike"):
        run("--interactions", "c.csv", *TIMED, *skip, c_csv=text)


def test_another_separator_is_named_or_seen_in_the_first_line(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--interactions", "c.csv", *TIMED]
    files = run(*args, c_csv=CLICKS).manifest["files"]
    for separator in ";|\t":
        assert run(*args, c_csv=CLICKS.replace(",", separator)).manifest["files"] == files
        said = f"c.csv: fields are separated by {separator!r}, not by ','"
        assert said in capsys.readouterr().err
    for separator, written in ((":", ":"), ("\t", r"\t"), (" ", " ")):
        named = run(*args, "--delimiter", written, c_csv=CLICKS.replace(",", separator))
        assert named.manifest["files"] == files
        assert "separated" not in capsys.readouterr().err
    both = CLICKS.replace(",", ";").replace("time", "time;x,y").replace("\nu", "\nu")
    with pytest.raises(
        UserError, match="seem to be separated by ';', not by ',': use --delimiter ';'"
    ):
        run(*args, c_csv=both)


def test_a_column_without_a_name_is_left_out_and_said(
    run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = [f"{number},{line}" for number, line in enumerate(CLICKS.splitlines()[1:])]
    text = "\n".join([",user_id,item_id,time", *rows, ""])
    items = pd.DataFrame({"item_id": ["a", "b"], "name": ["x", "y"]}, index=[5, 7])
    items.to_parquet(tmp_path / "i.parquet")
    dataset = run("--interactions", "c.csv", *TIMED, "--items", "i.parquet", c_csv=text)
    err = capsys.readouterr().err
    assert "c.csv: column 1 is left out: it has no name" in err
    assert "i.parquet: column 3 is left out" in err
    assert list(dataset.items().columns) == ["item_id", "name"]
    assert len(dataset.interactions("train")) == 2


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (CLICKS.encode("utf-16"), "^c.csv:1: the file seems to be UTF-16, .*iconv -f UTF-16 "),
        (CLICKS.encode("utf-16-be"), "^c.csv:1: the file seems to be UTF-16BE"),
        (CLICKS.encode("utf-16-le"), "^c.csv:1: the file seems to be UTF-16LE"),
        (CLICKS.encode("utf-32"), "^c.csv:1: the file seems to be UTF-32"),
        (CLICKS.replace("c,3", "\0,3").encode(), "^c.csv:4: holds a NUL byte"),
        (
            CLICKS.replace("b", "café").encode("latin-1"),
            "^c.csv:3: is not UTF-8; .*'u,café,2'.*iconv",
        ),
        (CLICKS.replace("b", "caf\\x").encode().replace(b"\\x", b"\xc3\xa9\xc3"), "is damaged"),
        (CLICKS.replace("time", "Größe").encode("latin-1"), "^c.csv:1: is not UTF-8; .*'.*Größe'"),
        (gzip.compress(CLICKS.encode(), mtime=0), "^c.csv is not text, it seems to be a gzip file"),
        (b"PK\3\4" + CLICKS.encode(), "^c.csv is not text, it seems to be a zip file"),
    ],
)
def test_another_encoding_or_kind_of_file_is_named(run: Run, content: bytes, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        run("--interactions", "c.csv", *TIMED, c_csv=content)


def test_the_first_line_may_be_data_which_is_said(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--user-col", "7", "--item-col", "8", "--split", "leave_one_out"]
    rows = "".join(f"{user},{item}\n" for user in (7, 8) for item in (8, 9, 10))
    run("--interactions", "c.csv", *args, c_csv=rows)
    said = "c.csv: the first line is taken as names of columns (7, 8); if it is data, this row is"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        (["--delimiter", ""], "--delimiter '' is not one character"),
        (["--delimiter", "::"], "--delimiter '::' is not one character"),
        (["--delimiter", '"'], "--delimiter '\"' is not one character"),
        (["--quote", "none"], "--quote is for CSV and TSV, and no file is one"),
        (["--decimal", ","], "--decimal is for CSV and TSV, and no file is one"),
        (["--encoding", "cp1252"], "--encoding is for text files, and all files are Parquet"),
        (["--delimiter", ";"], "--delimiter is for CSV and TSV, and no file is one"),
    ],
)
def test_options_for_text_that_have_no_effect_are_refused(
    run: Run, tmp_path: Path, args: list[str], problem: str
) -> None:
    pq.write_table(pa.table({"user_id": ["u"], "item_id": ["a"]}), tmp_path / "c.parquet")
    with pytest.raises(UserError, match=problem):
        run("--interactions", "c.parquet", *args)


@pytest.mark.parametrize(
    "values",
    [[["a"], ["b"]], [{"x": 1}, {"x": 2}], [b"a", b"b"], [True, False], [1.5, 2.5], [None, None]],
)
def test_ids_of_parquet_are_text_or_whole_numbers(
    run: Run, tmp_path: Path, values: list[object]
) -> None:
    pq.write_table(pa.table({"user_id": values, "item_id": ["a", "b"]}), tmp_path / "c.parquet")
    with pytest.raises(UserError, match="ids are text or whole numbers|user_id '' is empty"):
        run("--interactions", "c.parquet")


def test_every_error_of_duckdb_in_a_load_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "i.csv"
    path.write_text("item_id\na\n")
    con = duckdb.connect()
    con.execute("create table items (x integer)")  # so that a later statement of the load fails
    with pytest.raises(UserError, match="^.*i.csv cannot be read: Catalog Error: .*already exists"):
        tabular.load_features(con, RawFile.of(path), "items", "item_id")
