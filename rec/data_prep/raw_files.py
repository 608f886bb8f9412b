"""A file as a person has it: CSV, TSV, JSON lines or Parquet, and how it is written.

- The fields of a text file are separated by what its name or --delimiter says. If that is not in the first line, and
  another usual separator gives the columns that the command needs, that one is taken, and said.
- A quote opens a field that may hold separators, and is doubled inside it. In a .tsv, or with --quote none, it is a
  character like any other.
- Lines end in \\n, \\r\\n or \\r, all of a file alike; the last one may have no end. Blank lines are no rows.
- A compressed file (.gz, .zst) and one in the encoding that --encoding names are first copied as plain UTF-8.
- A line of a .jsonl, .ndjson or .json is an object. A field inside another is named by a dotted path, such as user.id.
  Lines that Python printed, which begin with {' or {u', are first copied as JSON.
- Another encoding, or another kind of file, is refused by the name of what it seems to be.

What becomes of its rows is in rows.py.
"""

import ast
import codecs
import csv
import glob
import io
import itertools
import json
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import pyarrow as pa
from duckdb import DuckDBPyConnection as Connection

from rec.errors import UserError, note

JSON = "\0"  # the delimiter of JSON lines, which have one field: no text holds it
DELIMITERS = {".csv": ",", ".tsv": "\t", ".parquet": ""}
DELIMITERS |= dict.fromkeys((".jsonl", ".ndjson", ".json"), JSON)
PYTHON = ("{'", "{u'")  # how a dictionary begins as Python prints it
QUOTES = {".csv": '"'}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
BYTES = "surrogateescape"  # reads and writes bytes that are not UTF-8 as they are
SEPARATORS = (",", ";", "\t", "|")  # those that are looked for
# The first bytes of files that are neither text nor what their name says. Longer ones come first.
BEGINNINGS = {
    codecs.BOM_UTF32_LE: "UTF-32 text",
    codecs.BOM_UTF32_BE: "UTF-32 text",
    codecs.BOM_UTF16_LE: "UTF-16 text",
    codecs.BOM_UTF16_BE: "UTF-16 text",
    b"PK": "a zip file (.xlsx is one, too)",
    b"\x1f\x8b": "a gzip file",
    b"BZh": "a bzip2 file",
    b"\xfd7zXZ": "an xz file",
    b"7z\xbc\xaf": "a 7z file",
    b"\x28\xb5\x2f\xfd": "a zstd file",
    b"PAR1": "a Parquet file",
    b"PARE": "an encrypted Parquet file",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook",
    b"<!DOCTYPE": "a web page",
    b"<html": "a web page",
}
INDEX = re.compile(r"\s*|__index_level_\d+__")  # names of columns that pandas writes for its index


class Record(NamedTuple):
    """A row as it stands in a text file."""

    line: int  # the first is 1
    last_line: int
    fields: list[str]  # none: the line is blank


@dataclass(frozen=True)
class RawFile:
    """A file as it was received, and how it is written."""

    path: Path
    delimiter: str  # "" for Parquet
    quote: str = ""  # "" if quotes are characters like any other
    header: tuple[str, ...] = ()  # column names; none: the first line holds them
    has_options: bool = False  # whether its command has --delimiter, --quote and --skip-bad-rows
    title: str = ""  # how messages call it; none: its path
    decimal: str = "."  # what numbers have before their fraction
    encoding: str = ""  # of a text file; "": UTF-8
    times: str = ""  # how they are written, for strptime, or their unit; "": seconds or ISO 8601
    skip_bad_rows: bool = False  # drop them instead of refusing the file

    @classmethod
    def of(
        cls, path: Path, delimiter: str | None = None, quote: str | None = None, **form: Any
    ) -> "RawFile":
        """A user's file; `delimiter` and `quote` replace what is usual for its extension, `form` is further fields.

        Raises UserError if the extension does not tell the format, or the file is empty or none.
        """
        name = path.stem if path.suffix.lower() in COMPRESSIONS else path.name
        kind = Path(name).suffix.lower()
        if kind not in DELIMITERS or kind == ".parquet" != path.suffix.lower():
            known = "end in .csv, .tsv, .jsonl, .json (or one of these and .gz or .zst) or .parquet"
            raise UserError(f"{path}: the name must {known}, so that the format is known")
        if not path.is_file():
            raise UserError(f"{path} is not a file")
        if not path.stat().st_size:
            raise UserError(f"{path} is empty")
        usual = DELIMITERS[kind]
        if usual in ("", JSON):
            form |= {"decimal": ".", "header": ("json",) if usual else ()}
            return cls(path, usual, has_options=bool(usual), **form)
        if delimiter is None:
            delimiter = usual
        if quote is None:
            quote = QUOTES.get(kind, "")
        return cls(path, delimiter, quote, has_options=True, **form)

    def __str__(self) -> str:
        return self.title or str(self.path)

    @property
    def is_text(self) -> bool:
        """Whether it is not Parquet."""
        return bool(self.delimiter)

    @property
    def is_json(self) -> bool:
        """Whether each line is a JSON object."""
        return self.delimiter == JSON

    def plain(self, scratch: Path) -> "RawFile":
        """This file, or a copy in `scratch` that is neither compressed nor in another encoding than UTF-8.

        Raises UserError for a file that is damaged, or not in that encoding.
        """
        compression = COMPRESSIONS.get(self.path.suffix.lower())
        needs_copy = compression or self.encoding or (self.is_json and self._is_python())
        if not self.is_text or not needs_copy:
            return self
        copy = Path(tempfile.mkdtemp(dir=scratch), "plain")
        try:
            with pa.input_stream(str(self.path), compression=compression) as source:
                errors = "strict" if self.encoding else BYTES  # rows.py names a row of other bytes
                text = io.TextIOWrapper(source, self.encoding or "utf-8", errors, newline="")
                with open(copy, "w", encoding="utf-8", errors=BYTES, newline="") as target:
                    if self.is_json:
                        target.writelines(map(_as_json, text))
                    else:
                        shutil.copyfileobj(text, target, 2**20)
        except (OSError, UnicodeDecodeError, LookupError) as error:
            if isinstance(error, OSError) and error.errno:  # the disk is full, say
                raise
            form = " in ".join(filter(None, (compression, self.encoding)))
            raise UserError(f"{self} cannot be read as {form}: {error}") from None
        return replace(self, path=copy, title=str(self))

    def _is_python(self) -> bool:
        """Whether the first line is a dictionary as Python prints it."""
        return "".join(self.first_record().fields).startswith(PYTHON)

    def records(self) -> Iterator[Record]:
        """The rows of a text file, with its header and blank lines. Bytes that are not UTF-8 become surrogates."""
        csv.field_size_limit(2**31 - 1)
        with open(self.path, encoding="utf-8-sig", errors=BYTES, newline="") as text:
            if not self.quote:
                for number, line in enumerate(text, 1):
                    content = line.rstrip("\r\n")
                    fields = content.split(self.delimiter) if content else []
                    yield Record(number, number, fields)
                return
            blanks = self.delimiter != " "  # as DuckDB does before a quote
            form: dict[str, Any] = {"delimiter": self.delimiter, "quotechar": self.quote}
            reader = csv.reader(text, skipinitialspace=blanks, **form)
            first = 1
            for fields in reader:
                yield Record(first, reader.line_num, fields)
                first = reader.line_num + 1

    def first_record(self) -> Record:
        """The first row of a text file, which is its header unless it has none."""
        return next(self.records(), Record(1, 1, []))

    def names(self) -> list[str]:
        """The columns of a text file. Raises UserError if they are not one line of UTF-8."""
        if self.header:
            return list(self.header)
        first = self.first_record()
        problem = encoding_problem(self, first)
        if not first.fields:
            problem = "the first line is blank; it must name the columns"
        elif first.last_line > 1:
            problem = f"a quote opens a name that goes on to line {first.last_line}: close it"
        if problem:
            raise UserError(f"{self}:1: {problem}")
        return first.fields

    def separated(self, columns: Iterable[str]) -> "RawFile":
        """This file, or with the separator that its first line shows, if only that gives all of `columns`.

        Raises UserError if the file's own separator is in the first line too, so that either may be right.
        """
        names = self.names()
        wanted = set(columns)
        if self.is_json or wanted <= set(names):
            return self
        for delimiter in SEPARATORS:
            other = replace(self, delimiter=delimiter)
            if not wanted <= set(other.first_record().fields):
                continue
            separators = f"separated by {delimiter!r}, not by {self.delimiter!r}"
            if len(names) > 1:
                hint = f"use --delimiter {delimiter!r}"
                raise UserError(f"{self}: fields seem to be {separators}: {hint}")
            note(f"{self}: fields are {separators}, as its first line shows")
            return other
        return self

    def line_of(self, row: int) -> int:
        """The line on which a row begins. The first row is 1; rows of Parquet are their own lines."""
        if not self.is_text:
            return row
        rows = (each.line for each in self.records() if each.fields)
        with_header = row - bool(self.header)
        return next(itertools.islice(rows, with_header, None), with_header + 1)

    def relation(
        self, con: Connection, fields: Collection[str], features: bool
    ) -> duckdb.DuckDBPyRelation:
        """The rows, all columns of CSV and TSV as text; those that cannot be read go to table `reject_errors`.

        Columns without a name and those that pandas writes for its index are left out. Of JSON lines, `fields` are
        columns, as text, and with `features` the other keys with their types; column `bad_json` is a line that is no
        object. Raises UserError if two columns have the same name.
        """
        path = glob.escape(str(self.path))
        relation = self._text_relation(con, path) if self.is_text else con.read_parquet(path)
        if self.is_json:
            return _json_relation(relation, fields, features)
        names = relation.columns
        named = [quoted(name) for name in names if not INDEX.fullmatch(name)]
        if len(named) == len(names):
            return relation
        left_out = [str(at) for at, name in enumerate(names, 1) if INDEX.fullmatch(name)]
        which = ", ".join(left_out)
        note(f"{self}: column {which} is left out: it has no name, or is pandas' index")
        return relation.project(", ".join(named))

    def _text_relation(self, con: Connection, path: str) -> duckdb.DuckDBPyRelation:
        names = self.names()
        counts = Counter(name.lower() for name in names if name.strip())
        if twice := [name for name in names if counts[name.lower()] > 1]:
            raise UserError(
                f"{self} cannot be read: two of its columns have the name {twice[0]}"
                " (capital and small letters count as the same): rename one"
            )
        # DuckDB wants a name for every column.
        named = [name if name.strip() else f"__index_level_{at}__" for at, name in enumerate(names)]
        has_one_column = len(named) == 1  # of which DuckDB takes a blank line for an empty field
        relation = con.read_csv(
            path,
            auto_detect=False,
            store_rejects=True,
            header=not self.header,
            sep=self.delimiter,
            quotechar=self.quote,
            escapechar=self.quote,
            columns=dict.fromkeys(named, "VARCHAR"),
            allow_quoted_nulls=not has_one_column,
        )
        return relation.filter(f"{quoted(named[0])} is not null") if has_one_column else relation


def _json_relation(
    lines: duckdb.DuckDBPyRelation, fields: Collection[str], features: bool
) -> duckdb.DuckDBPyRelation:
    """The fields of lines of JSON; see RawFile.relation."""
    is_object = "json_valid(json) and json_type(try_cast(json as json)) = 'OBJECT'"
    parsed = f"case when {is_object} then cast(json as json) end"
    columns = [f"case when not coalesce({is_object}, false) then json end as bad_json"]
    for name in fields:
        path = "$" + "".join(f'."{key}"' for key in name.split("."))
        columns.append(f"json_extract_string({parsed}, {literal(path)}) as {quoted(name)}")
    if not features:
        return lines.project(", ".join(columns))
    ((structure,),) = lines.aggregate(f"json_group_structure({parsed})").fetchall()
    others = [name for name in json.loads(structure or "{}") if name not in fields]
    typed = lines.project(
        f"{', '.join(columns)}, from_json({parsed}, {literal(structure or '{}')}) as fields"
    )
    names = [quoted(name) for name in ("bad_json", *fields)]
    names += [f"fields.{quoted(name)} as {quoted(name)}" for name in others]
    return typed.project(", ".join(names))


def _as_json(line: str) -> str:
    """A line that Python printed as JSON; another one as it is."""
    if not line.startswith(PYTHON):
        return line
    try:
        return json.dumps(ast.literal_eval(line.rstrip())) + "\n"
    except (ValueError, SyntaxError, TypeError):  # rows.py names it
        return line


def quoted(name: str) -> str:
    """A column's name as SQL writes it."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """A text as SQL writes it."""
    return "'" + text.replace("'", "''") + "'"


def delimiter_of(text: str) -> str:
    """What --delimiter means; a tab may be written `\\t`. Raises UserError if it is not one character."""
    delimiter = "\t" if text == "\\t" else text
    if len(delimiter) != 1 or delimiter in '"\r\n\0':
        problem = "is not one character that can separate fields, such as ';' or '\\t'"
        raise UserError(f"--delimiter {text!r} {problem}")
    return delimiter


def encoding_problem(file: RawFile, record: Record) -> str:
    """What is wrong with a row that was read from bytes which are not UTF-8; "" if they are."""
    content = file.delimiter.join(record.fields).encode("utf-8", BYTES)
    try:
        content.decode()
    except UnicodeDecodeError:
        if not content.decode("utf-8", "ignore").isascii():
            return "is not UTF-8: a character of it is damaged, export the file again"
        line = content.decode("cp1252", "replace")[:60]
        seems = f"the file seems to be Latin-1 (Windows-1252), in which the line is {line!r}"
        return f"is not UTF-8; {seems}: {_how_to_read(file, 'cp1252', 'WINDOWS-1252')}"
    return ""


def _how_to_read(file: RawFile, python_name: str, iconv_name: str) -> str:
    """What to do about an encoding."""
    convert = f"convert it, such as by `iconv -f {iconv_name} -t UTF-8`"
    return f"read it with --encoding {python_name}, or {convert}" if file.has_options else convert


def kind_of(path: Path) -> str:
    """What a file seems to be by its first bytes, such as "a gzip file"; "" if nothing speaks against text."""
    with open(path, "rb") as file:
        start = file.read(4096)
    for beginning, kind in BEGINNINGS.items():
        if start.startswith(beginning):
            return kind
    if start.count(b"\0") * 4 > len(start):  # every other byte, where letters are Latin
        return "UTF-16BE text" if start.startswith(b"\0") else "UTF-16LE text"
    return ""


def check_kind(file: RawFile) -> None:
    """Raises UserError for a file that is not what its name says, which names what it seems to be."""
    kind = kind_of(file.path)
    if kind.startswith("UTF"):
        encoding = kind.split()[0]
        hint = _how_to_read(file, encoding, encoding)
        raise UserError(f"{file}:1: the file seems to be {encoding}, and not UTF-8: {hint}")
    is_parquet = kind == "a Parquet file"
    if file.is_text and kind:
        hint = "rename it to .parquet" if is_parquet else "export it as CSV"
        if kind in ("a gzip file", "a zstd file"):
            hint = (
                f"let its name end in {'.gz' if 'gzip' in kind else '.zst'}, after .csv for example"
            )
        raise UserError(f"{file} is not text, it seems to be {kind}: {hint}")
    if not file.is_text and not is_parquet:
        hint = "write it as Parquet, or let its name end as its format asks"
        raise UserError(f"{file} is not Parquet, it seems to be {kind or 'text'}: {hint}")
