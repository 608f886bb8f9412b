"""The dataset directory: what is written, what is refused, and what a kill leaves behind."""

import functools
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest

from rec.data_prep import write
from rec.data_prep.dataset import Dataset, open_dataset, verify
from rec.data_prep.write import prepare, staging
from rec.errors import UserError


def load_six(con: duckdb.DuckDBPyConnection, scratch: Path) -> dict[str, int]:
    """Two users and three items in no order; features of one user, one item, and one item that nobody has met."""
    con.execute("""
        create table interactions as select * from (values
            ('u', '007', 3.9, 4, 1), ('v', 'b', 2.0, 5, 2), ('u', 'b', 1.0, 3, 3),
            ('u', 'ä, "c"', 3.1, 2, 4), ('v', 'ä, "c"', 9.0, 1, 5), ('v', '007', 1.0, 1, 6)
        ) as rows (user_id, item_id, timestamp, rating, source_row)""")
    con.execute(
        "create table users as select 'v' as user_id, 30 as age union all select 'stranger', 99"
    )
    con.execute("""create table items as select '007' as item_id, 'Bond' as title, ['a', 'b'] as tags
                   union all select 'new', 'Unmet', []""")
    return {"bad_rows": 1}


def prepare_six(output_dir: Path) -> Dataset:
    prepare(output_dir, load_six, "six", "a test", "leave_one_out", 0)
    return open_dataset(output_dir)


def test_interactions_are_typed_and_sorted_by_time_then_source(tmp_path: Path) -> None:
    dataset = prepare_six(tmp_path / "six")
    train = dataset.interactions("train")
    assert train.to_dict("list") == {
        "user_id": ["u", "v"],
        "item_id": ["b", "007"],
        "timestamp": [1, 1],
        "rating": [3.0, 1.0],
    }
    assert (train["timestamp"].dtype, train["rating"].dtype) == ("int64", "float32")
    assert dataset.interactions("val")["item_id"].tolist() == ["b", 'ä, "c"']
    assert dataset.interactions("test")["item_id"].tolist() == [
        "007",
        'ä, "c"',
    ]  # 3.9 is after 3.1, in second 3 both
    assert dataset.interactions("test")["timestamp"].tolist() == [3, 9]


def test_users_that_occur_and_all_items_of_the_catalogue_have_a_row(tmp_path: Path) -> None:
    dataset = prepare_six(tmp_path / "six")
    users, items = dataset.users(), dataset.items()
    assert users["user_id"].tolist() == ["u", "v"]
    assert users["age"].isna().tolist() == [True, False]
    assert items["item_id"].tolist() == ["007", "b", "new", 'ä, "c"']
    assert items["tags"].iloc[0].tolist() == ["a", "b"]
    assert items["title"].iloc[2] == "Unmet"
    assert items["title"].isna().tolist() == [False, True, False, True]


def test_manifest_and_json_line_tell_what_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = prepare_six(tmp_path / "six")
    counts = {"users": 2, "items": 4, "train": 2, "val": 2, "test": 2}
    assert dataset.manifest["counts"] == counts
    assert dataset.manifest["columns"]["items"] == {
        "item_id": "string",
        "title": "string",
        "tags": "list<string>",
    }
    assert (dataset.ordered, dataset.has_ratings, dataset.split_strategy) == (
        True,
        True,
        "leave_one_out",
    )
    out, err = capsys.readouterr()
    line = json.loads(out.splitlines()[-1])
    assert line == {
        "dataset": str(tmp_path / "six"),
        "id": dataset.id,
        **counts,
        "dropped": {"bad_rows": 1, "below_min_rating": 0, "duplicates": 0, "of_inactive_users": 0},
    }
    assert "dropped: 1 malformed rows" in err


def test_same_input_gives_the_same_bytes_in_another_directory(tmp_path: Path) -> None:
    one, two = prepare_six(tmp_path / "one"), prepare_six(tmp_path / "two")
    assert one.id == two.id
    for name in one.manifest["files"]:
        assert (one.path / name).read_bytes() == (two.path / name).read_bytes()


def test_large_splits_are_several_files_cut_at_the_same_rows_for_any_number_of_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(write.SHARDS, "max_rows_per_file", 50_000)
    monkeypatch.setitem(write.SHARDS, "max_rows_per_group", 20_000)
    monkeypatch.setitem(write.SHARDS, "min_rows_per_group", 20_000)

    def load_many(con: duckdb.DuckDBPyConnection, scratch: Path, threads: int) -> dict[str, int]:
        con.execute(f"set threads = {threads}")
        con.execute("""create table interactions as select cast(n % 1000 as varchar) as user_id,
            cast(n // 1000 as varchar) as item_id, cast(n * 7919 % 200003 as double) as timestamp, n as source_row
            from range(200000) as numbers (n)""")
        con.execute(
            "update interactions set item_id = 'x' where source_row % 1000 < 900 and source_row < 1000"
        )
        con.execute(
            "update interactions set item_id = 'x' where timestamp > 129000 and source_row % 2 = 0"
        )
        return {}

    for threads in (1, 4):
        load = functools.partial(load_many, threads=threads)
        prepare(tmp_path / str(threads), load, "many", "", "temporal", 0)
    one, four = open_dataset(tmp_path / "1"), open_dataset(tmp_path / "4")
    assert one.id == four.id
    assert [pq.ParquetFile(file).metadata.num_rows for file in one.files("train")][:2] == [
        50_000,
        50_000,
    ]
    assert one.interactions("train")["timestamp"].is_monotonic_increasing


@pytest.mark.parametrize(
    "name", ["interactions/train/00000.parquet", "users.parquet", "items.parquet"]
)
def test_verify_names_the_damaged_file(tmp_path: Path, name: str) -> None:
    dataset = prepare_six(tmp_path / "six")
    verify(dataset)
    content = bytearray((dataset.path / name).read_bytes())
    content[20] ^= 1
    (dataset.path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} is damaged"):
        verify(dataset)
    (dataset.path / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        verify(dataset)
    with pytest.raises(UserError, match=f"{name} is missing"):
        open_dataset(dataset.path)


def test_open_refuses_what_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run `python -m rec.data_prep.dummy"):
        open_dataset(tmp_path)
    (tmp_path / "dataset.json").write_text('{"format_version": 1')
    with pytest.raises(UserError, match="dataset.json is damaged"):
        open_dataset(tmp_path)
    (tmp_path / "dataset.json").write_text('{"format_version": 99, "files": {}}')
    with pytest.raises(UserError, match="is not of format version 1"):
        open_dataset(tmp_path)


def test_an_existing_dataset_is_replaced_and_nothing_is_left_over(tmp_path: Path) -> None:
    prepare_six(tmp_path / "six")
    (tmp_path / "six" / "old").touch()
    prepare_six(tmp_path / "six")
    assert [path.name for path in tmp_path.iterdir()] == ["six"]
    assert sorted(path.name for path in (tmp_path / "six").iterdir()) == [
        "dataset.json",
        "dataset.md",
        "interactions",
        "items.parquet",
        "users.parquet",
    ]


def test_an_empty_directory_is_filled_and_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    prepare_six(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert open_dataset(tmp_path / "elsewhere").id == open_dataset(tmp_path / "link").id


@pytest.mark.parametrize("make", [Path.touch, lambda path: (path / "mine").mkdir(parents=True)])
def test_anything_else_under_the_name_is_never_overwritten(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    make(tmp_path / "six")
    with pytest.raises(UserError, match="exists and is no dataset"):
        prepare_six(tmp_path / "six")
    assert (tmp_path / "six").is_file() or (tmp_path / "six/mine").is_dir()


def test_a_failure_keeps_the_old_dataset(tmp_path: Path) -> None:
    dataset = prepare_six(tmp_path / "six")

    def load_then_fail(con: duckdb.DuckDBPyConnection, scratch: Path) -> dict[str, int]:
        load_six(con, scratch)
        raise UserError("no")

    with pytest.raises(UserError):
        prepare(tmp_path / "six", load_then_fail, "six", "", "temporal", 0)
    assert open_dataset(tmp_path / "six").id == dataset.id
    assert [path.name for path in tmp_path.iterdir()] == ["six"]


def test_a_killed_command_leaves_nothing_under_the_name_and_the_next_run_works(
    tmp_path: Path,
) -> None:
    command = [sys.executable, "-m", "rec.data_prep.dummy", "--users", "20000", "--items", "2000"]
    command += ["--output-dir", str(tmp_path / "dummy")]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("filtering"):  # half-way: the database is filled, nothing is written yet
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "dummy").exists()
    assert (tmp_path / ".dummy.tmp").is_dir()
    prepare_six(tmp_path / "dummy")
    assert [path.name for path in tmp_path.iterdir()] == ["dummy"]


def test_the_old_dataset_survives_a_command_stopped_between_its_two_renames(tmp_path: Path) -> None:
    six = prepare_six(tmp_path / "six")
    six.path.rename(tmp_path / ".six.old")
    with pytest.raises(RuntimeError), staging(tmp_path / "six"):
        assert open_dataset(tmp_path / "six").id == six.id  # the next run puts it back first
        raise RuntimeError
    with pytest.raises(FileNotFoundError), staging(tmp_path / "six") as new:
        new.rmdir()  # so that the second rename fails
    assert open_dataset(tmp_path / "six").id == six.id
    assert [path.name for path in tmp_path.iterdir()] == ["six"]


def test_a_dataset_that_is_replaced_while_it_is_read_is_said(tmp_path: Path) -> None:
    opened = prepare_six(tmp_path / "six")
    verify(opened)
    prepare(tmp_path / "six", load_six, "another", "a test", "leave_one_out", 0)
    with pytest.raises(UserError, match="six was replaced while it was read: run the command"):
        verify(opened)
    verify(open_dataset(tmp_path / "six"))


def test_a_dataset_has_one_writer_at_a_time(tmp_path: Path) -> None:
    code = "import sys, time, pathlib; from rec.data_prep.write import staging\n"
    code += "with staging(pathlib.Path(sys.argv[1])): print('ready', flush=True); time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "six")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        command = [
            sys.executable,
            "-m",
            "rec.data_prep.dummy",
            "--output-dir",
            str(tmp_path / "six"),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 1 and done.stdout == ""
        assert f"six is being written by process {process.pid} on " in done.stderr
        assert (tmp_path / ".six.tmp" / "new").is_dir()
        waiting = subprocess.Popen(
            [*command, "--wait", "--users", "30", "--items", "20"],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert waiting.stderr is not None
        assert waiting.stderr.readline().startswith("waiting: ")
    finally:
        process.kill()
        process.wait()
    waiting.communicate()
    assert waiting.returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["six"]


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    def load_too_much(con: duckdb.DuckDBPyConnection, scratch: Path) -> dict[str, int]:
        con.execute("set max_temp_directory_size = '1MB'; set memory_limit = '20MB'")
        con.execute(
            "create table interactions as select md5(cast(n as varchar)) x from range(3000000) t (n) order by x"
        )
        return {}

    with pytest.raises(UserError, match="preparing .* failed: .*"):
        prepare(tmp_path / "big", load_too_much, "big", "", "temporal", 0)
    assert list(tmp_path.iterdir()) == []


def test_data_preparation_does_not_import_tensorflow() -> None:
    code = "import sys; from rec.data_prep import dummy, movielens, tabular; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
