"""A pair of bundles beside the one in production, on the test data that belong to the candidate."""

from pathlib import Path

import numpy as np

from rec import metrics
from rec.bundles import files
from rec.bundles.recommender import Recommender
from rec.config import Config
from rec.data_prep.dataset import Dataset, open_dataset
from rec.errors import UserError
from rec.evaluation import Report, Task, task_of
from rec.ops.rating_quality import squared_errors


def compare(config: Config, candidate: files.Pair, current: files.Pair | None = None) -> Report:
    """What the gate before production judges by.

    Returns:
      data: where they are; users; index_recall, index_recall_ci: how much of the k best by exact search the
      candidate's index finds for them; index_recall_target; metric: "ndcg@10", or "squared error" where both predict
      ratings; candidate: its value; where something is in production: production, difference, ci (paired), worse.

    Raises:
      UserError: the data set that the candidate was trained on is not at hand, or a bundle is damaged.
    """
    pairs = {"candidate": Recommender.load(*candidate)}
    if current is not None:
        pairs["production"] = Recommender.load(*current)
    pair = pairs["candidate"]
    dataset = data_of(pair, config)
    task = task_of(dataset, "test", pair)
    report: Report = {"data": str(dataset.path), "users": len(task.users)}
    report |= metrics.summarise({"index_recall": index_recall(task, pair)}, config.seed)
    report["index_recall_target"] = pair.metadata.retrieval.config.index.recall_target
    return report | _quality(task, pairs, config.seed)


def _quality(task: Task, pairs: dict[str, Recommender], seed: int) -> Report:
    by_ratings = all(pair.metadata.predicts_ratings for pair in pairs.values())
    measure = squared_errors if by_ratings else ndcg
    values = {name: measure(task, pair) for name, pair in pairs.items()}
    report: Report = {"metric": "squared error" if by_ratings else "ndcg@10"}
    report |= {name: float(each.mean()) for name, each in values.items()}
    if "production" in values:
        report |= metrics.paired_bootstrap(values["candidate"], values["production"], seed)
        low, high = report["ci"]
        report["worse"] = low > 0 if by_ratings else high < 0
    return report


def data_of(pair: Recommender, config: Config) -> Dataset:
    """The data set that a pair was trained on: the config's, or where the pair says that it was.

    Raises:
      UserError: it is at neither place.
    """
    trained_on = pair.metadata.retrieval.dataset
    places = (config.dataset, pair.metadata.retrieval.config.dataset)
    for place in places:
        if (Path(place) / "dataset.json").exists():
            dataset = open_dataset(place)
            if dataset.id == trained_on:
                return dataset
    raise UserError(
        f"the data set of the candidate is neither {' nor '.join(places)}: name it by --set dataset=DIR"
    )


def index_recall(task: Task, pair: Recommender) -> np.ndarray:
    """The share of each user's best items by exact search that the index finds, for users who have any."""
    retrieval = pair.module.retrieval
    found = task.ranked(retrieval.retrieve)
    exact = task.ranked(retrieval.retrieve_exactly)
    shares = []
    for row, best in zip(found, exact, strict=True):
        best = best[best >= 0]
        if len(best):
            shares.append(np.isin(best, row).mean())
    return np.array(shares)


def ndcg(task: Task, pair: Recommender) -> np.ndarray:
    """NDCG@10 of every user's answer."""
    ranked = task.ranked(pair.module.recommend_from)
    return metrics.per_user(ranked, task.relevant)["ndcg@10"]
