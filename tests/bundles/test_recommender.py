"""What may be recommended to whom: a bundle of a small model without training, under either rule."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import tensorflow as tf

from rec.bundles.metadata import PairMetadata
from rec.bundles.recommender import Recommender, RecommenderModule
from rec.bundles.signatures import Lookup, RetrievalModule
from rec.config import Config, Index, Retrieval, with_data_defaults
from rec.corpus import Corpus
from rec.retrieval.index import ExactIndex
from rec.retrieval.model import RetrievalModel
from rec.serving.answer import Catalogue, Engine
from rec.serving.schemas import RecommendRequest
from tests import small

ITEMS = 8
K = 6


def recommender_of(corpus: Corpus, assets: Path) -> Recommender:
    model = RetrievalModel(with_data_defaults(Retrieval(embedding_dim=8), corpus.facts), corpus)
    index = ExactIndex(model.candidates().numpy())
    lookup = Lookup(corpus, corpus.train, 100, assets)
    ids = corpus.items.ids.tolist()
    retrieval = RetrievalModule(model, index, lookup, K, exclude_seen=corpus.exclude_seen)
    config = Config(dataset="data", index=Index(k=K, exclude_seen=corpus.exclude_seen))
    return Recommender(
        RecommenderModule(retrieval, None, None, ids),
        pd.DataFrame({"item_id": ids}).set_index("item_id"),
        corpus.users.ids.tolist(),
        model.candidates().numpy(),
        PairMetadata(small.bundle_metadata(config=config)),
    )


@pytest.fixture(params=[True, False], ids=["exclude_seen", "with_seen"])
def recommender(request: pytest.FixtureRequest, tmp_path: Path) -> Recommender:
    train = [[3, 4, 5, 6, 7], [8, 9]]
    return recommender_of(small.corpus(train, items=ITEMS).under(request.param), tmp_path)


def test_the_rule_of_the_bundle_decides_unless_a_request_says_otherwise(
    recommender: Recommender,
) -> None:
    usual = recommender.metadata.retrieval.excludes_seen
    ids = recommender.items.index
    for rule in (None, True, False):
        rules = None if rule is None else [rule] * 3
        given = [None, ["i0"], ["i7"]]
        found = recommender.answer(["u0", "u1", ""], given, [[], ["i3"], []], rules)
        answers = [set(ids[rows[rows >= 0]]) for rows in found.rows]
        if usual if rule is None else rule:
            assert answers[0] == {"i5", "i6", "i7"}
            assert answers[1] == {"i1", "i2", "i4", "i7"}  # i5 and i6 are stored
            assert "i7" not in answers[2] and len(answers[2]) == K
        else:
            assert [len(answer) for answer in answers] == [K, K, K]
            assert answers[0] & {"i0", "i1", "i2", "i3", "i4"}
            assert "i3" not in answers[1]


def test_the_signatures_follow_the_rule_of_the_bundle(recommender: Recommender) -> None:
    module = recommender.module
    known = module.serving_default(tf.constant(["u0"]))["item_id"].numpy()[0]
    given = module.from_history(tf.constant([""]), tf.constant([["i0", "i7"]]))["item_id"].numpy()
    if recommender.metadata.retrieval.excludes_seen:
        assert sorted(known) == [b"", b"", b"", b"i5", b"i6", b"i7"]
        assert not {b"i0", b"i7"} & set(given[0])
    else:
        scores = module.retrieval.model.get.score_catalogue(
            tf.constant([1]),
            tf.constant([[3, 4, 5, 6, 7]]),
            module.retrieval.model.get.candidates(),
        )
        best = tf.math.top_k(scores[0], K)[1].numpy()
        assert known.tolist() == [f"i{place}".encode() for place in best]


@pytest.mark.parametrize("rule", [True, False])
def test_what_a_user_dislikes_is_never_recommended(rule: bool, tmp_path: Path) -> None:
    disliked = small.sequences([3, 9], [10])
    corpus = replace(small.corpus([[4, 5], [3]], items=ITEMS), dislikes={"test": disliked})
    recommender = recommender_of(corpus.under(rule), tmp_path)
    ids = recommender.items.index
    users = ["u0", "u0", "u0", "u1", ""]
    histories = [None, None, ["i4"], None, ["i4"]]
    for rules in (None, [False] * 5):
        found = recommender.answer(users, histories, [[]] * 5, rules)
        answers = [set(ids[rows[rows >= 0]]) for rows in found.rows]
        assert all(not {"i0", "i6"} & answer for answer in answers[:3])
        assert "i7" not in answers[3] and len(answers[3]) == K
        assert len(answers[4]) == K
    known = recommender.module.serving_default(tf.constant(["u0"]))["item_id"].numpy()[0]
    assert not {b"i0", b"i6"} & set(known)
    assert recommender.disliked(["u0", "nobody"]) == [["i0", "i6"], []]
    engine = Engine(recommender, Catalogue(recommender.items))
    request = RecommendRequest(user_id="u0", k=K, exclude=["i1", "i2"], exclude_seen=False)
    (answer,) = engine.recommend([request])
    assert {item["item_id"] for item in answer["items"]} == {"i3", "i4", "i5", "i7"}
