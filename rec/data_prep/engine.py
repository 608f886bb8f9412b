"""Where the heavy steps of preparation run: SQL that DuckDB and Spark execute unchanged.

- `duckdb`, the default: one machine, out of core; it spills to disk beyond 2 GB.
- `spark`: all cores of this machine, or the cluster that spark-defaults.conf names (found through SPARK_CONF_DIR).

Reading and checking a person's files is DuckDB's in both, on one machine, and so is writing the final Parquet: the bytes
are the same. What goes to Spark and what comes back lies as Parquet beside the output directory, which all machines of a
cluster have to see. Shuffles and kept tables lie where Spark puts them (spark.local.dir).

SQL that both understand alike: no `qualify` or `exclude`, `filter (where ..)` for counts under a condition, and every
order ends in a key that is unique, since neither promises one for ties. Strings are compared by their bytes in both.
"""

import glob
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
from duckdb import DuckDBPyConnection as Connection

from rec.errors import UserError

MEMORY = "2GB"  # DuckDB spills to disk beyond this, so that a laptop prepares what a server does
SPARK = {"spark.sql.session.timeZone": "UTC", "spark.ui.enabled": "false", "spark.log.level": "ERROR"}
Load = Callable[[Connection, Path], dict[str, int]]


class Engine:
    """Tables, and SQL over them: this one is DuckDB."""

    def __init__(self, scratch: Path) -> None:
        """`scratch` is a directory for temporary files."""
        self.scratch, self.con = scratch, duckdb.connect(scratch / "work.duckdb")
        self.con.execute(f"set memory_limit = '{MEMORY}'; set TimeZone = 'UTC'; set enable_progress_bar = false")

    def fill(self, load: Load) -> dict[str, int]:
        """Has `load` create table `interactions`, and `users` and `items` or not; returns what that dropped."""
        dropped = load(self.con, self.scratch)
        for table in ("users", "items"):
            self.con.execute(f"create table if not exists {table} ({table[:-1]}_id varchar)")
        return dropped

    def create(self, table: str, select: str) -> None:
        """Makes a table of a select, which may be from the table that it replaces."""
        self.con.execute(f"create or replace table {table} as {select}")

    def columns(self, table: str) -> list[str]:
        """The names of a table's columns."""
        return self.con.table(table).columns

    def one(self, select: str) -> tuple[Any, ...]:
        """The first row of a select."""
        return self.con.execute(select).fetchall()[0]

    def count(self, rows: str) -> int:
        """How many rows there are: "interactions where split = 'test'"."""
        return int(self.one(f"select count(*) from {rows}")[0])

    def reader(self, select: str, batch_rows: int) -> pa.RecordBatchReader:
        """The rows of a select in its order, of which one batch is in memory at a time; read it to its end at once."""
        return self.con.sql(select).to_arrow_reader(batch_rows)

    def close(self) -> None:
        """Ends the database; its files stay."""
        self.con.close()


class Spark(Engine):
    """The same on Spark."""

    def __init__(self, scratch: Path) -> None:
        """Raises UserError if PySpark is not installed, or Java does not start."""
        log = scratch / "spark.log"
        try:
            with _stderr_to(log):
                from pyspark.errors import PySparkRuntimeError
                from pyspark.sql import SparkSession

                self.session = SparkSession.builder.appName("rec").config(map=SPARK).getOrCreate()
        except ModuleNotFoundError:
            hint = "pip install -r requirements-spark.txt, and Java 17"
            raise UserError(f"--engine spark needs PySpark, which is not installed: {hint}") from None
        except PySparkRuntimeError:
            says = [line for line in log.read_text().splitlines() if line.strip() and not line[0].isspace()]
            hint = f"it needs Java 17 (apt install openjdk-17-jre-headless), and says: {(says or ['nothing'])[-1]}"
            raise UserError(f"--engine spark: Spark did not start: {hint}") from None
        super().__init__(scratch)

    def fill(self, load: Load) -> dict[str, int]:
        dropped = super().fill(load)
        for table in ("interactions", "users", "items"):
            file = str(self.scratch / f"{table}.parquet")
            self.con.table(table).write_parquet(file)
            self.con.execute(f"drop table {table}")
            path = re.sub(r"([\[\]{}*?\\])", r"\\\1", file)  # Spark takes it for a pattern
            self.session.read.parquet(f"file://{path}").createOrReplaceTempView(table)
        return dropped

    def create(self, table: str, select: str) -> None:
        frame = self.session.sql(select).persist()
        frame.count()  # computes it now, while what it is made from is at hand
        frame.createOrReplaceTempView(table)

    def columns(self, table: str) -> list[str]:
        return self.session.table(table).columns

    def one(self, select: str) -> tuple[Any, ...]:
        return tuple(self.session.sql(select).collect()[0])

    def reader(self, select: str, batch_rows: int) -> pa.RecordBatchReader:
        path = self.scratch / "sorted"
        self.session.sql(select).write.parquet(f"file://{path}", mode="overwrite")
        files = f"{glob.escape(str(path))}/*.parquet"  # in Spark's order, as their names are
        return self.con.read_parquet(files, hive_partitioning=False).to_arrow_reader(batch_rows)

    def close(self) -> None:
        self.session.stop()
        super().close()


ENGINES: dict[str, type[Engine]] = {"duckdb": Engine, "spark": Spark}
OPTION: dict[str, Any] = {"choices": list(ENGINES), "default": "duckdb"}
OPTION["help"] = "what filters, splits and sorts: DuckDB on this machine, or Spark; default: %(default)s"


@contextmanager
def _stderr_to(file: Path) -> Iterator[None]:
    """What this process, and those that it starts meanwhile, write on stderr goes to a file: Java greets at length."""
    stderr = os.dup(2)
    with open(file, "w") as log:
        os.dup2(log.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
