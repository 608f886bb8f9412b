import json
import os
from pathlib import Path

import pytest

from rec.errors import UserError
from rec.registry import draft, publish, read_metadata, resolve, versions


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
    assert [resolve(tmp_path, r).name for r in ("latest", "production", "1", 3)] == ["3", "2", "1", "3"]
    with pytest.raises(UserError, match="no version or alias 'prod'; it has latest, production, 1, 2, 3"):
        resolve(tmp_path, "prod")
    with pytest.raises(UserError, match="holds no bundle: train one"):
        resolve(tmp_path / "ranking")
