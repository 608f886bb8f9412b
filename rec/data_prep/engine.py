"""Where the heavy steps of preparation run: SQL over three tables, on DuckDB, one machine, out of core.

rec/ops/spark.py is another engine, which executes the same SQL. SQL that both understand alike has no `qualify`, names
all columns of a select that leaves some out, and ends every order in a key that is unique. Both compare strings by
their bytes. Not out of core: `percentile_disc`, for which DuckDB holds all values in memory.
"""

from pathlib import Path
from typing import Any

import pyarrow as pa
from duckdb import DuckDBPyConnection as Connection


def only_row(con: Connection, select: str) -> tuple[Any, ...]:
    """The row of a select that has one, such as an aggregate."""
    row: tuple[Any, ...]
    (row,) = con.execute(select).fetchall()
    return row


class Engine:
    """The tables `interactions`, `users` and `items`, and SQL over them."""

    def __init__(self, con: Connection, scratch: Path) -> None:
        """Takes over `interactions`, and `users` and `items` or empty ones. `scratch` is for temporary files."""
        con.execute("create table if not exists users (user_id text)")
        con.execute("create table if not exists items (item_id text)")
        self.con = con
        self.scratch = scratch
        self.columns = con.table("interactions").columns

    def rows(self, select: str) -> list[tuple]:
        """All rows of a select that has few."""
        return self.con.execute(select).fetchall()

    def count(self, where: str = "true") -> int:
        """The number of rows of table `interactions` that match, such as "split = 'test'"."""
        return int(self.rows(f"select count(*) from interactions where {where}")[0][0])

    def replace(self, select: str) -> int:
        """Replaces table `interactions` by a select from it; returns the number of rows that it has then."""
        return int(self.rows(f"create or replace table interactions as {select}")[0][0])

    def reader(self, select: str, size: int) -> pa.RecordBatchReader:
        """The rows of a select in its order, in batches of about `size` rows; valid until the engine's next call."""
        return self.con.sql(select).to_arrow_reader(size)
