import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rec.bundles.aliases import Versions
from rec.bundles.files import draft, publish, resolve, versions
from rec.bundles.metadata import read_metadata
from rec.errors import UserError
from rec.ops.history import Move, Verdict
from rec.ops.registry import LocalStore, check_alias
from tests.conftest import bundle_metadata, environment


def add(stage_dir: Path, content: str = "model") -> int:
    with draft(stage_dir) as directory:
        (directory / "saved_model.pb").write_text(content)
        return publish(directory, stage_dir, bundle_metadata())


def test_versions_count_up_and_say_what_they_hold(tmp_path: Path):
    stage_dir = tmp_path / "retrieval"
    assert [add(stage_dir), add(stage_dir, "other")] == [1, 2]
    first, second = (read_metadata(stage_dir / str(v)) for v in (1, 2))
    assert (first.stage, first.version) == ("retrieval", 1)
    assert list(first.files) == ["saved_model.pb"]
    assert first.id != second.id


def test_a_version_that_failed_leaves_nothing(tmp_path: Path):
    with pytest.raises(ZeroDivisionError), draft(tmp_path) as directory:
        (directory / "saved_model.pb").touch()
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


DRAFT = """
import sys
from pathlib import Path
from rec.bundles.files import draft

with draft(Path(sys.argv[1])) as directory:
    print(directory.parent.name, flush=True)
    sys.stdin.read()
"""


def test_a_killed_process_draft_is_cleared_and_a_living_ones_is_not_even_out_of_sight(
    tmp_path: Path,
):
    """The living one is in another PID namespace, as in another container, where /proc says nothing about it."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", DRAFT, str(tmp_path)]
    apart = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if subprocess.run([*apart, "true"], stderr=subprocess.DEVNULL, check=False).returncode:
        apart = []  # not allowed here: it is a living process of the same namespace then
    both = [
        subprocess.Popen(prefix + command, stdin=pipe, stdout=pipe, text=True, env=environment())
        for prefix in (apart, [])
    ]
    living, dead = (process.stdout.readline().strip() for process in both)  # type: ignore[union-attr]
    both[1].kill()
    both[1].wait()
    assert (tmp_path / dead).is_dir()
    add(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".last_version", "1", living]
    both[0].communicate("")
    assert not (tmp_path / living).exists()


def test_two_writers_get_two_numbers(tmp_path: Path):
    with draft(tmp_path) as one, draft(tmp_path) as other:
        for directory in (one, other):
            (directory / "saved_model.pb").touch()
        assert publish(one, tmp_path, bundle_metadata()) == 1
        (tmp_path / "2").mkdir()  # half copied by hand
        assert publish(other, tmp_path, bundle_metadata()) == 3


def test_many_processes_publish_at_once(tmp_path: Path):
    script = """
import sys
from pathlib import Path
from tests.ops.test_registry import add

for _ in range(10):
    print(add(Path(sys.argv[1])))
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
        for _ in range(2)
    ]
    numbers = [int(line) for each in running for line in each.communicate()[0].split()]
    assert sorted(numbers) == list(range(1, 21)) == versions(tmp_path)


def test_the_number_of_a_deleted_version_is_not_used_again(tmp_path: Path):
    stage_dir = tmp_path / "ranking"
    for _ in range(3):
        add(stage_dir)
    shutil.rmtree(stage_dir / "3")
    assert add(stage_dir) == 4
    shutil.rmtree(stage_dir)
    assert add(stage_dir) == 1  # nothing remembers it, and no alias has ever named it


def test_without_its_note_the_highest_number_that_an_alias_has_ever_named_counts(
    store: LocalStore, tmp_path: Path
):
    add(tmp_path / "ranking")
    move(store, 2)
    for stage, forgotten in (("retrieval", [".last_version", "2"]), ("ranking", ["3", "2"])):
        for name in forgotten:
            path = tmp_path / stage / name
            path.unlink() if path.is_file() else shutil.rmtree(path)
    (tmp_path / "ranking" / ".last_version").write_text("damaged")
    move(store, 1)
    assert add(tmp_path / "retrieval") == 3
    assert add(tmp_path / "ranking") == 3  # 3 has never had an alias
    shutil.rmtree(tmp_path / "retrieval")  # with its aliases
    assert add(tmp_path / "retrieval") == 3


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
        store.move(a_move(to, alias), to)


def a_move(to: Versions, alias: str = "production", why: str = "") -> Move:
    verdict = Verdict(passed=True, reasons=[], users=3)  # type: ignore[call-arg]
    return Move(
        alias=alias, previous={}, to=to, action="tried", gate=verdict, why=why, who="me", time="now"
    )


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
        to = {"retrieval": 1, "recommender": 1}
        store.move(a_move(to, why="first"), to)
    move(store, 2)
    assert store.versions_of("production") == {"retrieval": 2, "ranking": 2}
    assert json.loads((tmp_path / "retrieval" / "aliases.json").read_text()) == {"production": 2}
    assert json.loads((tmp_path / "recommender" / "aliases.json").read_text()) == {}
    assert [each.why for each in store.history()] == ["first", ""]
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


def test_an_alias_of_a_version_that_is_gone_is_said(store: LocalStore, tmp_path: Path):
    move(store, 2)
    shutil.rmtree(tmp_path / "retrieval" / "2")
    gone = "retrieval: the alias 'production' names version 2, which is gone: put it back, or give"
    with pytest.raises(UserError, match=gone):
        resolve(tmp_path / "retrieval", "production")
    with pytest.raises(UserError, match="retrieval 2 is gone: there is no .*retrieval/2"):
        store.directory("retrieval", 2)
    add(tmp_path / "retrieval")
    with pytest.raises(UserError, match=gone):
        resolve(tmp_path / "retrieval", "production")
    with pytest.raises(UserError, match="has no version or alias '2'; it has latest, 1, 3"):
        resolve(tmp_path / "retrieval", 2)


@pytest.mark.parametrize(
    "alias",
    [
        "latest",
        "",
        "1",
        "v3",
        "a\nb",
        "a\n",
        "a/b",
        "../a",
        "a b",
        " a",
        ".a",
        "-a",
        "id-1f",
        "\u00e4",
    ],
)
def test_names_that_are_no_aliases(alias: str):
    with pytest.raises(UserError, match="cannot be an alias: it needs letters") as refusal:
        check_alias(alias)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("alias", ["production", "canary-2", "Team_A.eu", "latest-good", "v3-test"])
def test_names_that_are_aliases(alias: str):
    check_alias(alias)


# ------------------------------------------------------------------------------------------------------------
# Copies of the directory


@pytest.fixture
def moved(store: LocalStore, tmp_path: Path) -> Path:
    """A store in which `production` is 2, after 1, and `mine`, written by hand, is 1 in ranking."""
    (tmp_path / "ranking" / "aliases.json").write_text('{"mine": 1}')
    for version in (1, 2):
        move(store, version)
    return tmp_path


def is_as_it_was(root: Path) -> bool:
    store = LocalStore(root)
    both = {"retrieval": 2, "ranking": 2}
    return (
        store.versions_of("production") == both
        and store.versions_of("mine") == {"ranking": 1}
        and [each.to["ranking"] for each in store.history()] == [1, 2]
        and resolve(root / "ranking", "production").name == "2"
    )


def goes_on(root: Path) -> bool:
    """After another move all is there, in links again."""
    move(LocalStore(root), 1)
    store = LocalStore(root)
    paths = [root / "retrieval/aliases.json", root / "history.jsonl", root / ".promotions/current"]
    return (
        store.versions_of("production") == {"retrieval": 1, "ranking": 1}
        and store.versions_of("mine") == {"ranking": 1}
        and [each.to["ranking"] for each in store.history()] == [1, 2, 1]
        and all(path.is_symlink() for path in paths)
    )


def test_a_copy_that_followed_the_links_works(
    moved: Path, tmp_path_factory: pytest.TempPathFactory
):
    copy = tmp_path_factory.mktemp("copy") / "savedmodels"
    shutil.copytree(moved, copy, symlinks=False)
    assert not (copy / ".promotions" / "current").is_symlink()
    assert is_as_it_was(copy) and goes_on(copy)


@pytest.mark.parametrize("lost", ["ranking/aliases.json", "history.jsonl", "models.config"])
def test_a_lost_link_loses_nothing(lost: str, moved: Path):
    (moved / lost).unlink()
    assert is_as_it_was(moved) and goes_on(moved)
    assert (moved / lost).is_symlink()


def test_a_copy_without_links_says_what_to_do(moved: Path):
    for path in [*moved.rglob("*"), moved / ".promotions" / "current"]:
        if path.is_symlink():
            path.unlink()
    with pytest.raises(UserError, match="a copy seems to have left it out: run ln -sfn") as refusal:
        LocalStore(moved).history()
    with pytest.raises(UserError, match="run ln -sfn"):
        move(LocalStore(moved), 1)
    with pytest.raises(UserError, match="run ln -sfn"):
        resolve(moved / "ranking", "production")
    assert resolve(moved / "ranking").name == "2"  # what needs no alias works
    subprocess.run(str(refusal.value).partition("run ")[2], shell=True, check=True)
    assert is_as_it_was(moved) and goes_on(moved)


def test_a_copy_without_hidden_files_says_what_to_do(moved: Path):
    shutil.rmtree(moved / ".promotions")
    for read in (LocalStore(moved).history, lambda: LocalStore(moved).versions_of("production")):
        with pytest.raises(UserError, match="is a link into .*promotions, which is missing: copy"):
            read()


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"production": "2"}', "../.promotions/current"]
)
def test_damaged_aliases_are_one_sentence(content: str, store: LocalStore, tmp_path: Path):
    (tmp_path / "ranking" / "aliases.json").write_text(content)
    with pytest.raises(UserError, match="ranking/aliases.json is damaged: it should be {ALIAS"):
        resolve(tmp_path / "ranking", "production")
    assert add(tmp_path / "ranking") == 3


def test_a_damaged_history_is_one_sentence(moved: Path):
    with open(moved / "history.jsonl", "a") as history:
        history.write('{"alias": ')
    with pytest.raises(UserError, match="history.jsonl, line 3 is damaged: remove the line"):
        LocalStore(moved).history()


def python(script: str, *arguments: object, **kwargs: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment(), **kwargs
    )  # type: ignore[call-overload]


MOVES = """
import os, shutil, signal, sys
from pathlib import Path
from rec.ops.history import Move, Verdict
from rec.ops.registry import LocalStore

WATCHED = {"open", "os.mkdir", "os.rename", "os.remove", "os.symlink", "os.rmdir"}
store, count = LocalStore(Path(sys.argv[1])), None
GATE = Verdict(passed=True, reasons=[])


def watch(event, arguments):  # kills this process before it touches the file system for the count-th time
    global count
    if count is not None and event in WATCHED:
        count -= 1
        if count < 0:
            os.kill(os.getpid(), signal.SIGKILL)


def move(version):
    to = {"retrieval": version, "ranking": version}
    about = {"action": "tried", "gate": GATE, "why": "", "who": "me", "time": "now"}
    with store.writing():
        store.move(Move(alias="production", previous={}, to=to, **about), to)
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
    named, told = store.versions_of("production"), len(store.history())
    assert named in ({}, {"retrieval": 1, "ranking": 1}, {"retrieval": 2, "ranking": 2}), (number, named)
    assert not named or store.history()[-1].to == named, number
    assert not is_first or store.aliases("retrieval")["mine"] == 1, number
    if not killed:
        break
    move(3 - version)
    assert store.versions_of("production") == {"retrieval": 3 - version, "ranking": 3 - version}, number
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
        named = store.versions_of("production")  # a reader meets no mixed pair
        assert len(set(named.values())) <= 1 and len(named) in (0, 2)
    assert [each.returncode for each in running] == [0, 0]
    assert len(store.history()) == 80
    assert store.history()[-1].to == store.versions_of("production")


def test_a_full_disk_changes_nothing(store: LocalStore, tmp_path: Path):
    move(store, 1)

    def fill() -> None:  # from now on a file can hold nothing, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

    done = python(MOVES + "move(2)", tmp_path, preexec_fn=fill)
    assert done.returncode == 1 and "File too large" in done.stderr
    assert (
        store.versions_of("production") == {"retrieval": 1, "ranking": 1}
        and len(store.history()) == 1
    )
    move(store, 2)
    assert store.versions_of("production") == {"retrieval": 2, "ranking": 2}
