"""Trained models -> SavedModel bundles: signatures, index, metadata, warm-up requests, published by rename.

    python -m rec.export --stage retrieval --set index.kind=exact        another index for the trained model
    python -m rec.export --stage retrieval --set dataset=data/newer      items added to the catalogue since
    python -m rec.export --stage recommender                             the latest matching pair as one bundle

A bundle loads in TF Serving as it stands: savedmodels/STAGE is a model's base path, VERSION its version. The last line
of stdout is JSON: {"stage", "bundle", "version", "seconds"}.
"""

import json
import shlex
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
from rec.config import Config, add_config_arguments, load_config, to_dict
from rec.corpus import Corpus
from rec.data_prep.dataset import open_dataset
from rec.errors import UserError, command_parser, run_command
from rec.ranking.count_features import CountFeatures
from rec.ranking.train import TrainedRanking, load_ranking
from rec.recommender import RecommenderModule, load_bundle
from rec.retrieval.index import build_index
from rec.retrieval.train import TrainedRetrieval, load_retrieval
from rec.training import TrainState

LIBRARIES = ("tensorflow", "tf-keras", "tensorflow-recommenders", "scann", "numpy")
TUNING_USERS = 2000  # users whose queries the index is tuned and measured on
WARMUP_ITEMS = 3  # in a warm-up request's history


def export_retrieval(trained: TrainedRetrieval, config: Config) -> Path:
    """Builds the index, writes the bundle and publishes it; returns its directory."""
    model, corpus, wanted = trained.model, trained.corpus, config.index
    history = corpus.history("test")
    users = np.flatnonzero(corpus.train.lengths).astype(np.int32)
    users = np.random.default_rng(config.seed).permutation(users)[:TUNING_USERS]
    queries = model.query_compiled(users, history.last(users, model.config.window)).numpy()
    candidates, kind, k, target = (
        model.candidates().numpy(),
        wanted.kind,
        wanted.k,
        wanted.recall_target,
    )
    index, report = build_index(
        candidates, queries, kind=kind, recall_target=target, k=k, seed=config.seed
    )
    if "fallback" in report:
        print(f"index: exact instead of {kind}: {report['fallback']}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as assets:
        module = RetrievalModule(
            model, index, Lookup(corpus, history, wanted.max_seen, Path(assets)), k
        )
        about = _about(corpus, model, trained.state, trained.description)
        return _save("retrieval", module, config, **about, index=report, built_from={})


def export_ranking(trained: TrainedRanking, config: Config) -> Path:
    """Writes the ranking bundle for the newest bundle of its retrieval model, whose towers it takes along.

    Returns the bundle's directory.
    """
    retrieval = trained.retrieval
    corpus = retrieval.corpus
    source = registry.read_metadata(bundle_of(config, retrieval.description))
    counts = CountFeatures(corpus.train, corpus.items.rows)
    with tempfile.TemporaryDirectory() as assets:
        history = corpus.history("test")
        lookup = Lookup(corpus, history, config.index.max_seen, Path(assets))
        module = RankingModule(trained.model, retrieval.model, counts, lookup)
        about = _about(corpus, trained.model, trained.state, trained.description)
        return _save("ranking", module, config, **about, built_from=_identities(source))


def export_recommender(retrieval: Path, ranking: Path, config: Config) -> Path:
    """Composes two published bundles into one and publishes it. Raises UserError if they are not a pair."""
    first, second = registry.verify(retrieval, "retrieval"), registry.verify(ranking, "ranking")
    registry.check_pair(first, second, ranking)
    items, count = (
        pd.read_parquet(retrieval / "items.parquet"),
        second["config"]["ranking"]["candidates"],
    )
    module = RecommenderModule(
        load_bundle(retrieval), load_bundle(ranking), count, items["item_id"]
    )
    kept = {key: first[key] for key in ("index", "dataset", "vocabulary")}
    kept |= {key: second[key] for key in ("metrics", "run_id")}
    told = {"architecture": "recommender", "built_from": _identities(first, second)}
    return _save("recommender", module, config, items, **kept, **told)


def _about(corpus: Corpus, model: Any, state: TrainState, run: dict[str, Any]) -> dict[str, Any]:
    """What a bundle holds beside its model: the items to show, whose rows its weights are for, how it was trained."""
    items = corpus.item_table.assign(popularity=corpus.popularity[corpus.items.first :])
    data = {"items": items, "dataset": corpus.dataset_id, "vocabulary": corpus.items.digest()}
    told = {"metrics": state.metrics, "run_id": state.run_id, "history": state.history}
    return {**data, "architecture": model.config.arch, "run": run, **told}


def _identities(*sources: dict[str, Any]) -> dict[str, Any]:
    """The bundles that a bundle is built from, by their metadata."""
    return {source["stage"]: {key: source[key] for key in ("version", "id")} for source in sources}


def _save(stage: str, module: Any, config: Config, items: pd.DataFrame, **metadata: Any) -> Path:
    """Writes a bundle and publishes it; returns its directory. `metadata` is what differs from stage to stage."""
    stage_dir = Path(config.output.savedmodels) / stage
    signatures = {name: getattr(module, name).get_concrete_function() for name in module.SIGNATURES}
    # Without ScaNN the empty list makes TensorFlow prove that the bundle needs no custom operation.
    has_scann = metadata.get("index", {}).get("kind") == "scann"
    options = tf.saved_model.SaveOptions(namespace_whitelist=["Scann"] if has_scann else [])
    command, created = (
        shlex.join(["python", *sys.orig_argv[1:]]),
        datetime.now(UTC).isoformat(timespec="seconds"),
    )
    metadata |= {
        "config": to_dict(config),
        "git_commit": _git_commit(),
        "command": command,
        "created": created,
    }
    metadata["libraries"] = {name: library_version(name) for name in LIBRARIES}
    with registry.draft(stage_dir) as draft:
        tf.saved_model.save(module, str(draft), signatures=signatures, options=options)
        items.to_parquet(draft / "items.parquet", index=False)
        (draft / "assets.extra").mkdir()
        with tf.io.TFRecordWriter(
            str(draft / "assets.extra" / "tf_serving_warmup_requests")
        ) as writer:
            for name, function in signatures.items():
                spec = model_pb2.ModelSpec(name=stage, signature_name=name)
                writer.write(
                    _warmup(
                        spec, function, items["item_id"][:WARMUP_ITEMS].tolist()
                    ).SerializeToString()
                )
        return stage_dir / str(registry.publish(draft, stage_dir, metadata))


def _warmup(
    spec: model_pb2.ModelSpec, function: Any, items: list[str]
) -> prediction_log_pb2.PredictionLog:
    """A request to one signature: a batch of one user, who is anonymous."""
    examples = {
        ("user_id", 1): [""],
        ("is_given", 1): [True],
        ("history", 2): [items],
        ("exclude", 2): [items],
        ("item_id", 1): items[:1],
        ("item_id", 2): [items],
    }
    request = predict_pb2.PredictRequest(model_spec=spec)
    for tensor in function.structured_input_signature[0]:
        value = tf.make_tensor_proto(examples[tensor.name, tensor.shape.rank], tensor.dtype)
        request.inputs[tensor.name].CopyFrom(value)
    return prediction_log_pb2.PredictionLog(
        predict_log=prediction_log_pb2.PredictLog(request=request)
    )


def _git_commit() -> str | None:
    """The commit of this code, or None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def main() -> None:
    parser = command_parser("rec.export", __doc__)
    parser.add_argument("--stage", required=True, choices=registry.STAGES)
    parser.add_argument("--checkpoint", type=Path, help="default: checkpoints/STAGE of the config")
    add_config_arguments(parser)
    args = parser.parse_args()
    start = time.perf_counter()
    bundle = export_stage(load_config(args.config, args.overrides), args.stage, args.checkpoint)
    seconds = round(time.perf_counter() - start, 1)
    print(
        json.dumps(
            {
                "stage": args.stage,
                "bundle": str(bundle),
                "version": int(bundle.name),
                "seconds": seconds,
            }
        )
    )


def export_stage(config: Config, stage: str, checkpoint: Path | None) -> Path:
    """Exports a stage from its checkpoint, or composes the recommender from the latest pair."""
    if stage == "recommender":
        ranking = registry.resolve(Path(config.output.savedmodels) / "ranking")
        return export_recommender(registry.retrieval_of(ranking), ranking, config)
    places = {name: Path(config.output.checkpoints) / name for name in ("retrieval", "ranking")}
    places |= {stage: checkpoint or places[stage]}
    retrieval = load_retrieval(places["retrieval"], open_dataset(config.dataset))
    if stage == "retrieval":
        return export_retrieval(retrieval, config)
    return export_ranking(load_ranking(places["ranking"], retrieval), config)


def bundle_of(config: Config, run: dict[str, Any]) -> Path:
    """The newest retrieval bundle that was exported from this training run. Raises UserError if there is none."""
    stage_dir = Path(config.output.savedmodels) / "retrieval"
    for version in reversed(registry.versions(stage_dir)):
        if registry.read_metadata(stage_dir / str(version)).get("run") == run:
            return stage_dir / str(version)
    hint = "run python -m rec.export --stage retrieval first"
    raise UserError(f"{stage_dir} holds no bundle of the trained retrieval model: {hint}")


if __name__ == "__main__":
    run_command(main)
