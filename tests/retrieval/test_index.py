"""The index: exact results by hand, what ScaNN finds, what is padded, and that a saved index answers the same."""

import json
import subprocess
import sys
from pathlib import Path

import rec  # isort: skip  # before tensorflow
import numpy as np
import pytest
import tensorflow as tf

from rec import LOWEST
from rec.errors import UserError
from rec.retrieval.index import ExactIndex, ScannIndex, build_index

ROWS, DIMENSION = 5000, 17


def clustered(seed: int, rows: int, clusters: np.ndarray) -> np.ndarray:
    """Points around cluster centres; the last dimension is a bias of another scale, as an item tower may have."""
    rng = np.random.default_rng(seed)
    points = clusters[rng.integers(len(clusters), size=rows)] + 0.5 * rng.normal(
        size=(rows, clusters.shape[1])
    )
    points[:, -1] *= 3
    return points.astype(np.float32)


@pytest.fixture(scope="module")
def embeddings() -> np.ndarray:
    return clustered(1, ROWS, np.random.default_rng(0).normal(size=(60, DIMENSION)))


@pytest.fixture(scope="module")
def queries() -> np.ndarray:
    queries = clustered(2, 1000, np.random.default_rng(0).normal(size=(60, DIMENSION)))
    queries[:, -1] = 1  # what multiplies the bias
    return queries


@pytest.fixture(scope="module")
def scann(embeddings: np.ndarray, queries: np.ndarray) -> tuple[ScannIndex, dict]:
    index, metadata = build_index(
        embeddings, queries, kind="scann", recall_target=0.95, k=50, seed=3
    )
    assert isinstance(index, ScannIndex)
    return index, metadata


def recall(rows: np.ndarray, embeddings: np.ndarray, queries: np.ndarray) -> float:
    """The share of the exact best rows, by sorting all scores, that are among `rows`."""
    best = np.argsort(-queries @ embeddings.T, axis=1)[:, : rows.shape[1]]
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(rows, best, strict=True)]))


def test_exact_orders_by_inner_product_and_equal_scores_by_row() -> None:
    index = ExactIndex(np.array([[1, 0], [0, 2], [3, 3], [1, 0]], np.float32))
    scores, rows = index.search(tf.constant([[1.0, 0.0], [0.0, -1.0]]), tf.constant(3))
    np.testing.assert_array_equal(rows, [[2, 0, 3], [0, 3, 1]])
    np.testing.assert_array_equal(scores, [[3, 1, 1], [0, 0, -2]])


def test_exact_pads_with_no_row_and_the_lowest_score_where_depth_exceeds_the_catalogue() -> None:
    index = ExactIndex(np.array([[1, 0], [0, 2]], np.float32))
    scores, rows = index.search(tf.constant([[1.0, 1.0]]), tf.constant(4))
    np.testing.assert_array_equal(rows, [[1, 0, -1, -1]])
    np.testing.assert_array_equal(scores, [[2, 1, LOWEST, LOWEST]])


def test_scann_reaches_its_target_on_queries_it_was_not_tuned_on(
    scann: tuple[ScannIndex, dict], embeddings: np.ndarray
) -> None:
    index, metadata = scann
    fresh = clustered(7, 500, np.random.default_rng(0).normal(size=(60, DIMENSION)))
    _, rows = index.search(fresh, tf.constant(50))
    assert metadata["kind"] == "scann" and "fallback" not in metadata
    assert metadata["recall@50"] >= 0.95
    assert recall(rows.numpy(), embeddings, fresh) > 0.93


def test_without_scann_the_index_is_exact_and_says_so(
    embeddings: np.ndarray, queries: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "scann", None)
    index, metadata = build_index(
        embeddings, queries, kind="scann", recall_target=0.95, k=50, seed=3
    )
    assert isinstance(index, ExactIndex) and metadata["kind"] == "exact"
    assert metadata["fallback"].startswith("the package scann is not installed")


def test_scann_does_not_search_more_than_the_target_needs(scann: tuple[ScannIndex, dict]) -> None:
    _, metadata = scann
    assert metadata["leaves"] == 71  # the root of 5,000
    assert metadata["leaves_to_search"] < 36 and metadata["reorder"] <= 500


def test_scann_scores_are_the_exact_inner_products_in_descending_order(
    scann: tuple[ScannIndex, dict], embeddings: np.ndarray, queries: np.ndarray
) -> None:
    scores, rows = (tensor.numpy() for tensor in scann[0].search(queries[:20], tf.constant(50)))
    np.testing.assert_allclose(
        scores, np.einsum("bd,bkd->bk", queries[:20], embeddings[rows]), rtol=1e-4, atol=1e-5
    )
    assert (np.diff(scores) <= 0).all()


@pytest.mark.parametrize("kind", ["exact", "scann"])
def test_depth_and_batch_size_are_known_only_when_the_graph_runs(
    kind: str, scann: tuple[ScannIndex, dict], embeddings: np.ndarray, queries: np.ndarray
) -> None:
    index = ExactIndex(embeddings) if kind == "exact" else scann[0]
    signature = [tf.TensorSpec([None, DIMENSION]), tf.TensorSpec([], tf.int32)]
    search = tf.function(index.search, input_signature=signature)
    for size, depth in ((1, 1), (3, 50), (0, 5), (2, 1000), (2, ROWS + 3)):
        scores, rows = search(queries[:size], tf.constant(depth))
        assert scores.shape == rows.shape == (size, depth)
    assert sorted(rows.numpy()[1]) == [
        -1,
        -1,
        -1,
        *range(ROWS),
    ]  # deeper than the catalogue: all of it, then nothing
    np.testing.assert_array_equal(scores.numpy()[:, ROWS:], LOWEST)


def test_a_deep_scann_search_keeps_its_recall(
    scann: tuple[ScannIndex, dict], embeddings: np.ndarray, queries: np.ndarray
) -> None:
    _, rows = scann[0].search(queries[:100], tf.constant(550))
    assert (rows.numpy() >= 0).all()
    assert recall(rows.numpy(), embeddings, queries[:100]) > 0.93


@pytest.mark.parametrize("kind", ["exact", "scann"])
def test_a_query_that_is_not_finite_finds_nothing_and_spoils_no_other(
    kind: str, scann: tuple[ScannIndex, dict], embeddings: np.ndarray, queries: np.ndarray
) -> None:
    index = ExactIndex(embeddings) if kind == "exact" else scann[0]
    batch = queries[:3].copy()
    batch[0, 0], batch[1] = np.inf, np.nan
    scores, rows = index.search(batch, tf.constant(4))
    np.testing.assert_array_equal(rows[:2], -1)
    np.testing.assert_array_equal(scores[:2], LOWEST)
    np.testing.assert_array_equal(rows[2], index.search(queries[2:3], tf.constant(4))[1][0])


def test_where_scann_runs_out_of_rows_the_rest_is_padded(
    embeddings: np.ndarray, queries: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, _ = build_index(embeddings[:400], queries, kind="scann", recall_target=0.5, k=2, seed=0)
    assert isinstance(index, ScannIndex)
    index.settings.assign([1, 400])
    monkeypatch.setattr(
        "rec.retrieval.index._fewest_leaves", lambda *_: 1
    )  # one leaf of twenty: about 20 rows
    scores, rows = (tensor.numpy() for tensor in index.search(queries, tf.constant(300)))
    found = rows >= 0
    assert (
        found.any() and not found[:, -1].any() and len(set(found.sum(axis=1))) > 1
    )  # some leaf may be empty
    assert (np.diff(found.astype(int)) <= 0).all()  # what was found comes first
    assert (scores[~found] == LOWEST).all()
    expected = np.einsum("bd,bkd->bk", queries, embeddings[rows])
    np.testing.assert_allclose(scores[found], expected[found], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "count", "reason"), [(1, 9, "16 items"), (15, 9, "16 items"), (50, 1, "2 query")]
)
def test_too_little_for_scann_falls_back_to_exact_and_says_why(
    rows: int, count: int, reason: str, embeddings: np.ndarray, queries: np.ndarray
) -> None:
    index, metadata = build_index(
        embeddings[:rows], queries[:count], kind="scann", recall_target=0.9, k=10, seed=0
    )
    assert (
        isinstance(index, ExactIndex) and metadata["kind"] == "exact" and metadata["recall@10"] == 1
    )
    assert reason in metadata["fallback"]
    _, found = index.search(queries[:2], tf.constant(1))
    np.testing.assert_array_equal(found[:, 0], np.argmax(queries[:2] @ embeddings[:rows].T, axis=1))


def test_a_target_that_scann_misses_falls_back_to_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "rec.retrieval.index.REORDER_FACTORS", (1.5,)
    )  # 30 rows scored again are too few for
    noise = (
        np.random.default_rng(0).normal(size=(3000, 48)).astype(np.float32)
    )  # what has no clusters
    index, metadata = build_index(
        noise[:2000], noise[2000:], kind="scann", recall_target=1.0, k=20, seed=0
    )
    assert (
        isinstance(index, ExactIndex)
        and metadata["kind"] == "exact"
        and "recall 1.0" in metadata["fallback"]
    )


def test_a_catalogue_of_which_all_rows_would_be_scored_falls_back_to_exact(
    embeddings: np.ndarray,
) -> None:
    index, metadata = build_index(
        embeddings[:100], embeddings, kind="scann", recall_target=0.5, k=100, seed=0
    )
    assert isinstance(index, ExactIndex) and "every item" in metadata["fallback"]


def test_sixteen_equal_items_are_enough_for_scann() -> None:
    same = np.ones((16, 4), np.float32)
    index, metadata = build_index(same, same, kind="scann", recall_target=1.0, k=3, seed=0)
    assert isinstance(index, ScannIndex) and metadata["recall@3"] == 1
    scores, rows = index.search(same[:1], tf.constant(16))
    np.testing.assert_array_equal(scores, np.full((1, 16), 4.0))
    assert sorted(rows.numpy()[0]) == list(range(16))


def test_exact_is_what_was_asked_for_and_not_a_fallback(
    embeddings: np.ndarray, queries: np.ndarray
) -> None:
    index, metadata = build_index(
        embeddings, queries, kind="exact", recall_target=0.9, k=10, seed=0
    )
    assert isinstance(index, ExactIndex) and metadata == {"kind": "exact", "recall@10": 1.0}


@pytest.mark.parametrize(
    "value", [np.nan, np.inf, 1e30]
)  # the square of the last is beyond float32
@pytest.mark.parametrize("kind", ["exact", "scann"])
def test_values_that_would_end_the_process_are_refused(
    kind: str, value: float, embeddings: np.ndarray
) -> None:
    spoilt = embeddings.copy()
    spoilt[[5, 9], 3] = value
    with pytest.raises(UserError, match="2 of 5000 candidate embeddings .* row 5"):
        build_index(spoilt, embeddings, kind=kind, recall_target=0.9, k=10, seed=0)
    with pytest.raises(UserError, match="2 of 5000 query embeddings"):
        build_index(embeddings, spoilt, kind=kind, recall_target=0.9, k=10, seed=0)


def test_an_empty_catalogue_is_refused(embeddings: np.ndarray) -> None:
    with pytest.raises(UserError, match="no items"):
        build_index(embeddings[:0], embeddings, kind="exact", recall_target=0.9, k=10, seed=0)


class Bundle(tf.Module):
    """Two signatures on one index."""

    def __init__(self, index: ScannIndex) -> None:
        super().__init__()
        self.index = index

    @tf.function(input_signature=[tf.TensorSpec([None, DIMENSION], name="queries")])
    def best(self, queries: tf.Tensor) -> dict[str, tf.Tensor]:
        scores, rows = self.index.search(queries, tf.constant(10))
        return {"scores": scores, "rows": rows}

    @tf.function(input_signature=[tf.TensorSpec([None, DIMENSION], name="queries")])
    def worst(self, queries: tf.Tensor) -> dict[str, tf.Tensor]:
        scores, rows = self.index.search(-queries, tf.constant(10))
        return {"scores": scores, "rows": rows}


IN_A_FRESH_PROCESS = """
import json, sys
import rec, scann, tensorflow as tf
class Composed(tf.Module):
    def __init__(self, bundle):
        super().__init__()
        self.bundle = bundle
    @tf.function(input_signature=[tf.TensorSpec([None, 17], name="queries")])
    def best(self, queries):
        return self.bundle.signatures["best"](queries=queries)
def answer(bundle, signature):
    return {name: value.numpy().tolist() for name, value in bundle.signatures[signature](queries=queries).items()}
folder, queries = sys.argv[1], tf.constant(json.load(sys.stdin))
bundle = tf.saved_model.load(folder)
answers = [answer(bundle, "best"), answer(bundle, "worst")]
composed, options = Composed(bundle), tf.saved_model.SaveOptions(namespace_whitelist=["Scann"])
tf.saved_model.save(composed, folder + "-composed", signatures={"best": composed.best}, options=options)
answers.append(answer(tf.saved_model.load(folder + "-composed"), "best"))
bundle.index.release()
answers.append(answer(bundle, "best"))
print(json.dumps(answers))
"""


def test_a_saved_index_answers_the_same_in_a_fresh_process_composed_again_and_after_a_release(
    tmp_path: Path, scann: tuple[ScannIndex, dict], queries: np.ndarray
) -> None:
    bundle, batch = Bundle(scann[0]), queries[:4]
    signatures = {"best": bundle.best, "worst": bundle.worst}
    options = tf.saved_model.SaveOptions(namespace_whitelist=["Scann"])
    tf.saved_model.save(bundle, str(tmp_path / "bundle"), signatures=signatures, options=options)
    command = [sys.executable, "-c", IN_A_FRESH_PROCESS, str(tmp_path / "bundle")]
    path = str(Path(rec.__file__).parents[1])
    child = subprocess.run(
        command,
        input=json.dumps(batch.tolist()),
        cwd=path,
        capture_output=True,
        text=True,
        check=True,
    )
    best, worst, composed, rebuilt = json.loads(child.stdout.splitlines()[-1])
    expected = {name: value.numpy().tolist() for name, value in bundle.best(batch).items()}
    assert best == composed == rebuilt == expected
    assert worst == {name: value.numpy().tolist() for name, value in bundle.worst(batch).items()}


def test_signatures_share_one_searcher_and_other_contents_have_another(
    scann: tuple[ScannIndex, dict], embeddings: np.ndarray, queries: np.ndarray
) -> None:
    bundle = Bundle(scann[0])
    names = {
        node.attr["shared_name"].s.decode()
        for function in (bundle.best, bundle.worst)
        for node in function.get_concrete_function().graph.as_graph_def().node
        if node.op == "Scann>TensorsToScann"
    }
    assert names == {scann[0].shared_name}
    other, _ = build_index(embeddings[:500], queries, kind="scann", recall_target=0.9, k=10, seed=0)
    assert isinstance(other, ScannIndex) and other.shared_name != scann[0].shared_name
