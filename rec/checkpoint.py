"""What a checkpoint holds besides its weights (training.py): a description of its run, and what its rows mean.

Its rows mean ids, one per line in their order, and encodings of feature columns. So a model can be exported for a data
set that has more items by now.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from rec.config import STRICT, Config, Features, Ranking, ResolvedRetrieval, first_problem
from rec.corpus import Corpus, load_corpus
from rec.data_prep.dataset import Dataset
from rec.errors import UserError
from rec.features import FIRST_ITEM, FIRST_USER, Vocabulary, columns_from_json, columns_to_json
from rec.training import read_description


@dataclass(frozen=True, kw_only=True, config=STRICT)
class _Run:
    """What identifies a training run: the same description, the same result."""

    stage: str
    dataset: str  # the id of the data set
    seed: int
    features: Features
    exclude_seen: bool = True  # the rule of validation and of candidate lists


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RetrievalRun(_Run):
    """The training of a retrieval model."""

    stage: Literal["retrieval"] = "retrieval"
    retrieval: ResolvedRetrieval
    interactions: int  # the number of them that it was trained on
    stop_after: int | None = None  # the number of epochs, if it was fixed

    def config_over(self, config: Config) -> Config:
        """`config` with what the model was trained with."""
        return replace(config, seed=self.seed, features=self.features, retrieval=self.retrieval)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RankingRun(_Run):
    """The training of a ranker."""

    stage: Literal["ranking"] = "ranking"
    ranking: Ranking
    retrieval_run: RetrievalRun
    init_from: str | None  # the checkpoint that its embeddings started from, if one was named

    def config_over(self, config: Config) -> Config:
        """`config` with what the ranker and its retrieval model were trained with.

        The length of the candidate lists stays: a bundle may re-rank more or fewer than the ranker was trained on.
        """
        ranking = replace(self.ranking, candidates=config.ranking.candidates)
        return replace(self.retrieval_run.config_over(config), seed=self.seed, ranking=ranking)


Run = TypeVar("Run", RetrievalRun, RankingRun)


def write_run(run: RetrievalRun | RankingRun) -> str:
    """The run as JSON, which TrainingRun keeps in run.json."""
    return TypeAdapter(type(run)).dump_json(run, indent=1).decode()


def read_run(kind: type[Run], directory: Path) -> Run:
    """The description of the finished run in `directory`.

    Raises:
      UserError: there is no finished run of that stage, or another version of rec has trained it, unreadable here.
    """
    text = read_description(directory)
    if text is None or json.loads(text).get("stage") != kind.stage:
        raise UserError(
            f"{directory} holds no finished {kind.stage} checkpoint: "
            f"run python -m rec.train --stage {kind.stage} first"
        )
    try:
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        raise UserError(
            f"{directory}: the trained model's {first_problem(error)}. It was trained by another version of rec: "
            "train again"
        ) from None


def corpus_files(corpus: Corpus) -> dict[str, str]:
    """The texts about its corpus that a checkpoint keeps, by file name."""
    return {
        "user_columns.json": columns_to_json(corpus.user_columns),
        "item_columns.json": columns_to_json(corpus.item_columns),
        "users.txt": _lines(corpus.users),
        "items.txt": _lines(corpus.items),
    }


def _lines(vocabulary: Vocabulary) -> str:
    return "".join(f"{word}\n" for word in vocabulary.ids[: vocabulary.trained])


def load_trained_corpus(directory: Path, dataset: Dataset) -> Corpus:
    """A data set with the rows and encodings of a checkpoint."""
    columns = (
        columns_from_json(_read(directory / "user_columns.json")),
        columns_from_json(_read(directory / "item_columns.json")),
    )
    users = _vocabulary(directory / "users.txt", FIRST_USER)
    items = _vocabulary(directory / "items.txt", FIRST_ITEM)
    return load_corpus(dataset, Features(), users, items, columns)


def _vocabulary(path: Path, first: int) -> Vocabulary:
    ids = _read(path).split("\n")[:-1]
    return Vocabulary(np.array(ids, object), first, len(ids))


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")
