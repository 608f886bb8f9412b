"""How good a retrieval model is on validation data: what early stopping looks at, and TFRS's own metric."""

import numpy as np
import tensorflow as tf
import tensorflow_recommenders as tfrs
from scipy.sparse import csr_matrix

from rec import metrics
from rec.corpus import Corpus
from rec.features import FIRST_ITEM, PAD
from rec.retrieval.model import RetrievalModel
from rec.retrieval.scoring import best_unseen, split_users

MAX_USERS = 10_000  # more would take longer to validate than to train
MAX_INTERACTIONS = 10_000  # for FactorizedTopK, which scores interactions one by one
FACTORIZED_KS = (10, 100)


class RetrievalValidation:
    """The validation users, their ground truth, and the metrics of a model on them."""

    def __init__(self, corpus: Corpus, seed: int) -> None:
        """`seed` draws the users if there are more than MAX_USERS."""
        self._corpus = corpus
        users = np.flatnonzero(corpus.val.lengths).astype(np.int32)
        drawn = np.random.default_rng(seed).permutation(users)[:MAX_USERS]
        self.users = np.sort(drawn)  # [U] user rows
        self.relevant = corpus.val.matrix(self.users, corpus.items.rows)  # [U, item rows]

    def measure(self, model: RetrievalModel) -> dict[str, float]:
        """The mean metrics, such as `val/ndcg@10`, of full rankings under the rule of index.exclude_seen."""
        ranked = self._rank(model, max(metrics.KS))
        return mean_metrics(ranked, self.relevant) | factorized_top_k(model, self._corpus)

    def _rank(self, model: RetrievalModel, k: int) -> np.ndarray:
        """[U, k] item rows, best first, PAD if nothing is left."""
        train = self._corpus.train
        barred = self._corpus.barred(train, "val")
        candidates = model.candidates()
        parts = []
        for users in split_users(self.users, model.n_items):
            history = train.last(users)
            time = self._corpus.val.times_at(users)
            scores = model.score_catalogue_compiled(users, history, candidates, time)
            parts.append(best_unseen(scores, barred.last(users), k)[1].numpy())
        return np.concatenate(parts)


def mean_metrics(ranked: np.ndarray, relevant: csr_matrix) -> dict[str, float]:
    """The mean metrics over users, by the name `val/METRIC`.

    Args:
      ranked: [U, K] item rows, best first, PAD if nothing is left.
      relevant: [U, item rows], not zero at what each user chose.
    """
    rows = np.where(ranked == PAD, -1, ranked)
    missing = max(metrics.KS) - rows.shape[1]
    rows = np.pad(rows, [(0, 0), (0, max(missing, 0))], constant_values=-1)
    values = metrics.per_user(rows, relevant)
    return {f"val/{name}": float(value.mean()) for name, value in values.items()}


def factorized_top_k(model: RetrievalModel, corpus: Corpus) -> dict[str, float]:
    """tfrs.metrics.FactorizedTopK: hits among all candidates, with those that the user has seen.

    It is shown beside the others and nothing is chosen by it: it scores interactions, not users.
    """
    val = corpus.val
    candidates = model.candidates()
    depths = [min(k, model.n_items) for k in FACTORIZED_KS]  # TFRS fails beyond the catalogue
    search = tfrs.layers.factorized_top_k.BruteForce(k=max(depths))
    search.index(candidates)
    metric = tfrs.metrics.FactorizedTopK(candidates=search, ks=depths)
    drawn = np.random.default_rng(0).permutation(len(val.items))[:MAX_INTERACTIONS]
    drawn = np.sort(drawn)
    owners = val.users
    for at in split_users(drawn, model.n_items):
        users = owners[at]
        queries = model.query_compiled(users, corpus.train.last(users))
        chosen = val.items[at] - FIRST_ITEM
        positive = tf.gather(candidates, chosen)
        metric.update_state(queries, positive, chosen[:, None])
    values = zip(FACTORIZED_KS, metric.metrics, strict=True)
    return {f"val/factorized_top_k@{k}": float(value.result()) for k, value in values}
