"""The training loop that both stages share: epochs, validation, early stopping, checkpoints, resume.

- After every epoch the weights, the optimiser and the state are on disk: a killed run, started again with the same
  command, goes on with the epoch after the last complete one, and ends as an unbroken one does, to the last digit.
- A run lives in `CHECKPOINTS/STAGE.partial` until it is finished; then it replaces `CHECKPOINTS/STAGE` by rename. The
  commands that train see to it that both have one writer at a time (files.py).
- Of several processes that train one model (workers.py), the first, the chief, writes; all resume from what it wrote.

    run.json        what the checkpoint belongs to: compared before its weights are used
    epoch-N.*       weights and optimiser after epoch N (0: before training): of the best epoch, and of the last one
    state.json      how far the run has come; an epoch counts from the moment this file says so
    metrics.jsonl   a line an epoch, and one every LOG_STEPS training steps
    events/         the same for TensorBoard
"""

import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from rec.errors import UserError
from rec.files import read_whole, replace_directory, writing
from rec.tracking import Tracker
from rec.workers import steps, whole

LOG_STEPS = 10


class LazyAdam(tf.keras.optimizers.Adam):
    """Adam that leaves the rows of an embedding table that a batch did not touch as they are.

    Keras' Adam decays the moments of every row at every step, which costs time in proportion to the table.
    """

    def apply_gradients(self, grads_and_vars: Any, *args: Any, **kwargs: Any) -> Any:
        """As Keras', without a warning for variables that this configuration of a model does not train."""
        return super().apply_gradients(
            [pair for pair in grads_and_vars if pair[0] is not None], *args, **kwargs
        )

    def update_step(self, gradient: tf.Tensor | tf.IndexedSlices, variable: tf.Variable) -> None:
        if not isinstance(gradient, tf.IndexedSlices):
            super().update_step(gradient, variable)
            return
        at = self._index_dict[self._var_key(variable)]
        beta1, beta2, step = self.beta_1, self.beta_2, tf.cast(self.iterations + 1, variable.dtype)
        rate = self.learning_rate * tf.sqrt(1 - tf.pow(beta2, step)) / (1 - tf.pow(beta1, step))
        rows, values = (
            gradient.indices,
            gradient.values,
        )  # Keras has summed the gradients of equal rows
        first = beta1 * tf.gather(self._momentums[at], rows) + (1 - beta1) * values
        second = beta2 * tf.gather(self._velocities[at], rows) + (1 - beta2) * tf.square(values)
        self._momentums[at].scatter_update(tf.IndexedSlices(first, rows))
        self._velocities[at].scatter_update(tf.IndexedSlices(second, rows))
        variable.scatter_sub(
            tf.IndexedSlices(rate * first / (tf.sqrt(second) + self.epsilon), rows)
        )


@dataclass
class Fitted:
    """How far a run has come. When it is finished, the model holds the weights of its best epoch."""

    examples: int  # training interactions an epoch
    history: list[
        dict[str, float]
    ]  # the metrics after each epoch; number 0 is the model before training
    epoch: int = 0  # the last complete one
    best_epoch: int = 0
    train_seconds: float = 0.0  # without validation, over all sessions of the run
    step: int = 0  # training steps so far
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex[:8])
    log: list[dict[str, float]] = field(default_factory=list)  # the lines of metrics.jsonl

    @property
    def metrics(self) -> dict[str, float]:
        """The best epoch's."""
        return self.history[self.best_epoch]

    @property
    def examples_per_second(self) -> float:
        return self.epoch * self.examples / self.train_seconds if self.epoch else 0.0


def fit(
    model: tf.keras.Model,
    batches: Callable[[int], tf.data.Dataset],
    examples: int,
    directory: Path,
    run: dict[str, Any],
    files: dict[str, str],
    *,
    epochs: int,
    stop_after: int | None = None,
    learning_rate: float,
    seed: int,
    validate: Callable[[], dict[str, float]] | None = None,
    calibrate: Callable[[], dict[str, float]] | None = None,
    monitor: str = "val/ndcg@10",
    patience: int = 0,
    tracker: Tracker | None = None,
) -> Fitted:
    """Trains `model` and leaves its best weights in it and in `directory`. Raises UserError if the loss diverges.

    Args:
      batches: epoch (0 first) -> that epoch's data, of `examples` training interactions.
      directory: where the finished checkpoint belongs.
      run: what identifies the run (configuration, data); an interrupted one with the same `run` is resumed.
      files: texts to keep beside the weights, by name.
      epochs: at most so many; the learning rate falls along a cosine that reaches zero behind the last.
      stop_after: end after so many epochs of that schedule.
      validate: -> metrics; without it, all epochs are trained and the last is kept.
      calibrate: settles, with the best weights, what is not trained; -> numbers that join the best epoch's metrics,
        which are then taken again.
      monitor: the metric to stop on: the higher the better, but for `val/rmse`.
      patience: epochs without a better one before training stops.
      tracker: told of all that is logged.
    """
    partial = Path(f"{directory}.partial")
    strategy, is_chief = (
        model.distribute_strategy,
        model.distribute_strategy.extended.should_checkpoint,
    )
    with strategy.scope():
        optimizer = LazyAdam(learning_rate)
        optimizer.build(model.trainable_variables)
        model.compile(optimizer=optimizer)
    checkpoint = tf.train.Checkpoint(weights=whole(model.trainable_variables), optimizer=optimizer)
    state = _resume(partial, run, checkpoint)
    if state is None:
        state = Fitted(examples, [validate() if validate else {}])
        if is_chief:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            for name, text in {**files, "run.json": json.dumps(run, indent=1)}.items():
                (partial / name).write_text(text, encoding="utf-8", newline="\n")
            _save(partial, checkpoint, state)
    tracker = tracker if tracker and is_chief else Tracker()
    tracker.start(state.run_id, partial)

    def log(values: dict[str, float]) -> None:
        state.log.append(values)
        tracker.log(values)

    sign = -1.0 if monitor == "val/rmse" else 1.0
    last = stop_after or epochs
    progress = tqdm(
        range(state.epoch + 1, last + 1), directory.name, last, unit="epoch", initial=state.epoch
    )
    for epoch in progress:
        if validate is not None and state.epoch - state.best_epoch >= patience:
            break
        start = time.perf_counter()
        optimizer.learning_rate.assign(
            learning_rate * (1 + np.cos(np.pi * state.epoch / epochs)) / 2
        )
        # Takes dropout back to the start of its sequence, which is fixed when the training step is traced. With
        # another seed every epoch, a resumed run would be traced with another one than an unbroken run.
        tf.random.set_seed(seed)
        total, before, since = 0.0, state.step, start
        for loss in steps(model, batches(state.epoch)):
            total, state.step = total + loss, state.step + 1
            if state.step % LOG_STEPS == 0:
                pace, since = LOG_STEPS / (time.perf_counter() - since), time.perf_counter()
                log({"step": state.step, "train/loss": float(loss), "train/steps_per_second": pace})
        values = {"loss": float(total) / (state.step - before)}
        seconds = time.perf_counter() - start
        state.train_seconds += seconds
        if not np.isfinite(values["loss"]):
            raise UserError(
                f"the loss is {values['loss']} after epoch {epoch}: lower the learning rate"
            )
        if validate is not None:
            values |= validate()
        if validate is None or sign * values[monitor] > sign * state.metrics[monitor]:
            state.best_epoch = epoch
        state.epoch = epoch
        state.history.append(values)
        log(
            {
                "step": state.step,
                "epoch": epoch,
                "train/examples_per_second": examples / seconds,
                **values,
            }
        )
        if is_chief:
            _check_owner(partial, state)
            _save(partial, checkpoint, state)
        shown = {name: values[name] for name in ("loss", monitor) if name in values}
        progress.set_postfix(shown, best_epoch=state.best_epoch)
    if not is_chief:
        return state
    _check_owner(partial, state)
    checkpoint.read(str(partial / f"epoch-{state.best_epoch}")).assert_consumed()
    if calibrate is not None and validate is not None:
        state.metrics.update(calibrate() | validate())
        log({"step": state.step, "epoch": state.best_epoch, **state.metrics})
        _write_state(partial, state)
    _keep(partial, state.best_epoch)
    replace_directory(partial, directory)
    return state


def read_run(directory: Path) -> dict[str, Any] | None:
    """What identifies the finished run in `directory`; None if there is none."""
    path = directory / "run.json"
    return read_whole(directory, lambda: json.loads(path.read_text()) if path.exists() else None)


def restore(model: tf.keras.Model, directory: Path) -> Fitted:
    """Loads a finished run's best weights into `model`."""
    state = _read_state(directory)
    checkpoint = tf.train.Checkpoint(weights=whole(model.trainable_variables))
    status = checkpoint.read(str(directory / f"epoch-{state.best_epoch}"))
    status.assert_existing_objects_matched().expect_partial()  # the optimiser is not read
    return state


def _resume(partial: Path, run: dict[str, Any], checkpoint: tf.train.Checkpoint) -> Fitted | None:
    """Restores an interrupted run; None if `partial` holds none with the same `run`."""
    if not (partial / "state.json").exists() or read_run(partial) != run:
        return None
    state = _read_state(partial)
    checkpoint.read(str(partial / f"epoch-{state.epoch}")).assert_consumed()
    print(f"resuming after epoch {state.epoch} from {partial}", file=sys.stderr)
    return state


def _read_state(directory: Path) -> Fitted:
    return Fitted(**json.loads((directory / "state.json").read_text()))


def _check_owner(partial: Path, state: Fitted) -> None:
    """Raises UserError if another training writes to `partial`, on a file system whose locks did not keep it out."""
    with suppress(OSError, ValueError):
        if _read_state(partial).run_id == state.run_id:
            return
    raise UserError(
        f"another training has taken {partial} over, and this one ends: give each its own output.checkpoints"
    )


def _save(partial: Path, checkpoint: tf.train.Checkpoint, state: Fitted) -> None:
    with writing(partial):
        checkpoint.write(str(partial / f"epoch-{state.epoch}"))
    _write_state(partial, state)
    _keep(partial, state.epoch, state.best_epoch)


def _write_state(partial: Path, state: Fitted) -> None:
    (partial / "metrics.jsonl").write_text(
        "".join(f"{json.dumps(values)}\n" for values in state.log)
    )
    (partial / "state.tmp").write_text(json.dumps(vars(state)))
    os.replace(partial / "state.tmp", partial / "state.json")


def _keep(partial: Path, *epochs: int) -> None:
    """Removes the weights of all other epochs."""
    for path in partial.glob("epoch-*"):
        if path.stem not in [f"epoch-{epoch}" for epoch in epochs]:
            path.unlink()
