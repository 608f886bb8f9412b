"""One small trained pair for all tests that need bundles, made once a session by the real commands."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

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


def run(module: str, *arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """`python -m module arguments`, with its outputs as text."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, env=environment())


def environment(**changes: str) -> dict[str, str]:
    """This process' environment with rec importable from any directory, and without API tokens."""
    kept = {name: value for name, value in os.environ.items() if not name.endswith("API_TOKENS")}
    return {**kept, "PYTHONPATH": str(ROOT), **changes}


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp("trained")
    config = root / "config.yaml"
    config.write_text(CONFIG.format(root))
    made = run("rec.data_prep.dummy", "--output-dir", root / "dataset", "--users", 200, "--items", 120)
    assert made.returncode == 0, made.stderr
    done = run("rec.train", "--stage", "all", "--config", config)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    return Trained(root / "dataset", config, root / "checkpoints", root / "savedmodels", report)
