"""What the training command looks at before it trains."""

from dataclasses import replace

import pytest

from rec.config import Config, Features, Ranking, Retrieval, load_config
from rec.data_prep.dataset import open_dataset
from rec.errors import UserError
from rec.train import check_names, check_ranking
from tests.conftest import Trained

CONFIG = Config(dataset="d")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            replace(CONFIG, retrieval=Retrieval(arch="lstm")),
            "retrieval.arch: there is no 'lstm'; choose one of auto, two_tower, gru4rec, sasrec, autoencoder",
        ),
        (
            replace(CONFIG, ranking=Ranking(arch="mpl")),
            "ranking.arch: there is no 'mpl'; choose one of mlp, dlrm, dcn",
        ),
        (
            replace(CONFIG, ranking=Ranking(objective="clicks")),
            "ranking.objective: there is no 'clicks'; choose one of implicit, listwise, rating",
        ),
    ],
)
def test_an_unknown_name_is_refused_before_training_with_those_that_are_known(
    config: Config, message: str
) -> None:
    with pytest.raises(UserError) as refused:
        check_names(config)
    assert str(refused.value) == message


def test_the_defaults_are_known() -> None:
    check_names(CONFIG)


def test_ratings_that_the_data_lack_are_missed_before_retrieval_is_trained(
    trained: Trained,
) -> None:
    config = load_config(trained.config, ["ranking.objective=rating"])
    dataset = open_dataset(trained.dataset)
    check_ranking(config, dataset, None)
    with pytest.raises(UserError, match="rating needs a column of ratings, and .* has none"):
        check_ranking(config, replace(dataset, has_ratings=False), None)


def test_a_ranker_starts_only_from_a_retrieval_model_of_its_data_features_and_width(
    trained: Trained,
) -> None:
    config, dataset = load_config(trained.config), open_dataset(trained.dataset)
    checkpoint = trained.checkpoints / "retrieval"
    check_ranking(config, dataset, checkpoint)
    wider = replace(config, retrieval=replace(config.retrieval, embedding_dim=32))
    for asked, data, key in [
        (config, replace(dataset, id="other"), "dataset"),
        (replace(config, features=Features(items={})), dataset, "features"),
        (wider, dataset, "retrieval.embedding_dim"),
    ]:
        with pytest.raises(UserError, match=f"was trained with another {key} than the model"):
            check_ranking(asked, data, checkpoint)
    with pytest.raises(UserError, match="holds no finished retrieval checkpoint"):
        check_ranking(config, dataset, trained.checkpoints / "ranking")
