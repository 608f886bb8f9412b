"""Trained models -> SavedModel bundles: signatures, index, metadata, warm-up requests, published by rename.

    python -m rec.export --stage all --set dataset=data/newer            items added to the catalogue since
    python -m rec.export --stage all --set index.kind=exact              another index for the trained models
    python -m rec.export --stage retrieval --set index.kind=exact        only the retrieval bundle, for TF Serving
    python -m rec.export --stage recommender                             the latest matching pair as one bundle

A server follows the latest ranking bundle and the retrieval bundle that it belongs to: only `--stage all` exports both,
and the recommender. A bundle loads in TF Serving as it stands: savedmodels/STAGE is a model's base path, VERSION its
version. The last line of stdout is JSON: {"stage", "bundle", "version", "seconds"}, or for `--stage all`
{"retrieval": {..}, "ranking": {..}, "recommender": {..}}.
"""

import json
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version as library_version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tensorflow as tf
from tensorflow_serving.apis import model_pb2, predict_pb2, prediction_log_pb2

import rec.ops.ratings  # noqa: F401  (registers the objective rating)
from rec.bundles import files
from rec.bundles.recommender import RecommenderModule, load_bundle
from rec.bundles.signatures import Lookup, RankingModule, RetrievalModule
from rec.config import (
    Config,
    Index,
    add_config_arguments,
    load_config,
    overruled,
    section_of_run,
    to_dict,
    with_run,
    without_effect,
)
from rec.corpus import Corpus
from rec.data_prep.dataset import open_dataset
from rec.errors import UserError, command_parser, run_command, warn
from rec.ranking.count_features import CountFeatures
from rec.ranking.train import TrainedRanking, load_ranking
from rec.retrieval.index import build_index
from rec.retrieval.train import TrainedRetrieval, load_retrieval
from rec.tables import read_table
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
    queries = model.query_compiled(users, history.last(users)).numpy()
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
    if wanted.max_seen < model.config.window:
        warn(
            f"index.max_seen: {wanted.max_seen} is also how much of a known user's stored history "
            f"is read: less than retrieval.window {model.config.window}"
        )
    with tempfile.TemporaryDirectory() as assets:
        module = RetrievalModule(
            model, index, Lookup(corpus, history, wanted.max_seen, Path(assets)), k
        )
        about = _about(corpus, model, trained.state, trained.description)
        config = with_run(config, trained.description)
        return _save("retrieval", module, config, **about, index=report, built_from={})


def export_ranking(trained: TrainedRanking, config: Config, source: Path) -> Path:
    """Writes the ranking bundle for `source`, the bundle of its retrieval model, whose towers it takes along.

    Returns the bundle's directory.
    """
    retrieval = trained.retrieval
    corpus = retrieval.corpus
    counts = CountFeatures(corpus.train, corpus.items.rows)
    with tempfile.TemporaryDirectory() as assets:
        history = corpus.history("test")
        lookup = Lookup(corpus, history, config.index.max_seen, Path(assets))
        module = RankingModule(trained.model, retrieval.model, counts, lookup)
        about = _about(corpus, trained.model, trained.state, trained.description)
        config = with_run(with_run(config, retrieval.description), trained.description)
        built_from = _identities(files.read_metadata(source))
        return _save("ranking", module, config, **about, built_from=built_from)


def export_recommender(retrieval: Path, ranking: Path, config: Config) -> Path:
    """Composes two published bundles into one and publishes it. Raises UserError if they are not a pair."""
    first, second = files.verify(retrieval, "retrieval"), files.verify(ranking, "ranking")
    files.check_pair(first, second, ranking)
    items = read_table(retrieval / "items.parquet")
    count = second["config"]["ranking"]["candidates"]
    module = RecommenderModule(
        load_bundle(retrieval), load_bundle(ranking), count, items["item_id"]
    )
    metadata = {key: first[key] for key in ("index", "dataset", "vocabulary")}
    metadata |= {key: second[key] for key in ("metrics", "run_id")}
    metadata |= {"architecture": "recommender", "built_from": _identities(first, second)}
    config = with_run(with_run(config, first["run"]), second["run"])
    config = replace(
        config,
        index=section_of_run(Index, first["config"], "index"),
        ranking=replace(config.ranking, candidates=count),
    )
    return _save("recommender", module, config, items, **metadata)


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
    with files.draft(stage_dir) as draft:
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
        return stage_dir / str(files.publish(draft, stage_dir, metadata))


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
    parser.add_argument("--stage", required=True, choices=(*files.STAGES, "all"))
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="of --stage retrieval or ranking; default: STAGE in output.checkpoints of the config",
    )
    add_config_arguments(parser)
    args = parser.parse_args()
    if args.checkpoint and args.stage in ("recommender", "all"):
        raise UserError(
            f"--checkpoint is for one checkpoint, and --stage {args.stage} needs two: "
            "use --set output.checkpoints=DIR"
        )
    config = load_config(args.config, args.overrides)
    if args.stage == "all":
        print(json.dumps(export_all(config)))
        return
    print(json.dumps(export_stage(config, args.stage, args.checkpoint)))


def export_stage(config: Config, stage: str, checkpoint: Path | None = None) -> dict[str, Any]:
    """Exports a stage from its checkpoint, or composes the recommender from the latest pair; returns the JSON."""
    start = time.perf_counter()
    if stage == "recommender":
        ranking = files.resolve(Path(config.output.savedmodels) / "ranking")
        bundle = export_recommender(files.retrieval_of(ranking), ranking, config)
        return _answer(bundle, start)
    if stage == "retrieval":
        bundle = export_retrieval(_load_retrieval(config, checkpoint), config)
        _warn_of_older_pair(config, bundle)
        return _answer(bundle, start)
    retrieval = _load_retrieval(config)
    trained = _load_ranking(config, retrieval, checkpoint)
    source = bundle_of(config, retrieval.description)
    return _answer(export_ranking(trained, config, source), start)


def export_all(config: Config) -> dict[str, dict[str, Any]]:
    """Exports both stages from their checkpoints, and their composition; returns the command's JSON.

    Raises UserError before anything is published if a checkpoint is missing, or if the two are no pair.
    """
    start = time.perf_counter()
    retrieval = _load_retrieval(config)
    ranking = _load_ranking(config, retrieval)
    first = export_retrieval(retrieval, config)
    answer = {"retrieval": _answer(first, start)}
    start = time.perf_counter()
    second = export_ranking(ranking, config, first)
    answer["ranking"] = _answer(second, start)
    start = time.perf_counter()
    answer["recommender"] = _answer(export_recommender(first, second, config), start)
    return answer


def _load_retrieval(config: Config, checkpoint: Path | None = None) -> TrainedRetrieval:
    directory = checkpoint or Path(config.output.checkpoints) / "retrieval"
    retrieval = load_retrieval(directory, open_dataset(config.dataset))
    warn(*overruled(config, retrieval.description, ("retrieval", "features")))
    warn(*without_effect(config, retrieval.corpus.facts, ("index",)))
    return retrieval


def _load_ranking(
    config: Config, retrieval: TrainedRetrieval, checkpoint: Path | None = None
) -> TrainedRanking:
    directory = checkpoint or Path(config.output.checkpoints) / "ranking"
    trained = load_ranking(directory, retrieval)
    warn(*overruled(config, trained.description, ("ranking",)))
    return trained


def _warn_of_older_pair(config: Config, bundle: Path) -> None:
    """A server follows the latest ranking bundle: a new retrieval bundle alone does not reach it."""
    stage_dir = Path(config.output.savedmodels) / "ranking"
    if files.versions(stage_dir):
        warn(
            f"no server follows {bundle}: ranking {max(files.versions(stage_dir))} belongs to "
            "another retrieval bundle; python -m rec.export --stage all exports both"
        )


def _answer(bundle: Path, start: float) -> dict[str, Any]:
    """The command's JSON for a bundle whose export began at `start`."""
    return {
        "stage": bundle.parent.name,
        "bundle": str(bundle),
        "version": int(bundle.name),
        "seconds": round(time.perf_counter() - start, 1),
    }


def bundle_of(config: Config, run: dict[str, Any]) -> Path:
    """The newest retrieval bundle that was exported from this training run. Raises UserError if there is none."""
    stage_dir = Path(config.output.savedmodels) / "retrieval"
    for version in reversed(files.versions(stage_dir)):
        if files.read_metadata(stage_dir / str(version)).get("run") == run:
            return stage_dir / str(version)
    hint = "run python -m rec.export --stage retrieval first"
    raise UserError(f"{stage_dir} holds no bundle of the trained retrieval model: {hint}")


if __name__ == "__main__":
    run_command(main)
