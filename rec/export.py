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
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version as library_version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import tensorflow as tf
from tensorflow_serving.apis import model_pb2, predict_pb2, prediction_log_pb2

import rec.ops.ratings  # noqa: F401  (registers the objective rating)
from rec.bundles import files
from rec.bundles.aliases import STAGES
from rec.bundles.metadata import (
    BundleMetadata,
    Coverage,
    Json,
    Stage,
    check_pair,
    read_metadata,
    verify,
)
from rec.bundles.recommender import RecommenderModule, load_bundle
from rec.bundles.signatures import Lookup, RankingModule, RetrievalModule
from rec.checkpoint import write_run
from rec.config import Config, add_config_arguments, load_config, overruled, without_effect
from rec.corpus import Corpus
from rec.data_prep.dataset import open_dataset
from rec.errors import UserError, command_parser, note, run_command, warn
from rec.features import vector_width
from rec.ranking.count_features import CountFeatures
from rec.ranking.train import TrainedRanking, load_ranking
from rec.retrieval.index import ExactIndex, ScannIndex, build_index
from rec.retrieval.train import TrainedRetrieval, load_retrieval
from rec.sequences import Sequences
from rec.tables import read_table

Module = RetrievalModule | RankingModule | RecommenderModule
LIBRARIES = ("tensorflow", "tf-keras", "tensorflow-recommenders", "scann", "numpy")
TUNING_USERS = 2000  # users whose queries the index is tuned and measured on
WARMUP_ITEMS = 3  # in a warm-up request's history


def export_retrieval(trained: TrainedRetrieval, config: Config) -> Path:
    """Builds the index, writes the bundle and publishes it; returns its directory."""
    window = trained.model.config.window
    max_seen = config.index.max_seen
    if max_seen < window:
        warn(
            f"index.max_seen: {max_seen} is also how much of a known user's stored history "
            f"is read: less than retrieval.window {window}"
        )
    corpus = trained.corpus
    _check_max_per(config, corpus)
    history = corpus.history("test")
    index, report = _build_index(trained, history, config)
    with tempfile.TemporaryDirectory() as assets:
        lookup = Lookup(corpus, history, max_seen, Path(assets))
        module = RetrievalModule(
            trained.model, index, lookup, config.index.k, exclude_seen=corpus.exclude_seen
        )
        metadata = replace(_metadata("retrieval", trained, corpus, config), index=report)
        return _save(module, metadata, _item_table(corpus), config)


def _check_max_per(config: Config, corpus: Corpus) -> None:
    """Raises UserError if the items lack a column of index.max_per."""
    for column in config.index.max_per:
        if column not in corpus.item_table:
            columns = ", ".join(map(str, corpus.item_table))
            raise UserError(f"index.max_per: there is no item column {column!r}, only {columns}")


def _build_index(
    trained: TrainedRetrieval, history: Sequences, config: Config
) -> tuple[ExactIndex | ScannIndex, Json]:
    """The index over the catalogue, tuned on queries of users in the training data, and what was measured."""
    users = np.flatnonzero(trained.corpus.train.lengths).astype(np.int32)
    users = np.random.default_rng(config.seed).permutation(users)[:TUNING_USERS]
    histories = history.last(users)
    index, report = build_index(
        trained.model.candidates().numpy(),
        trained.model.query_compiled(users, histories).numpy(),
        kind=config.index.kind,
        recall_target=config.index.recall_target,
        k=config.index.k,
        seed=config.seed,
    )
    if "fallback" in report:
        reason = report["fallback"]
        note(f"index: exact instead of {config.index.kind}: {reason}")
    return index, report


def export_ranking(trained: TrainedRanking, config: Config, source: Path) -> Path:
    """Writes the ranking bundle for `source`, the bundle of its retrieval model, and includes that model's towers.

    Returns the bundle's directory.
    """
    retrieval = trained.retrieval
    corpus = retrieval.corpus
    counts = CountFeatures(corpus.train, corpus.items.rows)
    with tempfile.TemporaryDirectory() as assets:
        lookup = Lookup(corpus, corpus.history("test"), config.index.max_seen, Path(assets))
        candidates = config.ranking.candidates
        module = RankingModule(trained.model, retrieval.model, counts, lookup, candidates)
        sources = {"retrieval": read_metadata(source).reference}
        metadata = replace(_metadata("ranking", trained, corpus, config), built_from=sources)
        return _save(module, metadata, _item_table(corpus), config)


def export_recommender(retrieval: Path, ranking: Path, config: Config) -> Path:
    """Composes two published bundles into one and publishes it. Raises UserError if they are not a pair."""
    first = verify(retrieval, "retrieval")
    second = verify(ranking, "ranking")
    check_pair(first, second, ranking)
    items = read_table(retrieval / "items.parquet")
    module = RecommenderModule(
        load_bundle(retrieval, "exclude_seen"),
        load_bundle(ranking, "rank_known"),
        second.config.ranking.candidates,
        items["item_id"],
    )
    metadata = replace(
        second,
        stage="recommender",
        architecture="recommender",
        built_from={"retrieval": first.reference, "ranking": second.reference},
        config=replace(second.config, index=first.config.index),
        index=first.index,
        run=None,
        history=None,
    )
    return _save(module, metadata, items, config)


def _metadata(
    stage: Stage, trained: TrainedRetrieval | TrainedRanking, corpus: Corpus, config: Config
) -> BundleMetadata:
    """What the bundles of both stages say about themselves."""
    index = replace(config.index, exclude_seen=corpus.exclude_seen)
    return BundleMetadata(
        stage=stage,
        run_id=trained.state.run_id,
        architecture=trained.model.config.arch,
        dataset=corpus.dataset_id,
        metrics=trained.state.metrics,
        built_from={},
        vocabulary=corpus.items.digest(),
        config=replace(trained.description.config_over(config), index=index),
        run=json.loads(write_run(trained.description)),
        history=trained.state.history,
        covers=Coverage(corpus.until, corpus.events),
    )


def _item_table(corpus: Corpus) -> pd.DataFrame:
    """The rows of items.parquet, without vectors: a server shows the columns, and the model holds the vectors."""
    table = corpus.item_table
    vectors = [name for name in table if vector_width(table[name])]
    return table.drop(columns=vectors).assign(popularity=corpus.popularity[corpus.items.first :])


def _save(module: Module, metadata: BundleMetadata, items: pd.DataFrame, config: Config) -> Path:
    """Writes a bundle and publishes it; returns its directory."""
    stage_dir = Path(config.output.savedmodels) / metadata.stage
    signatures = {name: getattr(module, name).get_concrete_function() for name in module.SIGNATURES}
    # Without ScaNN the empty list makes TensorFlow prove that the bundle needs no custom operation.
    has_scann = metadata.index is not None and metadata.index["kind"] == "scann"
    options = tf.saved_model.SaveOptions(namespace_whitelist=["Scann"] if has_scann else [])
    with files.draft(stage_dir) as draft:
        tf.saved_model.save(module, str(draft), signatures=signatures, options=options)
        items.to_parquet(draft / "items.parquet", index=False)
        if isinstance(module, RetrievalModule):
            np.save(draft / files.VECTORS, module.item_vectors())
        examples = items["item_id"][:WARMUP_ITEMS].tolist()
        _write_warmup(draft / "assets.extra", metadata.stage, signatures, examples)
        return stage_dir / str(files.publish(draft, stage_dir, _completed(metadata)))


def _completed(metadata: BundleMetadata) -> BundleMetadata:
    """The metadata with what is the same for all bundles of this run."""
    return replace(
        metadata,
        libraries=_library_versions(),
        git_commit=_git_commit(),
        command=shlex.join(["python", *sys.orig_argv[1:]]),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _write_warmup(
    directory: Path,
    stage: str,
    signatures: Mapping[str, tf.types.experimental.ConcreteFunction],
    items: list[str],
) -> None:
    """Writes a request to each signature, which TF Serving sends before it answers others."""
    directory.mkdir()
    with tf.io.TFRecordWriter(str(directory / "tf_serving_warmup_requests")) as writer:
        for name, function in signatures.items():
            spec = model_pb2.ModelSpec(name=stage, signature_name=name)
            writer.write(_warmup(spec, function, items).SerializeToString())


def _warmup(
    spec: model_pb2.ModelSpec, function: tf.types.experimental.ConcreteFunction, items: list[str]
) -> prediction_log_pb2.PredictionLog:
    """A request to one signature: a batch of one user, who is anonymous."""
    examples = {
        ("user_id", 1): [""],
        ("is_given", 1): [True],
        ("history", 2): [items],
        ("exclude", 2): [items],
        ("exclude_seen", 1): [True],
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


def _library_versions() -> dict[str, str]:
    """Of those that are installed: ScaNN may be missing."""
    installed = [name for name in LIBRARIES if find_spec(name.replace("-", "_"))]
    return {name: library_version(name) for name in installed}


def _git_commit() -> str | None:
    """The commit of this code, or None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def main() -> None:
    parser = command_parser("rec.export", __doc__)
    parser.add_argument("--stage", required=True, choices=(*STAGES, "all"))
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
        exported = export_all(config)
        print(json.dumps({stage: asdict(each) for stage, each in exported.items()}))
    else:
        print(json.dumps(asdict(export_stage(config, args.stage, args.checkpoint))))


@dataclass(frozen=True)
class Exported:
    """One published bundle: the command's JSON."""

    stage: str
    bundle: str
    version: int
    seconds: float


def _exported(bundle: Path, start: float) -> Exported:
    """For a bundle whose export began at `start`."""
    seconds = round(time.perf_counter() - start, 1)
    return Exported(bundle.parent.name, str(bundle), int(bundle.name), seconds)


def export_stage(config: Config, stage: str, checkpoint: Path | None = None) -> Exported:
    """Exports a stage from its checkpoint, or composes the recommender from the latest pair."""
    start = time.perf_counter()
    if stage == "retrieval":
        bundle = export_retrieval(_load_retrieval(config, checkpoint), config)
        _warn_of_older_pair(config, bundle)
    elif stage == "ranking":
        retrieval = _load_retrieval(config)
        ranking = _load_ranking(config, retrieval, checkpoint)
        bundle = export_ranking(ranking, config, bundle_of(config, retrieval))
    else:
        source = files.resolve(Path(config.output.savedmodels) / "ranking")
        bundle = export_recommender(files.retrieval_of(source), source, config)
    return _exported(bundle, start)


def export_all(config: Config) -> dict[str, Exported]:
    """Exports both stages from their checkpoints, and their composition.

    Raises UserError before anything is published if a checkpoint is missing, or if the two are no pair.
    """
    start = time.perf_counter()
    retrieval = _load_retrieval(config)
    ranking = _load_ranking(config, retrieval)
    first = _exported(export_retrieval(retrieval, config), start)
    start = time.perf_counter()
    second = _exported(export_ranking(ranking, config, Path(first.bundle)), start)
    start = time.perf_counter()
    recommender = export_recommender(Path(first.bundle), Path(second.bundle), config)
    return {each.stage: each for each in (first, second, _exported(recommender, start))}


def _load_retrieval(config: Config, checkpoint: Path | None = None) -> TrainedRetrieval:
    directory = checkpoint or Path(config.output.checkpoints) / "retrieval"
    retrieval = load_retrieval(directory, open_dataset(config.dataset))
    trained_config = retrieval.description.config_over(config)
    warn(*overruled(config, trained_config, ("retrieval", "features")))
    warn(*without_effect(config, retrieval.corpus.facts, ("index",)))
    return retrieval.under(config.index.exclude_seen)


def _load_ranking(
    config: Config, retrieval: TrainedRetrieval, checkpoint: Path | None = None
) -> TrainedRanking:
    directory = checkpoint or Path(config.output.checkpoints) / "ranking"
    ranking = load_ranking(directory, retrieval)
    warn(*overruled(config, ranking.description.config_over(config), ("ranking",)))
    return ranking


def _warn_of_older_pair(config: Config, bundle: Path) -> None:
    """A server follows the latest ranking bundle: a new retrieval bundle alone does not reach it."""
    stage_dir = Path(config.output.savedmodels) / "ranking"
    if files.versions(stage_dir):
        warn(
            f"no server follows {bundle}: ranking {max(files.versions(stage_dir))} belongs to "
            "another retrieval bundle; python -m rec.export --stage all exports both"
        )


def bundle_of(config: Config, trained: TrainedRetrieval) -> Path:
    """The newest retrieval bundle of this training run. Raises UserError if there is none."""
    stage_dir = Path(config.output.savedmodels) / "retrieval"
    for version in reversed(files.versions(stage_dir)):
        if read_metadata(stage_dir / str(version)).run_id == trained.state.run_id:
            return stage_dir / str(version)
    hint = "run python -m rec.export --stage retrieval first"
    raise UserError(f"{stage_dir} holds no bundle of the trained retrieval model: {hint}")


if __name__ == "__main__":
    run_command(main)
