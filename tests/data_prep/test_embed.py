"""Texts become vectors: alike texts alike vectors, also for items that came later; and what is refused."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse

from rec.data_prep import embed, tabular
from rec.data_prep.dataset import open_dataset
from rec.errors import UserError

Run = Callable[..., dict[str, Any]]
WINES = [("w1", "Dry red wine"), ("w2", "Sweet red wine"), ("w3", "Sweet white wine, cheap")]
PETS = [("p1", "Food for dogs"), ("p2", "Food for cats"), ("p3", "Toys for dogs and cats")]
ITEMS = "sku,title,price,tags\n" + "".join(
    f'{sku},"{title}",{at + 1},x\n' for at, (sku, title) in enumerate(WINES + PETS)
)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command on items.csv in a folder of its own; returns the vector of each item."""

    def run(*args: str, items: str = ITEMS, columns: str = "title") -> dict[str, Any]:
        monkeypatch.chdir(tmp_path)
        Path("items.csv").write_text(items)
        command = ["embed", "--items", "items.csv", "--item-col", "sku", "--columns", columns]
        monkeypatch.setattr("sys.argv", [*command, "--output", "items.parquet", *args])
        embed.main()
        table = pq.read_table("items.parquet")
        assert table.column_names == ["sku", "title", "price", "tags", "text_vector"]
        return dict(zip(table["sku"].to_pylist(), table["text_vector"].to_pylist(), strict=True))

    return run


def test_texts_with_common_words_are_near_and_an_item_without_a_text_has_no_vector(
    run: Run,
) -> None:
    vectors = run("--dim", "4", items=f"{ITEMS}none,,9,\n")
    assert vectors.pop("none") is None
    near = np.array([vectors["w1"], vectors["w2"], vectors["w3"]])
    far = np.array([vectors["p1"], vectors["p2"], vectors["p3"]])
    assert near.shape == (3, 4)
    assert (near @ near.T).min() > 0.01 > 1e-5 > np.abs(near @ far.T).max()
    assert run("--dim", "4") == vectors


def test_later_items_have_vectors_of_the_same_kind(run: Run, tmp_path: Path) -> None:
    first = run("--dim", "4")
    Path("first.csv").write_text(ITEMS)
    later = f"{ITEMS}w4,Cheap red wine,7,x\np4,Toys for dogs,8,x\n"
    then = run("--dim", "4", "--learn-from", "first.csv", items=later)
    assert {sku: then[sku] for sku in first} == first
    assert np.dot(then["w4"], first["w1"]) > 0.1
    assert np.dot(then["p4"], first["p3"]) > 0.1
    assert then["p4"] != run("--dim", "4", items=later)["p4"]


def test_the_axes_are_those_of_an_exact_decomposition() -> None:
    rng = np.random.default_rng(0)
    rows = rng.random((200, 50)) * (rng.random((200, 50)) < 0.2) / np.arange(1, 51)
    axes = embed._main_axes(scipy.sparse.csr_array(rows), 5)
    exact = np.linalg.svd(rows)[2][:5]
    assert np.abs((axes * exact).sum(axis=1)) == pytest.approx(np.ones(5))  # but for their signs


def test_several_columns_and_lists_are_one_text(run: Run) -> None:
    vectors = run(columns="title, tags")
    assert len(vectors["w1"]) == 6  # six texts have at most six directions
    assert np.dot(vectors["w1"], vectors["p1"]) > 1e-3  # x is in all of them


def test_the_vectors_are_a_column_of_the_dataset(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("--dim", "4")
    rows = "".join(
        f"{user},{sku},{at}\n"
        for user, items in (("u", WINES), ("v", WINES[::-1]))
        for at, (sku, _) in enumerate(items)
    )
    Path("c.csv").write_text("user_id,sku,time\n" + rows)
    command = ["tabular", "--interactions", "c.csv", "--item-col", "sku", "--timestamp-col", "time"]
    command += ["--allow-any-time", "--split", "leave_one_out", "--items", "items.parquet"]
    monkeypatch.setattr("sys.argv", [*command, "--output-dir", "out"])
    tabular.main()
    assert open_dataset("out").manifest["columns"]["items"] == {
        "item_id": "string",
        "title": "string",
        "price": "int64",
        "tags": "string",
        "text_vector": "list<float>",
    }
    assert "Parquet holds FLOAT[]: vectors of 4 numbers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        (["--columns", "titel"], "items.csv has no column titel: it has title, price, tags"),
        (["--output", "items.csv"], "--output items.csv must end in .parquet"),
        (["--dim", "0"], "--dim must be at least 1, not 0"),
        (["--encoder", "bert"], "--encoder bert: there is none; choose one of hashing, sent"),
        (["--encoder", "hashing:small"], "hashing has no models: leave out :small"),
        (["--encoder", "sentence-transformers"], "write --encoder sentence-transformers:MODEL"),
        (["--encoder", "sentence-transformers:m", "--dim", "8"], "MODEL, without --dim and"),
        (["--encoder", "sentence-transformers:m"], "cannot be imported .*: pip install sentence-"),
    ],
)
def test_what_cannot_be_embedded_is_one_sentence(
    run: Run, monkeypatch: pytest.MonkeyPatch, args: list[str], problem: str
) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)  # as if it were not installed
    with pytest.raises(UserError, match=problem):
        run(*args)


@pytest.mark.parametrize(
    ("texts", "problem"),
    [
        ([None, ""], "none of 2 rows has a text"),
        (["word"], "no two texts share a word"),
        (["!", "?"], "no two texts share a word"),
    ],
)
def test_too_few_texts_are_one_sentence(texts: list[str | None], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        embed.embed(texts, "hashing", embed.Encoding())


def test_a_model_of_sentence_transformers_is_called_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The package is not among the requirements: this module has what is used of its interface.
    (tmp_path / "sentence_transformers.py").write_text(
        "class SentenceTransformer:\n"
        "    def __init__(self, name):\n        self.size = len(name)\n"
        "    def encode(self, texts):\n        return [[len(text), self.size] for text in texts]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "sentence_transformers", raising=False)
    vectors = embed.embed(["ab", None, "c"], "sentence-transformers", embed.Encoding("mini"))
    assert vectors.type == pa.list_(pa.float32())
    assert vectors.to_pylist() == [[2, 4], None, [1, 4]]
    del sys.modules["sentence_transformers"]
