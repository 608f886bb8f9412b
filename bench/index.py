"""Recall and latency of rec's index beside ScaNN itself, faiss, hnswlib and Chroma, one query a call, one thread.

    make bench   (or: pip install --requirement requirements-bench.lock)
    python -m bench.index                            100k and 1M items; an hour
    python -m bench.index --items 100000 --curve     with other settings too, for the chart

- The vectors are made up, as a two-tower model's are shaped: 64 dimensions, of which the j-th has standard deviation
  1 / sqrt(j); 1,000 clusters, their sizes as 1 / rank; an item is its cluster's centre and .7 times as much of its own;
  lengths lognormal, sigma .2 (--norms 0: unit vectors). A query is an item's direction and half as much of its own.
  All search for the 100 items with the largest inner products.
- `rec`: rec.retrieval.index.build_index with its recall target, saved and loaded as a signature of a SavedModel, called
  with one query. `exact`: the same of kind exact. `scann`: ScaNN's Python library with the settings that rec found.
- `faiss_hnsw`, `hnswlib`, `chroma`: graphs of 16 neighbours, built with ef 100; ef of the search is the least of a grid
  that reaches the recall target. Graphs by inner product stop short of it (.94 with any ef: short vectors are hardly
  linked), so one more dimension makes all items equally long, and they search by Euclidean distance, whose order is
  then the same (Bachrach et al. 2014). Graphs still find it hard, as a query then lies far from all items: with
  --norms 0 they need a tenth of the ef. All tune on the same 1,000 queries, and are measured on 1,000 others.
- Latency is the median of calls from Python to a NumPy array (Chroma: to its list of ids). The systems take turns, a
  few queries each, in an order drawn anew every round: what else the machine does hits all alike.

JSON: {ITEMS: {SYSTEM: {"recall@100", "p50_ms", "p10_ms", "setting", "build_seconds", "grown_mb"}}, "threads",
"peak_mb"}. On a busy machine p10 is nearer to what a call costs. `grown_mb` is what the process grew by while that
system was built; "setting" is ef, or the leaves that are searched. A system that is not installed, or not in --systems,
is null.
"""

import argparse
import gc
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rec.errors import UserError, run_command
from rec.retrieval.index import build_index

import tensorflow as tf  # isort: skip  (rec goes first: it switches to Keras 2)

DIM, K, QUERIES = 64, 100, 1000
CLUSTERS = 1000
EFS = (100, 130, 160, 200, 250, 320, 400, 500, 640, 800, 1000, 1300, 1600, 2000, 2500, 3200, 4000)
TURN = 20  # queries of one system before the next has its turn


@dataclass
class System:
    """A built index: `search` takes one query [1, DIM] and returns the rows of its K best."""

    search: Callable[[np.ndarray], np.ndarray]
    configure: Callable[[int], None] | None = None  # sets ef, or the leaves to search
    settings: tuple[int, ...] = ()  # what `configure` is tried with, from the fastest
    setting: int | None = None
    measured: dict[str, Any] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------------------
# Vectors


def vectors(items: int, norms: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Items [items, DIM] and queries [2 x QUERIES, DIM], float32."""
    rng = np.random.default_rng(seed)
    scale = 1 / np.sqrt(np.arange(1, DIM + 1))

    def drawn(rows: int) -> np.ndarray:
        return (rng.standard_normal((rows, DIM), np.float32) * scale).astype(np.float32)

    def unit(rows: np.ndarray) -> np.ndarray:
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    size = 1 / np.arange(1, CLUSTERS + 1)
    cluster = rng.choice(CLUSTERS, items, p=size / size.sum())
    found = unit(drawn(CLUSTERS)[cluster] + 0.7 * drawn(items))
    queries = unit(found[rng.integers(items, size=2 * QUERIES)] + 0.5 * unit(drawn(2 * QUERIES)))
    return found * rng.lognormal(0.0, norms, (items, 1)).astype(np.float32), queries


def equally_long(items: np.ndarray) -> np.ndarray:
    """[items, DIM + 1]: one more dimension, after which the nearest to [query, 0] is the largest inner product."""
    squared = np.square(items).sum(1, keepdims=True)
    return np.concatenate([items, np.sqrt(squared.max() - squared)], 1)


def longer(query: np.ndarray) -> np.ndarray:
    return np.pad(query, [(0, 0), (0, 1)])


def truth_of(items: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """[Q, K]: the rows with the largest inner products."""
    # A copy of each part's first columns: a view would keep the whole, 16 GB for a million items.
    split = np.array_split(queries, len(queries) // 25)
    parts = [np.argpartition(-(part @ items.T), K, axis=1)[:, :K].copy() for part in split]
    return np.concatenate(parts)


# ------------------------------------------------------------------------------------------------------------
# The systems


class _Bundle(tf.Module):
    """What a retrieval bundle does with its index, without the towers."""

    def __init__(self, index: Any) -> None:
        super().__init__()
        self.index = index

    @tf.function(input_signature=[tf.TensorSpec([None, DIM], tf.float32)])
    def search(self, query: tf.Tensor) -> dict[str, tf.Tensor]:
        scores, rows = self.index.search(query, K)
        return {"score": scores, "row": rows}


def rec_index(items: np.ndarray, tuning: np.ndarray, kind: str, target: float, seed: int) -> System:
    index, report = build_index(items, tuning, kind=kind, recall_target=target, k=K, seed=seed)
    print(f"  {report}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        bundle = _Bundle(index)
        options = tf.saved_model.SaveOptions(
            namespace_whitelist=["Scann"] if report["kind"] == "scann" else []
        )
        tf.saved_model.save(
            bundle, folder, signatures={"serving_default": bundle.search}, options=options
        )
        loaded = tf.saved_model.load(folder)
    call = loaded.signatures["serving_default"]

    def search(query: np.ndarray) -> np.ndarray:
        return call(query=tf.constant(query))["row"].numpy()[0]

    call.keep = loaded  # the variables live as long as the module that was loaded
    if report["kind"] != "scann":
        return System(search)
    searched, leaves = report["leaves_to_search"], report["leaves"]
    settings = sorted(
        {min(leaves, max(1, round(searched * factor))) for factor in (0.1, 0.25, 0.5, 1.0, 2.0)}
    )
    reorder = report["reorder"]
    return System(
        search,
        lambda n: loaded.index.settings.assign([n, reorder]),
        tuple(settings),
        searched,
        report,
    )


def bare_scann(items: np.ndarray, of_rec: System) -> System:
    import scann

    report = of_rec.measured
    if not report:
        raise UserError("rec fell back to exact search: there are no settings for ScaNN")
    builder = scann.scann_ops_pybind.builder(items, K, "dot_product")
    builder = builder.tree(report["leaves"], report["leaves_to_search"])
    searcher = (
        builder.score_ah(2, anisotropic_quantization_threshold=0.2)
        .reorder(report["reorder"])
        .build()
    )
    system = System(lambda query: np.zeros(0), None, of_rec.settings, of_rec.setting)

    def search(query: np.ndarray) -> np.ndarray:
        return searcher.search(query[0], leaves_to_search=system.setting)[0]

    def configure(leaves: int) -> None:
        system.setting = leaves

    system.search, system.configure = search, configure
    return system


def faiss_hnsw(items: np.ndarray, neighbours: int, ef_build: int) -> System:
    import faiss

    index = faiss.IndexHNSWFlat(DIM + 1, neighbours, faiss.METRIC_L2)
    index.hnsw.efConstruction = ef_build
    faiss.omp_set_num_threads(os.cpu_count())
    index.add(equally_long(items))
    faiss.omp_set_num_threads(1)

    def configure(ef: int) -> None:
        index.hnsw.efSearch = ef

    return System(lambda query: index.search(longer(query), K)[1][0], configure, EFS)


def hnswlib_graph(items: np.ndarray, neighbours: int, ef_build: int) -> System:
    import hnswlib

    index = hnswlib.Index("l2", DIM + 1)
    index.init_index(len(items), M=neighbours, ef_construction=ef_build, random_seed=0)
    index.add_items(equally_long(items), num_threads=os.cpu_count())
    return System(
        lambda query: index.knn_query(longer(query), K, num_threads=1)[0][0], index.set_ef, EFS
    )


def chroma_collection(items: np.ndarray, neighbours: int, ef_build: int, folder: str) -> System:
    import chromadb
    from chromadb.api.client import SharedSystemClient
    from chromadb.config import Settings

    graph = {
        "space": "l2",
        "max_neighbors": neighbours,
        "ef_construction": ef_build,
        "ef_search": K,
    }
    name = f"items-{len(items)}"

    def client() -> Any:
        SharedSystemClient.clear_system_cache()  # else a new ef has no effect on a collection that is loaded
        return chromadb.PersistentClient(folder, Settings(anonymized_telemetry=False))

    opened = client()
    collection = opened.create_collection(
        name, configuration={"hnsw": graph}, embedding_function=None
    )
    step = opened.get_max_batch_size()
    rows = equally_long(items)
    for start in range(0, len(items), step):
        part = rows[start : start + step]
        collection.add([str(row) for row in range(start, start + len(part))], embeddings=part)
        if start % (20 * step) == 0:
            print(f"  chroma: {start:,}", file=sys.stderr, flush=True)

    def search(query: np.ndarray) -> np.ndarray:
        found = collection.query(query_embeddings=longer(query), n_results=K, include=[])
        return np.array(found["ids"][0], np.int64)

    def configure(ef: int) -> None:
        nonlocal collection
        collection.modify(configuration={"hnsw": {"ef_search": ef}})
        collection = client().get_collection(name, embedding_function=None)

    return System(search, configure, EFS)


# ------------------------------------------------------------------------------------------------------------
# Measuring


def recall(system: System, queries: np.ndarray, truth: np.ndarray) -> float:
    found = [
        len(np.intersect1d(system.search(query[None]), best))
        for query, best in zip(queries, truth, strict=True)
    ]
    return float(np.mean(found)) / K


def tune(system: System, queries: np.ndarray, truth: np.ndarray, target: float) -> None:
    """Leaves the system with the least setting that reaches the target, or with the largest one."""
    if system.setting is not None or system.configure is None:
        return
    for setting in system.settings:
        system.configure(setting)
        system.setting = setting
        if recall(system, queries, truth) >= target:
            return


def timed(
    systems: dict[str, System], queries: np.ndarray, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Milliseconds of each query [Q] of each system."""
    taken: dict[str, list[float]] = {name: [] for name in systems}
    for system in systems.values():
        for query in queries[:TURN]:
            system.search(query[None])
    gc.disable()
    for start in range(0, len(queries), TURN):
        for name in rng.permutation(list(systems)).tolist():
            for query in queries[start : start + TURN]:
                begin = time.perf_counter()
                systems[name].search(query[None])
                taken[name].append(1000 * (time.perf_counter() - begin))
    gc.enable()
    return {name: np.array(values) for name, values in taken.items()}


def curve(
    system: System, queries: np.ndarray, truth: np.ndarray, rng: np.random.Generator
) -> list[list[float]]:
    """[recall, median milliseconds] of other settings, ending with the tuned one in place."""
    points, tuned = [], system.setting
    for setting in system.settings:
        if system.configure is not None and setting <= 4 * (tuned or 0):
            system.configure(setting)
            times = timed({"": system}, queries, rng)[""]
            points.append(
                [round(recall(system, queries, truth), 4), round(float(np.median(times)), 4)]
            )
    if system.configure is not None and tuned is not None:
        system.configure(tuned)
    return points


def rss_mb() -> int:
    return (
        int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 2**20
    )


def measure(items: int, names: list[str], args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """One catalogue's part of the JSON; `folder` is for Chroma's files."""
    embeddings, queries = vectors(items, args.norms, args.seed)
    truth = truth_of(embeddings, queries)
    rng = np.random.default_rng(args.seed)
    graph = (args.neighbours, args.ef_build)
    built: dict[str, System] = {}
    report: dict[str, Any] = dict.fromkeys(SYSTEMS)
    makers: dict[str, Callable[[], System]] = {
        "rec": lambda: rec_index(embeddings, queries[:QUERIES], "scann", args.target, args.seed),
        "exact": lambda: rec_index(embeddings, queries[:QUERIES], "exact", args.target, args.seed),
        "scann": lambda: bare_scann(embeddings, built["rec"]),
        "faiss_hnsw": lambda: faiss_hnsw(embeddings, *graph),
        "hnswlib": lambda: hnswlib_graph(embeddings, *graph),
        "chroma": lambda: chroma_collection(embeddings, *graph, folder),
    }
    for name in names:
        before, start = rss_mb(), time.perf_counter()
        try:
            built[name] = makers[name]()
        except ModuleNotFoundError as error:
            print(
                f"{name} is left out: {error}; pip install --requirement requirements-bench.lock",
                file=sys.stderr,
            )
            continue
        seconds = round(time.perf_counter() - start, 1)
        tune(built[name], queries[:QUERIES:2], truth[:QUERIES:2], args.target)
        report[name] = {
            "setting": built[name].setting,
            "build_seconds": seconds,
            "grown_mb": rss_mb() - before,
        }
        alone = timed({name: built[name]}, queries[QUERIES:][:200], rng)[name]
        print(
            f"{items:,} {name}: {report[name]}, alone {np.median(alone):.3f} ms",
            file=sys.stderr,
            flush=True,
        )
    for name, taken in timed(built, queries[QUERIES:], rng).items():
        report[name] |= {
            "recall@100": round(recall(built[name], queries[QUERIES:], truth[QUERIES:]), 4)
        }
        report[name] |= {
            f"p{part}_ms": round(float(np.percentile(taken, part)), 3) for part in (50, 10)
        }
        if args.curve:
            report[name]["curve"] = curve(built[name], queries[QUERIES::5], truth[QUERIES::5], rng)
        print(f"{items:,} {name}: {report[name]}", file=sys.stderr, flush=True)
    return report


SYSTEMS = ("rec", "exact", "scann", "faiss_hnsw", "hnswlib", "chroma")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument(
        "--systems",
        nargs="+",
        choices=SYSTEMS,
        default=SYSTEMS,
        metavar="SYSTEM",
        help="default: all",
    )
    parser.add_argument(
        "--target", type=float, default=0.95, help="recall@100; default: %(default)s"
    )
    parser.add_argument(
        "--norms", type=float, default=0.2, help="sigma of the vectors' log lengths"
    )
    parser.add_argument(
        "--neighbours", type=int, default=16, help="of a node of the graphs; default: %(default)s"
    )
    parser.add_argument(
        "--ef-build", type=int, default=100, help="of building the graphs; default: %(default)s"
    )
    parser.add_argument(
        "--curve", action="store_true", help="also measure other settings of each system"
    )
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    names = [name for name in SYSTEMS if name in args.systems]
    if "scann" in names and "rec" not in names:
        raise UserError("--systems: scann takes its settings from rec, so name both")
    if min(args.items) < 10 * K:
        raise UserError(f"--items: {10 * K:,} or more")
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    report: dict[str, Any] = {}
    for items in args.items:
        with tempfile.TemporaryDirectory() as folder:
            report[str(items)] = measure(items, names, args, folder)
        print(json.dumps(report), file=sys.stderr, flush=True)
        gc.collect()
    report |= {"threads": 1, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}
    print(json.dumps(report))


if __name__ == "__main__":
    run_command(main)
