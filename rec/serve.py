"""Answers HTTP requests with a pair of bundles.

    python -m rec.serve                                      the latest ranking bundle and its retrieval bundle
    python -m rec.serve --ranking-bundle savedmodels/ranking/3 --port 8001
    python -m rec.serve --retrieval-bundle savedmodels/retrieval/production        an alias; retrieval alone
    curl -s 'http://127.0.0.1:8000/v1/users/u7/recommendations?k=5'
    curl -s http://127.0.0.1:8000/v1/recommend -H 'Content-Type: application/json' -d '{"history": ["i1", "i2"]}'

- Listens at once: /healthz says that the process is up, /readyz that the models are loaded and warm.
- Tokens: REC_API_TOKENS for the API, REC_ADMIN_TOKENS for POST /v1/models/reload (rec/serving/auth.py). A reload
  finds the bundles anew: `latest`, an alias and a W&B alias may by then mean another version.
- The config is only read for where the bundles are, and not if one is named.

--retrieval-wandb and --ranking-wandb download an artifact with W&B's client. They were not tried against W&B itself.
"""

import argparse
import signal
import socket
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import uvicorn

from rec import registry
from rec.config import add_config_arguments, load_config
from rec.errors import UserError, run_command
from rec.recommender import Recommender
from rec.serving.app import Service, create_app
from rec.serving.auth import Tokens

CACHE = Path("~/.cache/rec/wandb")  # downloaded artifacts, one directory a version


def find_pair(args: argparse.Namespace) -> tuple[Path, Path | None]:
    """The bundles that the command line means now; a ranking bundle brings the retrieval bundle it was trained for."""
    retrieval = _named(args.retrieval_bundle, args.retrieval_wandb)
    ranking = _named(args.ranking_bundle, args.ranking_wandb)
    if retrieval is None and ranking is None:
        return registry.latest_pair(Path(load_config(args.config, args.overrides).output.savedmodels))
    if retrieval is None and args.ranking_wandb:
        raise UserError("--ranking-wandb needs its retrieval bundle: add --retrieval-wandb or --retrieval-bundle")
    if retrieval is None:
        assert ranking is not None
        retrieval = registry.retrieval_of(ranking)
    return retrieval, ranking


def _named(bundle: Path | None, artifact: str | None) -> Path | None:
    if artifact is not None:
        return from_wandb(artifact)
    if bundle is None or (bundle / "metadata.json").exists():
        return bundle
    return registry.resolve(bundle.parent, bundle.name)


def from_wandb(reference: str) -> Path:
    """Downloads an artifact, such as ENTITY/PROJECT/retrieval_bundle:production; what is there already is kept.

    Raises:
      UserError: W&B cannot be reached, or has no such artifact.
    """
    import wandb

    try:
        artifact = wandb.Api().artifact(reference)
        name, _, version = artifact.name.rpartition(":")
        root = CACHE.expanduser() / artifact.entity / artifact.project / name / version
        return Path(artifact.download(root=str(root)))
    except (wandb.errors.Error, ValueError, OSError) as error:
        raise UserError(f"W&B artifact {reference}: {' '.join(str(error).split())}") from error


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
      UserError: the port is taken, or the address is not this machine's.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).partition(" (")[0]
        raise UserError(f"cannot listen on {host} port {port}: {reason}; choose another --port or --host") from error


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # what uvicorn ends with once its requests are answered
    parser = argparse.ArgumentParser(
        prog="python -m rec.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for stage in ("retrieval", "ranking"):
        group = parser.add_mutually_exclusive_group()
        group.add_argument(f"--{stage}-bundle", type=Path, metavar="D", help="a directory: SAVEDMODELS/STAGE/VERSION")
        group.add_argument(f"--{stage}-wandb", metavar="REF", help="a W&B artifact: ENTITY/PROJECT/NAME:ALIAS")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 for everyone who reaches this machine")
    parser.add_argument("--port", type=int, default=8000, help="0 for any free one (default: %(default)s)")
    parser.add_argument("--require-auth", action="store_true", help="refuse every request while no token is set")
    parser.add_argument("--allow-mismatch", action="store_true", help="serve a pair that was not trained together")
    add_config_arguments(parser)
    args = parser.parse_args()
    tokens = Tokens.from_environment(args.require_auth)
    if args.require_auth and not tokens.api:
        print("warning: --require-auth without REC_API_TOKENS: requests are refused", file=sys.stderr)
    listener = listen(args.host, args.port)
    host = f"[{args.host}]" if ":" in args.host else args.host
    print(f"listening on http://{host}:{listener.getsockname()[1]}", file=sys.stderr)

    def load() -> Recommender:
        retrieval, ranking = find_pair(args)
        print(f"loading {retrieval}{f' and {ranking}' if ranking else ''}", file=sys.stderr)
        pair = Recommender.load(retrieval, ranking, args.allow_mismatch)
        names = " and ".join(f"{stage} version {version}" for stage, version in pair.versions().items())
        print(f"serving {names}", file=sys.stderr)
        return pair

    service = Service(load)
    settings: dict[str, Any] = {"log_level": "warning", "access_log": False, "timeout_graceful_shutdown": 10}
    server = uvicorn.Server(uvicorn.Config(create_app(service, tokens), lifespan="off", **settings))

    def loaded(loading: Future[None]) -> None:
        server.should_exit = loading.exception() is not None
        if not server.should_exit:
            print("ready", file=sys.stderr)

    loading = service.thread.submit(service.load)
    loading.add_done_callback(loaded)
    server.run(sockets=[listener])
    loading.result()


if __name__ == "__main__":
    run_command(main)
