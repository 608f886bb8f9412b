"""What a checkpoint says about its run, and what of it counts."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from rec.checkpoint import RankingRun, RetrievalRun, read_run, write_run
from rec.config import Config, Features, Ranking, ResolvedRetrieval, Retrieval, overruled
from rec.errors import UserError

SETTINGS = ResolvedRetrieval(arch="gru4rec", epochs=3)
RETRIEVAL = RetrievalRun(
    dataset="d", seed=7, features=Features(users={}), retrieval=SETTINGS, interactions=100
)
RANKING = RankingRun(
    dataset="d",
    seed=7,
    features=Features(users={}),
    ranking=Ranking(hidden=(8, 4), candidates=100),
    retrieval_run=RETRIEVAL,
    init_from=None,
)


@pytest.mark.parametrize("run", [RETRIEVAL, RANKING])
def test_a_run_is_read_as_it_was_written(run: RetrievalRun, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(write_run(run))
    assert read_run(type(run), tmp_path) == run


def test_the_settings_of_a_run_count_and_others_are_reported() -> None:
    config = Config(dataset="d", retrieval=Retrieval(epochs=9, window=50))
    trained = RETRIEVAL.config_over(config)
    assert overruled(config, trained, ("retrieval", "features")) == [
        "retrieval.epochs: 9 has no effect: the checkpoint was trained with 3"
    ]
    assert (trained.retrieval, trained.seed, trained.features.users) == (SETTINGS, 7, {})


def test_a_bundle_may_rank_another_number_of_candidates_than_its_ranker_was_trained_on() -> None:
    config = Config(dataset="d", ranking=Ranking(candidates=30))
    trained = RANKING.config_over(config)
    assert overruled(config, trained, ("ranking",)) == []
    assert trained.ranking == replace(RANKING.ranking, candidates=30)
    assert trained.retrieval == SETTINGS


def test_settings_of_another_version_are_refused(tmp_path: Path) -> None:
    content = json.loads(write_run(RETRIEVAL))
    content["retrieval"]["hops"] = 3
    (tmp_path / "run.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"model's retrieval\.hops: .* another version .* again"):
        read_run(RetrievalRun, tmp_path)


def test_a_checkpoint_of_another_stage_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(write_run(RANKING))
    with pytest.raises(UserError, match="holds no finished retrieval checkpoint: run python -m"):
        read_run(RetrievalRun, tmp_path)
