"""What the training command looks at before it trains."""

from dataclasses import replace

import pytest

from rec.config import Config, Ranking, Retrieval
from rec.errors import UserError
from rec.train import check_names

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
