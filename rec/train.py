"""Trains a stage and exports its bundle.

    python -m rec.train --stage retrieval                  two towers, an index, savedmodels/retrieval/N
    python -m rec.train --stage ranking                    a ranker for them, savedmodels/ranking/N
    python -m rec.train --stage all                        both, composed into savedmodels/recommender/N
    python -m rec.train --stage ranking --model-arch dlrm --init-from-retrieval checkpoints/retrieval
    python -m rec.train --stage retrieval --config config/movielens/ml_100k.yaml --set retrieval.epochs=3

To resume an interrupted run, run the same command again. A checkpoint has one writer at a time: a second command
ends with an error, or waits with --wait. With TF_CONFIG, the same command on several machines with a common directory
for checkpoints trains one model (tf.distribute.MultiWorkerMirroredStrategy, or with --strategy ps
ParameterServerStrategy, whose tables lie in parts on servers); the chief exports it.

A setting that has no effect (another key or the data decide so) is reported before training starts.

Tables and progress go to stderr; the last line of stdout is JSON: {"stage", "bundle", "version", "metrics",
"examples_per_second", "seconds"}, or for `--stage all` {"retrieval": {..}, "ranking": {..}, "recommender": {..}}.
"""

import json
import os
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_recommenders as tfrs

from rec import metrics
from rec.checkpoint import TrainedRetrieval, corpus_files, describe, load_ranking, load_retrieval
from rec.config import (
    Config,
    add_config_arguments,
    load_config,
    overruled,
    settled,
    to_dict,
    with_run,
    without_effect,
)
from rec.counts import Counts, no_counts
from rec.data_prep.dataset import Dataset, open_dataset
from rec.errors import UserError, command_parser, run_command, warn
from rec.evaluate import evaluate, show_recommendations, show_systems
from rec.export import bundle_of, export_ranking, export_recommender, export_retrieval
from rec.features import FIRST_ITEM, PAD
from rec.files import add_wait_argument, sole_writer
from rec.fit import Fitted, fit, read_run, restore
from rec.pipeline import Corpus, Sequences, load_corpus, window_batches
from rec.ranking.archs import ARCHS
from rec.ranking.candidates import (
    CandidateLists,
    all_queries,
    first_queries,
    hold_out,
    list_batches,
    mine,
    rated_lists,
)
from rec.ranking.model import OBJECTIVES, RankingModel, score_lists
from rec.retrieval.model import RetrievalModel, calibrate, users_at_once
from rec.retrieval.towers import ENCODERS
from rec.tracking import Tracker, track
from rec.workers import workers

FACTORIZED_KS = (10, 100)
# What a ranker is chosen by: what it adds to the NDCG@10 of retrieval's order (which has 0), less one standard error,
# on validation's lists and those of one in JUDGED users, which it is not trained on. The best of several epochs by NDCG
# on validation alone is often luck, and worse than retrieval on test.
JUDGED = 5
GAIN = "val/ndcg@10_gain_low"
VALIDATION_USERS = (
    10_000  # more would take longer to validate than to train; also, of one metric, interactions
)
MOST_LISTS = 50_000  # that a ranker is trained on
RATINGS_A_LIST = 16  # a batch of ratings is so many times a batch of lists,
RATING_PACE = 3  # and its learning rate so many times as high


def train_retrieval(config: Config) -> tuple[TrainedRetrieval, dict[str, Any]]:
    """Trains the two towers on all training interactions, exports them; returns the model and the command's JSON.

    Of several workers, only the chief returns.
    """
    start = time.perf_counter()
    dataset = open_dataset(config.dataset)
    corpus = load_corpus(dataset, config.features)
    warn(*without_effect(config, corpus.facts, ("retrieval", "index")))
    directory = Path(config.output.checkpoints) / "retrieval"
    with track(config, "retrieval") as tracker:
        _fit_retrieval(config, corpus, corpus.train, directory, tracker=tracker)
        exit_unless_chief(config)
        trained = load_retrieval(directory, dataset, corpus)
        bundle = export_retrieval(trained, config)
        tracker.log_bundle(bundle)
    return trained, _answer("retrieval", bundle, trained.fitted, start)


def exit_unless_chief(config: Config) -> None:
    """Of several workers that train one model, only the chief exports it."""
    if not workers(config.strategy).extended.should_checkpoint:
        sys.exit(0)


def _fit_retrieval(
    config: Config,
    corpus: Corpus,
    train: Sequences,
    directory: Path,
    stop_after: int | None = None,
    tracker: Tracker | None = None,
) -> tuple[RetrievalModel, Fitted, dict[str, Any]]:
    """Fits a retrieval model; if told when to stop, without looking at validation data."""
    config = replace(
        config, retrieval=settled(config.retrieval, corpus.ordered, len(corpus.train.items))
    )
    settings = config.retrieval
    tf.keras.utils.set_random_seed(config.seed)
    with workers(config.strategy).scope():
        model = RetrievalModel(settings, corpus, train)
    run = describe(
        config, corpus, "retrieval", interactions=len(train.items), stop_after=stop_after
    )
    if stop_after is not None and read_run(directory) == run:
        return model, restore(model, directory), run
    model.start(train)
    queries = first_queries(corpus.val, VALIDATION_USERS, config.seed)
    relevant = corpus.val.matrix(queries[0], corpus.items.rows)

    def validate() -> dict[str, float]:
        lists = mine(model, corpus.train, corpus.val, queries, max(metrics.KS), whole=True)
        return {**_means(_per_user(lists.items, relevant)), **_factorized_top_k(model, corpus)}

    fitted = fit(
        model,
        lambda epoch: window_batches(corpus, settings, train, config.seed, epoch),
        len(train.items),
        directory,
        run,
        corpus_files(corpus),
        epochs=settings.epochs,
        stop_after=stop_after,
        learning_rate=settings.learning_rate,
        seed=config.seed,
        validate=validate if stop_after is None else None,
        calibrate=lambda: calibrate(model, corpus),
        patience=settings.patience,
        tracker=tracker,
    )
    return model, fitted, run


def _per_user(ranked: np.ndarray, relevant: Any) -> dict[str, np.ndarray]:
    """The metrics of ranked item rows [U, N]."""
    rows = np.where(ranked == PAD, -1, ranked)
    rows = np.pad(rows, [(0, 0), (0, max(metrics.KS) - rows.shape[1])], constant_values=-1)
    return metrics.per_user(rows, relevant)


def _means(values: dict[str, np.ndarray]) -> dict[str, float]:
    return {f"val/{name}": float(value.mean()) for name, value in values.items()}


def _factorized_top_k(model: RetrievalModel, corpus: Corpus) -> dict[str, float]:
    """TFRS's own metric: hits among all candidates, seen ones included, for VALIDATION_USERS interactions at most."""
    held = corpus.val
    candidates = model.candidates()
    depths = [min(k, model.n_items) for k in FACTORIZED_KS]  # TFRS fails beyond the catalogue
    search = tfrs.layers.factorized_top_k.BruteForce(k=max(depths))
    search.index(candidates, tf.strings.as_string(tf.range(FIRST_ITEM, FIRST_ITEM + model.n_items)))
    metric = tfrs.metrics.FactorizedTopK(candidates=search, ks=depths)
    drawn = np.sort(np.random.default_rng(0).permutation(len(held.items))[:VALIDATION_USERS])
    owners, step = held.users, users_at_once(model.n_items)
    for at in np.array_split(drawn, np.arange(step, len(drawn), step)):
        users = owners[at]
        queries = model.query_compiled(users, corpus.train.last(users, model.config.window))
        positive = tf.gather(candidates, held.items[at] - FIRST_ITEM)
        metric.update_state(queries, positive, tf.strings.as_string(held.items[at])[:, None])
    return {
        f"val/factorized_top_k@{k}": float(m.result())
        for k, m in zip(FACTORIZED_KS, metric.metrics, strict=True)
    }


def train_ranking(
    config: Config, init_from: Path | None, trained: TrainedRetrieval | None = None
) -> dict[str, Any]:
    """Trains a ranker for the latest trained retrieval model and exports it; returns the command's JSON."""
    start = time.perf_counter()
    dataset = open_dataset(config.dataset)
    if trained is None:
        trained = load_retrieval(Path(config.output.checkpoints) / "retrieval", dataset)
        warn(*overruled(config, trained.run, ("retrieval", "features")))
    if trained.run["dataset"] != dataset.id:
        raise UserError(
            f"{config.output.checkpoints}/retrieval was trained on another data set than {config.dataset}: "
            "run python -m rec.train --stage retrieval first"
        )
    check_ranking(with_run(config, trained.run), dataset, init_from)
    source = bundle_of(config, trained.run)  # there must be one: say so before training
    tf.keras.utils.set_random_seed(config.seed)
    settings, corpus = config.ranking, trained.corpus
    with workers(config.strategy).scope():
        model = RankingModel(
            settings, trained.model.config.window, trained.model.config.embedding_dim, corpus
        )
    warn(*without_effect(config, corpus.facts, ("ranking",)))
    by = _by_rating if settings.objective == "rating" else _by_clicks
    batches, examples, validate, monitor = by(config, trained, model)
    if init_from is not None:
        model.start_from(load_retrieval(init_from, dataset).model)
    run = describe(
        config,
        corpus,
        "ranking",
        retrieval_run=trained.run,
        init_from=None if init_from is None else str(init_from),
    )
    rate = settings.learning_rate * (RATING_PACE if settings.objective == "rating" else 1)
    with track(config, "ranking") as tracker:
        directory = Path(config.output.checkpoints) / "ranking"
        fit(
            model,
            batches,
            examples,
            directory,
            run,
            {},
            epochs=settings.epochs if examples else 0,
            learning_rate=rate,
            seed=config.seed,
            validate=validate,
            monitor=monitor,
            patience=settings.patience,
            tracker=tracker,
        )
        exit_unless_chief(config)
        model, fitted, run = load_ranking(directory, trained)
        tracker.use(source)
        exported = export_ranking(model, trained, config, run, fitted, source)
        tracker.log_bundle(exported)
    return _answer("ranking", exported, fitted, start)


Epochs = Callable[[int], tf.data.Dataset]
Validate = Callable[[], dict[str, float]]


def _by_clicks(
    config: Config, trained: TrainedRetrieval, model: RankingModel
) -> tuple[Epochs, int, Validate, str]:
    """Candidate lists of a retrieval model that has not seen their labels; validated on what will be served.

    Without a list to train on, the ranker stays what it is at the start: retrieval's order.
    """
    settings, corpus = config.ranking, trained.corpus
    past, labels = hold_out(corpus, settings.holdout, config.seed)
    before, served = (Counts(part, corpus.items.rows) for part in (past, corpus.train))
    queries = first_queries(corpus.val, VALIDATION_USERS, config.seed)
    relevant = corpus.val.matrix(queries[0], corpus.items.rows)
    offered = mine(
        trained.model, corpus.train, corpus.val, queries, settings.candidates, whole=True
    )
    mined = offered.take(np.arange(0))
    if len(labels.items):
        mined = _mine_lists(config, trained, model, past, labels)
    lists, judged = _judged_apart(mined)
    if not len(lists.user):
        warn(
            "no candidate list holds a right item, so the ranker keeps retrieval's order: "
            "it needs users with two or more training interactions, or a better retrieval model"
        )

    def added(lists: CandidateLists, order: np.ndarray) -> np.ndarray:
        ranked = np.take_along_axis(lists.labels, order, 1)
        return metrics.ndcg_of_lists(ranked, 10) - metrics.ndcg_of_lists(lists.labels, 10)

    def validate() -> dict[str, float]:
        of_judged, of_offered = (
            np.argsort(-score_lists(model, part, counts), axis=1, kind="stable")
            for part, counts in ((judged, before), (offered, served))
        )
        gain = np.concatenate([added(judged, of_judged), added(offered, of_offered)])
        values = _per_user(np.take_along_axis(offered.items, of_offered, 1), relevant)
        return {**_means(values), GAIN: float(gain.mean() - gain.std() / len(gain) ** 0.5)}

    def batches(epoch: int) -> tf.data.Dataset:
        rng = np.random.default_rng([config.seed, epoch])
        return list_batches(lists.take, before, len(lists.user), settings.batch_size, rng)

    return batches, lists.items.size, validate, GAIN


def _mine_lists(
    config: Config,
    trained: TrainedRetrieval,
    model: RankingModel,
    past: Sequences,
    labels: Sequences,
) -> CandidateLists:
    """The lists to train on: those that hold a right item. `model` starts with the miner's embeddings."""
    print(
        "training a retrieval model without the ranker's labels, to mine its candidates",
        file=sys.stderr,
    )
    corpus = trained.corpus
    of_miner = replace(config, retrieval=trained.model.config)
    stop_after = max(1, trained.fitted.best_epoch)
    directory = Path(config.output.checkpoints) / "mining"
    miner, _, _ = _fit_retrieval(of_miner, corpus, past, directory, stop_after)
    miner.lean(past, **trained.model.leaning)
    model.start_from(miner)  # not from the final model, whose embeddings have seen the labels
    # A leave-one-out test asks for the next item, not for all that follow.
    is_next = corpus.split_strategy == "leave_one_out"
    queries = all_queries(labels, is_next, MOST_LISTS, config.seed)
    n = config.ranking.candidates
    return mine(miner, past, labels, queries, n, whole=not is_next).with_hits()


def _judged_apart(lists: CandidateLists) -> tuple[CandidateLists, CandidateLists]:
    """The lists to train on, and those of one in JUDGED users; of very few users, all are trained on."""
    is_judged = lists.user % JUDGED == 0
    if is_judged.all():
        is_judged = np.zeros_like(is_judged)
    return lists.take(np.flatnonzero(~is_judged)), lists.take(np.flatnonzero(is_judged))


def _by_rating(
    config: Config, trained: TrainedRetrieval, model: RankingModel
) -> tuple[Epochs, int, Validate, str]:
    """Every training rating, from the history before it; or from all others of the user, as a test of a given split."""
    corpus, width = trained.corpus, model.window
    train, batch_size = corpus.train, config.ranking.batch_size * RATINGS_A_LIST
    known = train if corpus.split_strategy == "given" or not corpus.ordered else None
    val = rated_lists(corpus.val, np.arange(len(corpus.val.items)), train, width)
    print(
        f"ranking.objective rating: {batch_size:,} ratings a step ({RATINGS_A_LIST} times "
        f"ranking.batch_size), learning rate {config.ranking.learning_rate * RATING_PACE:g} "
        f"({RATING_PACE} times ranking.learning_rate), histories of {width} items "
        f"(retrieval reads {trained.model.config.window})",
        file=sys.stderr,
    )

    def batches(epoch: int) -> tf.data.Dataset:
        rng = np.random.default_rng([config.seed, epoch])
        return list_batches(
            lambda at: rated_lists(train, at, known, width),
            no_counts,
            len(train.items),
            batch_size,
            rng,
        )

    def validate() -> dict[str, float]:
        return {"val/rmse": metrics.rmse(score_lists(model, val, no_counts), val.labels)}

    return batches, len(train.items), validate, "val/rmse"


def _answer(stage: str, bundle: Path, fitted: Fitted, start: float) -> dict[str, Any]:
    seconds, pace = round(time.perf_counter() - start, 1), round(fitted.examples_per_second, 1)
    told = {
        "stage": stage,
        "bundle": str(bundle),
        "version": int(bundle.name),
        "run_id": fitted.run_id,
    }
    return told | {"metrics": fitted.metrics, "examples_per_second": pace, "seconds": seconds}


def train_all(config: Config, init_from: Path | None) -> dict[str, Any]:
    """Both stages and their composition; ends with a table of the test metrics and three users' recommendations."""
    check_ranking(config, open_dataset(config.dataset), init_from)
    trained, retrieval = train_retrieval(config)
    ranking = train_ranking(config, init_from, trained)
    start = time.perf_counter()
    bundle = export_recommender(Path(retrieval["bundle"]), Path(ranking["bundle"]), config)
    with track(config, "recommender") as tracker:
        tracker.start(uuid.uuid4().hex[:8], None)
        tracker.use(Path(retrieval["bundle"]))
        tracker.use(Path(ranking["bundle"]))
        tracker.log_bundle(bundle)
    report = evaluate(config, "test")
    show_systems(report)
    show_recommendations(config)
    metrics_of_test = {
        f"test/{name}": value for name, value in report["systems"]["recommender"].items()
    }
    recommender = {"stage": "recommender", "bundle": str(bundle), "version": int(bundle.name)}
    recommender |= {
        "metrics": ranking["metrics"] | metrics_of_test,
        "seconds": round(time.perf_counter() - start, 1),
    }
    recommender["examples_per_second"] = ranking["examples_per_second"]
    return {"retrieval": retrieval, "ranking": ranking, "recommender": recommender}


def check_names(config: Config) -> None:
    """Before anything is trained: raises UserError where an architecture or an objective is not registered."""
    retrieval, ranking = config.retrieval, config.ranking
    for key, name, known in (
        ("retrieval.arch", retrieval.arch, ("auto", *ENCODERS)),
        ("ranking.arch", ranking.arch, ARCHS),
        ("ranking.objective", ranking.objective, OBJECTIVES),
    ):
        if name not in known:
            raise UserError(f"{key}: there is no {name!r}; choose one of {', '.join(known)}")


def check_ranking(config: Config, dataset: Dataset, init_from: Path | None) -> None:
    """Before anything is trained: raises UserError if a ranker cannot be trained on these data, or not from there.

    `config` says what the retrieval model is trained with; `init_from` is a retrieval checkpoint.
    """
    if config.ranking.objective == "rating" and not dataset.has_ratings:
        raise UserError(
            f"ranking.objective: rating needs a column of ratings, and {dataset.path} has none"
        )
    if init_from is None:
        return
    run = read_run(init_from)
    if run is None or run["stage"] != "retrieval":
        raise UserError(
            f"--init-from-retrieval: {init_from} holds no finished retrieval checkpoint"
        )
    needed = {
        "dataset": dataset.id,
        "features": to_dict(config)["features"],
        "retrieval.embedding_dim": config.retrieval.embedding_dim,
    }
    found = {**run, "retrieval.embedding_dim": run["retrieval"]["embedding_dim"]}
    for key, value in needed.items():
        if found[key] != value:
            raise UserError(
                f"--init-from-retrieval: {init_from} was trained with another {key} than the model: "
                "name a checkpoint of the same data set, features and retrieval.embedding_dim"
            )


def checkpoints_of(stage: str, config: Config) -> list[Path]:
    """The checkpoints that the training of a stage writes, or of `all`; of several workers, only the chief writes."""
    if not workers(config.strategy).extended.should_checkpoint:
        return []
    names = {"retrieval": ["retrieval"], "ranking": ["mining", "ranking"]}
    names["all"] = names["retrieval"] + names["ranking"]
    return [Path(config.output.checkpoints) / name for name in names[stage]]


def main() -> None:
    parser = command_parser("rec.train", __doc__)
    parser.add_argument("--stage", required=True, choices=("retrieval", "ranking", "all"))
    parser.add_argument(
        "--model-arch",
        help="the stage's architecture instead of the config's (not with --stage all)",
    )
    parser.add_argument(
        "--strategy", choices=("mirrored", "ps"), help="of several processes (TF_CONFIG; see above)"
    )
    told = "start the ranker's embeddings from this one, not from checkpoints/mining, which has not seen its labels"
    parser.add_argument("--init-from-retrieval", type=Path, metavar="CHECKPOINT", help=told)
    add_wait_argument(parser)
    add_config_arguments(parser)
    args = parser.parse_args()
    overrides = list(args.overrides)
    if args.strategy:
        overrides.append(f"strategy={args.strategy}")
    if args.model_arch:
        if args.stage == "all":
            raise UserError(
                "--model-arch is for one stage; with --stage all, --set retrieval.arch=A or ranking.arch=A"
            )
        overrides.append(f"{args.stage}.arch={args.model_arch}")
    if args.stage == "all" and "TF_CONFIG" in os.environ:
        raise UserError(
            "--stage all is for one process: with TF_CONFIG, train the stages one after the other"
        )
    if args.init_from_retrieval and args.stage == "retrieval":
        raise UserError("--init-from-retrieval starts a ranker: use it with --stage ranking or all")
    config = load_config(args.config, overrides)
    check_names(config)
    workers(config.strategy)  # before TensorFlow is used for anything else
    with sole_writer(*checkpoints_of(args.stage, config), wait=args.wait):
        if args.stage == "retrieval":
            answer = train_retrieval(config)[1]
        else:
            answer = (train_all if args.stage == "all" else train_ranking)(
                config, args.init_from_retrieval
            )
    print(json.dumps(answer))


if __name__ == "__main__":
    run_command(main)
