"""Answers HTTP requests with a pair of bundles.

    python -m rec.serve                                      the latest ranking bundle and its retrieval bundle
    python -m rec.serve --alias production                   the pair that rec.promote has put there
    python -m rec.serve --ranking-bundle savedmodels/ranking/3 --port 8001
    python -m rec.serve --retrieval-bundle savedmodels/retrieval/production        an alias; retrieval alone
    curl -s 'http://127.0.0.1:8000/v1/users/u7/recommendations?k=5'
    curl -s http://127.0.0.1:8000/v1/recommend -H 'Content-Type: application/json' -d '{"history": ["i1", "i2"]}'

- Listens at once: /healthz says that the process is up, /readyz that the models are loaded and warm. With
  --workers, the other processes start once the first one is ready, and listen when they are warm.
- A process that dies is replaced. SIGHUP replaces all, one after the other. SIGTERM finishes what is in flight.
- Tokens: REC_API_TOKENS for the API, REC_ADMIN_TOKENS for POST /v1/models/reload (rec/ops/serving/gate.py). The server
  refuses to start if one of them is empty in the environment but has tokens in `.env`.
- A reload finds the bundles anew: `latest`, an alias and a W&B alias may by then mean another version.
- New bundles are loaded by a new process, which then takes the place of an old one. Bundles that fail are reported in
  /v1/models, /metrics and the log, and tried again.
- The config is only read for where the bundles are, and not if one is named.

--retrieval-wandb and --ranking-wandb download artifacts with W&B's client, which was not tried against W&B itself.
"""

import argparse
import os
import socket
import sys
import tempfile
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from rec.bundles import files
from rec.config import add_config_arguments, load_config
from rec.errors import UserError, command_parser, run_command
from rec.ops.registry import WandbStore, built_from

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from rec.serving.answer import Backend
    from rec.serving.service import Service

SHORTEST_WANDB = 60.0  # seconds between looks at W&B


def find_pair(args: argparse.Namespace) -> files.Pair:
    """The bundles that the command line means now; a ranking bundle brings the retrieval bundle it was trained for."""
    retrieval, ranking = _named(args.retrieval_bundle), _named(args.ranking_bundle)
    if args.ranking_wandb:
        store, version = WandbStore.find(args.ranking_wandb, "ranking")
        ranking = store.directory("ranking", version)
        if not args.retrieval_wandb and retrieval is None:
            retrieval = store.directory(
                "retrieval", built_from(store, "ranking", version)["retrieval"]
            )
    if args.retrieval_wandb:
        store, version = WandbStore.find(args.retrieval_wandb, "retrieval")
        retrieval = store.directory("retrieval", version)
    if ranking is not None:
        return retrieval or files.retrieval_of(ranking), ranking
    if retrieval is not None:
        return retrieval, None
    return files.find_pair(
        Path(load_config(args.config, args.overrides).output.savedmodels), args.alias
    )


def _named(bundle: Path | None) -> Path | None:
    if bundle is None or (bundle / "metadata.json").exists():
        return bundle
    return files.resolve(bundle.parent, bundle.name)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
      UserError: the port is taken, or the address is not this machine's.
    """
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET
        )
    except (OSError, OverflowError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).partition(" (")[0]
        raise UserError(
            f"cannot listen on {host} port {port}: {reason}; choose another --port or --host"
        ) from error


def parse() -> argparse.Namespace:
    parser = command_parser("rec.serve", __doc__)
    for stage in ("retrieval", "ranking"):
        group = parser.add_mutually_exclusive_group()
        group.add_argument(
            f"--{stage}-bundle",
            type=Path,
            metavar="D",
            help="a directory: SAVEDMODELS/STAGE/VERSION",
        )
        group.add_argument(
            f"--{stage}-wandb", metavar="REF", help="a W&B artifact: ENTITY/PROJECT/NAME:ALIAS"
        )
    parser.add_argument(
        "--alias", default="latest", help="of the config's bundles (default: %(default)s)"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0 for everyone who reaches this machine"
    )
    parser.add_argument(
        "--port", type=int, default=8000, help="0 for any free one (default: %(default)s)"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        help="processes, each with its models (default: %(default)s)",
    )
    parser.add_argument(
        "--follow", type=float, default=5, help="seconds between looks for newer bundles; 0: never"
    )
    parser.add_argument(
        "--tf-serving",
        action="append",
        metavar="URL",
        help="let TF Serving compute: http://host:8501",
    )
    parser.add_argument(
        "--require-auth", action="store_true", help="refuse every request while no token is set"
    )
    parser.add_argument(
        "--cors-origin", action="append", default=[], help="a page's origin that may call the API"
    )
    parser.add_argument("--no-access-log", action="store_true", help="no line a request on stdout")
    parser.add_argument(
        "--allow-mismatch", action="store_true", help="serve a pair that was not trained together"
    )
    add_config_arguments(parser)
    return parser.parse_args()


def build(args: argparse.Namespace, pair: files.Pair) -> "tuple[Service, ASGIApp]":
    """The service, which has not loaded its models yet, and the application in front of it."""
    from rec.ops.serving.gate import Tokens
    from rec.serving.app import create_app
    from rec.serving.service import Service

    service = Service(lambda: pair, lambda pair: load(args, pair))
    tokens = Tokens.from_environment(args.require_auth)
    app = create_app(service, tokens, tuple(args.cors_origin), not args.no_access_log)
    return service, app


def load(args: argparse.Namespace, pair: files.Pair) -> "Backend":
    """The models of the bundles, here or in TF Serving."""
    print(f"loading {' and '.join(str(path) for path in pair if path)}", file=sys.stderr)
    if args.tf_serving:
        from rec.ops.serving.tf_serving import connect

        return connect(args.tf_serving, *pair, allow_mismatch=args.allow_mismatch)
    import tensorflow as tf

    from rec.bundles.recommender import Recommender

    # One thread an operation: requests share calls instead, and the other cores are for other processes.
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    return Recommender.load(*pair, args.allow_mismatch)


def work(
    args: argparse.Namespace,
    pair: files.Pair,
    listener: socket.socket,
    connection: Connection,
    at_once: bool,
) -> None:
    """One of the processes that answer."""
    # A session of its own: Ctrl-C reaches the parent only, which ends this process. And where the kernel shares out
    # processor time by session (sched_autogroup), a process that loads takes none from those that answer.
    os.setsid()
    from rec.serving import worker

    service, app = build(args, pair)
    worker.run(service, app, listener, connection, at_once)


def main() -> None:
    args = parse()
    if args.workers < 1:
        raise UserError(f"--workers {args.workers}: must be at least 1")
    if args.follow < 0:
        raise UserError(f"--follow {args.follow}: must be 0 (never) or a number of seconds")
    with tempfile.TemporaryDirectory(prefix="rec-metrics-", ignore_cleanup_errors=True) as shared:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = shared  # before the metrics are made
        try:
            supervise(args)
        finally:
            del os.environ["PROMETHEUS_MULTIPROC_DIR"]


def supervise(args: argparse.Namespace) -> None:
    from rec.ops.serving.gate import Tokens
    from rec.ops.serving.supervisor import Supervisor

    warning = Tokens.from_environment(args.require_auth).warning()
    if warning is not None:
        print(f"warning: {warning}", file=sys.stderr)
    listener = listen(args.host, args.port)
    host = f"[{args.host}]" if ":" in args.host else args.host
    print(f"listening on http://{host}:{listener.getsockname()[1]}", file=sys.stderr)
    follow = args.follow
    if follow and (args.retrieval_wandb or args.ranking_wandb):
        follow = max(follow, SHORTEST_WANDB)
    find = partial(find_pair, args)
    Supervisor(find, partial(work, args), listener, args.workers, follow).run()


if __name__ == "__main__":
    run_command(main)
