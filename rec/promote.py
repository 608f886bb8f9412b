"""Assigns an alias such as `production` to a version, rolls it back, and shows the history.

    python -m rec.promote --stage recommender --metric val/ndcg@10     the best pair, if the gate allows it
    python -m rec.promote --stage recommender --version 3              this one
    python -m rec.promote --stage retrieval --version 2 --alias canary
    python -m rec.promote --rollback                                   the versions before
    python -m rec.promote --history
    python -m rec.promote --stage recommender --version production --card
    python -m rec.promote --artifact-name ENTITY/PROJECT/recommender_bundle --run-id 4f7c21aa       the same at W&B

- A recommender is promoted with the two versions that it was built from. One stage alone is promoted only if the
  resulting pair was trained together.
- The gate before `production`: the candidate and what is in production answer for the same users of the test data. The
  candidate is refused if the paired 95 % interval says that it is worse, if its index misses its recall target there,
  or if its pair does not match. --force promotes it all the same, and the history says so.

The last line of stdout is JSON: {"alias", "from", "to", "action", "gate": {"passed", "reasons", ...}}; `from` and `to`
are versions by stage. The exit code is 1 if the gate refuses.
"""

import argparse
import json
from pathlib import Path

from rec.bundles.aliases import STAGES, Versions
from rec.config import Config, add_config_arguments, load_config
from rec.errors import UserError, command_parser, note, run_command
from rec.ops.history import Move
from rec.ops.promotion import GUARDED, choose, promote, roll_back
from rec.ops.registry import LocalStore, Store, WandbStore


def show_history(moves: list[Move]) -> None:
    """Prints one line per move on stderr, and the reasons of the gate."""
    for move in moves:
        note(
            f"{move.time[:19]}  {move.who}  {move.alias} {move.action}: "
            f"{_names(move.previous)} -> {_names(move.to)} ({move.why})"
        )
        for reason in move.gate.reasons:
            note(f"    {reason}")


def _names(versions: Versions) -> str:
    return " ".join(f"{stage} {number}" for stage, number in versions.items()) or "nothing"


def parse() -> argparse.Namespace:
    parser = command_parser("rec.promote", __doc__)
    place = parser.add_mutually_exclusive_group()
    place.add_argument(
        "--stage", choices=STAGES, help="of bundles in the config's output.savedmodels"
    )
    place.add_argument(
        "--artifact-name", metavar="[ENTITY/PROJECT/]STAGE_bundle", help="bundles at W&B instead"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--version", metavar="N", help="this version, or the one with this alias")
    what.add_argument(
        "--metric", metavar="M", help="the version with the best M, such as val/ndcg@10"
    )
    what.add_argument("--run-id", metavar="R", help="the version that this training run exported")
    what.add_argument("--rollback", action="store_true", help="back to the versions before")
    what.add_argument("--history", action="store_true", help="who promoted what, when and why")
    parser.add_argument("--alias", default=GUARDED, help="default: %(default)s")
    parser.add_argument("--force", action="store_true", help="past the gate; the history says so")
    parser.add_argument("--reason", default="", help="goes into the history")
    parser.add_argument(
        "--card", action="store_true", help="write a page about the version instead of promoting it"
    )
    add_config_arguments(parser)
    return parser.parse_args()


def open_store(args: argparse.Namespace, config: Config) -> tuple[Store, str | None]:
    """The bundles' place and the stage that the command line names."""
    if not args.artifact_name:
        return LocalStore(Path(config.output.savedmodels)), args.stage
    project, _, name = args.artifact_name.rpartition("/")
    stage = name.removesuffix("_bundle")
    if stage not in STAGES:
        names = ", ".join(f"{each}_bundle" for each in STAGES)
        raise UserError(f"--artifact-name {name}: it is {names}")
    return WandbStore(project), stage


def choose_version(
    args: argparse.Namespace, store: Store, stage: str | None
) -> tuple[str, int, str]:
    """The stage, the version and the reason. Raises UserError if the command line names no stage or version."""
    if stage is None:
        raise UserError(
            "what to promote? Name --stage retrieval, ranking or recommender, or --artifact-name"
        )
    version, why = choose(store, stage, args.version, args.run_id, args.metric)
    return stage, version, f"{why}; {args.reason}" if args.reason else why


def main() -> None:
    args = parse()
    config = load_config(args.config, args.overrides)
    store, stage = open_store(args, config)
    if args.history:
        moves = store.history()
        show_history(moves)
        print(json.dumps({"history": [move.model_dump() for move in moves]}))
        return
    if args.rollback:
        move = roll_back(store, args.reason or "rolled back", args.alias)
    else:
        stage, version, why = choose_version(args, store, stage)
        if args.card:
            from rec.ops.card import write_card

            print(json.dumps({"card": str(write_card(store, config, stage, version))}))
            return
        move = promote(store, config, stage, version, why, args.alias, args.force)
    show_history([move])
    print(json.dumps(move.model_dump()), flush=True)
    if move.action == "refused":
        reasons = "; ".join(move.gate.reasons)
        raise UserError(f"the gate refuses it (--force promotes it all the same): {reasons}")


if __name__ == "__main__":
    run_command(main)
