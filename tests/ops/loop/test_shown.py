"""What was shown is kept by hour, for as long as it should be, and holds up nobody."""

import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from rec.ops.loop import shown
from rec.ops.loop.shown import DROPPED, Shown, ShownLog

AT = datetime(2026, 1, 2, 3, 59, 59, tzinfo=UTC).timestamp()


def row(name: str, at: float = AT) -> Shown:
    return Shown(at, name, None, "canary", True, {"retrieval": 3}, ["i2", "i1"], [0.5, None])


def kept(directory: Path) -> dict[str, list[dict]]:
    hours: dict[str, list[dict]] = {}
    for file in sorted(directory.glob("*/*.parquet")):
        hours.setdefault(file.parent.name, []).extend(pq.read_table(file).to_pylist())
    return hours


def test_rows_are_in_the_files_of_their_hour(tmp_path: Path) -> None:
    log = ShownLog(tmp_path, days=1e5)
    for name, at in (("a", AT), ("b", AT), ("c", AT + 1)):
        log.add(row(name, at))
    log.close()
    found = kept(tmp_path)
    names = {hour: [each["request_id"] for each in rows] for hour, rows in found.items()}
    assert names == {"2026-01-02T03": ["a", "b"], "2026-01-02T04": ["c"]}
    assert found["2026-01-02T04"][0] == {**row("c", AT + 1)._asdict(), "model": [("retrieval", 3)]}
    assert not list(tmp_path.glob("*/.*"))


def test_hours_beyond_the_retention_are_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in ("2020-01-01T00", "notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
    log = ShownLog(tmp_path, days=2)
    log.add(row("new", time.time()))
    log.add(row("older", time.time() - 86_400))
    log.close()
    assert not (tmp_path / "2020-01-01T00").exists()
    assert (tmp_path / "notes" / "file").exists()
    assert len(kept(tmp_path)) == 2


def test_a_full_queue_drops_rows_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shown, "MAX_WAITING", 5)
    is_held = threading.Event()
    monkeypatch.setattr(ShownLog, "_work", lambda self: is_held.wait())  # a writer that is late
    log = ShownLog(tmp_path, days=1)
    before = DROPPED._value.get()
    for number in range(8):
        log.add(row(str(number)))
    is_held.set()
    assert DROPPED._value.get() == before + 3
    assert capsys.readouterr().err.count("some are dropped") == 1


def test_a_directory_that_cannot_be_written_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "shown").write_text("a file")
    log = ShownLog(tmp_path / "shown", days=1)
    log.add(row("a"))
    log.close()
    assert "1 answers cannot be kept: " in capsys.readouterr().err
