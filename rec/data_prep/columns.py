"""Raw feature columns -> the few types that a data set has, each with what decided it.

- A text file's column is int64 or double if all its values are written as such. Otherwise it is a string, and the
  first value that is no number is named.
- Parquet's types keep their meaning: whole numbers become int64, booleans bool, fractions and decimals double, dates
  and times int64 seconds, lists list<string>. A whole number that int64 cannot hold stays as it is written, a string.
- Lists of fractions are vectors, list<float>. All of a column have one width and finite numbers, or it is refused.
- What has no form in a data set (a struct, a map, a list of lists, bytes that are not text) is left out, and said.
- A column that --list-col names is split, at a separator that is given or found, and one value of it is printed.

Types are decided by whole columns, never by a sample; only what a string looks like is a guess, and just printed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from duckdb import DuckDBPyConnection as Connection
from duckdb.sqltypes import DuckDBPyType

from rec.data_prep.engine import only_row
from rec.data_prep.raw_files import RawFile, literal, quoted
from rec.errors import UserError, note

WHOLE = "-?(0|[1-9][0-9]*)"
NUMBER = "-?(0|[1-9][0-9]*)([.][0-9]+)?([eE][+-]?[0-9]{1,2})?"
FEW = 0.1  # share of a column's values: fewer that are no numbers are probably mistakes

INTEGERS = ("tinyint", "smallint", "integer", "bigint", "utinyint", "usmallint", "uinteger")
LARGE = ("ubigint", "hugeint", "uhugeint", "decimal")  # may exceed int64
FRACTIONS = ("float", "double")
MOMENTS = ("date", *(f"timestamp{kind}" for kind in ("", "_s", "_ms", "_ns", " with time zone")))
SPANS = ("time", "time_ns", "time with time zone", "interval")
TEXTS = ("varchar", "enum", "uuid")
LISTS = ("list", "array")
FORMS = {  # types of Parquet -> SQL of the value, and what there is to say of it
    ("boolean",): ("{0}", ""),
    INTEGERS: ("cast({0} as bigint)", ""),
    FRACTIONS: ("case when not isnan({0}) then cast({0} as double) end", ""),
    MOMENTS: ("cast(floor(epoch(cast({0} as timestamptz))) as bigint)", ": seconds since 1970"),
    SPANS: ("cast(floor(epoch({0})) as bigint)", ": seconds"),
    TEXTS: ("cast({0} as varchar)", ""),
}
FORM = {kind: form for kinds, form in FORMS.items() for kind in kinds}

SAMPLE = 1000  # values that say what a string looks like
DIGITS = "-?[0-9]+([.][0-9]*)?([eE][+-]?[0-9]+)?"
LOOKS = {  # pattern of a value -> what such strings look like, and what to do if they are
    "-?[0-9]+,[0-9]+": "numbers with a decimal comma: write 1.99, not 1,99",
    "[0-9]{4}-[0-9]{2}-[0-9]{2}([T ][0-9]{2}:.*)?": "dates: write seconds since 1970, or use Parquet",
    rf"[\[(]?\s*{DIGITS}([\s,;]+{DIGITS}){{3,}}\s*[\])]?": "vectors, read as words: write lists, in Parquet",
    r"[\[({]['\"].*|.+[|].+": "lists: name the column with --list-col",
}

# A list as Python, NumPy or JSON writes it, and its elements.
LITERAL = r"\s*[\[({].*[\])}]\s*"
ELEMENT = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[^\s,'"\[\](){}][^,\[\](){}]*"""
UNQUOTED = """case when part[1] in ('''', '"') then regexp_replace(part[2:-2], '\\\\(.)', '\\1', 'g')
    else trim(part) end"""
SEPARATORS = ("|", ",", ";")  # that are looked for: "|" first, then the one that most values hold


@dataclass(frozen=True)
class Typed:
    """What becomes of a raw column."""

    value: str  # SQL over table `raw`; "" for a column that is left out
    why: str  # what decided that


@dataclass(frozen=True)
class ListColumns:
    """The columns that hold several values in one text (--list-col)."""

    names: Sequence[str] = ()
    separator: str | None = None  # None: found in the values


def type_columns(con: Connection, file: RawFile, lists: ListColumns) -> dict[str, Typed]:
    """What becomes of each feature column of table `raw`, which is `file`'s; the columns left out are not there.

    Raises UserError for a list column that has nothing to split.
    """
    raw = con.table("raw")
    typed = {}
    for name, kind in zip(raw.columns[2:], raw.types[2:], strict=True):  # source_row and the key
        if name in lists.names:
            column = _split(con, file, name, kind, lists.separator)
        elif file.is_text and not file.is_json:
            column = _by_spelling(con, file, name)
        else:
            column = _by_type(con, file, name, kind)
        if column.value:
            typed[name] = column
        else:
            note(f"warning: {file}: column {name} is left out: {column.why}")
    return typed


def _by_spelling(con: Connection, file: RawFile, name: str) -> Typed:
    """Of a text file: by how all its values are written."""
    text = quoted(name)
    number = text if file.decimal == "." else f"replace({text}, '{file.decimal}', '.')"
    is_whole = f"regexp_full_match({text}, '{WHOLE}')"
    fits = f"({is_whole} and try_cast({text} as bigint) is not null)"
    is_fraction = f"(not {is_whole} and regexp_full_match({number}, '{NUMBER}'))"
    is_number = f"({fits} or ({is_fraction} and isfinite(try_cast({number} as double))))"
    filled, whole, numbers, fraction, word, row = _one(
        con,
        f"count({text}), count_if({fits}), count_if({is_number})",
        f"arg_min({text}, source_row) filter (where not {fits})",
        f"arg_min({text}, source_row) filter (where not {is_number})",
        f"min(source_row) filter (where not {is_number})",
    )
    if not filled:
        return Typed(text, "it is empty")
    if whole == filled:
        return Typed(f"cast({text} as bigint)", "all values are whole numbers")
    if numbers == filled:
        return Typed(f"cast({number} as double)", f"{fraction!r} is not whole")
    first = f"{word[:60]!r} on line {file.line_of(row)}"
    odd = filled - numbers
    if odd <= FEW * filled:
        note(
            f"warning: {file}: column {name} is all numbers but for {odd:,} of {filled:,} values, "
            f"the first {first}. So it is text; empty those to have numbers"
        )
    return Typed(text, f"{first} is not a number{_looks(con, name)}")


def _by_type(con: Connection, file: RawFile, name: str, kind: DuckDBPyType) -> Typed:
    """Of a Parquet file, or of JSON."""
    text = quoted(name)
    why = f"{'JSON' if file.is_json else 'Parquet'} holds {str(kind)[:60]}"
    if kind.id in FORM:
        value, more = FORM[kind.id]
        looks = _looks(con, name) if kind.id in TEXTS else ""
        return Typed(value.format(text), f"{why}{more}{looks}")
    if kind.id == "null":
        return Typed("cast(null as varchar)", "it is empty")
    if kind.id in LARGE:
        if kind.id == "decimal" and dict(kind.children)["scale"]:
            return Typed(f"cast({text} as double)", why)
        (large,) = _one(con, f"max({text}) filter (where try_cast({text} as bigint) is null)")
        if large is None:
            return Typed(f"cast({text} as bigint)", why)
        return Typed(f"cast({text} as varchar)", f"{large} does not fit into int64")
    if kind.id == "blob":
        (bytes_only,) = _one(con, f"count_if({text} is not null and try(decode({text})) is null)")
        if bytes_only:
            return Typed("", f"{bytes_only:,} of its values are bytes that are not text")
        return Typed(f"decode({text})", f"{why}, all of them text")
    parts: dict[str, Any] = dict(kind.children) if kind.id in LISTS else {}
    element = parts["child"].id if parts else ""
    if element in FRACTIONS:
        return _vectors(con, file, name, why)
    if element in ("null", *FORM, *LARGE):
        words = ": each number is read as a word" if element in INTEGERS else ""
        filled = f"list_filter(cast({text} as varchar[]), lambda part: part <> '')"
        return Typed(filled, f"{why}{words}")
    return Typed("", f"it holds {str(kind)[:60]}, and a feature is a value or a list of values")


def _vectors(con: Connection, file: RawFile, name: str, why: str) -> Typed:
    """Of lists of fractions. Raises UserError unless all have as many numbers as the first, all of them finite."""
    text = quoted(name)
    filled = f"nullif(cast({text} as double[]), [])"
    value = f"list_transform({filled}, lambda part: try_cast(part as float))"
    (width,) = _one(con, f"arg_min(len({value}), source_row)")
    finite = f"len(list_filter({value}, lambda part: isfinite(part)))"
    row, numbers, usable = _one(
        con,
        f"min(source_row), arg_min(len({value}), source_row), arg_min({finite}, source_row)",
        where=f"len({value}) <> {width or 0} or {finite} <> {width or 0}",
    )
    if row:
        problem = f"column {name} has {numbers:,} numbers, {usable:,} of them finite"
        hint = f"each vector needs {width:,}, as the first has; null stands for none"
        raise UserError(f"{file}:{file.line_of(row)}: {problem}: {hint}")
    return Typed(value, f"{why}: vectors of {width or 0:,} numbers")


def _split(
    con: Connection, file: RawFile, name: str, kind: DuckDBPyType, separator: str | None
) -> Typed:
    """Of a column that --list-col names: a list of what its texts hold. Prints one of them, before and after."""
    if kind.id in LISTS:
        note(f"--list-col {name} has no effect: {file} holds lists there already ({kind})")
        return _by_type(con, file, name, kind)
    text = quoted(name)
    (first,) = _one(con, f"arg_min({text}, source_row)")
    if kind.id not in TEXTS:
        problem = f"{file} holds {kind} there, such as {first}, which has nothing to split"
        raise UserError(f"--list-col {name}: {problem}")
    separator = separator or _separator(con, name)
    is_literal = separator == LITERAL
    how = "read as a written list" if is_literal else f"split at {separator!r}"
    parts = f"list_transform(string_split({text}, {literal(separator)}), lambda part: trim(part))"
    if is_literal:
        elements = f"regexp_extract_all({text}, {literal(ELEMENT)})"
        parts = f"list_transform({elements}, lambda part: {UNQUOTED})"
    value = f"list_filter(coalesce({parts}, []), lambda part: part <> '')"
    example, result = _one(
        con,
        f"arg_min({text}, source_row), arg_min({value}, source_row)",
        where=f"len({value}) >= {1 if is_literal else 2}",
    )
    if result:
        note(f"{file}: column {name} is {how}: {example[:60]!r} becomes {result}")
    elif first is not None:
        note(
            f"warning: --list-col {name} splits nothing: no value of {file} holds {separator!r}, such as "
            f"{first[:60]!r}. Name what separates its values with --list-separator"
        )
    return Typed(value, f"--list-col, {how}")


def _separator(con: Connection, name: str) -> str:
    """What separates the values of a column of texts; LITERAL for written lists."""
    text = quoted(name)
    counts = [f"count_if(contains({text}, '{separator}'))" for separator in SEPARATORS]
    filled, literals, *held = _one(
        con, f"count({text}), count_if(regexp_full_match({text}, {literal(LITERAL)}))", *counts
    )
    bar, *others = SEPARATORS
    if filled and literals == filled:
        return LITERAL
    if held[0] or not any(held):
        return bar
    return max(zip(held[1:], others, strict=True))[1]


def _looks(con: Connection, name: str) -> str:
    """What most values of a column of texts look like, to be added to why they are texts."""
    text = quoted(name)
    values = f"(select {text} from raw where {text} is not null limit {SAMPLE})"
    counts = [f"count_if(regexp_full_match({text}, {literal(pattern)}))" for pattern in LOOKS]
    total, *found = only_row(con, f"select count(*), {', '.join(counts)} from {values}")
    for count, what in zip(found, LOOKS.values(), strict=True):
        if total and 2 * count > total:
            return f"; looks like {what}"
    return ""


def _one(con: Connection, *values: str, where: str = "true") -> tuple[Any, ...]:
    """The row of some aggregates of table `raw`."""
    return only_row(con, f"select {', '.join(values)} from raw where {where}")
