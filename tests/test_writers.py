"""Two commands that write the same directory at once, and a disk that is full, in real processes."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rec.bundles.files import versions
from rec.bundles.metadata import read_metadata
from rec.data_prep.dataset import open_dataset
from tests.conftest import ROOT, environment, run


def train(root: Path, *arguments: str) -> subprocess.Popen[str]:
    """A retrieval training below `root`, on data that are prepared there."""
    settings = [
        f"dataset={root / 'data'}",
        f"output.checkpoints={root / 'checkpoints'}",
        f"output.savedmodels={root / 'savedmodels'}",
        "index.kind=exact",
        "retrieval.patience=1000",
    ]
    command = [sys.executable, "-m", "rec.train", "--stage", "retrieval"]
    for setting in settings:
        command += ["--set", setting]
    return subprocess.Popen(
        [*command, *arguments],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def read_json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_two_trainings_do_not_mix_in_one_directory(tmp_path: Path) -> None:
    data = ["--output-dir", tmp_path / "data", "--users", 60, "--items", 120]
    assert run("rec.data_prep.dummy", *data).returncode == 0
    first = train(tmp_path, "--set", "retrieval.epochs=1000")
    partial = tmp_path / "checkpoints" / "retrieval.partial"
    while not (partial / "state.json").exists():
        assert first.poll() is None, first.communicate()[1]
        time.sleep(0.1)
    first.send_signal(signal.SIGSTOP)  # it keeps its locks, and leaves the processor to the others

    others = ("--set", "retrieval.epochs=2", "--set", "retrieval.embedding_dim=8")
    stdout, stderr = train(tmp_path, *others).communicate()
    assert stdout == "" and "Traceback" not in stderr
    last = stderr.splitlines()[-1]
    retrieval = tmp_path / "checkpoints" / "retrieval"
    assert last.startswith(f"error: {retrieval} is being written by process {first.pid} on ")
    assert "(python -m rec.train --stage retrieval " in last
    assert read_json(partial / "run.json")["retrieval"]["epochs"] == 1000
    assert first.poll() is None

    waiting = train(tmp_path, *others, "--wait")
    assert waiting.stderr is not None
    while not (line := waiting.stderr.readline()).startswith("waiting: "):
        assert line, "it has ended without waiting"
    first.kill()
    first.communicate()
    stdout, stderr = waiting.communicate()
    assert waiting.returncode == 0, stderr
    assert versions(tmp_path / "savedmodels" / "retrieval") == [1]
    bundle = read_metadata(tmp_path / "savedmodels" / "retrieval" / "1")
    checkpoint = read_json(tmp_path / "checkpoints" / "retrieval" / "run.json")
    assert bundle.run == checkpoint and checkpoint["retrieval"]["embedding_dim"] == 8
    assert bundle.config.retrieval.embedding_dim == 8
    assert bundle.dataset == open_dataset(tmp_path / "data").id
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["retrieval"]


EXPORT = """
import resource, sys
from pathlib import Path
import tensorflow as tf
from rec.errors import run_command
from rec.bundles.files import draft, publish
from tests.small import bundle_metadata


def export():
    module = tf.Module()
    module.table = tf.Variable(tf.zeros([100_000]))
    stage_dir = Path(sys.argv[1])
    with draft(stage_dir) as directory:
        tf.saved_model.save(module, str(directory))
        print(publish(directory, stage_dir, bundle_metadata("ranking")))


limit = int(sys.argv[2])  # to the bytes of a file, which TensorFlow meets as it meets a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
run_command(export)
"""


def test_an_export_onto_a_full_disk_is_one_sentence_and_leaves_what_was_there(
    tmp_path: Path,
) -> None:
    def export(limit: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", EXPORT, str(tmp_path / "ranking"), str(limit)],
            capture_output=True,
            text=True,
            check=False,
            env=environment(),
        )

    assert export(10**7).stdout == "1\n"
    for limit in (0, 1000, 100_000):
        done = export(limit)
        assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr
        last = done.stderr.splitlines()[-1]
        assert last == f"error: {tmp_path / 'ranking'} cannot be written: File too large"
    names = sorted(path.name for path in (tmp_path / "ranking").iterdir())
    assert names == [".last_version", "1"]
    assert export(10**7).stdout == "2\n"
