"""Answers HTTP requests with a pair of bundles.

    python -m rec.serve                                      the latest ranking bundle and its retrieval bundle
    python -m rec.serve --alias production                   the pair that rec.promote has put there
    python -m rec.serve --ranking-bundle savedmodels/ranking/3 --port 8001
    python -m rec.serve --retrieval-bundle savedmodels/retrieval/production        an alias; retrieval alone
    python -m rec.serve --openapi                            the schema of the API, without a server
    curl -s 'http://127.0.0.1:8000/v1/users/u7/recommendations?k=5'
    curl -s http://127.0.0.1:8000/v1/recommend -H 'Content-Type: application/json' -d '{"history": ["i1", "i2"]}'

- It listens at once: /healthz says that the process is up, /readyz that the models are loaded and warm. With
  --workers, the other processes start once the first one is ready, and listen when they are warm.
- A process that dies is replaced. SIGHUP replaces all, one after the other. SIGTERM lets requests finish.
- Tokens: REC_API_TOKENS for the API, REC_ADMIN_TOKENS for POST /v1/models/reload (rec/ops/serving/gate.py). The server
  refuses to start if one of them is empty in the environment but has tokens in `.env`.
- A reload finds the bundles anew: `latest`, an alias and a W&B alias may by then mean another version.
- New bundles are loaded by a new process, which then takes the place of an old one. Bundles that fail are reported in
  /v1/models, /metrics and the log, and tried again.
- The config is only read for where the bundles are, and not if one is named.

--retrieval-wandb and --ranking-wandb download artifacts with W&B's client. That was not tested with W&B itself.
"""

import argparse
import json
from pathlib import Path

from rec.config import add_config_arguments
from rec.errors import UserError, command_parser, run_command
from rec.ops.start import add_loop_arguments, serve


def parse() -> argparse.Namespace:
    parser = command_parser("rec.serve", __doc__)
    _add_bundles(parser)
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="0.0.0.0 for everyone who reaches this machine")
    add("--port", type=int, default=8000, help="0 for any free one (default: %(default)s)")
    add(
        "--workers",
        type=int,
        default=1,
        help="processes, each with its models (default: %(default)s)",
    )
    add("--follow", type=float, default=5, help="seconds between looks for newer bundles; 0: never")
    add(
        "--tf-serving",
        action="append",
        metavar="URL",
        help="let TF Serving compute: http://host:8501",
    )
    add("--require-auth", action="store_true", help="refuse every request while no token is set")
    add("--cors-origin", action="append", default=[], help="a page's origin that may call the API")
    add("--no-access-log", action="store_true", help="no line per request on stdout")
    add("--log-format", choices=("json", "text"), default="json", help="of these (%(default)s)")
    add("--openapi", action="store_true", help="print the API's schema, and exit")
    add_loop_arguments(parser)
    add_config_arguments(parser)
    return parser.parse_args()


def _add_bundles(parser: argparse.ArgumentParser) -> None:
    """The options that say which bundles answer."""
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
    add = parser.add_argument
    add("--alias", default="latest", help="of the config's bundles (default: %(default)s)")
    add("--allow-mismatch", action="store_true", help="serve a pair that was not trained together")


def main() -> None:
    args = parse()
    if args.workers < 1:
        raise UserError(f"--workers {args.workers}: must be at least 1")
    if args.follow < 0:
        raise UserError(f"--follow {args.follow}: must be 0 (never) or a number of seconds")
    if args.openapi:
        from rec.ops.serving.front import describe

        print(json.dumps(describe()))
        return
    serve(args)


if __name__ == "__main__":
    run_command(main)
