"""The C API's loader against Python on small bundles: strings and numbers in and out, exact and ScaNN index."""

import json
import subprocess
import sys
from pathlib import Path

import rec  # noqa: F401  isort: skip  # before tensorflow
import numpy as np
import pytest
import tensorflow as tf

from rec.retrieval.index import ExactIndex, ScannIndex, build_index
from tests.c_api import SavedModelSession, read_signatures

DIMENSION, ITEMS = 4, 300
LONG = "ein-langer-Name-über-22-Bytes"  # longer strings are stored elsewhere than short ones


class Toy(tf.Module):
    """A bundle in small: user id -> lookup table -> embedding -> index -> item ids and scores."""

    def __init__(self, index: ExactIndex | ScannIndex, users: np.ndarray, user_file: Path) -> None:
        super().__init__()
        self.index, self.users = index, tf.Variable(users)
        keys = tf.lookup.TextFileInitializer(
            str(user_file),
            tf.string,
            tf.lookup.TextFileIndex.WHOLE_LINE,
            tf.int64,
            tf.lookup.TextFileIndex.LINE_NUMBER,
        )
        self.table = tf.lookup.StaticHashTable(keys, default_value=0)
        self.items = tf.constant(
            [f"item-{row}-{LONG}" if row % 2 else f"é{row}" for row in range(ITEMS)]
        )

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="user_id")])
    def recommend(self, user_id: tf.Tensor) -> dict[str, tf.Tensor]:
        queries = tf.gather(self.users, self.table.lookup(user_id))
        scores, rows = self.index.search(queries, tf.constant(5))
        return {"item_id": tf.gather(self.items, rows), "score": scores}

    @tf.function(
        input_signature=[
            tf.TensorSpec([None], tf.string, name="user_id"),
            tf.TensorSpec([None, None], tf.string, name="history"),
        ]
    )
    def echo(self, user_id: tf.Tensor, history: tf.Tensor) -> dict[str, tf.Tensor]:
        return {
            "joined": tf.strings.reduce_join(history, axis=1, separator="|"),
            "user": tf.identity(user_id),
            "all": history,
            "length": tf.strings.length(user_id),
            "known": self.table.lookup(user_id) > 0,
            "row": self.table.lookup(user_id),
        }

    @tf.function(input_signature=[tf.TensorSpec([None, 2], tf.float32, name="x")])
    def third(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"y": x / 3}


def signatures(toy: Toy) -> dict[str, tf.types.experimental.PolymorphicFunction]:
    return {"serving_default": toy.recommend, "echo": toy.echo, "third": toy.third}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Toy]]:
    """The same model with either index, saved; custom ops are refused where the index is exact."""
    folder = tmp_path_factory.mktemp("bundles")
    user_file = folder / "users.txt"
    user_file.write_text(f"[UNK]\nu1\nu2\n{LONG}\n", encoding="utf-8")  # row 0 is anyone else
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(ITEMS, DIMENSION)).astype(np.float32)
    users = rng.normal(size=(4, DIMENSION)).astype(np.float32)
    found = {}
    for kind, allowed in (("exact", []), ("scann", ["Scann"])):
        index, metadata = build_index(
            embeddings, embeddings, kind=kind, recall_target=0.9, k=5, seed=0
        )
        assert metadata["kind"] == kind
        toy = Toy(index, users, user_file)
        options = tf.saved_model.SaveOptions(namespace_whitelist=allowed)
        tf.saved_model.save(toy, str(folder / kind), signatures=signatures(toy), options=options)
        found[kind] = (folder / kind, toy)
    return found


def run(arguments: list[str], lines: list[dict]) -> subprocess.CompletedProcess[str]:
    script = str(Path(__file__).with_name("c_api.py"))
    requests = "".join(json.dumps(line) + "\n" for line in lines)
    return subprocess.run(
        [sys.executable, script, *arguments], input=requests, capture_output=True, text=True
    )


def in_python(outputs: dict[str, tf.Tensor]) -> dict[str, list]:
    """Tensors as JSON would hold them."""
    return {
        key: np.char.decode(value.numpy().astype(bytes), "utf-8").tolist()
        if value.dtype == tf.string
        else value.numpy().tolist()
        for key, value in outputs.items()
    }


@pytest.mark.parametrize("kind", ["exact", "scann"])
def test_a_process_without_tensorflow_answers_bit_for_bit_as_python(
    kind: str, bundles: dict[str, tuple[Path, Toy]]
) -> None:
    bundle, toy = bundles[kind]
    users, history = ["u2", "nobody", LONG], [["", "a"], ["ü", LONG], ["c", ""]]
    x = [[1.0, 0.1], [2.0, -1e-30]]
    requests = [
        {"signature": "serving_default", "inputs": {"user_id": users}},
        {"signature": "echo", "inputs": {"user_id": users, "history": history}},
        {"signature": "echo", "inputs": {"user_id": ["u1"], "history": [[]]}},
        {"signature": "serving_default", "inputs": {"user_id": []}},
        {"signature": "third", "inputs": {"x": x}},
        {"signature": "third", "inputs": {"x": []}},
    ]
    child = run([str(bundle)] + ["--no-scann"] * (kind == "exact"), requests)
    assert child.returncode == 0, child.stderr
    best, echo, no_history, no_user, third, no_x = map(json.loads, child.stdout.splitlines())
    assert best == in_python(toy.recommend(tf.constant(users)))
    assert echo == in_python(toy.echo(tf.constant(users), tf.constant(history)))
    assert echo["joined"] == ["|a", f"ü|{LONG}", "c|"] and echo["row"] == [2, 0, 3]
    assert (
        no_history["joined"] == [""] and no_history["all"] == [[]] and no_history["known"] == [True]
    )
    assert no_user == {"item_id": [], "score": []}
    assert third == in_python(toy.third(tf.constant(x)))
    assert no_x == {"y": []}


def test_a_scann_bundle_without_scanns_library_fails_with_the_ops_name(
    bundles: dict[str, tuple[Path, Toy]],
) -> None:
    child = run(
        [str(bundles["scann"][0]), "--no-scann"],
        [{"signature": "serving_default", "inputs": {"user_id": ["u1"]}}],
    )
    assert child.returncode == 1
    assert "Scann>" in child.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def session(bundles: dict[str, tuple[Path, Toy]]) -> SavedModelSession:
    return SavedModelSession(bundles["exact"][0], scann=False)


def test_signatures_name_their_inputs_and_outputs_with_type_and_shape(
    session: SavedModelSession,
) -> None:
    found = session.signatures()
    assert sorted(found) == ["echo", "serving_default", "third"]
    inputs, outputs = found["serving_default"]["inputs"], found["serving_default"]["outputs"]
    assert inputs == {
        "user_id": {"name": "serving_default_user_id:0", "dtype": "string", "shape": [-1]}
    }
    assert {key: (info["dtype"], info["shape"]) for key, info in outputs.items()} == {
        "item_id": ("string", [-1, 5]),
        "score": ("float32", [-1, 5]),
    }


def test_a_signature_of_unknown_rank_has_no_shape() -> None:
    # MetaGraphDef.signature_def["s"].inputs["x"] = TensorInfo(name "n:0", DT_FLOAT, shape of unknown rank)
    info = b"\x0a\x03n:0" + b"\x10\x01" + b"\x1a\x02\x18\x01"
    entry = b"\x0a\x01x" + b"\x12" + bytes([len(info)]) + info
    signature = b"\x0a" + bytes([len(entry)]) + entry
    named = b"\x0a\x01s" + b"\x12" + bytes([len(signature)]) + signature
    found = read_signatures(b"\x2a" + bytes([len(named)]) + named)
    assert found == {
        "s": {"inputs": {"x": {"name": "n:0", "dtype": "float32", "shape": None}}, "outputs": {}}
    }


@pytest.mark.parametrize(
    ("signature", "inputs", "message"),
    [
        ("predict", {}, "no signature 'predict'.*serving_default"),
        ("echo", {"user_id": ["u1"]}, r"inputs missing: \['history'\]"),
        ("third", {"x": [[1, 2]], "z": [1]}, r"not in the signature: \['z'\]"),
        (
            "echo",
            {"user_id": ["u1"], "history": [["a"], ["b", "c"]]},
            "'history': the lists differ in length",
        ),
        (
            "third",
            {"x": [[1.0, 2.0, 3.0]]},
            r"'x': the shape is \[1, 3\], the signature wants \[-1, 2\]",
        ),
        ("serving_default", {"user_id": [7]}, "'user_id': 7 is not of type string"),
    ],
)
def test_a_request_that_does_not_fit_is_a_clear_error(
    session: SavedModelSession, signature: str, inputs: dict[str, list], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        session.run(signature, inputs)


def test_a_folder_without_a_bundle_is_one_line_on_stderr(tmp_path: Path) -> None:
    child = run([str(tmp_path)], [])
    assert child.returncode == 1
    assert child.stderr.splitlines()[-1].startswith(f"error: cannot load {tmp_path}")
    assert "Traceback" not in child.stderr
