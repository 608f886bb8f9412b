"""What a checkpoint says besides its weights (training.py): which run it is, and what gives its rows a meaning.

It keeps the ids in order, one per line, and the encoding of each feature column. So a model can be exported for a data
set that has more items by now.
"""

from pathlib import Path
from typing import Any

import numpy as np

from rec.config import Config, Features, to_dict
from rec.corpus import Corpus, load_corpus
from rec.data_prep.dataset import Dataset
from rec.errors import UserError
from rec.features import FIRST_ITEM, FIRST_USER, Vocabulary, columns_from_json, columns_to_json
from rec.training import read_description


def describe(config: Config, corpus: Corpus, stage: str, **more: Any) -> dict[str, Any]:
    """What identifies a training run: the same description, the same result. Can be written as JSON."""
    keys = ("seed", "features", stage)
    settings = {key: value for key, value in to_dict(config).items() if key in keys}
    return {"stage": stage, "dataset": corpus.dataset_id, **settings, **more}


def corpus_files(corpus: Corpus) -> dict[str, str]:
    """The texts that a checkpoint keeps of its corpus, by file name."""
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


def read_run(directory: Path, stage: str) -> dict[str, Any]:
    """The description of the finished run in `directory`. Raises UserError if it holds none of that stage."""
    description = read_description(directory)
    if description is None or description["stage"] != stage:
        raise UserError(
            f"{directory} holds no finished {stage} checkpoint: "
            f"run python -m rec.train --stage {stage} first"
        )
    return description
