"""What /metrics tells Prometheus. Several workers share their numbers through files (PROMETHEUS_MULTIPROC_DIR)."""

import os

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    multiprocess,
)

SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)

REQUESTS = Counter("rec_requests", "Requests answered.", ["address", "status"])
REQUEST_SECONDS = Histogram(
    "rec_request_seconds", "From the request to its answer.", ["address"], buckets=SECONDS
)
# queue: the longest wait of a batch; model: the TensorFlow calls; answer: choosing and writing JSON,
# and the plain requests that are answered between its steps.
STAGE_SECONDS = Histogram("rec_stage_seconds", "Each stage of a batch.", ["stage"], buckets=SECONDS)
BATCH_SIZE = Histogram(
    "rec_batch_size", "Requests that shared a call.", buckets=(1, 2, 4, 8, 16, 32, 64)
)
QUEUE = Gauge("rec_queue", "Requests waiting or being answered.", multiprocess_mode="livesum")
HUNG_UP = Counter("rec_hung_up", "Requests dropped because their client had gone.")
COLD = Counter("rec_cold_starts", "Answers of popular items, to users of whom nothing is known.")
RELOADS = Counter("rec_reloads", "Attempts to take new bundles into service.", ["result"])
VERSION = Gauge(
    "rec_model_version", "The version that answers.", ["stage"], multiprocess_mode="livemin"
)


def exposition() -> bytes:
    """All of it as text."""
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return generate_latest()
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)
    return generate_latest(registry)
