"""Directories that several commands may write: each has one writer at a time, and is replaced only by what is whole.

- A lock is `flock` on a file beside the directory, `.NAME.lock`. The file holds who has the lock, for the message. The
  system releases the lock when the process ends, also after kill -9, and containers that share the directory see it.
- On NFS, Linux turns `flock` into a lock of the server, so that all machines see it. With the mount options `nolock` or
  `local_lock=flock` a lock counts on one machine only. A file system without locks is warned of.
- A directory is written beside its target under a hidden name, and renamed.

No TensorFlow and nothing else of rec, since a server reads this module too.
"""

import argparse
import errno
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from rec.errors import UserError, note, warn

Value = TypeVar("Value")

HAS_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def digest(path: Path, algorithm: str = "sha256") -> str:
    """The hexadecimal digest of a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, algorithm).hexdigest()


# ------------------------------------------------------------------------------------------------------------
# One writer at a time


def add_wait_argument(parser: argparse.ArgumentParser) -> None:
    """Adds --wait: a command passes `args.wait` to `sole_writer`."""
    text = "wait while another command writes to the same directory (default: end with an error)"
    parser.add_argument("--wait", action="store_true", help=text)


@contextmanager
def sole_writer(*directories: Path, wait: bool = False) -> Iterator[None]:
    """Makes this process the only writer of directories that need not exist yet, until the block ends.

    Raises:
      UserError: another process writes one of them, and `wait` is false.
    """
    with ExitStack() as locks:
        for directory in sorted(
            directories
        ):  # in one order, so that no two commands wait for each other
            directory.parent.mkdir(parents=True, exist_ok=True)
            path = directory.with_name(f".{directory.name.lstrip('.')}.lock")
            locks.enter_context(lock(path, directory, wait=wait))
            _put_back(directory)
        yield


@contextmanager
def lock(path: Path, subject: Path, *, wait: bool = False) -> Iterator[None]:
    """Holds the lock file `path`, which is made and removed; messages call what it guards `subject`.

    Raises:
      UserError: another process holds it, and `wait` is false.
    """
    descriptor = _acquire(path, subject, wait=wait)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before the lock is released: see _acquire
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock file `path`. True where that cannot be found out."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _acquire(path: Path, subject: Path, *, wait: bool) -> int:
    """The descriptor of the lock file, which holds the lock until it is closed."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _flock(descriptor, subject, wait=wait)
            if _is_at(descriptor, path):
                _write_holder(descriptor)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the last holder has removed this file; there may be another by now


def _flock(descriptor: int, subject: Path, *, wait: bool) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        busy = f"{subject} is being written by {_holder(descriptor)}"
        if not wait:
            hint = "wait until that has ended, or run this command with --wait"
            raise UserError(f"{busy}: {hint}") from None
        note(f"waiting: {busy}")
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in HAS_NO_LOCKS:
            raise
        hint = "make sure that no other command writes there"
        warn(f"the file system of {subject} has no locks: {hint}")


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _write_holder(descriptor: int) -> None:
    holder = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
    }
    with suppress(OSError):  # a full disk: the lock counts without its text too
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)


def _holder(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 2**16, 0))
        process = f"process {holder['pid']} on {holder['host']} since {holder['since']}"
        return f"{process} ({' '.join(holder['command'].split())})"
    except (ValueError, KeyError, TypeError, OSError):  # it has not written its text yet
        return "another command"


# ------------------------------------------------------------------------------------------------------------
# Directories that are whole


def replace_directory(new: Path, target: Path) -> None:
    """Puts `new` in the place of `target`, in two renames. Only for the sole writer of `target`.

    After a kill between the two, the next writer or `read_whole` takes back the first.
    """
    old = _aside(target)
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    try:
        new.rename(target)
    finally:
        _put_back(target)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Makes a UserError of TensorFlow's errors about files below `place`, such as a full disk."""
    try:
        yield
    except Exception as error:
        tensorflow = sys.modules.get("tensorflow")
        if not tensorflow or not isinstance(error, tensorflow.errors.OpError):
            raise
        file, _, reason = str(error.message).partition(";")
        if str(place) not in file:
            raise
        reason = reason.partition("[Op:")[0].strip()
        raise UserError(f"{place} cannot be written: {reason}") from error


def read_whole(directory: Path, read: Callable[[], Value]) -> Value:
    """What `read` makes of a directory's files, all of them of one state: it starts again if they were replaced."""
    while True:
        _wait_for_rename(directory)
        before = _state(directory)
        try:
            value = read()
        except Exception:
            if _state(directory) == before:
                raise
            continue
        if _state(directory) == before:
            return value


def _aside(target: Path) -> Path:
    """Where `target` is for a moment while it is replaced."""
    return target.with_name(f".{target.name}.old")


def _put_back(target: Path) -> None:
    if _aside(target).exists() and not target.exists():
        _aside(target).rename(target)


def _wait_for_rename(target: Path) -> None:
    """Returns when `target` is where it belongs, if it exists."""
    while _aside(target).exists() and not target.exists():
        try:
            with sole_writer(target):
                pass  # its writer was killed between the two renames: this has put it back
        except UserError:
            time.sleep(0.01)  # its writer is between them


def _state(directory: Path) -> tuple[int, int] | None:
    try:
        status = directory.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns
