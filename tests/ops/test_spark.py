"""`--engine spark` writes what DuckDB writes, to the byte, and says the same meanwhile."""

import os
import random
import shutil
import sys
from pathlib import Path

import duckdb
import pytest

from rec.data_prep import dummy, movielens, tabular
from rec.data_prep.dataset import open_dataset
from rec.errors import UserError
from rec.ops.spark import Spark
from tests.conftest import run

COMMANDS = {"movielens": movielens, "tabular": tabular}
# Several partitions however small the data, so that there is an order to get wrong; and a Java that warms up quickly.
SPARK = """
spark.master local[2]
spark.sql.shuffle.partitions 3
spark.sql.adaptive.coalescePartitions.enabled false
spark.sql.codegen.wholeStage false
spark.driver.extraJavaOptions -XX:TieredStopAtLevel=1
"""
needs_java = pytest.mark.skipif(
    not (os.environ.get("JAVA_HOME") or shutil.which("java")), reason="there is no Java"
)
# In order of their bytes the last two come as here, in order of UTF-16 the other way round.
NAMES = ["007", "B", "a", 'a,"b"', "Ünï", "ﬀ", "🎬"]


def write_files(folder: Path) -> None:
    """Interactions of 40 users with 60 items, some twice, at few and so at equal times; and features of some."""
    draw = random.Random(0)
    users, items = (
        [f"{name} {kind}{n}" for n in range(size) for name in NAMES]
        for kind, size in (("u", 6), ("i", 9))
    )
    pairs = [(draw.choice(users), draw.choice(items)) for _ in range(700)]
    rows = [
        (user, item, draw.choice([1, 2.5, 3.3, 5]), draw.randrange(0, 4000) / 4)
        for user, item in pairs
    ]
    rows += [("only once", "a i0", 5, 7), *rows[:30]]
    line = '"{}","{}",{},{}\n'.format
    later, earlier = rows[::5], [row for number, row in enumerate(rows) if number % 5]
    test = [(user, item, rating, time + 900) for user, item, rating, time in later]
    for name, some in {"all": rows, "train": earlier, "test": test}.items():
        lines = (line(*(str(value).replace('"', '""') for value in row)) for row in some)
        (folder / f"{name}.csv").write_text("user_id,item_id,rating,time\n" + "".join(lines))
    ages = "".join(
        line(user.replace('"', '""'), "", n, n / 3 if n % 2 else "")
        for n, user in enumerate(users[:20])
    )
    (folder / "users.csv").write_text(f"user_id,empty,age,a.b\n{ages}")
    tags = "".join(
        f'"{item.replace(chr(34), chr(34) * 2)}",Ä {n},a|ß,1.5\n'
        for n, item in enumerate(items[::2])
    )
    (folder / "items.csv").write_text(
        f'item_id,title,tags,"Größe (`cm`), {{x}}"\n{tags}nobody met,,,\n'
    )
    (folder / "ratings.csv").write_text(
        "userId,movieId,rating,timestamp\n"
        + "".join(f"{n % 20},{n * n % 37},{n % 5}.5,{n % 50}\n" for n in range(300))
    )
    movies = "".join(f"{n},Film {n} (19{n + 10}),Drama|War\n" for n in range(40))
    (folder / "movies.csv").write_text(
        f"movieId,title,genres\n{movies}99,None,(no genres listed)\n"
    )


FEATURES = ["--users", "users.csv", "--items", "items.csv", "--list-col", "tags"]
TIMED = ["--timestamp-col", "time", "--allow-any-time"]
GIVEN = ["--train", "train.csv", "--test", "test.csv"]


@needs_java
@pytest.mark.filterwarnings("ignore:PySpark does not yet fully support pandas")
@pytest.mark.parametrize(
    ("command", "args"),
    [
        (
            "tabular",
            [
                "--interactions",
                "all.csv",
                "--rating-col",
                "rating",
                "--min-rating",
                "3.3",
                "--min-interactions",
                "6",
                *TIMED,
                *FEATURES,
            ],
        ),
        ("tabular", ["--interactions", "all.csv", "--split", "leave_one_out"]),
        ("tabular", [*GIVEN, *TIMED]),
        ("tabular", [*GIVEN, "--min-interactions", "2"]),
        ("movielens", ["--name", "latest-small", "--source", ".", "--split", "leave_one_out"]),
    ],
    ids=["temporal", "leave_one_out", "given", "given_unordered", "movielens"],
)
def test_both_engines_write_the_same_bytes_and_say_the_same(
    command: str,
    args: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "spark-defaults.conf").write_text(SPARK)
    monkeypatch.setenv("SPARK_CONF_DIR", str(tmp_path))
    found = {}
    for engine in ("duckdb", "spark"):
        folder = tmp_path / f"{engine} [1] {{a=b}}"  # which is no pattern, and no column a
        folder.mkdir()
        monkeypatch.chdir(folder)
        write_files(folder)
        monkeypatch.setattr("sys.argv", [command, "--output-dir", "out", "--engine", engine, *args])
        COMMANDS[command].main()
        assert {path.name for path in folder.iterdir() if path.suffix != ".csv"} == {"out"}
        dataset = open_dataset("out")
        bytes_of = {name: (dataset.path / name).read_bytes() for name in dataset.manifest["files"]}
        found[engine] = (dataset.manifest, bytes_of, capfd.readouterr())
    assert found["spark"] == found["duckdb"]
    assert "Java" not in found["spark"][2].err


def test_without_pyspark_one_sentence_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyspark.sql", None)
    monkeypatch.setattr(
        "sys.argv", ["dummy", "--output-dir", str(tmp_path / "out"), "--engine", "spark"]
    )
    with pytest.raises(
        UserError,
        match=r"^Spark did not start \(`pip install 'rec-two-tower\[spark\]'`, Java 17\): .*pyspark",
    ):
        dummy.main()
    assert list(tmp_path.iterdir()) == []


def test_without_java_one_sentence_says_what_to_install(tmp_path: Path) -> None:
    args = ["--output-dir", tmp_path / "out", "--engine", "spark"]
    done = run("rec.data_prep.dummy", *args, changes={"JAVA_HOME": "/nonexistent"})
    assert done.returncode == 1
    *notes, last = done.stderr.splitlines()
    assert all(line.startswith(("generating ", "users: ", "items: ", "times: ")) for line in notes)
    assert last.startswith(
        "error: Spark did not start (`pip install 'rec-two-tower[spark]'`, Java 17): "
    )


@needs_java
@pytest.mark.filterwarnings("ignore:PySpark does not yet fully support pandas")
def test_what_fails_in_a_job_is_one_sentence(tmp_path: Path) -> None:
    with duckdb.connect() as con:
        con.execute(
            "create table interactions as select 'u' as user_id, 'i' as item_id, 0 as source_row"
        )
        engine = Spark(con, tmp_path)
    with pytest.raises(UserError, match="^Spark failed: [^\n]*no room is left[^\n]*$"):
        engine.rows("select raise_error('no room is left') from interactions")
