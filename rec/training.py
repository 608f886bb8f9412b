"""What both stages' training loops share: a run that can be interrupted at any moment and resumed.

    run = TrainingRun(model, directory, description, files, schedule)
    run.fit(batches, metrics)  # functions: of an epoch, and of the model as it is
    run.restore_best()
    run.finish(metrics())

A run writes into DIRECTORY.partial, which takes the place of DIRECTORY when it is finished. The command makes sure that
both have one writer at a time (files.py):

    run.json        what identifies the run: data, configuration. The same run is resumed, another one starts anew
    epoch-N.*       weights and optimiser after epoch N (0: before training), of the best epoch and the last one
    weights.*       the weights of the finished run
    state.json      how far the run has come; an epoch counts from the moment this file says so
    metrics.jsonl   a line per epoch, and one per LOG_STEPS training steps
    events/         the same for TensorBoard

A resumed run ends like an unbroken one, to the last digit.
"""

import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from rec.errors import UserError, note
from rec.features import unsharded
from rec.files import read_whole, replace_directory, writing
from rec.optimizer import LazyAdam

LOG_STEPS = 10
LOWER_IS_BETTER = ("rmse", "loss")

Metrics = dict[str, float]


class Tracker(Protocol):
    """Where a run's numbers go besides metrics.jsonl."""

    def start(self, run_id: str, directory: Path | None) -> None: ...
    def log(self, values: Metrics) -> None: ...


class NoTracker:
    """Tracks nothing."""

    def start(self, run_id: str, directory: Path | None) -> None:
        pass

    def log(self, values: Metrics) -> None:
        pass


class Distribution(Protocol):
    """Who trains: one process, or several that share each batch."""

    strategy: tf.distribute.Strategy
    is_chief: bool  # the process that writes

    def losses(self, model: tf.keras.Model, data: tf.data.Dataset) -> Iterator[tf.Tensor]:
        """Trains on all of `data`; yields the loss of each step."""


class OneProcess:
    """This process alone."""

    is_chief = True

    def __init__(self) -> None:
        self.strategy = tf.distribute.get_strategy()

    def losses(self, model: tf.keras.Model, data: tf.data.Dataset) -> Iterator[tf.Tensor]:
        train_step = model.make_train_function()
        batches = iter(data)
        with suppress(tf.errors.OutOfRangeError):  # the end of the data
            while True:
                yield train_step(batches)["loss"]


@dataclass(frozen=True)
class Schedule:
    """How long a run trains, and how fast."""

    epochs: int  # at most. The learning rate falls along a cosine that reaches zero after the last
    learning_rate: float
    seed: int
    monitor: str | None = "val/ndcg@10"  # the metric of early stopping; None keeps the last epoch
    patience: int = 0  # epochs without a better value before training stops
    stop_after: int | None = None  # end after this many epochs of the schedule

    @property
    def last_epoch(self) -> int:
        return self.stop_after or self.epochs


@dataclass
class TrainState:
    """How far a run has come."""

    examples: int  # training interactions per epoch
    history: list[Metrics]  # the metrics after each epoch; number 0 is the model before training
    epoch: int = 0  # the last complete one
    best_epoch: int = 0
    train_seconds: float = 0.0  # without validation, over all sessions of the run
    step: int = 0  # training steps so far
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex[:8])
    log: list[Metrics] = field(default_factory=list)  # the lines of metrics.jsonl

    @property
    def metrics(self) -> Metrics:
        """Those of the best epoch."""
        return self.history[self.best_epoch]

    @property
    def examples_per_second(self) -> float:
        return self.epoch * self.examples / self.train_seconds if self.epoch else 0.0


class TrainingRun:
    """One training run of a model. See the module's docstring for its use."""

    def __init__(
        self,
        model: tf.keras.Model,
        directory: Path,
        description: str,
        files: dict[str, str],
        schedule: Schedule,
        *,
        examples: int,
        distribution: Distribution,
        tracker: Tracker,
    ) -> None:
        """Compiles the model; writes nothing yet.

        Args:
          model: a tfrs.Model, built; `fitted_variables`, if it has them, are saved with its weights.
          directory: where the finished checkpoint belongs.
          description: what identifies the run, as JSON.
          files: texts to keep beside the weights, by name.
          examples: training interactions per epoch.
        """
        self._model = model
        self._directory = directory
        self._partial = Path(f"{directory}.partial")
        self._description = description
        self._files = files
        self._schedule = schedule
        self._examples = examples
        self._distribution = distribution
        self._tracker = tracker if distribution.is_chief else NoTracker()
        with distribution.strategy.scope():
            self._optimizer = LazyAdam(schedule.learning_rate)
            self._optimizer.build(model.trainable_variables)
            model.compile(optimizer=self._optimizer)
        self._checkpoint = tf.train.Checkpoint(
            weights=saved_variables(model), optimizer=self._optimizer
        )
        self.state = TrainState(examples, history=[{}])
        self._epoch_seconds = 0.0

    def fit(
        self, batches: Callable[[int], tf.data.Dataset], measure: Callable[[], Metrics]
    ) -> None:
        """Trains to the last epoch, from the beginning or from where the same run was interrupted.

        Args:
          batches: those of an epoch, counted from 0.
          measure: the metrics of the model on validation data, after each epoch and before the first.
        """
        if not self._resume():
            self._begin(measure())
        for epoch in self._epochs():
            loss = self._train(batches(epoch))
            self._save(loss | measure())

    # ------------------------------------------------------------------------------------------------------------
    # Start

    def _resume(self) -> bool:
        """Takes up an interrupted run with the same description. False if there is none."""
        if not (self._partial / "state.json").exists():
            return False
        if read_description(self._partial) != self._description:
            return False
        self.state = _read_state(self._partial)
        self._checkpoint.read(self._weights_of(self.state.epoch)).assert_consumed()
        note(f"resuming after epoch {self.state.epoch} from {self._partial}")
        self._tracker.start(self.state.run_id, self._partial)
        return True

    def _begin(self, metrics: Metrics) -> None:
        """Starts anew, with the metrics of the untrained model."""
        self.state = TrainState(self._examples, history=[metrics])
        if self._distribution.is_chief:
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial.mkdir(parents=True)
            for name, text in {**self._files, "run.json": self._description}.items():
                (self._partial / name).write_text(text, encoding="utf-8", newline="\n")
            self._write_epoch()
        self._tracker.start(self.state.run_id, self._partial)

    # ------------------------------------------------------------------------------------------------------------
    # One epoch after the other

    def _epochs(self) -> Iterator[int]:
        """The epochs that are left, from 0, until the last one or until patience is at an end."""
        state = self.state
        last = self._schedule.last_epoch
        with tqdm(
            desc=self._directory.name, total=last, unit="epoch", initial=state.epoch
        ) as progress:
            while state.epoch < last and not self._is_out_of_patience():
                yield state.epoch
                progress.update()
                progress.set_postfix(self._shown(), best_epoch=state.best_epoch)

    def _is_out_of_patience(self) -> bool:
        if self._schedule.monitor is None:
            return False
        return self.state.epoch - self.state.best_epoch >= self._schedule.patience

    def _shown(self) -> Metrics:
        values = self.state.history[-1]
        names = ("loss", self._schedule.monitor)
        return {name: values[name] for name in names if name in values}

    def _train(self, batches: tf.data.Dataset) -> Metrics:
        """Trains one epoch. Raises UserError if the loss diverges."""
        state = self.state
        self._set_learning_rate()
        # Takes dropout back to the start of its sequence, which is fixed when the training step is traced. With
        # another seed per epoch, a resumed run would be traced with another one than an unbroken run.
        tf.random.set_seed(self._schedule.seed)
        start = time.perf_counter()
        first_step = state.step
        total = 0.0
        since = start
        for loss in self._distribution.losses(self._model, batches):
            total += loss
            state.step += 1
            if state.step % LOG_STEPS == 0:
                now = time.perf_counter()
                pace = LOG_STEPS / (now - since)
                since = now
                self._log({"train/loss": float(loss), "train/steps_per_second": pace})
        state.train_seconds += time.perf_counter() - start
        mean_loss = float(total) / (state.step - first_step)
        if not np.isfinite(mean_loss):
            raise UserError(
                f"the loss is {mean_loss} after epoch {state.epoch + 1}: lower the learning rate"
            )
        self._epoch_seconds = time.perf_counter() - start
        return {"loss": mean_loss}

    def _set_learning_rate(self) -> None:
        progress = self.state.epoch / self._schedule.epochs
        rate = self._schedule.learning_rate * (1 + np.cos(np.pi * progress)) / 2
        self._optimizer.learning_rate.assign(rate)

    def _save(self, values: Metrics) -> None:
        """Ends an epoch with its metrics."""
        state = self.state
        is_best = self._is_better(values)
        state.epoch += 1
        state.history.append(values)
        if is_best:
            state.best_epoch = state.epoch
        pace = self._examples / self._epoch_seconds
        self._log({"epoch": state.epoch, "train/examples_per_second": pace, **values})
        if self._distribution.is_chief:
            self._check_owner()
            self._write_epoch()

    def _check_owner(self) -> None:
        """Raises UserError if another training writes here, on a file system whose locks did not keep it out."""
        with suppress(OSError, ValueError):
            if _read_state(self._partial).run_id == self.state.run_id:
                return
        raise UserError(
            f"another training has taken {self._partial} over, and this one ends: "
            "give each its own output.checkpoints"
        )

    def _is_better(self, values: Metrics) -> bool:
        monitor = self._schedule.monitor
        if monitor is None:
            return True
        sign = -1 if monitor.endswith(LOWER_IS_BETTER) else 1
        return sign * values[monitor] > sign * self.state.metrics[monitor]

    def _log(self, values: Metrics) -> None:
        line = {"step": self.state.step, **values}
        self.state.log.append(line)
        self._tracker.log(line)

    # ------------------------------------------------------------------------------------------------------------
    # The end

    def restore_best(self) -> None:
        """Puts the best epoch's weights into the model."""
        self._checkpoint.read(self._weights_of(self.state.best_epoch)).assert_consumed()

    def finish(self, metrics: Metrics) -> TrainState:
        """Makes the partial directory the finished one.

        `metrics`: of the final weights, if they are not just those of the best epoch.
        """
        state = self.state
        if not self._distribution.is_chief:
            return state
        self._check_owner()
        if metrics:
            state.metrics.update(metrics)
            self._log({"epoch": state.best_epoch, **state.metrics})
        weights = tf.train.Checkpoint(weights=saved_variables(self._model))
        with writing(self._partial):
            weights.write(str(self._partial / "weights"))
        _write_state(self._partial, state)
        replace_directory(self._partial, self._directory)
        _remove_epochs(self._directory, kept=())  # not before: until then, the run can be resumed
        return state

    def _weights_of(self, epoch: int) -> str:
        return str(self._partial / f"epoch-{epoch}")

    def _write_epoch(self) -> None:
        state = self.state
        with writing(self._partial):
            self._checkpoint.write(self._weights_of(state.epoch))
        _write_state(self._partial, state)
        _remove_epochs(self._partial, kept=(state.epoch, state.best_epoch))


# ----------------------------------------------------------------------------------------------------------------
# Files


def saved_variables(model: tf.keras.Model) -> list[tf.Variable]:
    """What a checkpoint holds of a model: what is trained, and what is fitted afterwards."""
    fitted = getattr(model, "fitted_variables", [])
    return unsharded([*model.trainable_variables, *fitted])


def read_description(directory: Path) -> str | None:
    """What identifies the finished run in `directory`, as JSON; None if there is none."""
    path = directory / "run.json"
    return read_whole(
        directory, lambda: path.read_text(encoding="utf-8") if path.exists() else None
    )


def restore(model: tf.keras.Model, directory: Path) -> TrainState:
    """Loads a finished run's weights into `model`. Raises UserError if another version of rec wrote them."""
    if not (directory / "weights.index").exists():
        raise UserError(f"{directory} is from an older version of rec: train it again")
    checkpoint = tf.train.Checkpoint(weights=saved_variables(model))
    checkpoint.read(str(directory / "weights")).assert_consumed()
    return _read_state(directory)


def _read_state(directory: Path) -> TrainState:
    return TrainState(**json.loads((directory / "state.json").read_text(encoding="utf-8")))


def _write_state(directory: Path, state: TrainState) -> None:
    lines = "".join(f"{json.dumps(values)}\n" for values in state.log)
    (directory / "metrics.jsonl").write_text(lines)
    (directory / "state.tmp").write_text(json.dumps(asdict(state)))
    os.replace(directory / "state.tmp", directory / "state.json")


def _remove_epochs(directory: Path, kept: tuple[int, ...]) -> None:
    """Removes the weights of all epochs but those `kept`."""
    names = [f"epoch-{epoch}" for epoch in kept]
    for path in directory.glob("epoch-*"):
        if path.stem not in names:
            path.unlink()
