"""Training by several processes that TF_CONFIG names, as implementations of `training.Distribution`.

- `mirrored` (tf.distribute.MultiWorkerMirroredStrategy): every worker holds the whole model, makes the same batches,
  and takes its share of each. The result is that of one process.
- `ps` (tf.distribute.ParameterServerStrategy): tables lie in parts on parameter servers, so no machine has to hold them
  all. The chief makes the batches and hands each one to the next free worker. It is asynchronous: gradients are of
  weights that others have changed in the meantime, and no two runs are equal.
"""

import json
import os
import socket
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial

import tensorflow as tf

from rec.errors import UserError
from rec.training import Distribution, OneProcess

MIN_PART_BYTES = 2**18  # no table is divided into smaller parts
MAX_SCHEDULED = 64  # batches at the workers, or waiting for one
FORM = '{"cluster": {JOB: [ADDRESS, ..], ..}, "task": {"type": JOB, "index": N}}'


@dataclass(frozen=True)
class Cluster:
    """What TF_CONFIG says."""

    addresses: dict[str, list[str]]  # by job
    job: str  # of this process
    index: int  # of this process among those of its job

    @classmethod
    def from_environment(cls) -> "Cluster":
        """Raises UserError if TF_CONFIG is malformed."""
        try:
            config = json.loads(os.environ["TF_CONFIG"])
            addresses = config["cluster"]
            job = config["task"]["type"]
            index = config["task"]["index"]
            addresses[job][index].rindex(":")  # a host and a port
        except (ValueError, LookupError, TypeError, AttributeError):
            raise UserError(
                f"TF_CONFIG: expected {FORM}, with an address HOST:PORT for that task"
            ) from None
        return cls(addresses, job, index)


def distribution_of(kind: str) -> Distribution:
    """Who trains: this process alone, or those that TF_CONFIG names, by the strategy `kind`.

    To be called before TensorFlow is used for anything else, and once. A worker or a parameter server of `ps` serves
    until the chief is gone, and then ends here: SystemExit.

    Raises:
      UserError: TF_CONFIG is malformed, or names no chief, workers and servers for `ps`.
    """
    if kind == "mirrored" and "TF_CONFIG" not in os.environ:
        return OneProcess()
    cluster = Cluster.from_environment()
    if kind == "mirrored":
        return Mirrored()
    missing = [job for job in ("chief", "worker", "ps") if not cluster.addresses.get(job)]
    if missing:
        raise UserError(f"strategy: ps needs a TF_CONFIG that names {', '.join(missing)} too")
    if cluster.job != "chief":
        serve_until_the_chief_ends(cluster)
    return ParameterServers(len(cluster.addresses["ps"]))


def exit_unless_chief(distribution: Distribution) -> None:
    """Ends a worker whose part is done: the chief alone exports."""
    if not distribution.is_chief:
        sys.exit(0)


class Mirrored:
    """All workers hold the model and train on each batch together."""

    def __init__(self) -> None:
        self.strategy = tf.distribute.MultiWorkerMirroredStrategy()
        self.is_chief = self.strategy.extended.should_checkpoint

    def losses(self, model: tf.keras.Model, data: tf.data.Dataset) -> Iterator[tf.Tensor]:
        train_step = model.make_train_function()
        batches = self.strategy.distribute_datasets_from_function(partial(_share, data))
        iterator = iter(batches)
        with _lost_process_in_one_sentence(), suppress(tf.errors.OutOfRangeError):
            while True:
                yield train_step(iterator)["loss"]


def _share(data: tf.data.Dataset, context: tf.distribute.InputContext) -> tf.data.Dataset:
    """Worker i of n takes examples i, i + n, i + 2n, ... of each batch, and all of its negatives."""
    first = context.input_pipeline_id
    step = context.num_input_pipelines

    def share(batch: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        return {
            name: values if name == "negatives" else values[first::step]
            for name, values in batch.items()
        }

    return data if step == 1 else data.map(share)


class ParameterServers:
    """Tables lie on servers; workers train on one batch each, whenever they are free."""

    is_chief = True  # the others never get here

    def __init__(self, servers: int) -> None:
        cluster = tf.distribute.cluster_resolver.TFConfigClusterResolver(rpc_layer="grpc")
        partitioner = tf.distribute.experimental.partitioners.MinSizePartitioner(
            MIN_PART_BYTES, servers
        )
        self.strategy = tf.distribute.ParameterServerStrategy(cluster, partitioner)

    def losses(self, model: tf.keras.Model, data: tf.data.Dataset) -> Iterator[tf.Tensor]:
        coordinator = tf.distribute.coordinator.ClusterCoordinator(self.strategy)
        train_step = self._train_step(model, data)
        scheduled: deque[tf.Tensor] = deque()
        with _lost_process_in_one_sentence():
            for batch in data:
                scheduled.append(coordinator.schedule(train_step, (batch,)))
                if len(scheduled) > MAX_SCHEDULED:
                    yield scheduled.popleft().fetch()
            for loss in scheduled:
                yield loss.fetch()

    def _train_step(self, model: tf.keras.Model, data: tf.data.Dataset) -> tf.Tensor:
        """The compiled step. The model keeps it, where Keras keeps its own: it is traced once, not in every epoch."""

        def train_step(batch: dict[str, tf.Tensor]) -> tf.Tensor:
            return self.strategy.run(model.train_step, (batch,))["loss"]

        if model.train_function is None:
            model.train_function = tf.function(train_step, input_signature=[data.element_spec])
        return model.train_function


@contextmanager
def _lost_process_in_one_sentence() -> Iterator[None]:
    try:
        yield
    except (tf.errors.UnavailableError, tf.errors.AbortedError):
        raise UserError(
            "lost another process that TF_CONFIG names: start all of them again, "
            "and they resume after the last complete epoch"
        ) from None


def serve_until_the_chief_ends(cluster: Cluster) -> None:
    """Makes this process a worker or a parameter server. Never returns: SystemExit once the chief is gone."""
    server = tf.distribute.Server(
        cluster.addresses, job_name=cluster.job, task_index=cluster.index, protocol="grpc"
    )
    _wait_for_end(cluster.addresses["chief"][0])
    del server  # it serves for as long as it is referenced
    sys.exit(0)


def _wait_for_end(address: str) -> None:
    """Returns when something that listens at HOST:PORT has come and gone."""
    host, port = address.rsplit(":", 1)
    has_come = False
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
            has_come = True
        except OSError:
            if has_come:
                return
        time.sleep(1)
