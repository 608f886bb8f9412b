"""What `python -m rec.serve` starts: the bundles that the command line names, a socket, and the processes behind it."""

import argparse
import os
import socket
import sys
import tempfile
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, cast

from rec.bundles import files
from rec.config import load_config
from rec.errors import UserError, warn
from rec.ops.registry import WandbStore, built_from

if TYPE_CHECKING:  # the metrics must not be made before `serve` says where
    from rec.ops.loop.service import LoopService
    from rec.ops.serving.reload import Bundles
    from rec.serving.answer import Backend

SHORTEST_WANDB = 60.0  # seconds between looks at W&B


def add_loop_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of rec/ops/loop/."""
    add = parser.add_argument
    events = "take events: a file of SQLite, or redis://HOST:PORT/0"
    add("--events", metavar="STORE", help=events)
    add("--shown", type=Path, metavar="DIR", help="keep what was shown, as Parquet by hour")
    add("--shown-days", type=float, default=90, help="how long (default: %(default)s)")
    variant = "serve these bundles to this share of the users; once per variant"
    add("--variant", action="append", default=[], metavar="NAME=ALIAS:SHARE", help=variant)
    add("--salt", default="", help="another one splits the users anew")


def find_bundles(args: argparse.Namespace) -> "Bundles":
    """The bundles of each variant, or the pair that the command line means now."""
    from rec.ops.loop.variants import parse_variants

    if not args.variant:
        return find_pair(args)
    savedmodels = Path(load_config(args.config, args.overrides).output.savedmodels)
    pairs = [files.find_pair(savedmodels, each.alias) for each in parse_variants(args.variant)]
    return tuple(bundle for pair in pairs for bundle in pair)


def find_pair(args: argparse.Namespace) -> files.Pair:
    """The bundles that the command line means now. A ranking bundle brings the retrieval bundle it was trained for."""
    retrieval = _named(args.retrieval_bundle)
    ranking = _named(args.ranking_bundle)
    if args.ranking_wandb:
        store, version = WandbStore.find(args.ranking_wandb, "ranking")
        ranking = store.directory("ranking", version)
        if not args.retrieval_wandb and retrieval is None:
            base = built_from(store, "ranking", version)["retrieval"]
            retrieval = store.directory("retrieval", base)
    if args.retrieval_wandb:
        store, version = WandbStore.find(args.retrieval_wandb, "retrieval")
        retrieval = store.directory("retrieval", version)
    if ranking is not None:
        return retrieval or files.retrieval_of(ranking), ranking
    if retrieval is not None:
        return retrieval, None
    savedmodels = Path(load_config(args.config, args.overrides).output.savedmodels)
    return files.find_pair(savedmodels, args.alias)


def _named(bundle: Path | None) -> Path | None:
    if bundle is None or (bundle / "metadata.json").exists():
        return bundle
    return files.resolve(bundle.parent, bundle.name)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
      UserError: the port is taken, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).partition(" (")[0]
        raise UserError(
            f"cannot listen on {host} port {port}: {reason}; choose another --port or --host"
        ) from error


def load_all(args: argparse.Namespace, bundles: "Bundles") -> list["Backend"]:
    """The models of each variant."""
    pairs = cast(list[files.Pair], list(zip(bundles[::2], bundles[1::2], strict=True)))
    return [load(args, pair) for pair in pairs]


def load(args: argparse.Namespace, pair: files.Pair) -> "Backend":
    """The models of the bundles, here or in TF Serving."""
    print(f"loading {' and '.join(str(path) for path in pair if path)}", file=sys.stderr)
    if args.tf_serving:
        from rec.ops.serving.tf_serving import connect

        return connect(args.tf_serving, *pair, allow_mismatch=args.allow_mismatch)
    import tensorflow as tf

    from rec.bundles.recommender import Recommender

    # One thread per operation: requests share calls instead, and the other cores are for other processes.
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    return Recommender.load(*pair, args.allow_mismatch)


def work(
    args: argparse.Namespace,
    bundles: "Bundles",
    listener: socket.socket,
    connection: Connection,
    at_once: bool,
) -> None:
    """One of the processes that answer. The arguments are those of supervisor.Target."""
    # A session of its own: Ctrl-C reaches the parent only, which ends this process. And where the kernel shares out
    # processor time by session (sched_autogroup), a process that loads takes none from those that answer.
    os.setsid()
    from rec.ops.serving import worker
    from rec.ops.serving.front import guarded_app
    from rec.ops.serving.gate import LOG_FORMATS, Tokens

    service = _make_service(args, bundles)
    supervision = worker.Supervision(connection, service, bundles)
    app = guarded_app(
        service,
        Tokens.from_environment(args.require_auth),
        supervision.reload,
        origins=tuple(args.cors_origin),
        access_log=None if args.no_access_log else LOG_FORMATS[args.log_format],
        more=service.addresses,
    )
    worker.run(supervision, app, listener, at_once, service.close)


def _make_service(args: argparse.Namespace, bundles: "Bundles") -> "LoopService":
    from rec.ops.loop.service import LoopService
    from rec.ops.loop.shown import ShownLog
    from rec.ops.loop.stores import open_store
    from rec.ops.loop.variants import parse_variants

    return LoopService(
        partial(load_all, args, bundles),
        variants=parse_variants(args.variant),
        salt=args.salt,
        store=open_store(args.events) if args.events else None,
        shown=ShownLog(args.shown, args.shown_days) if args.shown else None,
    )


def serve(args: argparse.Namespace) -> None:
    """Serves until the process is told to end."""
    with tempfile.TemporaryDirectory(prefix="rec-metrics-", ignore_cleanup_errors=True) as shared:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = shared  # before the metrics are made
        try:
            _supervise(args)
        finally:
            del os.environ["PROMETHEUS_MULTIPROC_DIR"]


def _supervise(args: argparse.Namespace) -> None:
    from rec.ops.loop.stores import open_store
    from rec.ops.serving.gate import Tokens
    from rec.ops.serving.supervisor import Supervisor

    _check_loop(args)
    if args.events:
        open_store(args.events)  # so that the command ends if it cannot be used
    warning = Tokens.from_environment(args.require_auth).warning()
    if warning is not None:
        warn(warning)
    listener = listen(args.host, args.port)
    host = f"[{args.host}]" if ":" in args.host else args.host
    print(f"listening on http://{host}:{listener.getsockname()[1]}", file=sys.stderr)
    follow = args.follow
    if follow and (args.retrieval_wandb or args.ranking_wandb):
        follow = max(follow, SHORTEST_WANDB)
    find = partial(find_bundles, args)
    Supervisor(find, partial(work, args), listener, args.workers, follow).run()


def _check_loop(args: argparse.Namespace) -> None:
    """Raises UserError for an option of the loop that is wrong, or meets one that names other bundles."""
    from rec.ops.loop.variants import parse_variants

    parse_variants(args.variant)
    if args.shown_days <= 0:
        raise UserError(f"--shown-days {args.shown_days:g}: must be above 0")
    for name in ("retrieval_bundle", "ranking_bundle", "retrieval_wandb", "ranking_wandb"):
        if args.variant and getattr(args, name) is not None:
            option = name.replace("_", "-")
            raise UserError(f"--variant names bundles by their alias: leave out --{option}")
