"""A checkpoint directory -> the trained model, on the data set at hand.

All that is loaded comes from one run, even if a training replaces the checkpoint meanwhile (files.py, `read_whole`).

Beside the weights (fit.py) a checkpoint keeps what gives their rows a meaning: the ids in order, one a line, and the
encoding of each feature column. So a model can be exported for a data set that has come to hold more items.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rec.config import Config, Features, Ranking, Retrieval, to_dict
from rec.data_prep.dataset import Dataset
from rec.errors import UserError
from rec.features import FIRST_ITEM, FIRST_USER, Vocabulary, columns_from_json, columns_to_json
from rec.files import read_whole
from rec.fit import Fitted, read_run, restore
from rec.pipeline import Corpus, load_corpus
from rec.ranking.model import RankingModel
from rec.retrieval.model import RetrievalModel


@dataclass(frozen=True)
class TrainedRetrieval:
    model: RetrievalModel
    corpus: Corpus
    fitted: Fitted
    run: dict[str, Any]


def describe(config: Config, corpus: Corpus, stage: str, **more: Any) -> dict[str, Any]:
    """What identifies a training run: the same description, the same result. JSON-able."""
    kept = {
        key: value for key, value in to_dict(config).items() if key in ("seed", "features", stage)
    }
    return {"stage": stage, "dataset": corpus.dataset_id, **kept, **more}


def corpus_files(corpus: Corpus) -> dict[str, str]:
    """The texts that a checkpoint keeps of its corpus, by file name."""
    files = {"user_columns.json": columns_to_json(corpus.user_columns)}
    files["item_columns.json"] = columns_to_json(corpus.item_columns)
    for name, words in (("users.txt", corpus.users), ("items.txt", corpus.items)):
        files[name] = "".join(f"{word}\n" for word in words.ids[: words.trained])
    return files


def load_trained_corpus(directory: Path, dataset: Dataset) -> Corpus:
    """A data set with the rows and encodings of a checkpoint."""
    sides = []
    for side, first in (("user", FIRST_USER), ("item", FIRST_ITEM)):
        ids = (directory / f"{side}s.txt").read_text(encoding="utf-8").split("\n")[:-1]
        columns = columns_from_json(
            (directory / f"{side}_columns.json").read_text(encoding="utf-8")
        )
        sides.append((Vocabulary(np.array(ids, object), first, len(ids)), columns))
    (users, user_columns), (items, item_columns) = sides
    return load_corpus(dataset, Features(), users, items, (user_columns, item_columns))


def load_retrieval(
    directory: Path, dataset: Dataset, corpus: Corpus | None = None
) -> TrainedRetrieval:
    """The retrieval model of a finished checkpoint, for `corpus` if it is loaded already. Raises UserError if none."""
    return read_whole(directory, lambda: _load_retrieval(directory, dataset, corpus))


def _load_retrieval(directory: Path, dataset: Dataset, corpus: Corpus | None) -> TrainedRetrieval:
    run = _run(directory, "retrieval")
    corpus = corpus or load_trained_corpus(directory, dataset)
    model = RetrievalModel(Retrieval(**run["retrieval"]), corpus)
    fitted = restore(model, directory)
    model.lean(corpus.train, **{name: fitted.metrics[name] for name in model.leaning})
    return TrainedRetrieval(model, corpus, fitted, run)


def load_ranking(
    directory: Path, retrieval: TrainedRetrieval
) -> tuple[RankingModel, Fitted, dict[str, Any]]:
    """The ranking model of a finished checkpoint, its result and its run.

    Raises UserError if there is no finished ranking checkpoint, or if it was trained for another retrieval model.
    """
    return read_whole(directory, lambda: _load_ranking(directory, retrieval))


def _load_ranking(
    directory: Path, retrieval: TrainedRetrieval
) -> tuple[RankingModel, Fitted, dict[str, Any]]:
    run = _run(directory, "ranking")
    if run["retrieval_run"] != retrieval.run:
        raise UserError(f"{directory} was trained for another retrieval model: train ranking again")
    config = Ranking(**{**run["ranking"], "hidden": tuple(run["ranking"]["hidden"])})
    settings = retrieval.model.config
    model = RankingModel(config, settings.window, settings.embedding_dim, retrieval.corpus)
    return model, restore(model, directory), run


def _run(directory: Path, stage: str) -> dict[str, Any]:
    run = read_run(directory)
    if run is None or run["stage"] != stage:
        raise UserError(
            f"{directory} holds no finished {stage} checkpoint: run python -m rec.train --stage {stage} first"
        )
    return run
