import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from rec.errors import UserError
from rec.registry import LocalStore, draft, publish, read_metadata, resolve, versions
from tests.conftest import environment


def add(stage_dir: Path, content: str = "model") -> int:
    with draft(stage_dir) as directory:
        (directory / "saved_model.pb").write_text(content)
        return publish(directory, stage_dir, {"metrics": {}})


def test_versions_count_up_and_say_what_they_hold(tmp_path: Path):
    stage_dir = tmp_path / "retrieval"
    assert [add(stage_dir), add(stage_dir, "other")] == [1, 2]
    first, second = (read_metadata(stage_dir / str(v)) for v in (1, 2))
    assert (first["stage"], first["version"]) == ("retrieval", 1)
    assert list(first["files"]) == ["saved_model.pb"]
    assert first["id"] != second["id"]


def test_a_version_that_failed_leaves_nothing(tmp_path: Path):
    with pytest.raises(ZeroDivisionError), draft(tmp_path) as directory:
        (directory / "saved_model.pb").touch()
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_cleared_and_a_running_ones_draft_is_not(tmp_path: Path):
    dead, alive = tmp_path / "draft-999999999-x", tmp_path / f"draft-{os.getpid()}-x"
    for directory in (dead, alive):
        directory.mkdir()
    add(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", alive.name]


def test_two_writers_get_two_numbers(tmp_path: Path):
    with draft(tmp_path) as one, draft(tmp_path) as other:
        for directory in (one, other):
            (directory / "saved_model.pb").touch()
        assert publish(one, tmp_path, {}) == 1
        (tmp_path / "2").mkdir()  # as if a third process had taken the number in between
        (tmp_path / "2" / "file").touch()
        assert publish(other, tmp_path, {}) == 3


def test_a_half_copied_directory_is_no_version(tmp_path: Path):
    add(tmp_path)
    (tmp_path / "7").mkdir()
    assert versions(tmp_path) == [1]


def test_references(tmp_path: Path):
    for _ in range(3):
        add(tmp_path)
    (tmp_path / "aliases.json").write_text(json.dumps({"production": 2}))
    assert [resolve(tmp_path, r).name for r in ("latest", "production", "1", 3)] == [
        "3",
        "2",
        "1",
        "3",
    ]
    with pytest.raises(
        UserError, match="no version or alias 'prod'; it has latest, production, 1, 2, 3"
    ):
        resolve(tmp_path, "prod")
    with pytest.raises(UserError, match="holds no bundle: train one"):
        resolve(tmp_path / "ranking")


# ------------------------------------------------------------------------------------------------------------
# Aliases


def move(store: LocalStore, version: int, alias: str = "production") -> None:
    to = {stage: version for stage in ("retrieval", "ranking")}
    with store.writing():
        store.move(alias, to, {"alias": alias, "to": to})


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    for stage in ("retrieval", "ranking", "recommender"):
        for _ in range(2):
            add(tmp_path / stage)
    return LocalStore(tmp_path)


def test_an_alias_moves_in_all_stages_and_leaves_those_that_are_not_named(
    store: LocalStore, tmp_path: Path
):
    with store.writing():
        store.move("production", {"retrieval": 1, "recommender": 1}, {"n": 1})
    move(store, 2)
    assert store.named("production") == {"retrieval": 2, "ranking": 2}
    assert json.loads((tmp_path / "retrieval" / "aliases.json").read_text()) == {"production": 2}
    assert json.loads((tmp_path / "recommender" / "aliases.json").read_text()) == {}
    assert [entry.get("n") for entry in store.history()] == [1, None]
    assert resolve(tmp_path / "ranking", "production").name == "2"
    assert "recommender" not in (tmp_path / "models.config").read_text()


def test_aliases_that_were_written_by_hand_move_in(store: LocalStore, tmp_path: Path):
    (tmp_path / "ranking" / "aliases.json").write_text('{"mine": 1}')
    move(store, 2)
    assert store.aliases("ranking") == {"mine": 1, "production": 2}
    (
        tmp_path / "ranking" / "aliases.json"
    ).unlink()  # an editor may put a file in the place of the link
    (tmp_path / "ranking" / "aliases.json").write_text('{"mine": 2, "production": 2}')
    assert store.aliases("ranking") == {"mine": 2, "production": 2}
    move(store, 1)
    assert store.aliases("ranking") == {"mine": 2, "production": 1}


def python(script: str, *arguments: object, **kwargs: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment(), **kwargs
    )  # type: ignore[call-overload]


MOVES = """
import os, shutil, signal, sys
from pathlib import Path
from rec.registry import LocalStore

WATCHED = {"open", "os.mkdir", "os.rename", "os.remove", "os.symlink", "os.rmdir"}
store, count = LocalStore(Path(sys.argv[1])), None


def watch(event, arguments):  # kills this process before it touches the file system for the count-th time
    global count
    if count is not None and event in WATCHED:
        count -= 1
        if count < 0:
            os.kill(os.getpid(), signal.SIGKILL)


def move(version):
    to = {"retrieval": version, "ranking": version}
    with store.writing():
        store.move("production", to, {"to": to})
"""
KILLS = """
root, is_first = Path(sys.argv[1]), sys.argv[2] == "first"
sys.addaudithook(watch)
for number in range(1000):
    version = 1 + number % 2
    if is_first:  # the first move ever, with an alias written by hand
        shutil.rmtree(root / ".promotions", ignore_errors=True)
        for path in [*root.glob("*/aliases.json*"), *root.glob("*.config*"), *root.glob("*.jsonl*")]:
            path.unlink()
        (root / "retrieval" / "aliases.json").write_text('{"mine": 1}')
    child = os.fork()
    if not child:
        count = number
        move(version)
        os._exit(0)
    killed = os.waitpid(child, 0)[1] != 0
    named, told = store.named("production"), len(store.history())
    assert named in ({}, {"retrieval": 1, "ranking": 1}, {"retrieval": 2, "ranking": 2}), (number, named)
    assert not named or store.history()[-1]["to"] == named, number
    assert not is_first or store.aliases("retrieval")["mine"] == 1, number
    if not killed:
        break
    move(3 - version)
    assert store.named("production") == {"retrieval": 3 - version, "ranking": 3 - version}, number
    assert told <= len(store.history()) - 1
print(number)
"""
MANY = """
for number in range(40):
    move(int(sys.argv[2]))
"""


@pytest.mark.parametrize(("which", "points"), [("first", 25), ("later", 12)])
def test_a_kill_at_any_point_leaves_what_was_or_what_will_be(
    which: str, points: int, store: LocalStore, tmp_path: Path
):
    done = python(MOVES + KILLS, tmp_path, which)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > points


def test_two_who_promote_at_once_take_turns(store: LocalStore, tmp_path: Path):
    command = [sys.executable, "-c", MOVES + MANY, str(tmp_path)]
    running = [subprocess.Popen([*command, str(version)], env=environment()) for version in (1, 2)]
    while any(each.poll() is None for each in running):
        named = store.named("production")  # a reader meets no mixed pair
        assert len(set(named.values())) <= 1 and len(named) in (0, 2)
    assert [each.returncode for each in running] == [0, 0]
    assert len(store.history()) == 80
    assert store.history()[-1]["to"] == store.named("production")


def test_a_full_disk_changes_nothing(store: LocalStore, tmp_path: Path):
    move(store, 1)

    def fill() -> None:  # from now on a file can hold nothing, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

    done = python(MOVES + "move(2)", tmp_path, preexec_fn=fill)
    assert done.returncode == 1 and "File too large" in done.stderr
    assert store.named("production") == {"retrieval": 1, "ranking": 1} and len(store.history()) == 1
    move(store, 2)
    assert store.named("production") == {"retrieval": 2, "ranking": 2}
