"""One small trained pair for all tests that need bundles, made once a session by the real commands."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from rec.bundles.metadata import read_metadata, write_metadata
from rec.files import digest
from tests.wandb_server import WandbServer

ROOT = Path(__file__).parent.parent
CONFIG = """
dataset: {0}/dataset
retrieval: {{embedding_dim: 16, epochs: 2}}
ranking: {{candidates: 40, epochs: 1}}
index: {{k: 50}}
output: {{checkpoints: {0}/checkpoints, savedmodels: {0}/savedmodels}}
"""


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
    """`python -m module arguments`, with its outputs as text and changes of the environment."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(
        command,
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env=environment(**(changes or {})),
    )


def environment(**changes: str) -> dict[str, str]:
    """This process' environment with rec importable from any directory, and without API tokens."""
    kept = {name: value for name, value in os.environ.items() if not name.endswith("API_TOKENS")}
    return {**kept, "PYTHONPATH": str(ROOT), **changes}


def rewrite(bundle: Path, **changes: Any) -> None:
    """Changes what a bundle says about itself. The sums of its files are right."""
    metadata = read_metadata(bundle)
    sums = {name: digest(bundle / name) for name in metadata.files}
    write_metadata(bundle, replace(metadata, files=sums, **changes))


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp("trained")
    config = root / "config.yaml"
    config.write_text(CONFIG.format(root))
    made = run(
        "rec.data_prep.dummy", "--output-dir", root / "dataset", "--users", 200, "--items", 120
    )
    assert made.returncode == 0, made.stderr
    done = run("rec.train", "--stage", "all", "--config", config)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    return Trained(root / "dataset", config, root / "checkpoints", root / "savedmodels", report)


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
