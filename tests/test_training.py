import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from rec.errors import UserError
from rec.optimizer import LazyAdam
from rec.training import (
    NoTracker,
    OneProcess,
    Schedule,
    TrainingRun,
    TrainState,
    read_description,
    restore,
)

X = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
Y = X @ np.array([[1.0], [2.0], [3.0], [4.0]], np.float32)


class Linear(tf.keras.Model):
    """y = x w, trained through the same train_step that TFRS models have."""

    def __init__(self) -> None:
        super().__init__()
        self.w = self.add_weight(name="w", shape=[4, 1], initializer="zeros")

    def train_step(self, batch: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(batch["x"] @ self.w - batch["y"]))
        self.optimizer.minimize(loss, [self.w], tape)
        return {"loss": loss}


class WithDropout(Linear):
    def train_step(self, batch: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        return super().train_step({"x": tf.nn.dropout(batch["x"], 0.2), "y": batch["y"]})


def batches(epoch: int) -> tf.data.Dataset:
    order = np.random.default_rng(epoch).permutation(64)
    return tf.data.Dataset.from_tensor_slices({"x": X[order], "y": Y[order]}).batch(16)


class EpochWatcher(NoTracker):
    """Calls a function with the number of each epoch."""

    def __init__(self, on_epoch: Callable[[int], None]) -> None:
        self._on_epoch = on_epoch

    def log(self, values: dict[str, float]) -> None:
        if "epoch" in values:
            self._on_epoch(int(values["epoch"]))


def train(
    directory: Path,
    model: Linear,
    on_epoch=lambda _: None,
    epochs=6,
    validate=None,
    data=batches,
    **description,
) -> TrainState:
    """Trains as both stages do; `description` tells runs apart."""

    def error() -> dict[str, float]:
        return {"val/ndcg@10": -float(np.mean(np.square(X @ model.w.numpy() - Y)))}

    measure = validate or error
    run = TrainingRun(
        model,
        directory,
        json.dumps({"name": "test", **description}),
        {"note.txt": "kept\n"},
        Schedule(epochs=epochs, learning_rate=0.1, seed=0, patience=2),
        examples=64,
        distribution=OneProcess(),
        tracker=EpochWatcher(on_epoch),
    )
    run.fit(data, measure)
    run.restore_best()
    return run.finish({})


def test_a_killed_run_goes_on_to_the_same_weights_as_an_unbroken_one(tmp_path: Path):
    unbroken = Linear()
    train(tmp_path / "a", unbroken)

    def kill(epoch: int) -> None:
        if epoch == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "b", Linear(), kill)
    assert not (tmp_path / "b").exists()
    epochs: list[int] = []
    resumed = Linear()
    train(tmp_path / "b", resumed, epochs.append)
    assert epochs == [4, 5, 6]  # the killed epoch is trained again
    assert resumed.w.numpy() == pytest.approx(unbroken.w.numpy(), abs=1e-6)
    logged = [
        json.loads(line) for line in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [values["epoch"] for values in logged if "epoch" in values] == [1, 2, 3, 4, 5, 6]
    assert [values["step"] for values in logged] == [
        4,
        8,
        10,
        12,
        16,
        20,
        20,
        24,
    ]  # four an epoch, and every tenth


def test_a_resumed_run_drops_out_what_an_unbroken_one_does(tmp_path: Path):
    def kill(epoch: int) -> None:
        if epoch == 3:
            raise KeyboardInterrupt

    unbroken, resumed = WithDropout(), WithDropout()
    train(tmp_path / "a", unbroken)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "b", WithDropout(), kill)
    train(tmp_path / "b", resumed)
    assert resumed.w.numpy().tolist() == unbroken.w.numpy().tolist()


def test_a_kill_before_the_rename_finishes_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def kill(new: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("rec.training.replace_directory", kill)
        train(tmp_path / "a", Linear())
    epochs: list[int] = []
    train(tmp_path / "a", Linear(), epochs.append)
    assert epochs == []  # all were trained
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert not list((tmp_path / "a").glob("epoch-*"))


def test_a_training_that_lost_its_directory_ends_and_replaces_nothing(tmp_path: Path):
    """As on a file system without locks: the second training begins where the first one is under way."""
    train(tmp_path / "a", Linear(), run="finished")

    def begin_another(epoch: int) -> None:
        if epoch == 2:
            with pytest.raises(KeyboardInterrupt):
                train(tmp_path / "a", Linear(), stop, run="second")

    def stop(epoch: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(UserError, match="another training has taken .*a.partial over"):
        train(tmp_path / "a", Linear(), begin_another, run="first")
    assert read_description(tmp_path / "a") == json.dumps({"name": "test", "run": "finished"})
    assert read_description(tmp_path / "a.partial") == json.dumps({"name": "test", "run": "second"})


def test_another_configuration_starts_anew(tmp_path: Path):
    def stop(epoch: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "a", Linear(), stop)
    epochs: list[int] = []
    train(tmp_path / "a", Linear(), epochs.append, learning="other")
    assert epochs == [1, 2, 3, 4, 5, 6]


def test_the_best_epoch_is_kept_and_training_stops_early(tmp_path: Path):
    values = iter([0.0, 0.1, 0.5, 0.4, 0.3, 0.9])  # before training, then epoch 1, 2, ...
    model, weights = Linear(), []
    fitted = train(
        tmp_path / "a",
        model,
        lambda *_: weights.append(model.w.numpy()),
        epochs=9,
        validate=lambda: {"val/ndcg@10": next(values)},
    )
    assert len(weights) == 4  # two epochs without a better one after the second
    assert fitted.best_epoch == 2 and fitted.metrics["val/ndcg@10"] == 0.5
    assert (model.w.numpy() == weights[1]).all()
    other = Linear()
    assert restore(other, tmp_path / "a") == fitted
    assert (other.w.numpy() == weights[1]).all()
    assert (tmp_path / "a" / "note.txt").read_text() == "kept\n"
    assert read_description(tmp_path / "a") == json.dumps({"name": "test"})


def test_a_loss_that_is_not_a_number_is_said(tmp_path: Path):
    def broken(epoch: int) -> tf.data.Dataset:
        return tf.data.Dataset.from_tensor_slices({"x": X * np.nan, "y": Y}).batch(16)

    with pytest.raises(UserError, match="the loss is nan after epoch 1: lower the learning rate"):
        train(tmp_path / "a", Linear(), data=broken)


def test_lazy_adam_is_adam_on_the_rows_it_touches_and_leaves_the_others():
    table, dense = tf.Variable(tf.ones([4, 2])), tf.Variable(tf.ones([4, 2]))
    lazy, adam = LazyAdam(0.1), tf.keras.optimizers.Adam(0.1)
    gradient = np.array([[0.5, -1.0], [0, 0], [2.0, 1.0], [0, 0]], np.float32)
    for _ in range(3):
        rows = tf.constant([0, 2, 0])  # row 0 twice: its gradients add up
        values = tf.constant(np.stack([gradient[0] / 2, gradient[2], gradient[0] / 2]))
        lazy.apply_gradients([(tf.IndexedSlices(values, rows, tf.constant([4, 2])), table)])
        adam.apply_gradients([(tf.constant(gradient), dense)])
    assert table.numpy()[[0, 2]] == pytest.approx(dense.numpy()[[0, 2]], abs=1e-6)
    assert (table.numpy()[[1, 3]] == 1).all()
