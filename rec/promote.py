"""Gives an alias, such as `production`, to versions that deserve it; takes it back; tells who did.

    python -m rec.promote --stage recommender --metric val/ndcg@10     the best pair, if the gate lets it
    python -m rec.promote --stage recommender --version 3              this one
    python -m rec.promote --stage retrieval --version 2 --alias canary
    python -m rec.promote --rollback                                   the versions before
    python -m rec.promote --history
    python -m rec.promote --stage recommender --version production --card
    python -m rec.promote --artifact-name ENTITY/PROJECT/recommender_bundle --run-id 4f7c21aa       the same at W&B

- A recommender is promoted with the two versions that it was built from. One stage alone only where the pair that this
  leaves was trained together.
- The gate before `production`: the candidate and what is in production answer for the same users of the test data. The
  candidate is refused where the paired 95 % interval says that it is worse, where its index misses its recall target
  there, or where its pair does not match. --force promotes it all the same, and the history says so.

The last line of stdout is JSON: {"alias", "from", "to", "action", "gate": {"passed", "reasons", ...}}; `from` and `to`
are versions by stage. What is refused exits with 1.
"""

import argparse
import json
import sys
from pathlib import Path

from rec.bundles.files import STAGES, Entry, Versions
from rec.config import add_config_arguments, load_config
from rec.errors import UserError, command_parser, run_command
from rec.ops.promotion import GUARDED, choose, promote, roll_back
from rec.ops.registry import LocalStore, Store, WandbStore


def show_history(entries: list[Entry]) -> None:
    """Prints a line a move on stderr, and what the gate had against it."""

    def named(versions: Versions) -> str:
        return " ".join(f"{stage} {number}" for stage, number in versions.items()) or "nothing"

    for entry in entries:
        print(
            f"{entry['time'][:19]}  {entry['who']}  {entry['alias']} {entry['action']}: {named(entry['from'])} -> "
            f"{named(entry['to'])} ({entry['why']})",
            *(f"    {reason}" for reason in entry["gate"]["reasons"]),
            sep="\n",
            file=sys.stderr,
        )


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


def main() -> None:
    args = parse()
    config = load_config(args.config, args.overrides)
    stage = args.stage
    store: Store = LocalStore(Path(config.output.savedmodels))
    if args.artifact_name:
        project, _, name = args.artifact_name.rpartition("/")
        stage, store = name.removesuffix("_bundle"), WandbStore(project)
        if stage not in STAGES:
            raise UserError(
                f"--artifact-name {name}: it is {', '.join(f'{each}_bundle' for each in STAGES)}"
            )
    if args.history:
        entries = store.history()
        show_history(entries)
        print(json.dumps({"history": entries}))
        return
    if args.rollback:
        entry = roll_back(store, args.reason or "rolled back", args.alias)
    elif stage is None:
        raise UserError(
            "what to promote? Name --stage retrieval, ranking or recommender, or --artifact-name"
        )
    else:
        version, why = choose(store, stage, args.version, args.run_id, args.metric)
        if args.card:
            from rec.ops.card import write_card

            print(json.dumps({"card": str(write_card(store, config, stage, version))}))
            return
        why = f"{why}; {args.reason}" if args.reason else why
        entry = promote(store, config, stage, version, why, args.alias, args.force)
    show_history([entry])
    print(json.dumps(entry), flush=True)
    if entry["action"] == "refused":
        reasons = "; ".join(entry["gate"]["reasons"])
        raise UserError(f"the gate refuses it (--force promotes it all the same): {reasons}")


if __name__ == "__main__":
    run_command(main)
