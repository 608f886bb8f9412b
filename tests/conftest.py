"""One small trained pair for all tests that need bundles, made once per session by the real commands."""

import contextlib
import fcntl
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from rec.bundles.metadata import BundleMetadata, Stage, read_metadata, write_metadata
from rec.config import Config
from rec.errors import run_command
from rec.files import digest
from tests.wandb_server import WandbServer

ROOT = Path(__file__).parent.parent
# The longest files run first: at the end, they would keep one process busy alone.
LONGEST = (
    "test_documents.py",
    "test_notebooks.py",
    "test_small_data.py",
    "test_distributed.py",
    "test_commands.py",
    "test_writers.py",
    "test_tracking.py",
    "test_supervisor.py",
    "test_load.py",
)
CONFIG = """
dataset: {0}/dataset
retrieval: {{embedding_dim: 16, epochs: 2}}
ranking: {{candidates: 40, epochs: 1}}
index: {{k: 50}}
output: {{checkpoints: {0}/checkpoints, savedmodels: {0}/savedmodels}}
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@dataclass(frozen=True)
class Trained:
    """What `rec.data_prep.dummy` and `rec.train --stage all` wrote: 200 users, 120 items. Tests must not change it."""

    dataset: Path
    config: Path
    checkpoints: Path
    savedmodels: Path
    report: dict[str, Any]  # the JSON of the train command


def run(
    module: str, *arguments: object, cwd: Path = ROOT, changes: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`python -m module arguments` in a process of its own, with changes of the environment.

    TensorFlow's import alone takes 4 seconds: unless the process matters, use `run_here`.
    """
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(
        command,
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env=environment(**(changes or {})),
    )


def run_here(module: str, *arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """The same within this process, where TensorFlow is imported already."""
    command = [module, *map(str, arguments)]
    stdout = io.StringIO()
    stderr = io.StringIO()
    code: object = 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        patch.setattr(sys, "argv", command)
        patch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            run_command(importlib.import_module(module).main)
        except SystemExit as end:
            code = end.code or 0
    if isinstance(code, str):  # as the interpreter does with a sentence
        print(code, file=stderr)
        code = 1
    assert isinstance(code, int)
    return subprocess.CompletedProcess(command, code, stdout.getvalue(), stderr.getvalue())


def environment(**changes: str) -> dict[str, str]:
    """This process' environment with rec importable from any directory, and without API tokens."""
    kept = {name: value for name, value in os.environ.items() if not name.endswith("API_TOKENS")}
    return {**kept, "PYTHONPATH": str(ROOT), **changes}


def rewrite(bundle: Path, **changes: Any) -> None:
    """Changes what a bundle says about itself. The sums of its files are right."""
    metadata = read_metadata(bundle)
    sums = {name: digest(bundle / name) for name in metadata.files}
    write_metadata(bundle, replace(metadata, files=sums, **changes))


def bundle_metadata(stage: Stage = "retrieval", config: Config | None = None) -> BundleMetadata:
    """Metadata of a bundle whose numbers do not matter."""
    return BundleMetadata(
        stage=stage,
        version=1,
        run_id="x",
        architecture="none",
        dataset="d",
        metrics={},
        built_from={},
        vocabulary="v",
        config=config or Config(dataset="data"),
    )


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    session = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        session = session.parent  # which all workers share: the first one trains, the others wait
    root = session / "trained"
    root.mkdir(exist_ok=True)
    answer = root / "answer.json"
    with open(root / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not answer.exists():
            answer.write_text(train(root))
    report = json.loads(answer.read_text())
    return Trained(
        root / "dataset", root / "config.yaml", root / "checkpoints", root / "savedmodels", report
    )


def train(root: Path) -> str:
    """Makes the data set and trains both stages on it; returns the JSON of the train command."""
    config = root / "config.yaml"
    config.write_text(CONFIG.format(root))
    made = run(
        "rec.data_prep.dummy", "--output-dir", root / "dataset", "--users", 200, "--items", 120
    )
    assert made.returncode == 0, made.stderr
    done = run("rec.train", "--stage", "all", "--config", config)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.fixture
def server() -> Iterator[WandbServer]:
    """A W&B server on this machine, which understood all that it was asked."""
    with WandbServer() as server:
        yield server
    assert server.refused == []


@pytest.fixture
def wandb(server: WandbServer, tmp_path: Path) -> Iterator[Any]:
    """The wandb module as its client."""
    with server.client(tmp_path / "client") as client:
        yield client


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy to work in, which trains for a moment only."""
    for name in ("rec", "config", "notebooks"):
        shutil.copytree(ROOT / name, tmp_path / name)
    config = tmp_path / "config" / "dummy" / "dummy_small.yaml"
    config.write_text(config.read_text().replace("epochs: 10 ", "epochs: 2 "))
    return tmp_path
