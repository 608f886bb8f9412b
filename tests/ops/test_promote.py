"""Promotion as a user does it: a pair that was trained, one that was spoilt since, one with a poor index."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format
from tensorflow_serving.config import model_server_config_pb2

import rec.export
from rec.bundles.files import find_pair
from rec.bundles.metadata import read_metadata
from rec.config import Config, load_config
from rec.data_prep.dataset import open_dataset
from rec.errors import UserError
from rec.ops.registry import LocalStore, together
from rec.promote import choose, promote, roll_back
from rec.ranking.train import load_ranking
from rec.retrieval.train import load_retrieval
from tests.conftest import Trained, rewrite, run_here

ONE, SPOILT, POOR = ({"retrieval": n, "ranking": n, "recommender": n} for n in (1, 2, 3))


@pytest.fixture(scope="module")
def prepared(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The config of three versions: what was trained; the same with a bias for unpopular items; with a poor index."""
    savedmodels = Path(
        shutil.copytree(trained.savedmodels, tmp_path_factory.mktemp("promote") / "savedmodels")
    )
    config = load_config(trained.config, [f"output.savedmodels={savedmodels}"])
    for is_spoilt in (True, False):
        retrieval = load_retrieval(trained.checkpoints / "retrieval", open_dataset(config.dataset))
        with pytest.MonkeyPatch.context() as patch:
            if is_spoilt:
                popularity = retrieval.corpus.popularity[: retrieval.model.trained_items]
                bias = retrieval.model.candidate_tower.popularity_bias
                bias.assign(np.log1p(popularity), share=1.0, weight=-10.0)
            else:
                patch.setattr(rec.export, "build_index", that_is_poor(rec.export.build_index))
            first = rec.export.export_retrieval(retrieval, config)
        ranking = load_ranking(trained.checkpoints / "ranking", retrieval)
        if is_spoilt:
            ranking.model.neighbours_weight.assign(-10.0)
        second = rec.export.export_ranking(ranking, config, first)
        rec.export.export_recommender(first, second, config)
    return config


def that_is_poor(build: Any) -> Any:
    def build_index(*args: Any, **kwargs: Any) -> Any:
        index, report = build(*args, **kwargs)
        index.settings.assign([1, 20])
        return index, report

    return build_index


@pytest.fixture
def config(prepared: Config, tmp_path: Path) -> Config:
    """The same, in a copy that a test may change."""
    output = replace(prepared.output, savedmodels=str(tmp_path / "savedmodels"))
    shutil.copytree(prepared.output.savedmodels, output.savedmodels)
    return replace(prepared, output=output)


@pytest.fixture
def store(config: Config) -> Iterator[LocalStore]:
    yield LocalStore(Path(config.output.savedmodels))


def command(
    trained: Trained, config: Config, *arguments: object
) -> tuple[int, dict[str, Any], str]:
    """Exit code, JSON and stderr of the command."""
    place = f"output.savedmodels={config.output.savedmodels}"
    done = run_here("rec.promote", "--config", trained.config, "--set", place, *arguments)
    assert "Traceback" not in done.stderr
    return (
        done.returncode,
        json.loads(done.stdout.splitlines()[-1]) if done.stdout else {},
        done.stderr,
    )


def labels(config: Config) -> dict[str, dict[str, int]]:
    """What TF Serving is told, as its own parser reads it."""
    text = (Path(config.output.savedmodels) / "models.config").read_text()
    parsed = text_format.Parse(text, model_server_config_pb2.ModelServerConfig())
    for model in parsed.model_config_list.config:
        assert model.base_path == f"/models/{model.name}" and model.model_platform == "tensorflow"
        assert set(model.version_labels.values()) == set(
            model.model_version_policy.specific.versions
        )
    return {model.name: dict(model.version_labels) for model in parsed.model_config_list.config}


def test_the_story_of_a_promotion(trained: Trained, config: Config, store: LocalStore):
    code, answer, _ = command(trained, config, "--stage", "recommender", "--metric", "val/ndcg@10")
    assert code == 0 and answer["gate"]["passed"] and answer["gate"]["users"] == 200
    assert (answer["alias"], answer["from"], answer["to"], answer["action"]) == (
        "production",
        {},
        ONE,
        "promoted",
    )
    assert store.versions_of("production") == ONE
    assert labels(config)["ranking"] == {"stable": 1, "canary": 1}

    code, answer, stderr = command(trained, config, "--stage", "recommender", "--version", 2)
    assert (code, answer["action"], answer["gate"]["passed"]) == (1, "refused", False)
    assert answer["gate"]["ci"][1] < 0 and "error: the gate refuses it" in stderr
    assert store.versions_of("production") == ONE

    code, answer, _ = command(
        trained, config, "--stage", "recommender", "--version", 2, "--force", "--reason", "a dare"
    )
    assert (code, answer["action"], answer["gate"]["passed"]) == (0, "forced", False)
    assert store.versions_of("production") == SPOILT and labels(config)["retrieval"] == {
        "stable": 2,
        "canary": 2,
    }
    assert [
        path and path.name for path in find_pair(Path(config.output.savedmodels), "production")
    ] == ["2", "2"]

    code, answer, _ = command(trained, config, "--rollback", "--alias", "production")
    assert (code, answer["from"], answer["to"]) == (0, SPOILT, ONE)
    assert store.versions_of("production") == ONE

    code, answer, stderr = command(trained, config, "--history")
    actions = [entry["action"] for entry in answer["history"]]
    assert actions == ["promoted", "refused", "forced", "rolled back"]
    assert (
        "version 2; a dare" in stderr
        and "retrieval 2 ranking 2 recommender 2 -> retrieval 1" in stderr
    )
    assert all(entry["who"] and entry["time"] and entry["why"] for entry in answer["history"])


@pytest.mark.parametrize("options", [["--stage", "ranking", "--version", "1"], ["--rollback"]])
def test_a_name_that_is_no_alias_is_refused(
    options: list[str], trained: Trained, config: Config, store: LocalStore
):
    code, answer, stderr = command(trained, config, *options, "--alias", "latest")
    assert (code, answer) == (1, {})
    assert "error: 'latest' cannot be an alias: " in stderr
    assert store.history() == []


def test_a_poor_index_is_refused(config: Config, store: LocalStore):
    entry = promote(store, config, "recommender", 3, "to try")
    assert entry.action == "refused" and store.versions_of("production") == {}
    [reason] = entry.gate.reasons
    assert reason.startswith("its index finds ") and reason.endswith("its target is 95.0%")


def test_one_stage_alone_may_not_leave_a_mismatched_pair(config: Config, store: LocalStore):
    assert (
        promote(store, config, "ranking", 1, "too early").action == "refused"
    )  # its retrieval is not there
    assert promote(store, config, "retrieval", 1, "first").action == "promoted"
    assert promote(store, config, "ranking", 1, "then").to == {"retrieval": 1, "ranking": 1}
    entry = promote(store, config, "retrieval", 2, "alone")
    assert entry.action == "refused"
    [reason] = entry.gate.reasons
    assert reason.startswith(
        "ranking 1 was trained for retrieval 1, which would not be beside it: "
    )
    assert store.versions_of("production") == {"retrieval": 1, "ranking": 1}
    assert promote(store, config, "retrieval", 2, "alone", force=True).action == "forced"
    assert store.versions_of("production") == {"retrieval": 2, "ranking": 1}


def test_other_aliases_are_free_and_one_is_the_canary(config: Config, store: LocalStore):
    promote(store, config, "recommender", 1, "good")
    promote(store, config, "retrieval", 2, "to look at", "canary")
    assert store.aliases("retrieval") == {"production": 1, "canary": 2}
    assert labels(config)["retrieval"] == {"stable": 1, "canary": 2}
    assert labels(config)["ranking"] == {"stable": 1, "canary": 1}
    assert promote(store, config, "recommender", 1, "again").action == "unchanged"
    assert len(store.history()) == 2


def test_rolling_back_goes_further_back_each_time(config: Config, store: LocalStore):
    alias = "candidate"  # before which no gate stands
    for version in (1, 2, 3):
        promote(store, config, "recommender", version, "to try", alias)
    assert roll_back(store, "no good", alias).to == SPOILT
    assert roll_back(store, "nor this", alias).to == ONE
    with pytest.raises(
        UserError, match="candidate: there are no versions before these to go back to"
    ):
        roll_back(store, "nor this", alias)
    assert store.versions_of(alias) == ONE


@pytest.mark.parametrize("name", ["saved_model.pb", "items.parquet", "metadata.json"])
def test_a_flipped_byte_is_found(name: str, config: Config, store: LocalStore):
    path = Path(config.output.savedmodels) / "ranking" / "2" / name
    content = bytearray(path.read_bytes())
    content[content.index(b"1") if name == "metadata.json" else len(content) // 2] ^= 2
    path.write_bytes(content)
    with pytest.raises(
        UserError, match=f"ranking/2/{name} has changed since the export|is not a|cannot be read"
    ):
        promote(store, config, "recommender", 2, "damaged", force=True)
    assert store.versions_of("production") == {} and store.history() == []


def test_a_missing_file_or_version_is_told(config: Config, store: LocalStore):
    root = Path(config.output.savedmodels)
    (root / "retrieval" / "2" / "assets" / "users.txt").unlink()
    with pytest.raises(
        UserError, match="retrieval/2 lacks assets/users.txt: export the bundle again"
    ):
        promote(store, config, "recommender", 2, "incomplete")
    shutil.rmtree(root / "ranking" / "3")
    with pytest.raises(UserError, match="recommender 3 was built from ranking 3, which is gone"):
        promote(store, config, "recommender", 3, "incomplete")
    with pytest.raises(UserError, match="no version or alias '7'; it has latest, 1, 2, 3"):
        choose(store, "recommender", "7", None, None)
    with pytest.raises(
        UserError, match="has no alias 'production': python -m rec.promote gives it"
    ):
        find_pair(root, "production")


def test_what_is_damaged_in_production_can_only_be_replaced_by_force(
    config: Config, store: LocalStore
):
    promote(store, config, "recommender", 1, "good")
    (Path(config.output.savedmodels) / "ranking" / "1" / "saved_model.pb").write_bytes(b"")
    [reason] = promote(store, config, "recommender", 2, "instead").gate.reasons
    assert (
        reason.startswith("it cannot be measured: ")
        and "ranking/1/saved_model.pb has changed" in reason
    )
    assert promote(store, config, "recommender", 2, "instead", force=True).to == SPOILT


def test_a_version_is_chosen_by_its_metric_or_its_run(config: Config, store: LocalStore):
    root = Path(config.output.savedmodels) / "retrieval"
    rewrite(root / "1", metrics={"val/ndcg@10": 0.3, "val/rmse": 1.0})
    rewrite(root / "2", metrics={"val/ndcg@10": 0.2, "val/rmse": 0.9}, run_id="second")
    assert choose(store, "retrieval", None, None, "val/ndcg@10") == (
        1,
        "val/ndcg@10 0.3000, the best of 3 versions",
    )
    assert choose(store, "retrieval", None, None, "val/rmse")[0] == 2  # the lower, the better
    assert choose(store, "retrieval", None, "second", None) == (2, "run second")
    rewrite(root / "1", dataset="another")  # whose metrics cannot be compared
    rewrite(root / "3", metrics={"val/ndcg@10": 0.1})
    assert choose(store, "retrieval", None, None, "val/ndcg@10")[0] == 2
    with pytest.raises(
        UserError, match="no version with the metric 'val/ndcg'; the latest has val/ndcg@10"
    ):
        choose(store, "retrieval", None, None, "val/ndcg")
    with pytest.raises(UserError, match="no version of run 'third'; it has those of .*second"):
        choose(store, "retrieval", None, "third", None)
    assert together(store, "retrieval", 2, ONE) == {"retrieval": 2, "ranking": 1}


def test_the_data_of_the_candidate_must_be_at_hand(config: Config, store: LocalStore):
    elsewhere = replace(config, dataset="elsewhere")
    bundle = Path(config.output.savedmodels) / "retrieval" / "1"
    rewrite(bundle, config=replace(read_metadata(bundle).config, dataset="gone"))
    entry = promote(store, elsewhere, "recommender", 1, "good")
    assert entry.action == "refused"
    [reason] = entry.gate.reasons
    assert (
        "data set of the candidate is neither elsewhere nor gone: name it by --set dataset=DIR"
        in reason
    )
    assert promote(store, config, "recommender", 1, "good").action == "promoted"
    # What is in production knows where its data are, wherever the command looks.
    assert (
        promote(store, elsewhere, "recommender", 2, "other")
        .gate.reasons[0]
        .startswith("its ndcg@10 on ")
    )


def test_a_card_says_what_a_version_is(trained: Trained, config: Config):
    code, answer, _ = command(trained, config, "--stage", "ranking", "--version", 1, "--card")
    card = Path(answer["card"])
    assert code == 0 and card == Path(config.output.savedmodels) / "cards" / "ranking-1" / "card.md"
    text = card.read_text()
    assert (
        text.startswith("# Ranking 1\n") and "200 users" in text and "rec.train --stage all" in text
    )
    assert "| recommender | 0." in text and " to 0." in text
    for image in ("quality.png", "retrieval.png", "ranking.png"):
        assert f"]({image})" in text and (card.parent / image).read_bytes().startswith(b"\x89PNG")
