"""Tables of users and items: read without a change of types, and described a line per column.

pandas has no missing whole number of its own: it would turn a column that has one into floating point, so that 46
becomes 46.0 and the last digits of long numbers change. `read_table` takes its nullable types instead.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from rec.errors import note

NULLABLE = {pa.int64(): pd.Int64Dtype(), pa.bool_(): pd.BooleanDtype()}
WIDEST_EXAMPLE = 32  # characters of a value that a description shows


def read_table(path: Path) -> pd.DataFrame:
    """The rows of a Parquet file. Whole numbers are Int64 and booleans `boolean`, with <NA> where there is none.

    Raises OSError or ValueError (pyarrow's errors are such) for a file that is missing or damaged.
    """
    table = pq.read_table(path, partitioning=None)  # a folder named a=b adds no column
    return table.to_pandas(types_mapper=NULLABLE.get)


@dataclass(frozen=True)
class ColumnLine:
    """One column of a table, for a person."""

    name: str
    kind: str
    filled: float  # share of the rows that have a value
    example: object  # a value; None if there is none
    why: str  # what decided the kind


def describe_columns(title: str, columns: Iterable[ColumnLine]) -> None:
    """Prints a line per column on stderr, under a title; nothing if there are no columns."""
    rows = [
        (line.name, line.kind, f"{line.filled:.0%}", shorten(line.example), line.why)
        for line in columns
    ]
    if not rows:
        return
    rows.insert(0, ("column", "kind", "filled", "example", "why"))
    *padded, _ = (max(map(len, cells)) for cells in zip(*rows, strict=True))
    note(title)
    for *cells, why in rows:
        parts = [cell.ljust(width) for cell, width in zip(cells, padded, strict=True)]
        note("  " + "  ".join([*parts, why]).rstrip())


def shorten(value: object) -> str:
    """A value as one would write it, cut to some thirty characters; "-" for None."""
    if value is None:
        return "-"
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    text = repr(value)
    return text if len(text) <= WIDEST_EXAMPLE else f"{text[: WIDEST_EXAMPLE - 2]}.."
