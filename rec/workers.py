"""Training by several processes, from TF_CONFIG: which strategy, which part of the data, which loss.

- `mirrored` (tf.distribute.MultiWorkerMirroredStrategy): every worker holds the whole model, makes the same batches,
  and takes its share of each. The result is one process's.
- `ps` (tf.distribute.ParameterServerStrategy): tables lie in parts on parameter servers, so that training needs no
  machine that holds them all; the chief makes the batches and hands each to the next free worker. It is asynchronous:
  gradients are of weights that others have changed meanwhile, and no two runs are equal.

A process alone takes the same way, with TensorFlow's default strategy.
"""

import json
import os
import socket
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from functools import cache, partial
from typing import Any

import tensorflow as tf

from rec.errors import UserError

MIN_PART = 2**18  # bytes: no table is divided into smaller parts
UNDER_WAY = 64  # batches at the workers, or waiting for one


@cache
def workers(kind: str) -> tf.distribute.Strategy:
    """All that train together: this process, or those that TF_CONFIG names, by the strategy `kind`.

    A worker or parameter server of `ps` never returns from here: it serves until the chief is gone, and exits.
    Raises UserError for a TF_CONFIG that is malformed, or for `ps` names no chief, workers and servers.
    """
    if kind == "mirrored" and "TF_CONFIG" not in os.environ:
        return tf.distribute.get_strategy()
    jobs, job, index = _cluster()
    if kind == "mirrored":
        return tf.distribute.MultiWorkerMirroredStrategy()
    if not all(jobs.get(each) for each in ("chief", "worker", "ps")):
        raise UserError(
            f"strategy: ps needs a TF_CONFIG that names chief, worker and ps, not just {', '.join(jobs)}"
        )
    if job != "chief":
        _server = tf.distribute.Server(
            jobs, job_name=job, task_index=index, protocol="grpc"
        )  # as long as it is held
        _wait_for_end(*jobs["chief"])
        sys.exit(0)
    cluster = tf.distribute.cluster_resolver.TFConfigClusterResolver(rpc_layer="grpc")
    by_size = tf.distribute.experimental.partitioners.MinSizePartitioner(MIN_PART, len(jobs["ps"]))
    return tf.distribute.ParameterServerStrategy(cluster, by_size)


def _cluster() -> tuple[dict[str, list[str]], str, int]:
    """TF_CONFIG's addresses by job; this process's job, and its index among them."""
    form = '{"cluster": {JOB: [ADDRESS, ..], ..}, "task": {"type": JOB, "index": N}}'
    try:
        told = json.loads(os.environ["TF_CONFIG"])
        job, index = told["task"]["type"], told["task"]["index"]
        told["cluster"][job][index].rindex(":")  # a host and a port
    except (ValueError, LookupError, TypeError, AttributeError):
        raise UserError(
            f"TF_CONFIG: expected {form}, with an address HOST:PORT for that task"
        ) from None
    return told["cluster"], job, index


def _wait_for_end(address: str) -> None:
    """Returns when something that listens at `address` has come and gone."""
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


def steps(model: tf.keras.Model, data: tf.data.Dataset) -> Iterator[tf.Tensor]:
    """Trains `model` on all of `data`; yields the loss of each step. Raises UserError if another process is lost."""
    is_ps = isinstance(model.distribute_strategy, tf.distribute.ParameterServerStrategy)
    try:
        yield from (_scheduled if is_ps else _together)(model, data)
    except (tf.errors.UnavailableError, tf.errors.AbortedError):
        hint = "start all again, and they go on after the last whole epoch"
        raise UserError(f"another process that TF_CONFIG names is lost: {hint}") from None


def _together(model: tf.keras.Model, data: tf.data.Dataset) -> Iterator[tf.Tensor]:
    train_step = model.make_train_function()
    share = partial(_share, data)
    iterator = iter(model.distribute_strategy.distribute_datasets_from_function(share))
    with suppress(tf.errors.OutOfRangeError):  # the end of the data
        while True:
            yield train_step(iterator)["loss"]


def _share(data: tf.data.Dataset, context: tf.distribute.InputContext) -> tf.data.Dataset:
    """What one of several workers trains on: every so-manieth example of each batch, and all of its negatives."""
    first, step = context.input_pipeline_id, context.num_input_pipelines
    if step == 1:
        return data
    return data.map(
        lambda batch: {
            k: part if k == "negatives" else part[first::step] for k, part in batch.items()
        }
    )


def _scheduled(model: tf.keras.Model, data: tf.data.Dataset) -> Iterator[tf.Tensor]:
    strategy = model.distribute_strategy
    coordinator = tf.distribute.coordinator.ClusterCoordinator(strategy)

    def train_step(batch: dict[str, tf.Tensor]) -> tf.Tensor:
        return strategy.run(model.train_step, (batch,))["loss"]

    if model.train_function is None:  # where Keras keeps its own; traced once, not in every epoch
        model.train_function = tf.function(train_step, input_signature=[data.element_spec])
    under_way: deque[Any] = deque()
    for batch in data:
        under_way.append(coordinator.schedule(model.train_function, (batch,)))
        if len(under_way) > UNDER_WAY:
            yield under_way.popleft().fetch()
    yield from (loss.fetch() for loss in under_way)


def whole(variables: list[tf.Variable]) -> list[tf.Variable]:
    """The same variables; a table that lies in parts on servers is there once, not part by part."""
    tables = [getattr(part, "_sharded_container", lambda part=part: part)() for part in variables]
    return list({id(table): table for table in tables}.values())


def of_all_workers(value: tf.Tensor) -> tf.Tensor:
    """In a training step: the sum of the workers' values, where several train on one batch."""
    return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, value)
