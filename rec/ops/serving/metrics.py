"""The numbers at /metrics, for Prometheus.

The processes of a server share their numbers through files in PROMETHEUS_MULTIPROC_DIR. Each process has a slot
(REC_SLOT). When it ends, its successor gets the slot: counters continue, and the number of files stays small.
"""

import os
from pathlib import Path

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    multiprocess,
    values,
)

from rec.serving.answer import Observer

DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
SLOT = "REC_SLOT"

if DIRECTORY in os.environ:
    slot = os.environ.get(SLOT, "parent")
    values.ValueClass = values.MultiProcessValue(lambda: slot)

SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)

REQUESTS = Counter("rec_requests", "Requests answered.", ["address", "status"])
REQUEST_SECONDS = Histogram(
    "rec_request_seconds", "From the request to its answer.", ["address"], buckets=SECONDS
)
# The stage `answer` includes the plain requests that are answered between its steps.
STAGE_SECONDS = Histogram("rec_stage_seconds", "Each stage of a batch.", ["stage"], buckets=SECONDS)
BATCH_SIZE = Histogram(
    "rec_batch_size", "Requests that shared a call.", buckets=(1, 2, 4, 8, 16, 32, 64)
)
QUEUE = Gauge("rec_queue", "Requests waiting or being answered.", multiprocess_mode="livesum")
HUNG_UP = Counter("rec_hung_up", "Requests dropped because their client had hung up.")
COLD = Counter("rec_cold_starts", "Answers of popular items, for users of whom nothing is known.")
RELOADS = Counter("rec_reloads", "Attempts to take new bundles into service.", ["result"])
for result in ("done", "failed"):
    RELOADS.labels(result)  # 0 from the start: Prometheus does not see a first rise from nothing
VERSION = Gauge(
    "rec_model_version",
    "The version that answers; 0 if there is none.",
    ["stage"],
    multiprocess_mode="livemin",
)
LOOKS_FAILED = Counter(
    "rec_looks_failed", "Looks for newer bundles that failed, such as on an unreadable file."
)
FOLLOWED = Gauge(
    "rec_followed_timestamp_seconds",
    "When a look for newer bundles last succeeded, in seconds since 1970.",
    multiprocess_mode="max",
)
WORKERS = Gauge("rec_workers", "Processes that are ready to answer.", multiprocess_mode="max")


class Prometheus(Observer):
    """Counts what a service does."""

    def loaded(self, versions: dict[str, int]) -> None:
        for stage, version in {"ranking": 0, **versions}.items():
            VERSION.labels(stage).set(version)

    def waiting(self, requests: int) -> None:
        QUEUE.set(requests)

    def call(self, requests: int) -> None:
        BATCH_SIZE.observe(requests)

    def stage(self, name: str, seconds: float) -> None:
        STAGE_SECONDS.labels(name).observe(seconds)

    def cold_starts(self, answers: int) -> None:
        COLD.inc(answers)


def exposition() -> bytes:
    """All numbers as text."""
    if DIRECTORY not in os.environ:
        return generate_latest()
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)
    return generate_latest(registry)


def forget(slot: str) -> None:
    """Removes the gauges of a process that has ended; what it counted stays."""
    directory = os.environ.get(DIRECTORY)
    if directory is not None and Path(directory).is_dir():
        multiprocess.mark_process_dead(slot, directory)
