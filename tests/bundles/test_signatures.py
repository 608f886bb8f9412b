"""The three bundles of a small trained model: their contract, in Python and through TensorFlow's C API."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from tensorflow_serving.apis import prediction_log_pb2

from rec.bundles.metadata import Reference, check_pair, read_metadata, verify
from rec.bundles.recommender import Recommender, load_bundle, pad_lists
from rec.data_prep.dataset import open_dataset
from rec.errors import UserError
from rec.files import digest
from tests.conftest import Trained, run_here

LOWEST = float(np.finfo(np.float32).min)


def bundle_of(trained: Trained, stage: str) -> Path:
    return trained.savedmodels / stage / "1"


@pytest.fixture(scope="module")
def interactions(trained: Trained) -> pd.DataFrame:
    dataset = open_dataset(trained.dataset)
    return pd.concat([dataset.interactions(split) for split in ("train", "val")])


@pytest.fixture(scope="module")
def bundles(trained: Trained) -> dict[str, Any]:
    return {
        stage: load_bundle(bundle_of(trained, stage))
        for stage in ("retrieval", "ranking", "recommender")
    }


def strings(values: list[Any]) -> tf.Tensor:
    return tf.constant(values, tf.string)


def call(bundle: Any, signature: str, **inputs: Any) -> dict[str, np.ndarray]:
    tensors = {
        name: value if tf.is_tensor(value) else strings(value) for name, value in inputs.items()
    }
    return {name: value.numpy() for name, value in bundle.signatures[signature](**tensors).items()}


def items_of(answer: dict[str, np.ndarray], row: int = 0) -> list[str]:
    return [item.decode() for item in answer["item_id"][row] if item]


def test_the_signatures_are_those_of_the_contract(bundles: dict[str, Any]):
    found = {
        stage: {
            name: (
                {
                    k: (v.dtype.name, v.shape.rank)
                    for k, v in f.structured_input_signature[1].items()
                },
                {k: (v.dtype.name, v.shape.rank) for k, v in f.structured_outputs.items()},
            )
            for name, f in bundle.signatures.items()
        }
        for stage, bundle in bundles.items()
    }
    ids, lists = ("string", 1), ("string", 2)
    listed = {"item_id": lists, "score": ("float32", 2)}
    answered = {**listed, "row": ("int32", 2), "cold": ("bool", 1)}
    scored = {"score": ("float32", 2)}
    assert found == {
        "retrieval": {
            "serving_default": ({"user_id": ids}, listed),
            "from_history": ({"user_id": ids, "history": lists}, listed),
            "similar_items": ({"item_id": ids}, listed),
            "answer": (
                {
                    "user_id": ids,
                    "history": lists,
                    "is_given": ("bool", 1),
                    "exclude": lists,
                    "exclude_seen": ("bool", 1),
                },
                answered,
            ),
            "answer_known": ({"user_id": ids}, answered),
            "history": ({"user_id": ids}, {"output_0": lists}),
            "disliked": ({"user_id": ids}, {"output_0": lists}),
        },
        "ranking": {
            "serving_default": ({"user_id": ids, "item_id": lists}, scored),
            "from_history": ({"user_id": ids, "history": lists, "item_id": lists}, scored),
            "answer": (
                {"user_id": ids, "history": lists, "is_given": ("bool", 1), "item_id": lists},
                scored,
            ),
        },
        "recommender": {
            "serving_default": ({"user_id": ids}, listed),
            "from_history": ({"user_id": ids, "history": lists}, listed),
        },
    }


@pytest.mark.parametrize("stage", ["retrieval", "recommender"])
def test_what_a_known_user_has_interacted_with_is_never_returned(
    stage: str, bundles: dict[str, Any], interactions: pd.DataFrame
):
    users = sorted(interactions["user_id"].unique())[:50]
    seen = interactions.groupby("user_id")["item_id"].agg(set)
    stored = call(bundles[stage], "serving_default", user_id=users)
    anew = call(bundles[stage], "from_history", user_id=users, history=[["i3", "i4"]] * len(users))
    for row, user in enumerate(users):
        assert not set(items_of(stored, row)) & seen[user]
        assert not set(items_of(anew, row)) & (seen[user] | {"i3", "i4"})


def test_the_stored_history_is_train_and_val(bundles: dict[str, Any], interactions: pd.DataFrame):
    user = interactions["user_id"].iloc[0]
    expected = interactions[interactions["user_id"] == user]["item_id"].tolist()
    stored = [
        item.decode() for item in bundles["retrieval"].history(strings([user])).numpy()[0] if item
    ]
    assert stored == expected
    given = call(bundles["retrieval"], "from_history", user_id=[user], history=[expected])
    assert items_of(given) == items_of(
        call(bundles["retrieval"], "serving_default", user_id=[user])
    )


def test_what_was_found_at_export_is_what_a_search_finds(bundles: dict[str, Any]):
    retrieval, users = bundles["retrieval"], strings(["u1", "u2", "nobody"])
    nothing = strings([[]] * 3)
    rows = retrieval.history(users).numpy()
    histories = pad_lists([[item.decode() for item in row if item] for row in rows])
    known = retrieval.answer_known(users)
    unseen = tf.constant([True] * 3)
    stored = retrieval.answer(users, nothing, tf.constant([False] * 3), nothing, unseen)
    told = retrieval.answer(users, histories, tf.constant([True] * 3), nothing, unseen)
    mixed = retrieval.answer(users, histories, tf.constant([True, False, True]), nothing, unseen)
    assert known["cold"].numpy().tolist() == [False, False, True]
    for other in (stored, told, mixed):
        assert (other["cold"].numpy() == known["cold"].numpy()).all()
        np.testing.assert_allclose(other["score"], known["score"], atol=1e-5)
        assert (
            other["item_id"].numpy() == known["item_id"].numpy()
        ).mean() > 0.98  # equal scores may change places


def test_scores_fall_and_are_finite(bundles: dict[str, Any]):
    for stage in ("retrieval", "recommender"):
        scores = call(bundles[stage], "serving_default", user_id=["u1", "u2", "nobody"])["score"]
        assert np.isfinite(scores).all()
        assert (np.diff(scores, axis=1) <= 0).all()


def test_ids_that_the_bundle_does_not_know_are_ignored(bundles: dict[str, Any], trained: Trained):
    known = (
        pd.read_parquet(bundle_of(trained, "retrieval") / "items.parquet")["item_id"]
        .head(2)
        .tolist()
    )
    for stage in ("retrieval", "recommender"):
        clean = call(bundles[stage], "from_history", user_id=[""], history=[known])
        noisy = call(
            bundles[stage],
            "from_history",
            user_id=[""],
            history=[["", known[0], "no-such", known[1], ""]],
        )
        assert items_of(noisy) == items_of(clean)


def test_nobody_gets_what_is_popular(bundles: dict[str, Any], trained: Trained):
    train = open_dataset(trained.dataset).interactions("train")["item_id"]
    counts = (
        train.value_counts()
        .reset_index()
        .sort_values(["count", "item_id"], ascending=[False, True])
    )
    for user, history in (("nobody", [""]), ("", ["no-such"])):
        answer = call(bundles["retrieval"], "from_history", user_id=[user], history=[history])
        assert items_of(answer) == counts["item_id"].head(50).tolist()
        told = {
            "user_id": [user],
            "history": [history],
            "is_given": tf.constant([True]),
            "exclude": [[""]],
            "exclude_seen": tf.constant([True]),
        }
        assert call(bundles["retrieval"], "answer", **told)["cold"].tolist() == [True]
    told |= {"history": [["i1"]]}
    assert call(bundles["retrieval"], "answer", **told)["cold"].tolist() == [False]


def test_similar_items_are_the_nearest_by_cosine(bundles: dict[str, Any], trained: Trained):
    items = (
        pd.read_parquet(bundle_of(trained, "retrieval") / "items.parquet")["item_id"]
        .head(5)
        .tolist()
    )
    answer = call(bundles["retrieval"], "similar_items", item_id=[*items, "no-such"])
    ids = pd.read_parquet(bundle_of(trained, "retrieval") / "items.parquet")["item_id"].tolist()
    vectors = np.load(bundle_of(trained, "retrieval") / "item_vectors.npy")
    for row, item in enumerate(items):
        assert item not in items_of(answer, row)
        near = [ids.index(other) for other in items_of(answer, row)]
        np.testing.assert_allclose(answer["score"][row], vectors[near] @ vectors[row], atol=1e-6)
        assert (np.abs(answer["score"][row][answer["score"][row] > LOWEST]) <= 1 + 1e-5).all()
    assert items_of(answer, 5) == []
    assert (answer["score"][5] == LOWEST).all()


def test_ranking_scores_do_not_depend_on_the_company(bundles: dict[str, Any]):
    together = call(
        bundles["ranking"],
        "serving_default",
        user_id=["u1", "u2"],
        item_id=[["i1", "i2"], ["i3", ""]],
    )
    alone = call(bundles["ranking"], "serving_default", user_id=["u2"], item_id=[["i3"]])
    assert together["score"][1, 0] == pytest.approx(alone["score"][0, 0], abs=1e-4)
    assert together["score"][1, 1] == LOWEST


def test_the_recommender_is_retrieval_reordered_by_ranking(bundles: dict[str, Any]):
    history = [["i5", "i9", "i2"]]
    retrieved = call(bundles["retrieval"], "from_history", user_id=["u4"], history=history)[
        "item_id"
    ][:, :40]
    scores = call(
        bundles["ranking"],
        "from_history",
        user_id=["u4"],
        history=history,
        item_id=tf.constant(retrieved),
    )["score"]
    order = np.argsort(-scores, axis=1, kind="stable")
    answer = call(bundles["recommender"], "from_history", user_id=["u4"], history=history)
    assert answer["item_id"].tolist() == np.take_along_axis(retrieved, order, 1).tolist()


def test_fewer_items_than_asked_for_are_filled_with_nothing(trained: Trained, tmp_path: Path):
    """A user who has seen nearly all of the catalogue gets the few that are left."""
    items = pd.read_parquet(bundle_of(trained, "retrieval") / "items.parquet")["item_id"].tolist()
    pair = Recommender.load(bundle_of(trained, "retrieval"), bundle_of(trained, "ranking"))
    for answer in (
        pair.module.from_history(strings([""]), strings([items[:-3]])),
        pair.module.retrieval.from_history(strings([""]), strings([items[:-3]])),
    ):
        found = {name: value.numpy() for name, value in answer.items()}
        assert set(items_of(found)) == set(items[-3:])
        assert (found["score"][0, 3:] == LOWEST).all() and np.isfinite(found["score"]).all()


def test_a_ranker_answers_from_the_whole_stored_history_or_from_the_callers(
    bundles: dict[str, Any],
):
    users, items = ["u4", "u4", ""], [["i1", "i2", "i3"]] * 3
    lists = [["", ""], ["i7", "i8"], ["i7", "i8"]]
    given = tf.constant([False, True, True])
    answer = call(
        bundles["ranking"], "answer", user_id=users, history=lists, is_given=given, item_id=items
    )
    stored = call(bundles["ranking"], "serving_default", user_id=["u4"], item_id=items[:1])
    told = call(
        bundles["ranking"], "from_history", user_id=["u4", ""], history=lists[1:], item_id=items[1:]
    )
    assert np.allclose(answer["score"], np.concatenate([stored["score"], told["score"]]), atol=1e-5)


# ------------------------------------------------------------------------------------------------------------
# The C API: what TF Serving calls to load and run a bundle


REQUESTS: dict[str, dict[str, dict[str, Any]]] = {
    "retrieval": {
        "serving_default": {"user_id": ["u1", "nobody", ""]},
        "from_history": {"user_id": ["", "u2"], "history": [["", "i5"], ["i7", "no-such"]]},
        "similar_items": {"item_id": ["i1", "no-such"]},
    },
    "ranking": {
        "serving_default": {"user_id": ["u1", ""], "item_id": [["i1", "i2"], ["i3", ""]]},
        "from_history": {
            "user_id": ["u1"],
            "history": [["i5"]],
            "item_id": [["i1", "i2", "no-such"]],
        },
    },
    "recommender": {
        "serving_default": {"user_id": ["u1", "nobody"]},
        "from_history": {"user_id": ["", "u2"], "history": [["i4", "i5"], ["", "i7"]]},
    },
}


@pytest.mark.parametrize("stage", REQUESTS)
def test_every_signature_answers_the_same_without_python(
    stage: str, trained: Trained, bundles: dict[str, Any]
):
    compare(bundle_of(trained, stage), bundles[stage], REQUESTS[stage])


def compare(directory: Path, bundle: Any, requests: dict[str, Any], *flags: str) -> None:
    lines = "".join(
        json.dumps({"signature": name, "inputs": inputs}) + "\n"
        for name, inputs in requests.items()
    )
    script = Path(__file__).parent.parent / "c_api.py"
    done = subprocess.run(
        [sys.executable, str(script), *flags, str(directory)],
        input=lines,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for line, (name, inputs) in zip(done.stdout.splitlines(), requests.items(), strict=True):
        outputs = json.loads(line)
        expected = call(bundle, name, **inputs)
        assert set(outputs) == set(expected)
        if "item_id" in expected:
            assert (
                outputs["item_id"]
                == np.char.decode(expected["item_id"].astype(bytes), "utf-8").tolist()
            )
        # Nearly: the two loaders fuse different operations, which rounds the last bit differently.
        assert np.array(outputs["score"], np.float32) == pytest.approx(
            expected["score"], rel=1e-6, abs=1e-6
        )


def test_warm_up_requests_are_one_a_signature_and_run(trained: Trained, bundles: dict[str, Any]):
    for stage, bundle in bundles.items():
        file = bundle_of(trained, stage) / "assets.extra" / "tf_serving_warmup_requests"
        logs = [
            prediction_log_pb2.PredictionLog.FromString(r.numpy())
            for r in tf.data.TFRecordDataset(str(file))
        ]
        requests = [log.predict_log.request for log in logs]
        assert {r.model_spec.signature_name for r in requests} == set(bundle.signatures)
        for request in requests:
            inputs = {
                name: tf.constant(tf.make_ndarray(value)) for name, value in request.inputs.items()
            }
            bundle.signatures[request.model_spec.signature_name](**inputs)


def test_metadata_says_what_a_bundle_is(trained: Trained):
    dataset = open_dataset(trained.dataset)
    retrieval, ranking, recommender = (
        read_metadata(bundle_of(trained, stage))
        for stage in ("retrieval", "ranking", "recommender")
    )
    assert (retrieval.stage, retrieval.version) == ("retrieval", 1)
    assert retrieval.architecture == "sasrec"
    assert retrieval.dataset == ranking.dataset == recommender.dataset == dataset.id
    assert retrieval.vocabulary == ranking.vocabulary
    assert retrieval.index is not None
    assert retrieval.index["kind"] == "scann"
    assert retrieval.index["recall@50"] >= 0.95  # type: ignore[operator]
    assert retrieval.metrics["val/ndcg@10"] == trained.report["retrieval"]["metrics"]["val/ndcg@10"]
    assert ranking.built_from == {"retrieval": Reference(1, retrieval.id)}
    assert set(recommender.built_from) == {"retrieval", "ranking"}
    assert recommender.config == replace(ranking.config, index=retrieval.config.index)
    for stage in ("retrieval", "ranking", "recommender"):
        directory = bundle_of(trained, stage)
        files = [
            path for path in directory.rglob("*") if path.is_file() and path.name != "metadata.json"
        ]
        expected = {str(path.relative_to(directory)): digest(path) for path in files}
        assert verify(directory).files == expected


def test_a_pair_that_does_not_match_is_refused(trained: Trained):
    retrieval, ranking = (
        read_metadata(bundle_of(trained, stage)) for stage in ("retrieval", "ranking")
    )
    with pytest.raises(
        UserError, match="trained for retrieval version 1, not for version 2: .*--allow-mismatch"
    ):
        check_pair(replace(retrieval, version=2), ranking, "ranking/1")
    with pytest.raises(UserError, match="is a ranking bundle, not a retrieval bundle"):
        Recommender.load(bundle_of(trained, "ranking"), bundle_of(trained, "ranking"))
    with pytest.raises(UserError, match="is not a bundle"):
        Recommender.load(trained.config.parent)


def test_a_bundle_that_lacks_a_function_is_refused(trained: Trained):
    with pytest.raises(UserError, match="is from an older version of rec: export the bundle again"):
        load_bundle(bundle_of(trained, "retrieval"), "rank_known")


def test_histories_are_padded_on_the_left():
    assert pad_lists([["a"], ["b", "c"]]).numpy().tolist() == [[b"", b"a"], [b"b", b"c"]]
    assert pad_lists([[], []]).shape == (2, 0)


def test_an_exact_bundle_needs_no_custom_operation_and_finds_the_same(
    trained: Trained, tmp_path: Path
):
    exact_only = ("--set", "index.kind=exact", "--set", f"output.savedmodels={tmp_path}")
    done = run_here("rec.export", "--stage", "retrieval", "--config", trained.config, *exact_only)
    assert done.returncode == 0, done.stderr
    directory = Path(json.loads(done.stdout.splitlines()[-1])["bundle"])
    assert directory == tmp_path / "retrieval" / "1"
    index = read_metadata(directory).index
    assert index is not None and index["kind"] == "exact"
    bundle = load_bundle(directory)
    compare(directory, bundle, REQUESTS["retrieval"], "--no-scann")
    users = [f"u{j}" for j in range(50)]
    exact = call(bundle, "serving_default", user_id=users)
    approximate = call(
        load_bundle(bundle_of(trained, "retrieval")), "serving_default", user_id=users
    )
    shared = [len(set(items_of(exact, r)) & set(items_of(approximate, r))) / 50 for r in range(50)]
    assert np.mean(shared) >= 0.95
