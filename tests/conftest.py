"""What many tests share: one small data set, trained once a session by the real commands."""

import contextlib
import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True)
class Trained:
    """The dummy data set and everything that `train --stage all` makes of it."""

    root: Path
    config: Path
    dataset: Path
    savedmodels: Path
    checkpoints: Path
    answer: dict[str, Any]  # the command's JSON

    def bundle(self, stage: str, version: int = 1) -> Path:
        return self.savedmodels / stage / str(version)


def run(main: Callable[[], None], *arguments: str) -> dict[str, Any]:
    """Runs a command's main in this process; returns the JSON of its last line."""
    before, output = sys.argv, io.StringIO()
    sys.argv = ["command", *arguments]
    try:
        with contextlib.redirect_stdout(output):
            main()
    finally:
        sys.argv = before
    return json.loads(output.getvalue().splitlines()[-1])


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    from rec import train
    from rec.data_prep import dummy

    root = tmp_path_factory.mktemp("trained")
    dataset, config = root / "data", root / "small.yaml"
    run(dummy.main, "--output-dir", str(dataset), "--users", "200", "--items", "300")
    config.write_text(f"""
dataset: {dataset}
retrieval: {{epochs: 2, embedding_dim: 16}}
ranking: {{epochs: 1, candidates: 50}}
output: {{checkpoints: {root}/checkpoints, savedmodels: {root}/savedmodels}}
""")
    answer = run(train.main, "--stage", "all", "--config", str(config))
    return Trained(root, config, dataset, root / "savedmodels", root / "checkpoints", answer)
