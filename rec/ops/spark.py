"""The heavy steps of preparation on Spark: `--engine spark` of the commands in rec/data_prep/.

Spark uses all cores of this machine, or the cluster that spark-defaults.conf names (found through SPARK_CONF_DIR).

DuckDB still reads and checks the source files and writes the dataset directory, on one machine, so the bytes are the
same. The tables are handed over as Parquet beside the output directory, which all machines of a cluster have to see.
Shuffles and the table that is kept lie where Spark puts them (spark.local.dir). One executor holds all distinct values
of a `percentile_disc` in memory.
"""

import atexit
import glob
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
from duckdb import DuckDBPyConnection as Connection

from rec.data_prep.engine import Engine
from rec.errors import UserError

SETTINGS = {
    "spark.sql.session.timeZone": "UTC",
    "spark.ui.enabled": "false",
    "spark.log.level": "ERROR",
}


class Spark(Engine):
    """The engine on Spark, which gets all three tables."""

    def __init__(self, con: Connection, scratch: Path) -> None:
        """Raises UserError if PySpark is not installed or does not start."""
        super().__init__(con, scratch)
        self.session = _start(scratch / "spark.log")
        atexit.register(self.session.stop)
        for table in ("interactions", "users", "items"):
            path = str(scratch / f"{table}.parquet")
            con.table(table).write_parquet(path)
            escaped = re.sub(r"([][{}*?\\])", r"\\\1", path)  # Spark reads a path as a pattern
            self.session.read.parquet(f"file://{escaped}").createOrReplaceTempView(table)

    def rows(self, select: str) -> list[tuple]:
        with _one_sentence():
            return [tuple(row) for row in self.session.sql(select).collect()]

    def replace(self, select: str) -> int:
        with _one_sentence():
            frame = self.session.sql(select).persist()
            count = frame.count()  # computes it, while the table that it is made from is still kept
            frame.createOrReplaceTempView("interactions")
            return count

    def reader(self, select: str, size: int) -> pa.RecordBatchReader:
        path = f"{self.scratch}/sorted"
        with _one_sentence():
            frame = self.session.sql(select)
            frame.write.parquet(f"file://{path}", mode="overwrite")  # the files are named in order
        files = f"{glob.escape(path)}/*.parquet"
        return self.con.read_parquet(files, hive_partitioning=False).to_arrow_reader(size)


def _start(log: Path) -> Any:
    """A SparkSession. What Java prints while it starts, a dozen lines, goes to `log`."""
    stderr = os.dup(2)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 2)
    try:
        from pyspark.sql import SparkSession

        return SparkSession.builder.appName("rec").config(map={**SETTINGS}).getOrCreate()
    except Exception as error:  # not installed, no Java, a configuration that does not work
        lines = re.findall(r"^\S.*", log.read_text(), re.M)  # without Java's stack
        raise UserError(
            "Spark did not start (`pip install 'rec-two-tower[spark]'`, Java 17): "
            f"{lines[-1] if lines else error}"
        ) from None
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


@contextmanager
def _one_sentence() -> Iterator[None]:
    """Raises UserError if a job of Spark fails, for example on a full disk, with the last cause that Java names."""
    try:
        yield
    except Exception as error:
        causes = re.findall(r"^(?:: |Caused by: )(.*)", str(error), re.M)
        last = [*str(error).splitlines()[:1], *causes][-1]
        raise UserError(f"Spark failed: {last}") from None


ENGINES: dict[str, type[Engine]] = {"duckdb": Engine, "spark": Spark}
