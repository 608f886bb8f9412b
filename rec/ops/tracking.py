"""Where a training run's numbers go: TensorBoard's files beside the checkpoint, and Weights & Biases.

    tensorboard --logdir checkpoints

With `use_wandb: true` and WANDB_API_KEY (or WANDB_MODE=offline) set, a stage is also a W&B run of the project
WANDB_PROJECT (`rec`): its config, what metrics.jsonl holds, and its bundle as the artifact `retrieval_bundle`,
`ranking_bundle` or `recommender_bundle`. A ranking run says which retrieval artifact it used. Otherwise nothing is
asked and nothing imported. W&B's failures never stop training: they are warned of once, and tracking there ends.
"""

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import tensorflow as tf

from rec.bundles.metadata import metadata_to_json, read_metadata
from rec.config import Config, to_dict
from rec.errors import warn
from rec.ops.registry import PROJECT

PATIENCE = 300  # seconds for W&B to take a run, an artifact, or a run's end
KEPT = (
    "stage",
    "version",
    "id",
    "run_id",
    "architecture",
    "metrics",
    "dataset",
    "vocabulary",
    "index",
    "built_from",
    "config",
)


class Tracker:
    """Logs to TensorBoard and perhaps to a W&B run; without a config, to nothing."""

    def __init__(self, config: Config | None = None, stage: str = "") -> None:
        self._config, self._stage = config, stage
        self._events: Any = None
        self._run: Any = None

    def start(self, run_id: str, directory: Path | None) -> None:
        """Starts a run, or goes on with it. `directory` is its checkpoint's, if it makes one."""
        if self._config is None:
            return
        if directory is not None:
            self._events = tf.summary.create_file_writer(str(directory / "events"))
        if not self._config.use_wandb:
            return
        if not os.environ.get("WANDB_API_KEY") and os.environ.get("WANDB_MODE") != "offline":
            warn("use_wandb without tracking: neither WANDB_API_KEY nor WANDB_MODE=offline")
            return
        with self._forgiving():
            import wandb

            project, config = os.environ.get("WANDB_PROJECT", PROJECT), to_dict(self._config)
            settings = wandb.Settings(init_timeout=PATIENCE, finish_timeout=PATIENCE)
            self._run = wandb.init(
                project=project,
                job_type=self._stage,
                id=run_id,
                resume="allow",
                config=config,
                settings=settings,
            )

    def log(self, values: dict[str, float]) -> None:
        """Logs numbers under their names; `step`, the training steps so far, is one of them."""
        if self._events is not None:
            with self._events.as_default(step=int(values["step"])):
                for name, value in values.items():
                    tf.summary.scalar(name, value)
        with self._forgiving():
            if self._run:
                self._run.log(values)

    def use(self, bundle: Path) -> None:
        """Says that the run builds on a published bundle."""
        with self._forgiving():
            if self._run and not self._run.offline:
                metadata = read_metadata(bundle)
                self._run.use_artifact(f"{metadata.stage}_bundle:id-{metadata.id}")

    def log_bundle(self, bundle: Path) -> None:
        """Logs a published bundle as the artifact STAGE_bundle, with its metrics, data set and versions."""
        with self._forgiving():
            if self._run:
                import wandb

                metadata = read_metadata(bundle)
                content = metadata_to_json(metadata)
                kept = {key: content[key] for key in KEPT if key in content}
                artifact = wandb.Artifact(f"{metadata.stage}_bundle", type="model", metadata=kept)
                artifact.add_dir(str(bundle))
                logged = self._run.log_artifact(artifact, aliases=["latest", f"id-{metadata.id}"])
                if not self._run.offline:
                    logged.wait(timeout=PATIENCE)  # nothing else tells of an upload that failed

    def close(self) -> None:
        if self._events is not None:
            self._events.close()
        with self._forgiving():
            if self._run:
                self._run.finish()

    @contextmanager
    def _forgiving(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever W&B raises, training is worth more
            warn(f"W&B failed, tracking ends: {error}")
            self._run = None


def track(config: Config, stage: str) -> closing[Tracker]:
    """A tracker for one stage's training, finished when the block ends."""
    return closing(Tracker(config, stage))
