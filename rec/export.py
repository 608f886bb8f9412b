"""Trained models -> SavedModel bundles: signatures, index, metadata, warm-up requests, published by rename.

    python -m rec.export --stage retrieval --set index.kind=exact        another index for the trained model
    python -m rec.export --stage retrieval --set dataset=data/newer      items added to the catalogue since
    python -m rec.export --stage recommender                             the latest matching pair as one bundle

A bundle loads in TF Serving as it stands: savedmodels/STAGE is a model's base path, VERSION its version. The last line
of stdout is JSON: {"stage", "bundle", "version", "seconds"}.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version as library_version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tensorflow as tf
from tensorflow_serving.apis import model_pb2, predict_pb2, prediction_log_pb2

from rec import registry
from rec.bundle import Lookup, RankingModule, RetrievalModule
from rec.checkpoint import TrainedRetrieval, load_ranking, load_retrieval
from rec.config import Config, add_config_arguments, load_config, to_dict
from rec.data_prep.dataset import open_dataset
from rec.errors import UserError, run_command
from rec.pipeline import Corpus
from rec.ranking.model import RankingModel
from rec.recommender import RecommenderModule, load_bundle
from rec.retrieval.index import build_index
from rec.retrieval.model import RetrievalModel

LIBRARIES = ("tensorflow", "tf-keras", "tensorflow-recommenders", "scann", "numpy")
TUNING_USERS = 2000  # users whose queries the index is tuned and measured on
WARMUP_HISTORY = 3  # items in a warm-up request's history


def export_retrieval(
    model: RetrievalModel, corpus: Corpus, config: Config, run: dict[str, Any], metrics: dict[str, float]
) -> Path:
    """Builds the index, writes the bundle and publishes it; returns its directory."""
    candidates = model.candidates().numpy()
    users = np.flatnonzero(corpus.train.lengths).astype(np.int32)
    users = np.random.default_rng(config.seed).permutation(users)[:TUNING_USERS]
    history = corpus.history("test")
    queries = model.query_compiled(users, history.last(users, model.config.window)).numpy()
    index, report = build_index(
        candidates, queries, kind=config.index.kind, recall_target=config.index.recall_target, k=config.index.k,
        seed=config.seed,
    )  # fmt: skip
    if "fallback" in report:
        print(f"index: exact instead of {config.index.kind}: {report['fallback']}", file=sys.stderr)
    details = {"index": report, "vocabulary": corpus.items.digest()}
    with tempfile.TemporaryDirectory() as assets:
        lookup = Lookup(corpus, history, config.index.max_seen, Path(assets))
        module = RetrievalModule(model, index, lookup, config.index.k)
        return _save("retrieval", module, corpus, config, run, metrics, details, {})


def export_ranking(
    model: RankingModel,
    retrieval: TrainedRetrieval,
    retrieval_bundle: Path,
    config: Config,
    run: dict[str, Any],
    metrics: dict[str, float],
) -> Path:
    """Writes the ranking bundle for a retrieval bundle, whose towers it takes along, and publishes it."""
    corpus = retrieval.corpus
    with tempfile.TemporaryDirectory() as assets:
        lookup = Lookup(corpus, corpus.history("test"), config.index.max_seen, Path(assets))
        module = RankingModule(model, retrieval.model, lookup)
        details = {"vocabulary": corpus.items.digest()}
        return _save("ranking", module, corpus, config, run, metrics, details, {"retrieval": retrieval_bundle})


def export_recommender(retrieval: Path, ranking: Path, config: Config, metrics: dict[str, float]) -> Path:
    """Composes two published bundles into one and publishes it. It is made from the bundles alone.

    Raises:
      UserError: the ranking bundle was trained for another retrieval version.
    """
    found = {"retrieval": registry.read_metadata(retrieval), "ranking": registry.read_metadata(ranking)}
    registry.check_pair(found["retrieval"], found["ranking"], ranking)
    candidates = found["ranking"]["config"]["ranking"]["candidates"]
    module = RecommenderModule(load_bundle(retrieval), load_bundle(ranking), candidates)
    stage_dir = Path(config.output.savedmodels) / "recommender"
    with registry.draft(stage_dir) as draft:
        examples = json.loads((retrieval / "assets.extra" / "examples.json").read_text())
        _write_saved_model(module, draft, examples, "recommender", found["retrieval"]["index"]["kind"] == "scann")
        pd.read_parquet(retrieval / "items.parquet").to_parquet(draft / "items.parquet", index=False)
        shared = {key: found["retrieval"][key] for key in ("dataset", "vocabulary", "index")}
        metadata = _metadata(config, "recommender", metrics, {"retrieval": retrieval, "ranking": ranking})
        return stage_dir / str(registry.publish(draft, stage_dir, {**metadata, **shared}))


def _save(
    stage: str,
    module: RetrievalModule | RankingModule,
    corpus: Corpus,
    config: Config,
    run: dict[str, Any],
    metrics: dict[str, float],
    details: dict[str, Any],
    built_from: dict[str, Path],
) -> Path:
    stage_dir = Path(config.output.savedmodels) / stage
    with registry.draft(stage_dir) as draft:
        items = corpus.items.ids[:WARMUP_HISTORY].tolist()
        user = str(corpus.users.ids[0]) if len(corpus.users.ids) else ""
        examples = {"user_id": user, "history": items, "item_id": items, "is_given": True, "exclude": items}
        _write_saved_model(module, draft, examples, stage, details.get("index", {}).get("kind") == "scann")
        items_table = corpus.item_table.assign(popularity=corpus.popularity[corpus.items.first :])
        items_table.to_parquet(draft / "items.parquet", index=False)
        metadata = _metadata(config, module.model.get.config.arch, metrics, built_from)
        metadata |= {"dataset": corpus.dataset_id, "run": run, **details}
        return stage_dir / str(registry.publish(draft, stage_dir, metadata))


def _write_saved_model(module: Any, directory: Path, examples: dict[str, Any], stage: str, scann: bool) -> None:
    signatures = module.signatures()
    # Without ScaNN the empty list makes TensorFlow prove that the bundle needs no custom operation.
    options = tf.saved_model.SaveOptions(namespace_whitelist=["Scann"] if scann else [])
    tf.saved_model.save(module, str(directory), signatures=signatures, options=options)
    extra = directory / "assets.extra"
    extra.mkdir()
    (extra / "examples.json").write_text(json.dumps(examples, ensure_ascii=False))
    with tf.io.TFRecordWriter(str(extra / "tf_serving_warmup_requests")) as writer:
        for name, function in signatures.items():
            writer.write(_warmup(name, function, examples, stage).SerializeToString())


def _warmup(name: str, function: Any, examples: dict[str, Any], stage: str) -> prediction_log_pb2.PredictionLog:
    """A request for one signature, with one example in the batch."""
    request = predict_pb2.PredictRequest(model_spec=model_pb2.ModelSpec(name=stage, signature_name=name))
    for spec in function.structured_input_signature[0]:
        example = examples[spec.name]
        if spec.shape.rank == 1 and isinstance(example, list):
            example = example[0]
        request.inputs[spec.name].CopyFrom(tf.make_tensor_proto([example], spec.dtype))
    return prediction_log_pb2.PredictionLog(predict_log=prediction_log_pb2.PredictLog(request=request))


def _metadata(
    config: Config, architecture: str, metrics: dict[str, float], built_from: dict[str, Path]
) -> dict[str, Any]:
    sources = {stage: registry.read_metadata(path) for stage, path in built_from.items()}
    return {
        "architecture": architecture,
        "config": to_dict(config),
        "metrics": metrics,
        "built_from": {stage: {key: source[key] for key in ("version", "id")} for stage, source in sources.items()},
        "libraries": {name: library_version(name) for name in LIBRARIES},
        "git_commit": _git_commit(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _git_commit() -> str | None:
    """The commit of this code, or None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m rec.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", required=True, choices=registry.STAGES)
    parser.add_argument("--checkpoint", type=Path, help="default: checkpoints/STAGE of the config")
    add_config_arguments(parser)
    args = parser.parse_args()
    config = load_config(args.config, args.overrides)
    start = time.perf_counter()
    bundle = export_stage(config, args.stage, args.checkpoint)
    seconds = round(time.perf_counter() - start, 1)
    print(json.dumps({"stage": args.stage, "bundle": str(bundle), "version": int(bundle.name), "seconds": seconds}))


def export_stage(config: Config, stage: str, checkpoint: Path | None = None) -> Path:
    """Exports a stage from its checkpoint, or composes the recommender from the latest pair."""
    if stage == "recommender":
        return latest_recommender(config)
    checkpoints = Path(config.output.checkpoints)
    retrieval_dir = (checkpoint if stage == "retrieval" else None) or checkpoints / "retrieval"
    trained = load_retrieval(retrieval_dir, open_dataset(config.dataset))
    if stage == "retrieval":
        return export_retrieval(trained.model, trained.corpus, config, trained.run, trained.fitted.metrics)
    model, fitted, run = load_ranking(checkpoint or checkpoints / "ranking", trained)
    bundle = bundle_of(config, trained.run)
    return export_ranking(model, trained, bundle, config, run, fitted.metrics)


def bundle_of(config: Config, run: dict[str, Any]) -> Path:
    """The newest retrieval bundle that was exported from this training run.

    Raises:
      UserError: there is none.
    """
    stage_dir = Path(config.output.savedmodels) / "retrieval"
    for version in reversed(registry.versions(stage_dir)):
        if registry.read_metadata(stage_dir / str(version)).get("run") == run:
            return stage_dir / str(version)
    raise UserError(
        f"{stage_dir} holds no bundle of the trained retrieval model: run python -m rec.export --stage retrieval first"
    )


def latest_recommender(config: Config) -> Path:
    """Composes the latest ranking bundle with the retrieval bundle that it was trained for."""
    ranking = registry.resolve(Path(config.output.savedmodels) / "ranking")
    metrics = registry.read_metadata(ranking, "ranking")["metrics"]
    return export_recommender(registry.retrieval_of(ranking), ranking, config, metrics)


if __name__ == "__main__":
    run_command(main)
