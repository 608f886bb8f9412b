"""Locks between real processes, and directories that are replaced while others read or a kill comes between."""

import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rec.errors import UserError
from rec.files import digest, is_locked, lock, read_whole, replace_directory, sole_writer
from tests.conftest import environment

HOLD = """
import sys
from pathlib import Path
from rec.files import sole_writer

with sole_writer(Path(sys.argv[1]), wait="wait" in sys.argv):
    print("ready", flush=True)
    sys.stdin.read()
"""
COUNT = """
import sys
from pathlib import Path
from rec.files import sole_writer

path = Path(sys.argv[1]) / "count"
for _ in range(100):
    with sole_writer(path, wait=True):
        number = int(path.read_text())
        path.write_text(str(number + 1))
"""


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment()
    )


def hold(target: Path, *arguments: object) -> subprocess.Popen[str]:
    """A process that is the sole writer of `target` until its input ends."""
    process = start(HOLD, target, *arguments)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# ------------------------------------------------------------------------------------------------------------
# One writer at a time


def test_a_second_writer_learns_who_the_first_is_and_gets_its_turn_after_kill_9(tmp_path: Path):
    target = tmp_path / "checkpoints" / "retrieval"
    holder = hold(target)
    try:
        message = (
            f"^{re.escape(str(target))} is being written by process {holder.pid} on .* since 20"
        )
        with pytest.raises(UserError, match=message) as refusal, sole_writer(target):
            pass
        assert "(python -c " in str(refusal.value) and "\n" not in str(refusal.value)
        assert str(refusal.value).endswith("or run this command with --wait")
        with sole_writer(target.with_name("ranking")):  # another directory is free
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    with sole_writer(target):
        assert names(target.parent) == [".retrieval.lock"]
    assert names(target.parent) == []


def test_a_writer_that_waits_begins_when_the_other_has_ended(tmp_path: Path):
    holder = hold(tmp_path / "a")
    waiting = start(HOLD, tmp_path / "a", "wait")
    assert waiting.stderr is not None and waiting.stdout is not None
    assert f"a is being written by process {holder.pid}" in waiting.stderr.readline()
    holder.communicate("")
    assert waiting.stdout.readline() == "ready\n"
    waiting.communicate("")
    assert (holder.returncode, waiting.returncode) == (0, 0)


def test_writers_that_wait_take_turns(tmp_path: Path):
    (tmp_path / "count").write_text("0")
    running = [start(COUNT, tmp_path) for _ in range(3)]
    assert [each.communicate()[0] for each in running] == [""] * 3
    assert (tmp_path / "count").read_text() == "300"
    assert names(tmp_path) == ["count"]


def test_several_directories_are_locked_together_or_not_at_all(tmp_path: Path):
    with sole_writer(tmp_path / "b"):
        with pytest.raises(UserError), sole_writer(tmp_path / "a", tmp_path / "b"):
            pass
        with sole_writer(tmp_path / "a"):
            pass


def test_a_file_system_without_locks_is_warned_of_and_nothing_there_counts_as_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with sole_writer(tmp_path / "a"):
        assert (
            f"warning: the file system of {tmp_path / 'a'} has no locks" in capsys.readouterr().err
        )
        assert is_locked(tmp_path / ".a.lock")


def test_a_lock_is_held_as_long_as_its_block(tmp_path: Path):
    path = tmp_path / "lock"
    assert not is_locked(path)
    with lock(path, tmp_path):
        assert is_locked(path)
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert not is_locked(path)
    path.touch()  # left by a killed process
    assert not is_locked(path)


# ------------------------------------------------------------------------------------------------------------
# Directories that are whole

KILLS = """
import os, signal, sys
from pathlib import Path
from rec.files import read_whole, replace_directory, sole_writer

root, count = Path(sys.argv[1]), None


def watch(event, arguments):  # kills this process before it touches the file system for the count-th time
    global count
    if count is not None and event in {"os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}:
        count -= 1
        if count < 0:
            os.kill(os.getpid(), signal.SIGKILL)


def make(name, content):
    (root / name).mkdir()
    (root / name / "file").write_text(content)


def replace(content):
    with sole_writer(root / "target"):
        make(f"new {content}", content)
        replace_directory(root / f"new {content}", root / "target")


sys.addaudithook(watch)
replace("before")
for number in range(100):
    child = os.fork()
    if not child:
        count = number
        replace(f"after {number}")
        os._exit(0)
    killed = os.waitpid(child, 0)[1] != 0
    content = read_whole(root / "target", (root / "target" / "file").read_text)
    assert content in ("before", f"after {number}"), (number, content)
    if not killed:
        break
    replace("before")
    assert (root / "target" / "file").read_text() == "before"
    assert not (root / ".target.old").exists()
print(number)
"""


def test_a_kill_at_any_point_leaves_the_old_directory_or_the_new(tmp_path: Path):
    stdout, stderr = start(KILLS, tmp_path).communicate()
    assert stderr == ""
    assert int(stdout) >= 4


def test_replacing_a_directory_leaves_nothing_of_the_old_and_all_else_alone(tmp_path: Path):
    for name in ("new", "target", "target.old"):  # the last is somebody's own
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    replace_directory(tmp_path / "new", tmp_path / "target")
    assert names(tmp_path) == ["target", "target.old"]
    assert names(tmp_path / "target") == ["new"]


def test_a_directory_that_cannot_be_put_in_place_leaves_the_old_one(tmp_path: Path):
    (tmp_path / "target").mkdir()
    with pytest.raises(FileNotFoundError):
        replace_directory(tmp_path / "missing", tmp_path / "target")
    assert names(tmp_path) == ["target"]


def test_what_is_read_is_of_one_state(tmp_path: Path):
    target = tmp_path / "target"

    def put(content: str) -> None:
        new = tmp_path / "new"
        new.mkdir()
        for name in ("first", "second"):
            (new / name).write_text(content)
        replace_directory(new, target)

    put("old")
    replacements = iter(["newer", "newest"])

    def read() -> tuple[str, str]:
        first = (target / "first").read_text()
        if content := next(replacements, ""):
            put(content)  # as another command does
        return first, (target / "second").read_text()

    assert read_whole(target, read) == ("newest", "newest")
    with pytest.raises(FileNotFoundError):  # where nothing was replaced, an error is one
        read_whole(target, (target / "missing").read_text)


def test_a_digest_is_of_the_bytes(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"abc")
    assert digest(tmp_path / "file", "md5") == "900150983cd24fb0d6963f7d28e17f72"  # RFC 1321
    assert digest(tmp_path / "file").startswith("ba7816bf8f01cfea")  # FIPS 180-4
