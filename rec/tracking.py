"""Weights & Biases, where a team has it: metrics of every epoch, and each bundle as an artifact.

With `use_wandb: true` and WANDB_API_KEY (or WANDB_MODE=offline) set, a stage is a run, and its bundle the artifact
`retrieval_bundle` or `ranking_bundle`. Otherwise nothing is asked and nothing imported. W&B's failures never stop
training: they are warned of once, and tracking ends.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rec.config import Config, to_dict
from rec.registry import read_metadata

PROJECT = "rec"


class Tracker:
    """Logs to a W&B run, or to nothing."""

    _run: Any = None

    def start(self, config: Config, stage: str) -> None:
        if not os.environ.get("WANDB_API_KEY") and os.environ.get("WANDB_MODE") != "offline":
            message = "use_wandb is set, but neither WANDB_API_KEY nor WANDB_MODE=offline: not tracking"
            print(f"warning: {message}", file=sys.stderr)
            return
        with self._forgiving():
            import wandb

            project = os.environ.get("WANDB_PROJECT", PROJECT)
            self._run = wandb.init(project=project, job_type=stage, config=to_dict(config))

    def log(self, epoch: int, metrics: dict[str, float]) -> None:
        """Logs an epoch's metrics under their names."""
        with self._forgiving():
            if self._run:
                self._run.log({"epoch": epoch, **metrics})

    def log_bundle(self, bundle: Path) -> None:
        """Logs a published bundle as the artifact STAGE_bundle, with its metrics, data set and versions."""
        with self._forgiving():
            if self._run:
                import wandb

                metadata = read_metadata(bundle)
                kept = {key: metadata[key] for key in ("metrics", "dataset", "version", "built_from", "id")}
                artifact = wandb.Artifact(f"{metadata['stage']}_bundle", type="model", metadata=kept)
                artifact.add_dir(str(bundle))
                self._run.log_artifact(artifact)

    @contextmanager
    def _forgiving(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever W&B raises, training is worth more
            print(f"warning: W&B failed, tracking ends: {error}", file=sys.stderr)
            self._run = None


@contextmanager
def track(config: Config, stage: str) -> Iterator[Tracker]:
    """A tracker for one stage's training, finished when the block ends."""
    tracker = Tracker()
    if config.use_wandb:
        tracker.start(config, stage)
    try:
        yield tracker
    finally:
        with tracker._forgiving():
            if tracker._run:
                tracker._run.finish()
