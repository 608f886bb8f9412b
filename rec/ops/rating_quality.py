"""How well a ranker of objective `rating` predicts held-out ratings, next to rating baselines."""

import numpy as np

from rec import metrics
from rec.bundles.recommender import Recommender
from rec.errors import note
from rec.evaluation import Report, Task
from rec.features import PAD
from rec.ops.rating_baselines import rating_baselines


def rating_errors(task: Task, pair: Recommender) -> Report:
    """{"ratings": {name: {"rmse": x}}} for the ranker and each baseline; {} for a ranker of another objective."""
    if not pair.metadata.predicts_ratings:
        return {}
    corpus = task.corpus
    held = task.held
    assert held.ratings is not None
    fitted = rating_baselines(corpus.train, corpus.val, corpus.items.rows)
    predicted = {name: each.predict(held.users, held.items) for name, each in fitted.items()}
    predicted["recommender"] = predicted_ratings(task, pair)
    errors = {
        name: {"rmse": metrics.rmse(ratings, held.ratings)} for name, ratings in predicted.items()
    }
    return {"ratings": errors}


def predicted_ratings(task: Task, pair: Recommender) -> np.ndarray:
    """The ranking bundle's predictions of all held-out ratings, in the order of `task.held`."""
    ranking = pair.module.ranking
    assert ranking is not None
    parts = []
    for batch in task.requests():
        rows = task.held.last(batch.users)
        items = task.item_ids(rows)
        answer = ranking.score_at(batch.user_id, batch.history, items, batch.time)
        parts.append(answer["score"].numpy()[rows != PAD])
    return np.concatenate(parts)


def squared_errors(task: Task, pair: Recommender) -> np.ndarray:
    """One for every held-out rating, in the order of `task.held`."""
    assert task.held.ratings is not None
    return (predicted_ratings(task, pair) - task.held.ratings) ** 2


def show_ratings(report: Report) -> None:
    """Prints the errors on stderr, if the report has any."""
    for name, values in report.get("ratings", {}).items():
        note(f"{name:20}{'rmse':>12} {values['rmse']:.4f}")
