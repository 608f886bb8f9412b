"""A file as a person has it: CSV, TSV or Parquet, and how it is written.

- The fields of a text file are separated by what its name or --delimiter says. If that is not in the first line, and
  another usual separator gives the columns that the command needs, that one is taken, and said.
- A quote opens a field that may hold separators, and is doubled inside it. In a .tsv, or with --quote none, it is a
  character like any other.
- Lines end in \\n, \\r\\n or \\r, all of a file alike; the last one may have no end. Blank lines are no rows.
- Another encoding than UTF-8, or another kind of file, is refused by the name of what it seems to be.

What becomes of its rows is in rows.py.
"""

import codecs
import csv
import glob
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import numpy as np
from duckdb import DuckDBPyConnection as Connection

from rec.errors import UserError, note

DELIMITERS = {".csv": ",", ".tsv": "\t", ".parquet": ""}
QUOTES = {".csv": '"', ".tsv": "", ".parquet": ""}
SEPARATORS = (",", ";", "\t", "|")  # those that are looked for
BLOCK = 2**20  # bytes that are read at once
LINE_FEED = 10
CARRIAGE_RETURN = 13
# The first bytes of files that are neither text nor what their name says. Longer ones come first.
BEGINNINGS = {
    codecs.BOM_UTF32_LE: "UTF-32 text",
    codecs.BOM_UTF32_BE: "UTF-32 text",
    codecs.BOM_UTF16_LE: "UTF-16 text",
    codecs.BOM_UTF16_BE: "UTF-16 text",
    b"PK\x03\x04": "a zip file (.xlsx is one, too)",
    b"PK\x05\x06": "an empty zip file",
    b"\x1f\x8b": "a gzip file",
    b"BZh": "a bzip2 file",
    b"\xfd7zXZ": "an xz file",
    b"7z\xbc\xaf": "a 7z file",
    b"\x28\xb5\x2f\xfd": "a zstd file",
    b"Rar!": "a rar file",
    b"PAR1": "a Parquet file",
    b"PARE": "an encrypted Parquet file",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook",
    b"<!DOCTYPE": "a web page",
    b"<!doctype": "a web page",
    b"<html": "a web page",
}
INDEX = re.compile(r"\s*|__index_level_\d+__")  # names of columns that pandas writes for its index
DATA = re.compile(r"[+-]?\d+([.,]\d+)?([eE][+-]?\d+)?|\d{4}-\d\d-\d\d([ T].*)?")  # numbers, times


class Record(NamedTuple):
    """A row as it stands in a text file."""

    line: int  # the first is 1
    last_line: int
    fields: list[str]  # none: the line is blank


class Lines(NamedTuple):
    """The number of lines of a text file."""

    total: int
    blank: int


@dataclass(frozen=True)
class RawFile:
    """A file as it was received, and how it is written."""

    path: Path
    delimiter: str  # "" for Parquet
    quote: str = ""  # "" if quotes are characters like any other
    header: tuple[str, ...] = ()  # column names; none: the first line holds them
    has_options: bool = False  # whether its command has --delimiter, --quote and --skip-bad-rows
    title: str = ""  # how messages call it; none: its path

    @classmethod
    def of(cls, path: Path, delimiter: str | None = None, quote: str | None = None) -> "RawFile":
        """A user's file; `delimiter` and `quote` replace what is usual for its extension.

        Raises UserError if the extension does not tell the format, or the file is empty or none.
        """
        kind = path.suffix.lower()
        if kind not in DELIMITERS:
            raise UserError(
                f"{path}: the name must end in .csv, .tsv or .parquet, so that the format is known"
            )
        if not path.is_file():
            raise UserError(f"{path} is not a file")
        if not path.stat().st_size:
            raise UserError(f"{path} is empty")
        if not DELIMITERS[kind]:
            return cls(path, delimiter="")
        return cls(
            path,
            delimiter=DELIMITERS[kind] if delimiter is None else delimiter,
            quote=QUOTES[kind] if quote is None else quote,
            has_options=True,
        )

    def __str__(self) -> str:
        return self.title or str(self.path)

    @property
    def is_text(self) -> bool:
        """Whether it is not Parquet."""
        return bool(self.delimiter)

    def records(self) -> Iterator[Record]:
        """The rows of a text file, with its header and blank lines. Bytes that are not UTF-8 become surrogates."""
        csv.field_size_limit(2**31 - 1)
        with open(self.path, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
            if not self.quote:
                for number, line in enumerate(text, 1):
                    content = line.rstrip("\r\n")
                    fields = content.split(self.delimiter) if content else []
                    yield Record(number, number, fields)
                return
            reader = csv.reader(
                text,
                delimiter=self.delimiter,
                quotechar=self.quote,
                skipinitialspace=self.delimiter != " ",  # as DuckDB does before a quote
            )
            first = 1
            for fields in reader:
                yield Record(first, reader.line_num, fields)
                first = reader.line_num + 1

    def names(self) -> list[str]:
        """The columns of a text file. Raises UserError if they are not one line of UTF-8."""
        if self.header:
            return list(self.header)
        first = self.first_record()
        if not first.fields:
            raise UserError(f"{self}:1: the first line is blank; it must name the columns")
        if first.last_line > 1:
            raise UserError(
                f"{self}:1: a quote opens a name that goes on to line {first.last_line}: close it"
            )
        if any("\udc80" <= letter <= "\udcff" for letter in "".join(first.fields)):
            raise UserError(f"{self}:1: {encoding_problem(line_at(self.path, 0)[1])}")
        return first.fields

    def first_record(self) -> Record:
        """The first row of a text file, which is its header unless it has none."""
        return next(self.records(), Record(1, 1, []))

    def separated(self, columns: Iterable[str]) -> "RawFile":
        """This file, or with the separator that its first line shows, if only that gives all of `columns`.

        Raises UserError if the file's own separator is in the first line too, so that either may be right.
        """
        names = self.names()
        wanted = set(columns)
        if wanted <= set(names):
            return self
        for delimiter in SEPARATORS:
            other = replace(self, delimiter=delimiter)
            if delimiter == self.delimiter or not wanted <= set(other.first_record().fields):
                continue
            if len(names) == 1:
                note(
                    f"{self}: fields are separated by {shown(delimiter)}, not by"
                    f" {shown(self.delimiter)}, as its first line shows"
                )
                return other
            raise UserError(
                f"{self}: fields seem to be separated by {shown(delimiter)}, not by"
                f" {shown(self.delimiter)}: use --delimiter {shown(delimiter)}"
            )
        return self

    def line_of(self, row: int) -> int:
        """The line on which a row begins. The first row is 1; rows of Parquet are their own lines."""
        if not self.is_text:
            return row
        blank_too = self.has_one_column()
        rows = (record.line for record in self.records() if record.fields or blank_too)
        with_header = row - bool(self.header)
        return next(itertools.islice(rows, with_header, None), with_header + 1)

    def has_one_column(self) -> bool:
        """Whether a blank line is a row, namely one whose only field is empty."""
        return self.is_text and len(self.names()) == 1

    def relation(self, con: Connection) -> duckdb.DuckDBPyRelation:
        """The rows, all columns of text files as text; those that cannot be read go to table `reject_errors`.

        Columns without a name and those that pandas writes for its index are left out. Raises UserError if two
        columns have the same name.
        """
        path = glob.escape(str(self.path))
        relation = self._text_relation(con, path) if self.is_text else con.read_parquet(path)
        names = relation.columns
        left_out = [at for at, name in enumerate(names, 1) if INDEX.fullmatch(name)]
        if not left_out:
            return relation
        which = ", ".join(map(str, left_out))
        note(f"{self}: column {which} is left out: it has no name, or is pandas' index")
        return relation.project(
            ", ".join(quoted(name) for name in names if not INDEX.fullmatch(name))
        )

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
        form: dict[str, Any] = {
            "sep": self.delimiter,
            "quotechar": self.quote,
            "escapechar": self.quote,
            "columns": dict.fromkeys(named, "VARCHAR"),
            "header": not self.header,
        }
        return con.read_csv(path, auto_detect=False, store_rejects=True, **form)


def quoted(name: str) -> str:
    """A column's name as SQL writes it."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """A text as SQL writes it."""
    return "'" + text.replace("'", "''") + "'"


def shown(delimiter: str) -> str:
    """A separator as a shell takes it."""
    return repr(delimiter)


def delimiter_of(text: str) -> str:
    """What --delimiter means; a tab may be written `\\t`. Raises UserError if it is not one character."""
    delimiter = "\t" if text == "\\t" else text
    if len(delimiter) != 1 or delimiter in '"\r\n\0':
        raise UserError(
            f"--delimiter {text!r} is not one character that can separate fields, such as ';' or '\\t'"
        )
    return delimiter


def count_lines(file: RawFile) -> Lines:
    """Counts the lines of a text file by its bytes alone, whatever its quotes are. Raises UserError for a NUL byte."""
    total = filled = 0
    before = b"\n"  # the last byte of the block before
    with open(file.path, "rb") as stream:
        while block := stream.read(BLOCK):
            if b"\0" in block:
                line = total + len(block[: block.index(b"\0")].splitlines())
                raise UserError(
                    f"{file}:{max(line, 1)}: holds a NUL byte, which no text has: export the file again"
                )
            codes = np.frombuffer(before + block, np.uint8)
            is_return = codes == CARRIAGE_RETURN
            is_feed = codes == LINE_FEED
            is_break = is_return | is_feed
            # A return ends a line when the byte after it is seen, so that \r\n is one end.
            total += int(np.count_nonzero(is_feed[1:]))
            total += int(np.count_nonzero(is_return[:-1] & ~is_feed[1:]))
            filled += int(np.count_nonzero(is_break[1:] & ~is_break[:-1]))
            before = block[-1:]
    if before == b"\r":
        total += 1
    elif before != b"\n":  # the last line has no end
        total += 1
        filled += 1
    return Lines(total=total, blank=total - filled)


def line_at(path: Path, byte: int) -> tuple[int, bytes]:
    """The number of the line that begins at a byte, and its content."""
    number = 1
    with open(path, "rb") as file:
        left = byte
        before = b""
        while left:
            block = file.read(min(BLOCK, left))
            left -= len(block)
            number += block.count(b"\n") + block.count(b"\r") - block.count(b"\r\n")
            number -= before == b"\r" and block[:1] == b"\n"
            before = block[-1:]
        return number, re.split(rb"[\r\n]", file.readline(BLOCK), maxsplit=1)[0]


def encoding_problem(line: bytes) -> str:
    """What is wrong with a line that is not UTF-8."""
    if not line.decode("utf-8", "ignore").isascii():
        return "is not UTF-8: a character of it is damaged, export the file again"
    text = line.decode("cp1252", "replace")[:60]
    return (
        f"is not UTF-8; the file seems to be Latin-1 (Windows-1252), in which the line is {text!r}:"
        " convert it, such as by `iconv -f WINDOWS-1252 -t UTF-8`"
    )


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
        raise UserError(
            f"{file}:1: the file seems to be {encoding}, and only UTF-8 is read: convert it,"
            f" such as by `iconv -f {encoding} -t UTF-8`"
        )
    if file.is_text and kind:
        renamed = "rename it to .parquet" if kind == "a Parquet file" else "export it as CSV"
        raise UserError(f"{file} is not text, it seems to be {kind}: {renamed}")
    if not file.is_text and kind != "a Parquet file":
        raise UserError(
            f"{file} is not Parquet, it seems to be {kind or 'text'}: write it as Parquet, or"
            " let its name end as its format asks"
        )
