"""Files as they are: compressed, in several parts, in other encodings, as JSON lines, with other numbers and times."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from rec.data_prep import tabular
from rec.data_prep.dataset import Dataset, open_dataset
from rec.errors import UserError

Run = Callable[..., Dataset]
ROWS = [("u", "a", 1), ("u", "é", 2), ("u", "c", 3), ("v", "c", 1), ("v", "é", 2), ("v", "a", 3)]
CLICKS = "user_id,item_id,time\n" + "".join(f"{user},{item},{time}\n" for user, item, time in ROWS)
TIMED = ["--timestamp-col", "time", "--allow-any-time", "--split", "leave_one_out"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command in a folder with the files given by name; opens the dataset."""

    def run(*args: str, files: dict[str, bytes | str]) -> Dataset:
        monkeypatch.chdir(tmp_path)
        for name, content in files.items():
            Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
        monkeypatch.setattr("sys.argv", ["tabular", "--output-dir", "out", *args])
        tabular.main()
        return open_dataset("out")

    return run


def lines_of_json(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


JSON = [{"user": {"id": user}, "item_id": item, "time": time} for user, item, time in ROWS]
NESTED = ["--user-col", "user.id", *TIMED]


def gzipped(content: bytes) -> bytes:
    """Without the time, so that the tests have the same names in every process."""
    return gzip.compress(content, mtime=0)


def zstd(content: bytes) -> bytes:
    return pa.compress(content, codec="zstd", asbytes=True)


@pytest.mark.parametrize(
    ("name", "content", "args"),
    [
        ("c.csv.gz", gzipped(CLICKS.encode()), TIMED),
        ("c.csv.zst", zstd(CLICKS.encode()), TIMED),
        ("c.tsv.gz", gzipped(CLICKS.replace(",", "\t").encode()), TIMED),
        ("c.csv", CLICKS.encode("cp1252"), [*TIMED, "--encoding", "cp1252"]),
        ("c.csv", CLICKS.encode("utf-16"), [*TIMED, "--encoding", "utf-16"]),
        ("c.csv.gz", gzipped(CLICKS.encode("utf-16")), [*TIMED, "--encoding", "utf-16"]),
        ("c.jsonl", lines_of_json(JSON).encode(), NESTED),
        ("c.json", lines_of_json(JSON).encode(), NESTED),
        ("c.json", "".join(f"{row}\n" for row in JSON).encode(), NESTED),  # as Python prints it
        (
            "c.csv",
            CLICKS.partition("\n")[2].encode(),
            [*TIMED, "--header", "user_id, item_id,time"],
        ),
        ("c.ndjson.gz", gzipped(lines_of_json(JSON).encode()), NESTED),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_form_gives_the_same_interactions(
    run: Run, name: str, content: bytes, args: list[str]
) -> None:
    expected = run("--interactions", "plain.csv", *TIMED, files={"plain.csv": CLICKS})
    dataset = run("--interactions", name, *args, files={name: content})
    assert dataset.manifest["files"] == expected.manifest["files"]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("c.csv.gz", gzipped(CLICKS.encode())[:30], "^c.csv.gz cannot be read as gzip: "),
        ("c.csv.zst", CLICKS.encode(), "^c.csv.zst cannot be read as zstd: "),
        ("c.csv.gz", gzipped(f"{CLICKS}u\n".encode()), "^c.csv.gz:8: has fewer fields"),
        ("c.csv", gzipped(CLICKS.encode()), "a gzip file: let its name end in .gz, after"),
        ("c.parquet.gz", b"PAR1", "the name must end in .csv"),
    ],
)
def test_a_compressed_file_is_named_by_what_is_wrong(
    run: Run, name: str, content: bytes, problem: str
) -> None:
    with pytest.raises(UserError, match=problem):
        run("--interactions", name, *TIMED, files={name: content})


def test_another_encoding_than_the_one_named_is_refused(run: Run) -> None:
    args = ["--interactions", "c.csv", *TIMED, "--encoding"]
    with pytest.raises(UserError, match="^c.csv cannot be read as ascii: .*position"):
        run(*args, "ascii", files={"c.csv": CLICKS})
    with pytest.raises(UserError, match="^c.csv cannot be read as utf-16: .*truncated"):
        run(*args, "utf-16", files={"c.csv": CLICKS.encode("utf-16")[:-1]})
    with pytest.raises(UserError, match="^c.csv cannot be read as klingon: unknown encoding"):
        run(*args, "klingon", files={"c.csv": CLICKS})


# ------------------------------------------------------------------------------------------------------------
# JSON lines


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "line '{' is no JSON object"),
        ("[1]", r"line '\[1\]' is no JSON object"),
        ("user_id,item_id", "line 'user_id,item_id' is no JSON object"),
        ("{'user': w}", "line \"{'user': w}\" is no JSON object"),
        ('{"user": {"id": "w"}, "time": 3}', "item_id '' is empty"),
        ('{"user": "w", "item_id": "a", "time": 3}', "user.id '' is empty"),
        ('{"user": {"id": "w"}, "item_id": "a", "time": "soon"}', "time 'soon' is neither"),
    ],
)
def test_a_line_of_json_that_is_malformed_is_named_or_skipped_and_counted(
    run: Run, capsys: pytest.CaptureFixture[str], line: str, problem: str
) -> None:
    files = {"c.jsonl": f"\n{lines_of_json(JSON)}\n{line}\n"}
    args = ["--interactions", "c.jsonl", *NESTED]
    with pytest.raises(UserError, match=rf"^c.jsonl:9: {problem}.*1 malformed row"):
        run(*args, files=files)
    dataset = run(*args, "--skip-bad-rows", files=files)
    assert json.loads(capsys.readouterr().out)["dropped"]["bad_rows"] == 1
    assert sum(dataset.manifest["counts"][part] for part in ("train", "val", "test")) == 6


def test_features_of_json_keep_their_types(run: Run) -> None:
    items = [
        {"item_id": "a", "zip": "02139", "price": 1.5, "stock": 3, "new": True, "tags": ["x"]},
        {"item_id": "c", "zip": "7", "price": 2, "stock": None, "size": {"w": 1}},
    ]
    files = {"c.csv": CLICKS, "i.jsonl": lines_of_json(items)}
    dataset = run("--interactions", "c.csv", *TIMED, "--items", "i.jsonl", files=files)
    assert dataset.manifest["columns"]["items"] == {
        "item_id": "string",
        "zip": "string",
        "price": "double",
        "stock": "int64",
        "new": "bool",
        "tags": "list<string>",
    }
    row = dataset.items().set_index("item_id").loc["a"]
    assert (row["zip"], row["price"], row["stock"], row["new"]) == ("02139", 1.5, 3, True)
    assert row["tags"].tolist() == ["x"]


# ------------------------------------------------------------------------------------------------------------
# Several files, numbers, times


def test_a_pattern_names_several_files_in_order_of_their_names(run: Run) -> None:
    header, *lines = CLICKS.replace(",1\n", ",5\n").replace(",2\n", ",5\n").splitlines()
    files = {f"part-{at}.csv": f"{header}\n{line}\n" for at, line in enumerate(lines)}
    files["part-9.csv"] = f"{header}\nw,é,1\nw,a,2\nw,c,3\n"
    dataset = run("--interactions", "part-*.csv", *TIMED, files=files)
    last = dataset.interactions("test")
    assert last["user_id"].tolist() == ["w", "u", "v"]
    assert last["item_id"].tolist() == ["c", "é", "é"]  # of the same second, from the later file
    assert dataset.manifest["source"].startswith("part-0.csv, part-1.csv, ")
    files = {}
    named = ["part-0.csv", "part-[1-5].csv", "part-9.csv"]
    again = run("--interactions", *named, *TIMED, files=files)
    assert again.manifest["files"] == dataset.manifest["files"]
    with pytest.raises(UserError, match=r"no file matches none-\*.csv"):
        run("--interactions", "none-*.csv", *TIMED, files={})
    with pytest.raises(UserError, match="--items names 7 files: name one"):
        run("--interactions", "part-0.csv", *TIMED, "--items", "part-*.csv", files={})


def test_a_decimal_comma_is_read_in_ratings_times_and_features(run: Run) -> None:
    clicks = CLICKS.replace("time", "time;stars").replace("\n", ",5;3,5\n").replace(",5;3,5", "", 1)
    clicks = (
        clicks.replace("u,", "u;")
        .replace("v,", "v;")
        .replace("user_id,item_id,", "user_id;item_id;")
    )
    clicks = clicks.replace("a,", "a;").replace("é,", "é;").replace("c,", "c;")
    files = {"c.csv": clicks, "i.csv": "item_id;price;year\na;1,99;1999\nc;2;2001\n"}
    options = ["--rating-col", "stars", "--delimiter", ";", "--items", "i.csv"]
    dataset = run("--interactions", "c.csv", *TIMED, *options, "--decimal", ",", files=files)
    assert dataset.interactions("train")["rating"].tolist() == [3.5, 3.5]
    assert dataset.items()["price"].tolist()[:2] == [1.99, 2.0]
    assert dataset.manifest["columns"]["items"]["year"] == "int64"
    with pytest.raises(UserError, match="stars '3,5' is not a number"):
        run("--interactions", "c.csv", "--split", "leave_one_out", *options, files=files)


@pytest.mark.parametrize(
    ("unit", "factor"), [("s", 1), ("ms", 10**3), ("us", 10**6), ("ns", 10**9)]
)
def test_times_have_the_unit_that_is_named(run: Run, unit: str, factor: int) -> None:
    now = 1_700_000_000
    clicks = CLICKS.splitlines()[0] + "\n"
    clicks += "".join(f"{user},{item},{(now + time) * factor}\n" for user, item, time in ROWS)
    args = ["--timestamp-col", "time", "--split", "leave_one_out", "--timestamp-unit", unit]
    dataset = run("--interactions", "c.csv", *args, files={"c.csv": clicks})
    assert dataset.interactions("train")["timestamp"].tolist() == [now + 1, now + 1]
    dates = clicks.replace(str((now + 3) * factor), "2023-11-14")
    with pytest.raises(
        UserError, match=f"c.csv:4: time '2023-11-14' is not a number of {unit} since"
    ):
        run("--interactions", "c.csv", *args, files={"c.csv": dates})
    with pytest.raises(UserError, match="--timestamp-format and --timestamp-unit exclude each"):
        run("--interactions", "c.csv", *args, "--timestamp-format", "%Y", files={})
