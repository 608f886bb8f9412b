"""Following: what is loaded when, on real directories. The clock is a number that the tests move."""

import shutil
from pathlib import Path

import pytest

from rec.bundles.files import find_pair
from rec.bundles.metadata import verify
from rec.errors import UserError
from rec.ops.serving.metrics import exposition
from rec.ops.serving.reload import LONGEST_DELAY, Bundles, Follower, look
from tests.conftest import Trained, rewrite
from tests.ops.serving.test_front import publish_ranking


@pytest.fixture
def bundles(trained: Trained, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained.savedmodels, tmp_path / "savedmodels"))


class Following:
    """A follower of the latest pair, asked every second for `seconds` seconds."""

    def __init__(self, bundles: Path, seconds: float = 5) -> None:
        self.bundles = bundles
        self.follower = Follower(seconds, find_pair(bundles))
        self.now = 0.0
        self.follower.next_look = 0.0
        self.looks = 0

    def step(self) -> Bundles | None:
        """What is to be loaded after this second."""
        self.now += 1
        if self.now < self.follower.next_look:
            return None
        self.looks += 1
        try:
            seen = look(lambda: find_pair(self.bundles))
        except Exception as error:
            self.follower.missed(error, self.now)
            return None
        self.seen = seen
        return self.follower.saw(seen, self.now)

    def wait(self, seconds: int) -> Bundles | None:
        for _ in range(seconds):
            pair = self.step()
            if pair is not None:
                return pair
        return None


def counted(name: str) -> float:
    lines = exposition().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def test_a_new_version_is_loaded_once_it_has_settled(bundles: Path) -> None:
    following = Following(bundles)
    assert following.wait(20) is None
    publish_ranking(bundles, 2)
    assert following.wait(7) == (bundles / "retrieval" / "1", bundles / "ranking" / "2")


def test_a_bundle_that_is_copied_in_slowly_is_waited_for(bundles: Path) -> None:
    following = Following(bundles, 2)
    source = bundles / "ranking" / "1"
    target = bundles / "ranking" / "2"
    publish_ranking(bundles, 9)
    (bundles / "ranking" / "9").rename(source.with_name("aside"))
    aside = source.with_name("aside")
    rewrite(aside, version=2)
    files = sorted(path for path in aside.rglob("*") if path.is_file())
    files.sort(key=lambda path: path.name != "saved_model.pb")  # which makes it a version
    files.sort(key=lambda path: path.name == "items.parquet")
    assert files[-1].name == "items.parquet"
    for path in files:
        (target / path.relative_to(aside)).parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes()
        for size in (len(content) // 2, len(content)):
            (target / path.relative_to(aside)).write_bytes(content[:size])
            assert following.step() is None
    assert following.wait(int(LONGEST_DELAY) + 2) == (bundles / "retrieval" / "1", target)
    verify(target)


def test_refused_bundles_are_tried_again_with_growing_delays(bundles: Path) -> None:
    following = Following(bundles)
    publish_ranking(bundles, 2, damaged=True)
    tried = []
    for _ in range(400):
        if following.step() is not None:
            tried.append(following.now)
            following.follower.refused(following.seen, UserError("damaged"), following.now)
    delays = [later - earlier for earlier, later in zip(tried, tried[1:], strict=False)]
    assert delays == sorted(delays) and delays[0] <= 10 and delays[-1] <= LONGEST_DELAY + 5
    failed = following.follower.failed
    assert failed and failed["attempts"] == len(tried) > 5 and "ranking/2" in failed["bundles"]


def test_refused_bundles_are_tried_at_once_when_they_have_changed(bundles: Path) -> None:
    following = Following(bundles)
    publish_ranking(bundles, 2, damaged=True)
    for _ in range(6):
        assert following.wait(int(LONGEST_DELAY) + 10) is not None
        following.follower.refused(following.seen, UserError("damaged"), following.now)
    assert following.wait(30) is None
    model = bundles / "ranking" / "1" / "saved_model.pb"
    shutil.copy(model, bundles / "ranking" / "2" / "saved_model.pb")
    rewrite(bundles / "ranking" / "2")
    assert following.wait(7) is not None


def test_a_later_good_version_is_loaded_although_one_was_refused(bundles: Path) -> None:
    following = Following(bundles)
    publish_ranking(bundles, 2, damaged=True)
    assert following.wait(10) is not None
    following.follower.refused(following.seen, UserError("damaged"), following.now)
    publish_ranking(bundles, 3)
    pair = following.wait(10)
    assert pair is not None and pair[1] == bundles / "ranking" / "3"
    following.follower.accepted(pair)
    assert following.follower.failed is None and following.wait(100) is None


def unreadable(bundles: Path) -> None:
    """A directory in the place of a file fails for every user, root too."""
    metadata = bundles / "ranking" / "2" / "metadata.json"
    metadata.unlink()
    metadata.mkdir()


def half_written(bundles: Path) -> None:
    (bundles / "ranking" / "2" / "metadata.json").write_text('{"stage": "rank')


def no_metadata(bundles: Path) -> None:
    (bundles / "ranking" / "2" / "metadata.json").unlink()


def half_written_aliases(bundles: Path) -> None:
    aliases = bundles / "ranking" / "aliases.json"
    aliases.unlink(missing_ok=True)
    aliases.write_text('{"production": ')


def no_list(bundles: Path) -> None:
    (bundles / "ranking" / "2" / "metadata.json").write_text("[]")


@pytest.mark.parametrize(
    "damage", [unreadable, half_written, no_metadata, half_written_aliases, no_list]
)
def test_whatever_a_look_meets_is_reported_and_following_goes_on(
    bundles: Path, damage: object, capsys: pytest.CaptureFixture[str]
) -> None:
    following = Following(bundles)
    publish_ranking(bundles, 2)
    damage(bundles)  # type: ignore[operator]
    before = counted("rec_looks_failed_total"), counted("rec_reloads_total")
    for _ in range(200):
        pair = following.step()
        if pair is not None:  # it can only be found out by loading it
            following.follower.refused(following.seen, UserError("damaged"), following.now)
    failed = following.follower.failed
    assert failed is not None and failed["error"] and failed["at"]
    assert (counted("rec_looks_failed_total"), counted("rec_reloads_total")) > before
    log = capsys.readouterr().err
    assert log.count("the models stay as they are") == 1 and failed["error"] in log

    shutil.rmtree(bundles / "ranking" / "2")
    (bundles / "ranking" / "aliases.json").unlink(missing_ok=True)
    publish_ranking(bundles, 3)
    pair = following.wait(int(LONGEST_DELAY) + 10)
    assert pair is not None and pair[1] == bundles / "ranking" / "3"


def test_failed_looks_come_with_growing_delays(bundles: Path) -> None:
    following = Following(bundles)
    publish_ranking(bundles, 2)
    metadata = bundles / "ranking" / "2" / "metadata.json"
    content = metadata.read_text()
    metadata.write_text("{")
    following.wait(600)
    assert 10 < following.looks < 20
    metadata.write_text(content)
    assert following.wait(int(LONGEST_DELAY) + 2) is not None
    assert following.follower.failed is None or following.follower.failed["error"]


def test_what_is_in_service_again_is_no_failure(bundles: Path) -> None:
    following = Following(bundles)
    publish_ranking(bundles, 2, damaged=True)
    following.wait(10)
    following.follower.refused(following.seen, UserError("damaged"), following.now)
    assert following.follower.failed is not None
    shutil.rmtree(bundles / "ranking" / "2")
    following.wait(10)
    assert following.follower.failed is None


def test_without_an_interval_nothing_is_looked_at(bundles: Path) -> None:
    follower = Follower(0, find_pair(bundles))
    follower.saw(look(lambda: find_pair(bundles)), 1.0)
    follower.missed(OSError("gone"), 2.0)
    assert follower.next_look == float("inf")
