"""Trains a stage and exports its bundle.

    python -m rec.train --stage retrieval                  two towers, an index, savedmodels/retrieval/N
    python -m rec.train --stage ranking                    a ranker for them, savedmodels/ranking/N
    python -m rec.train --stage all                        both, composed into savedmodels/recommender/N
    python -m rec.train --stage ranking --model-arch dlrm --init-from-retrieval checkpoints/retrieval
    python -m rec.train --stage retrieval --config config/movielens/ml_100k.yaml --set retrieval.epochs=3

To resume an interrupted run, run the same command again. A checkpoint has one writer at a time: a second command ends
with an error, or waits with --wait. With TF_CONFIG, the same command on several machines that share a directory for
checkpoints trains one model (rec/ops/distributed.py); the chief exports it.

A setting that has no effect (another key or the data decide so) is reported before training starts.

Tables and progress go to stderr. The last line of stdout is JSON: {"stage", "bundle", "version", "metrics",
"examples_per_second", "seconds"}, or for `--stage all` {"retrieval": {..}, "ranking": {..}, "recommender": {..}}.
"""

import argparse
import json
import os
import time
import uuid
from pathlib import Path
from typing import Any

from rec.checkpoint import RetrievalRun, read_run
from rec.config import Config, add_config_arguments, load_config, overruled, without_effect
from rec.corpus import load_corpus
from rec.data_prep.dataset import Dataset, open_dataset
from rec.errors import UserError, command_parser, run_command, warn
from rec.evaluation import evaluate, show_systems
from rec.export import bundle_of, export_ranking, export_recommender, export_retrieval
from rec.files import add_wait_argument, sole_writer
from rec.ops.distributed import distribution_of, exit_unless_chief
from rec.ops.rating_quality import rating_errors, show_ratings
from rec.ops.ratings import train_ratings
from rec.ops.tracking import track
from rec.ranking.archs import ARCHS
from rec.ranking.train import MODELS, load_ranking, train_ranking
from rec.recommend import show_examples
from rec.retrieval.encoders import ENCODERS
from rec.retrieval.model import RetrievalModel
from rec.retrieval.train import TrainedRetrieval, load_retrieval, train_retrieval
from rec.training import Distribution, OneProcess, TrainState

Answer = dict[str, Any]  # the command's JSON


def run_retrieval(config: Config, distribution: Distribution) -> tuple[TrainedRetrieval, Answer]:
    """Trains the two towers and exports them."""
    start = time.perf_counter()
    dataset = open_dataset(config.dataset)
    corpus = load_corpus(dataset, config.features).under(config.index.exclude_seen)
    warn(*without_effect(config, corpus.facts, ("retrieval", "index")))
    with track(config, "retrieval") as tracker:
        trained = train_retrieval(config, corpus, distribution=distribution, tracker=tracker)
        exit_unless_chief(distribution)
        if not isinstance(distribution, OneProcess):  # its variables belong to the cluster
            trained = load_retrieval(retrieval_checkpoint(config), dataset, corpus)
        bundle = export_retrieval(trained, config)
        tracker.log_bundle(bundle)
    return trained, _answer("retrieval", bundle, trained.state, start)


def run_ranking(
    config: Config,
    init_from: Path | None,
    distribution: Distribution,
    retrieval: TrainedRetrieval | None = None,
) -> Answer:
    """Trains a ranker for a retrieval model, by default the one in CHECKPOINTS, and exports it."""
    start = time.perf_counter()
    dataset = open_dataset(config.dataset)
    retrieval = retrieval or _latest_retrieval(config, dataset)
    check_ranking(retrieval.description.config_over(config), dataset, init_from)
    warn(*without_effect(config, retrieval.corpus.facts, ("ranking",)))
    source = bundle_of(config, retrieval)  # refuses before training if there is none
    train = train_ratings if config.ranking.objective == "rating" else train_ranking
    with track(config, "ranking") as tracker:
        trained = train(
            config,
            retrieval,
            init_from=_initial_model(init_from, dataset),
            init_name=None if init_from is None else str(init_from),
            distribution=distribution,
            tracker=tracker,
        )
        exit_unless_chief(distribution)
        if not isinstance(distribution, OneProcess):
            trained = load_ranking(Path(config.output.checkpoints) / "ranking", retrieval)
        tracker.use(source)
        bundle = export_ranking(trained, config, source)
        tracker.log_bundle(bundle)
    return _answer("ranking", bundle, trained.state, start)


def run_all(config: Config, init_from: Path | None, distribution: Distribution) -> Answer:
    """Both stages and their composition. Ends with a table of the test metrics and recommendations for three users."""
    check_ranking(config, open_dataset(config.dataset), init_from)
    trained, retrieval = run_retrieval(config, distribution)
    ranking = run_ranking(config, init_from, distribution, trained)
    start = time.perf_counter()
    bundle = _compose(config, Path(retrieval["bundle"]), Path(ranking["bundle"]))
    report = evaluate(config, "test", more=rating_errors)
    show_systems(report)
    show_ratings(report)
    show_examples(config)
    test_metrics = report["systems"]["recommender"]
    recommender = ranking | {
        "stage": "recommender",
        "bundle": str(bundle),
        "version": int(bundle.name),
        "metrics": ranking["metrics"] | {f"test/{name}": x for name, x in test_metrics.items()},
        "seconds": round(time.perf_counter() - start, 1),
    }
    return {"retrieval": retrieval, "ranking": ranking, "recommender": recommender}


def _compose(config: Config, retrieval: Path, ranking: Path) -> Path:
    """Exports two bundles as one recommender, which a run of its own tracks."""
    bundle = export_recommender(retrieval, ranking, config)
    with track(config, "recommender") as tracker:
        tracker.start(uuid.uuid4().hex[:8], None)
        tracker.use(retrieval)
        tracker.use(ranking)
        tracker.log_bundle(bundle)
    return bundle


def retrieval_checkpoint(config: Config) -> Path:
    return Path(config.output.checkpoints) / "retrieval"


def _latest_retrieval(config: Config, dataset: Dataset) -> TrainedRetrieval:
    """The model in CHECKPOINTS. Raises UserError if there is none, or if it was trained on other data."""
    directory = retrieval_checkpoint(config)
    retrieval = load_retrieval(directory, dataset).under(config.index.exclude_seen)
    warn(*overruled(config, retrieval.description.config_over(config), ("retrieval", "features")))
    if retrieval.description.dataset != dataset.id:
        raise UserError(
            f"{directory} was trained on another data set than {config.dataset}: "
            "run python -m rec.train --stage retrieval first"
        )
    return retrieval


def check_ranking(config: Config, dataset: Dataset, init_from: Path | None) -> None:
    """To be called before training. `config` says what the retrieval model is trained with.

    Raises:
      UserError: the data have no ratings to train on, or the checkpoint `init_from` is of another kind of model.
    """
    if config.ranking.objective == "rating" and not dataset.has_ratings:
        raise UserError(
            f"ranking.objective: rating needs a column of ratings, and {dataset.path} has none"
        )
    if init_from is None:
        return
    start = read_run(RetrievalRun, init_from)
    _check_same("dataset", init_from, start.dataset, dataset.id)
    _check_same("features", init_from, start.features, config.features)
    dim = config.retrieval.embedding_dim
    _check_same("retrieval.embedding_dim", init_from, start.retrieval.embedding_dim, dim)


def _check_same(key: str, checkpoint: Path, trained: object, wanted: object) -> None:
    if trained != wanted:
        raise UserError(
            f"--init-from-retrieval: {checkpoint} was trained with another {key} than the model: "
            "name a checkpoint of the same data set, features and retrieval.embedding_dim"
        )


def _initial_model(checkpoint: Path | None, dataset: Dataset) -> RetrievalModel | None:
    return None if checkpoint is None else load_retrieval(checkpoint, dataset).model


def _answer(stage: str, bundle: Path, state: TrainState, start: float) -> Answer:
    return {
        "stage": stage,
        "bundle": str(bundle),
        "version": int(bundle.name),
        "run_id": state.run_id,
        "metrics": state.metrics,
        "examples_per_second": round(state.examples_per_second, 1),
        "seconds": round(time.perf_counter() - start, 1),
    }


def check_names(config: Config) -> None:
    """Raises UserError if an architecture or an objective is not registered. To be called before training."""
    _check_name("retrieval.arch", config.retrieval.arch, ["auto", *ENCODERS])
    _check_name("ranking.arch", config.ranking.arch, list(ARCHS))
    _check_name("ranking.objective", config.ranking.objective, list(MODELS))


def _check_name(key: str, name: str, known: list[str]) -> None:
    if name not in known:
        raise UserError(f"{key}: there is no {name!r}; choose one of {', '.join(known)}")


def parse() -> argparse.Namespace:
    parser = command_parser("rec.train", __doc__)
    parser.add_argument("--stage", required=True, choices=("retrieval", "ranking", "all"))
    parser.add_argument(
        "--model-arch",
        metavar="ARCH",
        help="short for --set STAGE.arch=ARCH; not with --stage all, which has two",
    )
    parser.add_argument("--strategy", choices=("mirrored", "ps"), help="short for --set strategy=S")
    parser.add_argument(
        "--init-from-retrieval",
        type=Path,
        metavar="CHECKPOINT",
        help="start the ranker's embeddings from this checkpoint instead of checkpoints/mining, "
        "which has not seen the ranker's labels",
    )
    add_wait_argument(parser)
    add_config_arguments(parser)
    return parser.parse_args()


def config_of(args: argparse.Namespace) -> Config:
    """The config with the flags that stand for keys. Raises UserError for flags that exclude each other."""
    overrides = list(args.overrides)
    if args.strategy:
        overrides.append(f"strategy={args.strategy}")
    if args.model_arch:
        if args.stage == "all":
            raise UserError(
                "--model-arch is for one stage: with --stage all, "
                "use --set retrieval.arch=A or --set ranking.arch=A"
            )
        overrides.append(f"{args.stage}.arch={args.model_arch}")
    if args.stage == "all" and "TF_CONFIG" in os.environ:
        raise UserError("--stage all is for one process: with TF_CONFIG, train one stage at a time")
    if args.init_from_retrieval and args.stage == "retrieval":
        raise UserError("--init-from-retrieval starts a ranker: use it with --stage ranking or all")
    config = load_config(args.config, overrides)
    check_names(config)
    return config


def checkpoints_of(stage: str, config: Config, distribution: Distribution) -> list[Path]:
    """The checkpoints that training a stage writes, or `all`. Of several workers, only the chief writes."""
    if not distribution.is_chief:
        return []
    names = {
        "retrieval": ["retrieval"],
        "ranking": ["mining", "ranking"],
        "all": ["retrieval", "mining", "ranking"],
    }
    return [Path(config.output.checkpoints) / name for name in names[stage]]


def run_stage(
    stage: str, config: Config, init_from: Path | None, distribution: Distribution
) -> Answer:
    """Trains and exports a stage, or `all`; returns the command's JSON."""
    if stage == "retrieval":
        return run_retrieval(config, distribution)[1]
    if stage == "ranking":
        return run_ranking(config, init_from, distribution)
    return run_all(config, init_from, distribution)


def main() -> None:
    args = parse()
    config = config_of(args)
    distribution = distribution_of(config.strategy)  # before TensorFlow is used for anything else
    with sole_writer(*checkpoints_of(args.stage, config, distribution), wait=args.wait):
        answer = run_stage(args.stage, config, args.init_from_retrieval, distribution)
    print(json.dumps(answer))


if __name__ == "__main__":
    run_command(main)
