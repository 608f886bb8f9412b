"""An answer depends on its request alone: the same order and the same scores whoever shares its batch."""

from typing import Any

import rec  # noqa: F401  isort: skip  # before tensorflow
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rec.bundles.metadata import PairMetadata
from rec.bundles.recommender import Recommender, RecommenderModule
from rec.bundles.signatures import Lookup, RankingModule, RetrievalModule
from rec.config import Config, Index, Ranking, Retrieval, with_data_defaults
from rec.ranking.count_features import CountFeatures
from rec.ranking.model import RankingModel
from rec.retrieval.encoders import ENCODERS
from rec.retrieval.index import build_index
from rec.retrieval.model import RetrievalModel
from rec.retrieval.taste import TasteSetting
from rec.serving.answer import Catalogue, Engine
from rec.serving.schemas import RecommendRequest
from tests import small

ITEMS, USERS, K = 2000, 60, 100
GENRES = ("War", "Drama", "Comedy")


def randomize(model: tf.keras.Model, seed: int) -> None:
    """Weights as a trained model may have them: its scores differ, by little."""
    rng = np.random.default_rng(seed)
    for weight in model.trainable_variables:
        weight.assign_add(rng.normal(scale=0.3, size=weight.shape))


@pytest.fixture(scope="module", params=["scann", "exact"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """What serves a pair of bundles, with either index, of a model of 2,000 items that was never trained."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 130, size=USERS)
    corpus = small.corpus(
        [(3 + rng.permutation(ITEMS)[:length]).tolist() for length in lengths], items=ITEMS
    )
    config = with_data_defaults(Retrieval(embedding_dim=16, taste_dim=32), corpus.facts)
    model = RetrievalModel(config, corpus)
    model.taste.fit(corpus.train, TasteSetting(alpha=10.0, regularization=10.0, weight=5.0), seed=0)
    randomize(model, seed=1)
    queries = model.query_compiled(*queries_of(corpus)).numpy()
    index, report = build_index(
        model.candidates().numpy(), queries, kind=request.param, recall_target=0.9, k=K, seed=0
    )
    assert report["kind"] == request.param
    lookup = Lookup(corpus, corpus.train, 1000, tmp_path_factory.mktemp("assets"))
    ranker = RankingModel(Ranking(), config.window, config.embedding_dim, corpus)
    randomize(ranker, seed=2)
    counts = CountFeatures(corpus.train, corpus.items.rows)
    ids = [f"i{row}" for row in range(ITEMS)]
    items = pd.DataFrame({"item_id": ids, "genre": [GENRES[row % 3] for row in range(ITEMS)]})
    retrieval = RetrievalModule(model, index, lookup, K)
    module = RecommenderModule(
        retrieval, RankingModule(ranker, model, counts, lookup, K), candidates=K, items=ids
    )
    served = Config(dataset="data", index=Index(k=K))
    metadata = PairMetadata(
        small.bundle_metadata("retrieval", served), small.bundle_metadata("ranking", served)
    )
    backend = Recommender(
        module, items.set_index("item_id"), ["u0"], retrieval.item_vectors(), metadata
    )
    return Engine(backend, Catalogue(backend.items))


def queries_of(corpus: Any) -> tuple[tf.Tensor, tf.Tensor]:
    """Users and histories, as many as ScaNN is tuned with."""
    rng = np.random.default_rng(3)
    return np.zeros(400, np.int32), rng.integers(3, 3 + ITEMS, size=(400, 50)).astype(np.int32)


def some_items(most: int) -> st.SearchStrategy[list[str]]:
    """Different items of the catalogue, and one that it does not have."""
    lengths = st.one_of(st.sampled_from([0, 1, 49, 50, 51]), st.integers(0, most))
    return st.builds(
        lambda length, start, step: [
            "?",
            *(f"i{(start + j * step) % ITEMS}" for j in range(length)),
        ],
        lengths,
        st.integers(0, ITEMS - 1),
        st.sampled_from([1, 7, 333]),
    )


REQUESTS = st.builds(
    RecommendRequest,
    user_id=st.one_of(st.none(), st.just("nobody"), st.integers(0, USERS - 1).map("u{}".format)),
    history=st.one_of(st.none(), some_items(130)),
    k=st.integers(1, K),
    exclude=some_items(400),
    filter=st.sampled_from([{}, {}, {"genre": ["War"]}, {"item_id": ["i5", "i6"]}]),
    max_per=st.sampled_from([None, None, {"genre": 3}]),
    diversity=st.sampled_from([None, None, 0.3]),
    explain=st.booleans(),
)


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(requests=st.lists(REQUESTS, min_size=2, max_size=12))
def test_each_answer_equals_that_of_the_request_alone(
    engine: Engine, requests: list[RecommendRequest]
) -> None:
    for request, answer in zip(requests, engine.recommend(requests), strict=True):
        alone = engine.recommend([request])[0]
        assert ids_of(answer) == ids_of(alone)
        assert scores_of(answer) == pytest.approx(scores_of(alone), rel=0, abs=1e-6)


def ids_of(answer: dict[str, Any]) -> list[str]:
    return [item["item_id"] for item in answer["items"]]


def scores_of(answer: dict[str, Any]) -> list[float]:
    return [-1.0 if item["score"] is None else item["score"] for item in answer["items"]]


@pytest.mark.parametrize("size", [2, 3, 5, 6, 31, 64])
def test_a_batch_of_any_size_has_the_answers_of_its_requests(engine: Engine, size: int) -> None:
    """One request in nine excludes as much as is allowed."""
    rng = np.random.default_rng(size)
    exclude = [f"i{row}" for row in rng.permutation(ITEMS)[:1000]]
    requests = [
        RecommendRequest(user_id=f"u{row % USERS}", k=K, exclude=exclude if row % 9 == 1 else [])
        for row in range(size)
    ]
    together = engine.recommend(requests)
    assert [ids_of(each) for each in together] == [
        ids_of(engine.recommend([request])[0]) for request in requests
    ]


@pytest.mark.parametrize("arch", ENCODERS)
def test_a_query_is_the_same_to_the_last_bit_beside_longer_histories(arch: str) -> None:
    rng = np.random.default_rng(6)
    corpus = small.corpus([(3 + rng.permutation(300)[:20]).tolist() for _ in range(99)], items=300)
    config = with_data_defaults(Retrieval(arch=arch, embedding_dim=16, taste_dim=32), corpus.facts)
    model = RetrievalModel(config, corpus)
    model.taste.fit(corpus.train, TasteSetting(alpha=10.0, regularization=10.0, weight=5.0), seed=0)
    randomize(model, seed=4)
    rng = np.random.default_rng(5)
    history = rng.integers(3, 303, size=(33, 150)).astype(np.int32)
    history[np.arange(150) >= rng.integers(0, 151, size=33)[:, None]] = 0
    users = np.zeros(33, np.int32)
    together = model.query_compiled(users, history).numpy()
    for first in range(0, 33, 2):
        pair = history[first : first + 2]
        if len(pair) == 2:
            widest = (pair > 0).sum(1).max(initial=1)
            apart = model.query_compiled(users[:2], pair[:, :widest]).numpy()
            np.testing.assert_array_equal(apart, together[first : first + 2])
