"""Where the heavy steps of preparation run: SQL that DuckDB and Spark execute unchanged.

- `duckdb`, the default: one machine, out of core.
- `spark`: all cores of this machine, or the cluster that spark-defaults.conf names (found through SPARK_CONF_DIR).

Reading and checking a person's files is DuckDB's in both, on one machine, and so is writing the dataset directory, so
the bytes are the same. What goes to Spark and what comes back lies as Parquet beside the output directory, which all
machines of a cluster have to see. Shuffles and the table that is kept lie where Spark puts them (spark.local.dir).

SQL that both understand alike has no `qualify`, names all columns of a select that leaves some out, and ends every
order in a key that is unique. Strings are compared by their bytes in both. Not out of core: `percentile_disc`, for
which DuckDB holds all values in memory, and one executor of Spark all distinct ones.
"""

import atexit
import glob
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
from duckdb import DuckDBPyConnection as Connection

from rec.errors import UserError

SPARK = {
    "spark.sql.session.timeZone": "UTC",
    "spark.ui.enabled": "false",
    "spark.log.level": "ERROR",
}


class Engine:
    """The tables `interactions`, `users` and `items`, and SQL over them. This one is DuckDB."""

    def __init__(self, con: Connection, scratch: Path) -> None:
        """Takes over `interactions`, and `users` and `items` or empty ones; `scratch` is for temporary files."""
        con.execute(
            "create table if not exists users (user_id text); create table if not exists items (item_id text)"
        )
        self.con, self.scratch, self.columns = con, scratch, con.table("interactions").columns

    def rows(self, select: str) -> list[tuple]:
        """All rows of a select that has few."""
        return self.con.execute(select).fetchall()

    def count(self, where: str = "true") -> int:
        """How many rows of table `interactions` are so, such as "split = 'test'"."""
        return int(self.rows(f"select count(*) from interactions where {where}")[0][0])

    def replace(self, select: str) -> int:
        """Replaces table `interactions` by a select from it; returns how many rows it has then."""
        return int(self.rows(f"create or replace table interactions as {select}")[0][0])

    def reader(self, select: str, size: int) -> pa.RecordBatchReader:
        """The rows of a select in its order, in batches of some `size` rows; valid until the engine is asked again."""
        return self.con.sql(select).to_arrow_reader(size)


class Spark(Engine):
    """The same on Spark, to which all three tables are handed over."""

    def __init__(self, con: Connection, scratch: Path) -> None:
        """Raises UserError if PySpark is not installed or does not start."""
        super().__init__(con, scratch)
        stderr, log = os.dup(2), scratch / "spark.log"
        with open(log, "w") as file:
            os.dup2(file.fileno(), 2)  # Java greets with a dozen lines
        try:
            from pyspark.sql import SparkSession

            self.session = SparkSession.builder.appName("rec").config(map={**SPARK}).getOrCreate()
        except Exception as error:  # not installed, no Java, a configuration that does not work
            why = (re.findall(r"^\S.*", log.read_text(), re.M) or [error])[
                -1
            ]  # Java's last word, but for its stack
            raise UserError(
                f"Spark did not start (`pip install -r requirements-spark.txt`, Java 17): {why}"
            ) from None
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
        atexit.register(self.session.stop)
        for table in ("interactions", "users", "items"):
            con.table(table).write_parquet(path := str(scratch / f"{table}.parquet"))
            # Spark takes a path that it reads for a pattern.
            self.session.read.parquet(
                "file://" + re.sub(r"([][{}*?\\])", r"\\\1", path)
            ).createOrReplaceTempView(table)

    def rows(self, select: str) -> list[tuple]:
        with _in_a_sentence():
            return list(map(tuple, self.session.sql(select).collect()))

    def replace(self, select: str) -> int:
        with _in_a_sentence():
            frame = self.session.sql(select).persist()
            count = frame.count()  # computes it, while what it is made from is still kept
            frame.createOrReplaceTempView("interactions")
            return count

    def reader(self, select: str, size: int) -> pa.RecordBatchReader:
        path = f"{self.scratch}/sorted"
        with _in_a_sentence():
            self.session.sql(select).write.parquet(
                f"file://{path}", mode="overwrite"
            )  # named in order of the rows
        return self.con.read_parquet(
            f"{glob.escape(path)}/*.parquet", hive_partitioning=False
        ).to_arrow_reader(size)


@contextmanager
def _in_a_sentence() -> Iterator[None]:
    """Raises UserError for what goes wrong in a job of Spark's, such as a full disk: the last cause that Java names."""
    try:
        yield
    except Exception as error:
        causes = (
            re.findall(r"^(?:: |Caused by: )(.*)", str(error), re.M) or str(error).splitlines()[:1]
        )
        raise UserError(f"Spark failed: {causes[-1]}") from None


ENGINES = {"duckdb": Engine, "spark": Spark}
