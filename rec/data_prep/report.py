"""dataset.md: what a data set holds, in tables and in words, for the person who prepared it.

It is read from the written files, so it describes what training will see, whichever engine prepared them. An id is new
if it is not in train. The command prints the warnings too.
"""

import glob
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duckdb import DuckDBPyConnection as Connection

from rec.data_prep.checks import iso
from rec.data_prep.engine import only_row
from rec.data_prep.raw_files import literal
from rec.data_prep.split import SPLITS
from rec.errors import warn
from rec.tables import ColumnLine, shorten


@dataclass(frozen=True)
class Ids:
    """The users, or the items, that interactions have."""

    total: int
    occurring: tuple[int, ...]  # in train, val and test
    new: tuple[int, ...]  # those of them that are not in train
    per_id: tuple[float, float, int]  # interactions: mean, median, most
    top: tuple[float, float]  # share of the interactions that the top 1 % and 10 % have


def write_report(
    con: Connection,
    directory: Path,
    manifest: Mapping[str, Any],
    dropped: Mapping[str, int],
    columns: Mapping[str, Sequence[ColumnLine]],
) -> None:
    """Writes dataset.md into a directory that is complete but for it, and prints its warnings.

    `dropped` is reason, in words, -> rows; `columns` is table -> its feature columns.
    """
    files = literal(f"{glob.escape(str(directory))}/interactions/*/*.parquet")
    split = "parse_path(filename)[-2] as split"
    written = f"read_parquet({files}, filename = true, hive_partitioning = false)"
    con.execute(f"create temp view written as select *, {split} from {written}")
    users = _count_ids(con, "user")
    items = _count_ids(con, "item")
    repeats = _share_of_repeats(con, manifest)
    warnings = _warnings(manifest, users, items, repeats, columns)
    warn(*warnings)
    sections = {
        "Warnings": [f"- {warning}" for warning in warnings],
        "Counts": _describe_counts(con, manifest, users, items, repeats),
        "Dropped": _table(["rows", "what"], [(f"{dropped[why]:,}", why) for why in dropped]),
        "Events": _describe_events(con, manifest),
    }
    for table, lines in columns.items():
        sections[f"Columns of {table}"] = _describe_columns(lines)
    text = f"# {manifest['name']}\n\nFrom {manifest['source']}. Split: {manifest['split']}.\n"
    for title, body in sections.items():
        if body:
            text += "\n".join(["", f"## {title}", "", *body, ""])
    (directory / "dataset.md").write_text(text, encoding="utf-8")


def _count_ids(con: Connection, kind: str) -> Ids:
    counts = ", ".join(f"count_if(split = '{part}') as {part}" for part in SPLITS)
    per_id = f"select count(*) as n, {counts} from written group by {kind}_id"
    nth = "row_number() over (order by n desc)"
    occurring = [f"count_if({part} > 0)" for part in SPLITS]
    new = [f"count_if({part} > 0 and train = 0)" for part in SPLITS]
    top = [f"sum(n) filter (nth <= ceil({share} * total)) / sum(n)" for share in (0.01, 0.1)]
    row = only_row(
        con,
        f"select count(*), mean(n), median(n), max(n), {', '.join([*occurring, *new, *top])}"
        f" from (select *, {nth} as nth, count(*) over () as total from ({per_id}))",
    )
    return Ids(row[0], occurring=row[4:7], new=row[7:10], per_id=row[1:4], top=row[10:])


def _share_of_repeats(con: Connection, manifest: Mapping[str, Any]) -> float:
    """The share of interactions that repeat an earlier one of a user and an item; 0 if preparation left none."""
    if manifest["repeats"] != "keep" and len(manifest.get("events", [])) < 2:
        return 0.0
    pairs = "select count(*) as n from written group by user_id, item_id"
    return float(only_row(con, f"select sum(n - 1) / sum(n) from ({pairs})")[0])


def _warnings(
    manifest: Mapping[str, Any],
    users: Ids,
    items: Ids,
    repeats: float,
    columns: Mapping[str, Sequence[ColumnLine]],
) -> list[str]:
    """What is unusual, and what to do about it. `repeats` is their share of the interactions."""
    test = manifest["counts"]["test"]
    new_items = items.new[-1] / max(items.occurring[-1], 1)
    new_users = users.new[-1] / max(users.occurring[-1], 1)
    (head, _) = items.top
    cases = {
        f"{new_items:.0%} of the test items are new: use item features": new_items > 0.1,
        f"{new_users:.0%} of the test users are new: use user features, or ask for known users"
        " with --split leave_one_out": new_users > 0.5,
        f"1 % of the items has {head:.0%} of the interactions: popularity will be hard to beat"
        " and rare items hard to learn": head > 0.5,
        f"{repeats:.0%} of the interactions repeat a user and item": repeats > 0.1,
        f"test has only {test:,} interactions, so its metrics have wide intervals": test < 1000,
    }
    for table, lines in columns.items():
        for line in lines:
            sentence = f"{table}: only {line.filled:.0%} of the rows have a value of {line.name}"
            cases[sentence] = 0 < line.filled < 0.5
    return [sentence for sentence, applies in cases.items() if applies]


def _describe_counts(
    con: Connection, manifest: Mapping[str, Any], users: Ids, items: Ids, repeats: float
) -> list[str]:
    counts = manifest["counts"]
    total = sum(counts[part] for part in SPLITS)
    rows = [["interactions", *(f"{counts[part]:,}" for part in SPLITS)]]
    lines = []
    for kind, ids in {"user": users, "item": items}.items():
        rows.append([f"{kind}s", *(f"{count:,}" for count in ids.occurring)])
        rows.append([f"new {kind}s", *(f"{count:,}" for count in ids.new)])
        mean, median, most = ids.per_id
        per_id = f"{mean:.1f} on average, median {median:g}, at most {most:,}"
        lines.append(f"- Interactions per {kind}: {per_id}")
    if "timestamp" in manifest["columns"]["interactions"]:
        rows += [_times(con, "first"), _times(con, "last")]
    share = total * (1 - repeats) / (users.total * items.total)
    (one, ten) = items.top
    return [
        *_table(["", *SPLITS], rows),
        "",
        *lines,
        f"- Of all pairs of a user and an item, {share:.3%} have met",
        f"- Long tail: 1 % of the items has {one:.0%} of the interactions, 10 % has {ten:.0%}",
        f"- Repeats of a user and item: {repeats:.1%} of the interactions",
        f"- Items that nobody has met: {counts['items'] - items.total:,} of {counts['items']:,}",
    ]


def _times(con: Connection, which: str) -> list[str]:
    """The row of the first or last time in each split."""
    extreme = {"first": "min", "last": "max"}[which]
    select = f"select {extreme}(timestamp) from written where split = '{{}}'"
    return [f"{which} time", *(iso(only_row(con, select.format(part))[0]) for part in SPLITS)]


def _describe_events(con: Connection, manifest: Mapping[str, Any]) -> list[str]:
    weights = manifest.get("events", {})
    if not weights:
        return []
    by_split = ", ".join(f"count_if(split = '{part}')" for part in SPLITS)
    found = con.execute(f"select event, {by_split} from written group by event order by event")
    targets = manifest["target_events"] or weights
    rows = []
    for event, *counts in found.fetchall():
        is_negative = event in manifest["negative_events"]
        role = "negative" if is_negative else "asked for" if event in targets else "history"
        rows.append([event, f"{weights[event]:g}", role, *(f"{count:,}" for count in counts)])
    return _table(["event", "weight", "in val and test", *SPLITS], rows)


def _describe_columns(lines: Sequence[ColumnLine]) -> list[str]:
    rows = [
        (line.name, line.kind, f"{line.filled:.0%}", shorten(line.example), line.why)
        for line in lines
    ]
    return _table(["column", "kind", "filled", "example", "why"], rows)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown; none if it has no rows."""
    lines = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows]
    if not lines:
        return []
    head = [" | ".join(header), " | ".join(["---"] * len(header))]
    return [f"| {line} |" for line in (*head, *lines)]
