"""Looks at a machine before rec runs on it: each check is one line, fine or with one sentence that says how to fix it.

TensorFlow is loaded in a process of its own. So an environment in which that fails, or even kills the process (a
processor without AVX), gives a line like any other.

Not covered: whether the machine is fast enough, W&B, Spark, TF Serving.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rec import HAS_KERAS_3, KERAS_3
from rec.ops.start import listen

PYTHONS = ((3, 11), (3, 13))  # the oldest and the newest
MEMORY = 2  # GiB; training the dummy data takes 1.5
DISK = 1  # GiB for data, checkpoints and bundles
FLAGS = ("avx", "avx2", "fma")  # what TensorFlow's and ScaNN's wheels are compiled for

HAS_WHEEL = (sys.platform, os.uname().machine) == ("linux", "x86_64")  # of ScaNN
LIBRARIES = {  # module -> distribution
    "tensorflow": "tensorflow",
    "tf_keras": "tf-keras",
    "tensorflow_recommenders": "tensorflow-recommenders",
    "scann": "scann",
}

# Prints, as JSON, the version of each library or the error of its import, and the number of GPUs.
PROBE = """
import importlib, importlib.metadata, json, sys
answer = {}
for name, distribution in json.loads(sys.argv[1]).items():
    try:
        importlib.import_module(name)
        answer[name] = {"version": importlib.metadata.version(distribution)}
    except Exception as error:
        answer[name] = {"error": f"{type(error).__name__}: {error}"}
if "version" in answer["tensorflow"]:
    answer["gpus"] = len(sys.modules["tensorflow"].config.list_physical_devices("GPU"))
print(json.dumps(answer))
"""


@dataclass(frozen=True)
class Check:
    """The result of one check."""

    name: str
    is_ok: bool
    text: str  # what was found, and how to fix it


def fine(name: str, text: str) -> Check:
    return Check(name, True, text)


def broken(name: str, text: str) -> Check:
    return Check(name, False, text)


def check_python(version: tuple[int, int] = sys.version_info[:2]) -> Check:
    shown = ".".join(map(str, version))
    if PYTHONS[0] <= version <= PYTHONS[1]:
        return fine("python", f"{shown}, {sys.executable}")
    return broken(
        "python", f"{shown}: rec needs 3.11 to 3.13; make an environment with one of them"
    )


def check_processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> Check:
    """The instructions of an x86-64 processor. Others have none of these, and need none."""
    machine = os.uname().machine
    if machine != "x86_64" or not cpuinfo.exists():
        return fine("processor", f"{machine}: nothing to check")
    lines = cpuinfo.read_text().splitlines()
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    missing = [flag for flag in FLAGS if flag not in flags]
    if missing:
        names = ", ".join(missing)
        return broken(
            "processor", f"no {names}: TensorFlow's wheels need it; use a newer (virtual) processor"
        )
    return fine("processor", f"{machine} with {', '.join(FLAGS)}")


def check_libraries() -> Iterator[Check]:
    """TensorFlow and what works with it only in step, as a new process finds them."""
    command = [sys.executable, "-c", PROBE, json.dumps(LIBRARIES)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == -signal.SIGILL:
        yield broken("tensorflow", "it needs instructions that this processor does not have")
        return
    if done.returncode != 0:
        last = done.stderr.strip().rpartition("\n")[2]
        yield broken(
            "tensorflow", f"loading it ends with {done.returncode}: {last}; install it again"
        )
        return
    yield from judge_libraries(json.loads(done.stdout.splitlines()[-1]))


def judge_libraries(answer: dict) -> Iterator[Check]:
    """Checks of what the probe has printed."""
    install = "install the package again in an empty environment"
    tensorflow = answer["tensorflow"]
    yield _judge("tensorflow", tensorflow, install)
    keras = answer["tf_keras"]
    if HAS_KERAS_3:
        yield broken("keras 2", KERAS_3)
    elif "version" in keras and _minor(keras) != _minor(tensorflow):
        yield broken(
            "keras 2", f"tf-keras {keras['version']} is not for this TensorFlow: {install}"
        )
    else:
        yield _judge("keras 2", keras, install)
    yield _judge("tfrs", answer["tensorflow_recommenders"], install)
    if "error" in answer["scann"] and not HAS_WHEEL:
        yield fine("scann", "there is none for this machine: the index is exact")
    else:
        yield _judge("scann", answer["scann"], f"{install}, or use --set index.kind=exact")
    gpus = answer.get("gpus", 0)
    yield fine("gpu", f"{gpus} for training" if gpus else "none: training runs on the processor")


def _judge(name: str, library: dict[str, str], fix: str) -> Check:
    if "error" in library:
        return broken(name, f"{library['error'].splitlines()[0]}: {fix}")
    return fine(name, library["version"])


def _minor(library: dict[str, str]) -> list[str]:
    return library.get("version", "").split(".")[:2]


def check_memory(meminfo: Path = Path("/proc/meminfo")) -> Check:
    if not meminfo.exists():
        return fine("memory", "not measured on this system")
    rows = (line.split() for line in meminfo.read_text().splitlines())
    free = next(int(row[1]) for row in rows if row[0] == "MemAvailable:") / 2**20
    if free < MEMORY:
        return broken(
            "memory", f"{free:.1f} GiB free, {MEMORY} are needed: end other programs, or add memory"
        )
    return fine("memory", f"{free:.1f} GiB free")


def check_disk(place: Path, name: str, least: float = DISK) -> Check:
    """Whether `place` has room, and takes a file: a quota is not among the free bytes."""
    free = shutil.disk_usage(place).free / 2**30
    if free < least:
        return broken(
            name, f"{place}: {free:.1f} GiB free, {least} are needed: delete something there"
        )
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(2**20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return broken(
            name, f"{place}: {error.strerror}: work in a directory that can be written to"
        )
    return fine(name, f"{place}: {free:.0f} GiB free")


def check_port(port: int) -> Check:
    try:
        listen("127.0.0.1", port).close()
    except ValueError as error:
        return broken("port", str(error))
    return fine("port", f"{port} is free for rec.serve")


def check_cluster() -> Check:
    """TF_CONFIG, with which several processes train one model."""
    if "TF_CONFIG" not in os.environ:
        return fine("TF_CONFIG", "not set: one process trains")
    from rec.ops.distributed import Cluster

    try:
        cluster = Cluster.from_environment()
        addresses = [address for job in cluster.addresses.values() for address in job]
        for address in addresses:
            socket.getaddrinfo(address.rpartition(":")[0], None)
    except ValueError as error:
        return broken("TF_CONFIG", f"{error}; or unset it to train with one process")
    except OSError:
        return broken("TF_CONFIG", f"the name in {address} is unknown here: name an address")
    return fine("TF_CONFIG", f"{cluster.job} {cluster.index} of {len(addresses)} processes")


SMOKE = (
    "rec.data_prep.dummy --output-dir data/dummy --users 100 --items 60",
    "rec.train --stage retrieval --set retrieval.epochs=1 --set retrieval.arch=two_tower "
    "--set retrieval.taste_dim=0 --set retrieval.embedding_dim=8 --set index.k=20 --set ranking.candidates=20",
    "rec.recommend --user u1",
)


def run_smoke_test() -> Check:
    """Data, a retrieval model, its bundle and an answer, at the smallest size, in a directory that is removed."""
    with tempfile.TemporaryDirectory(prefix="rec-doctor-") as place:
        for line in SMOKE:
            command = [sys.executable, "-m", *line.split()]
            done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                last = done.stderr.strip().rpartition("\n")[2]
                return broken("smoke", f"python -m {line}: {last}")
    return fine("smoke", "data, training, a bundle, an answer")


def examine(port: int, has_smoke: bool, show: Callable[[Check], None]) -> list[Check]:
    """All checks, each shown as soon as it is known."""
    checks = []
    for check in _checks(port, has_smoke):
        show(check)
        checks.append(check)
    return checks


def _checks(port: int, has_smoke: bool) -> Iterator[Check]:
    yield check_python()
    yield check_processor()
    yield from check_libraries()
    yield check_memory()
    yield check_disk(Path.cwd(), "disk")
    yield check_disk(Path(tempfile.gettempdir()), "temporary disk", 0.1)
    yield check_port(port)
    yield check_cluster()
    if has_smoke:
        yield run_smoke_test()
