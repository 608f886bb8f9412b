"""The training loop that both stages share: epochs, validation, early stopping, checkpoints, resume.

- After every epoch the weights, the optimiser and the state are on disk: a killed run, started again with the same
  command, goes on with the epoch after the last complete one. Batches depend on (seed, epoch) only.
- A run lives in `CHECKPOINTS/STAGE.partial` until it is finished; then it replaces `CHECKPOINTS/STAGE` by rename.
- A checkpoint is weights plus `run.json`, which says what they belong to, and is compared before they are used.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from rec.errors import UserError

OnEpoch = Callable[[int, dict[str, float]], None]


class LazyAdam(tf.keras.optimizers.Adam):
    """Adam that leaves the rows of an embedding table that a batch did not touch as they are.

    Keras' Adam decays the moments of every row at every step, which costs time in proportion to the table.
    """

    def update_step(self, gradient: tf.Tensor | tf.IndexedSlices, variable: tf.Variable) -> None:
        if not isinstance(gradient, tf.IndexedSlices):
            super().update_step(gradient, variable)
            return
        at = self._index_dict[self._var_key(variable)]
        beta1, beta2, step = self.beta_1, self.beta_2, tf.cast(self.iterations + 1, variable.dtype)
        rate = self.learning_rate * tf.sqrt(1 - tf.pow(beta2, step)) / (1 - tf.pow(beta1, step))
        rows, values = gradient.indices, gradient.values  # Keras has summed the gradients of equal rows
        first = beta1 * tf.gather(self._momentums[at], rows) + (1 - beta1) * values
        second = beta2 * tf.gather(self._velocities[at], rows) + (1 - beta2) * tf.square(values)
        self._momentums[at].scatter_update(tf.IndexedSlices(first, rows))
        self._velocities[at].scatter_update(tf.IndexedSlices(second, rows))
        variable.scatter_sub(tf.IndexedSlices(rate * first / (tf.sqrt(second) + self.epsilon), rows))


@dataclass(frozen=True)
class Fitted:
    """How a run ended. The model holds the weights of its best epoch."""

    best_epoch: int  # 1 is the first epoch; 0 is the model before training
    metrics: dict[str, float]  # of the best epoch
    examples_per_second: float  # training interactions, validation not counted
    seconds: float  # of training and validation, over all sessions of the run


@dataclass
class _State:
    """What a resumed run must know beside the weights."""

    epoch: int = 0
    best_epoch: int = 0
    best: dict[str, float] | None = None
    examples: int = 0
    train_seconds: float = 0.0
    seconds: float = 0.0
    finished: bool = False

    def fitted(self) -> Fitted:
        rate = self.examples / self.train_seconds if self.train_seconds else 0.0
        return Fitted(self.best_epoch, self.best or {}, rate, self.seconds)


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
    monitor: str = "val/ndcg@10",
    patience: int = 0,
    on_epoch: OnEpoch = lambda epoch, metrics: None,
) -> Fitted:
    """Trains `model` and leaves its best weights in it and in `directory`.

    Args:
      batches: epoch (0 first) -> that epoch's data.
      examples: training interactions an epoch, for the throughput.
      directory: where the finished checkpoint belongs.
      files: texts to keep beside the weights, by name.
      run: what identifies the run (configuration, data); an interrupted one with the same `run` is resumed.
      epochs: at most so many; the learning rate falls along a cosine that reaches zero behind the last.
      stop_after: end after so many epochs of that schedule.
      validate: -> metrics; without it, all epochs are trained and the last is kept.
      monitor: the metric to stop on: the higher the better, but for `val/rmse`.
      patience: epochs without a better one before training stops.
      on_epoch: called with each epoch's number and metrics.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.with_name(directory.name + ".partial")
    optimizer = LazyAdam(learning_rate)
    optimizer.build(model.trainable_variables)
    model.compile(optimizer=optimizer)
    checkpoint = tf.train.Checkpoint(weights=list(model.trainable_variables), optimizer=optimizer)
    state = _resume(partial, run, files, checkpoint)
    sign = -1.0 if monitor == "val/rmse" else 1.0

    def save(name: str) -> None:
        checkpoint.write(str(partial / name))
        _write_json(partial / "state.json", vars(state))

    if state.epoch == 0 and validate is not None:
        state.best = validate()
        save("best-0")
    progress = tqdm(total=stop_after or epochs, initial=state.epoch, desc=f"training {directory.name}", unit="epoch")
    last_epoch = stop_after or epochs
    while state.epoch < last_epoch and (validate is None or state.epoch - state.best_epoch < patience):
        start = time.perf_counter()
        optimizer.learning_rate.assign(learning_rate * (1 + np.cos(np.pi * state.epoch / epochs)) / 2)
        tf.random.set_seed(seed + state.epoch)
        history = model.fit(batches(state.epoch), epochs=1, verbose=0)
        trained = time.perf_counter()
        state.epoch += 1
        state.examples += examples
        state.train_seconds += trained - start
        values = {"loss": float(history.history["loss"][-1])}
        if not np.isfinite(values["loss"]):
            raise UserError(f"the loss is {values['loss']} after epoch {state.epoch}: lower the learning rate")
        if validate is not None:
            values |= validate()
        is_best = validate is None or state.best is None or sign * values[monitor] > sign * state.best[monitor]
        before = state.best_epoch
        if is_best:
            state.best_epoch, state.best = state.epoch, values
        state.seconds += time.perf_counter() - start
        with open(partial / "metrics.jsonl", "a") as log:
            log.write(json.dumps({"epoch": state.epoch, **values}) + "\n")
        on_epoch(state.epoch, values)
        if is_best:
            checkpoint.write(str(partial / f"best-{state.epoch}"))
        save(f"last-{state.epoch}")
        _remove(partial, f"last-{state.epoch - 1}")
        if is_best:
            _remove(partial, f"best-{before}")
        shown = {"loss": values["loss"], monitor: values.get(monitor), "best": (state.best or {}).get(monitor)}
        progress.set_postfix({name: f"{value:.4f}" for name, value in shown.items() if value is not None})
        progress.update()
    progress.close()
    checkpoint.read(str(partial / f"best-{state.best_epoch}")).expect_partial()
    _remove(partial, f"last-{state.epoch}")
    state.finished = True
    _write_json(partial / "state.json", vars(state))
    replace_directory(partial, directory)
    return state.fitted()


def read_run(directory: Path) -> dict[str, Any] | None:
    """What identifies the finished run in `directory`; None if there is none."""
    state = _read_json(directory / "state.json")
    return _read_json(directory / "run.json") if state and state["finished"] else None


def restore(model: tf.keras.Model, directory: Path) -> Fitted:
    """Loads a finished run's best weights into `model`."""
    state = _State(**_read_json(directory / "state.json"))
    checkpoint = tf.train.Checkpoint(weights=list(model.trainable_variables))
    checkpoint.read(str(directory / f"best-{state.best_epoch}")).expect_partial()
    return state.fitted()


def _resume(partial: Path, run: dict[str, Any], files: dict[str, str], checkpoint: tf.train.Checkpoint) -> _State:
    """Restores an interrupted run, if `partial` holds one with the same `run`; else begins a new one there."""
    found = _read_json(partial / "state.json")
    if found and _read_json(partial / "run.json") == run:
        state = _State(**found)
        name = f"last-{state.epoch}" if (partial / f"last-{state.epoch}.index").exists() else f"best-{state.epoch}"
        checkpoint.read(str(partial / name)).assert_consumed()
        log = partial / "metrics.jsonl"
        if log.exists():  # a kill between the log and the state leaves a line too many
            replace_text(log, "".join(log.read_text().splitlines(keepends=True)[: state.epoch]))
        print(f"resuming after epoch {state.epoch} from {partial}", file=sys.stderr)
        return state
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for name, text in files.items():
        (partial / name).write_text(text, encoding="utf-8", newline="\n")
    _write_json(partial / "run.json", run)
    return _State()


def replace_directory(new: Path, target: Path) -> None:
    """Puts `new` in the place of `target`; what was there stays until the very rename."""
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(new, target)
    shutil.rmtree(old, ignore_errors=True)


def _remove(directory: Path, name: str) -> None:
    for path in directory.glob(f"{name}.*"):
        path.unlink()


def _write_json(path: Path, value: Any) -> None:
    replace_text(path, json.dumps(value, indent=1))


def replace_text(path: Path, text: str) -> None:
    """Writes a file by rename: a reader or a kill sees the old content or the new."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None
