"""What bundles say about themselves: written, read, and refused in one sentence."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rec.bundles.metadata import (
    OPTIONAL,
    PairMetadata,
    Reference,
    checksum,
    parse_metadata,
    read_metadata,
    write_metadata,
)
from rec.config import Config, Ranking, Retrieval
from rec.errors import UserError
from tests.small import bundle_metadata


def change(bundle: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edits metadata.json as another version of rec might have written it."""
    path = bundle / "metadata.json"
    content = json.loads(path.read_text())
    edit(content)
    content["checksum"] = checksum(content)
    path.write_text(json.dumps(content))


def test_metadata_are_read_as_they_were_written(tmp_path: Path) -> None:
    config = Config(dataset="data", retrieval=Retrieval(epochs=3), ranking=Ranking(hidden=(8, 4)))
    metadata = replace(
        bundle_metadata("ranking", config),
        built_from={"retrieval": Reference(3, "ab")},
        metrics={"val/ndcg@10": 0.25},
        history=[{}, {"loss": 1.0}],
        run={"seed": 42},
        files={"saved_model.pb": "c0ffee"},
    )
    write_metadata(tmp_path, metadata)
    assert read_metadata(tmp_path) == metadata
    content = json.loads((tmp_path / "metadata.json").read_text())
    assert content["built_from"] == {"retrieval": {"version": 3, "id": "ab"}}
    assert content["git_commit"] is None and "index" not in content


def test_what_a_recommender_does_not_have_is_not_in_the_file(tmp_path: Path) -> None:
    write_metadata(tmp_path, bundle_metadata("recommender"))
    content = json.loads((tmp_path / "metadata.json").read_text())
    assert not set(OPTIONAL) & content.keys()


def test_a_bundle_of_rec_0_1_is_read(tmp_path: Path) -> None:
    """It said 0 for `auto`, and had fewer keys."""
    write_metadata(tmp_path, bundle_metadata())

    def write_as_0_1(content: dict[str, Any]) -> None:
        content["config"]["retrieval"] |= {"window": 0, "epochs": 0}
        del content["config"]["ranking"]["window"]
        content["anything else"] = 1

    change(tmp_path, write_as_0_1)
    assert read_metadata(tmp_path) == bundle_metadata()


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda content: content["config"]["retrieval"].update(hops=3), "config.retrieval.hops: "),
        (lambda content: content.pop("metrics"), "metrics: Field required"),
        (lambda content: content.update(created=None), "created: "),
    ],
)
def test_what_this_version_cannot_read_is_one_sentence(
    edit: Callable[[dict[str, Any]], object], problem: str, tmp_path: Path
) -> None:
    write_metadata(tmp_path, bundle_metadata())
    change(tmp_path, edit)
    with pytest.raises(UserError, match=f"is from another version of rec .{problem}") as refusal:
        read_metadata(tmp_path)
    assert str(refusal.value).endswith("): export the bundle again")
    assert "\n" not in str(refusal.value)


def test_an_artifact_that_is_not_a_bundle_is_one_sentence() -> None:
    with pytest.raises(UserError, match="^W&B's x:v0 is from another version of rec .stage: Field"):
        parse_metadata({"note": "by hand"}, "W&B's x:v0")


def test_a_pair_says_what_it_serves() -> None:
    config = Config(dataset="d", ranking=Ranking(objective="rating", candidates=30))
    retrieval = bundle_metadata()
    alone = PairMetadata(retrieval)
    assert (alone.candidates, alone.predicts_ratings) == (None, False)
    both = PairMetadata(retrieval, replace(bundle_metadata("ranking", config), version=2))
    assert both.versions == {"retrieval": 1, "ranking": 2}
    assert (both.candidates, both.predicts_ratings) == (30, True)
