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
import getpass
import json
import socket
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rec.config import Config, add_config_arguments, load_config
from rec.errors import UserError, command_parser, run_command
from rec.registry import (
    STAGES,
    Entry,
    LocalStore,
    Store,
    Versions,
    WandbStore,
    bundles,
    check_alias,
    pick,
    together,
)

GUARDED = "production"  # the alias before which the gate stands
PASSED: dict[str, Any] = {"passed": True, "reasons": []}  # where nothing had to be measured


def choose(
    store: Store, stage: str, version: str | None, run_id: str | None, metric: str | None
) -> tuple[int, str]:
    """The version that is meant, and why it.

    Raises:
      UserError: there is none, or none with that metric.
    """
    found = store.metadata(stage)
    where = f"the registry's {stage}"
    if version is not None or not found:
        return pick(
            list(found), store.aliases(stage), version or "latest", where
        ), f"version {version}"
    if run_id is not None:
        of_run = [number for number, metadata in found.items() if metadata.get("run_id") == run_id]
        if not of_run:
            known = ", ".join(sorted({str(metadata.get("run_id")) for metadata in found.values()}))
            raise UserError(f"{where} has no version of run {run_id!r}; it has those of {known}")
        return of_run[-1], f"run {run_id}"
    assert metric is not None
    dataset = found[max(found)]["dataset"]  # metrics of another data set cannot be compared
    alike = {number: of["metrics"] for number, of in found.items() if of["dataset"] == dataset}
    values = {number: metrics[metric] for number, metrics in alike.items() if metric in metrics}
    if not values:
        raise UserError(
            f"{where} has no version with the metric {metric!r}; the latest has "
            + ", ".join(found[max(found)]["metrics"])
        )
    best = (min if metric.endswith(("rmse", "loss")) else max)(
        values, key=lambda number: values[number]
    )
    return best, f"{metric} {values[best]:.4f}, the best of {len(values)} versions"


def gate(store: Store, config: Config, to: Versions, current: Versions) -> dict[str, Any]:
    """Whether `to` may take the place of `current`: {"passed", "reasons", and what was measured}."""
    if (ranking := to.get("ranking")) is not None:
        expected = store.metadata("ranking")[ranking]["built_from"]["retrieval"]
        if store.metadata("retrieval").get(to.get("retrieval", 0), {}).get("id") != expected["id"]:
            odd = f"ranking {ranking} was trained for retrieval {expected['version']}, which would not be beside it"
            return {
                "passed": False,
                "reasons": [f"{odd}: promote --stage recommender, which moves both"],
            }
    from rec.evaluate import compare  # TensorFlow: not before it is needed

    try:
        measured = compare(
            config, *(bundles(store, versions) for versions in (to, current) if versions)
        )
    except UserError as error:
        return {"passed": False, "reasons": [f"it cannot be measured: {error}"]}
    reasons = []
    if measured.get("worse"):
        (low, high), difference = measured["ci"], measured["difference"]
        reasons.append(
            f"its {measured['metric']} on the test data is {measured['candidate']:.4f}, that in production "
            f"{measured['production']:.4f}: a difference of {difference:+.4f}, 95 % {low:+.4f} to {high:+.4f}"
        )
    (low, high), target = measured["index_recall_ci"], measured["index_recall_target"]
    if high < target:
        found = f"{measured['index_recall']:.1%} of what exact search finds, 95 % {low:.1%} to {high:.1%}"
        reasons.append(f"its index finds {found}; its target is {target:.1%}")
    return {"passed": not reasons, "reasons": reasons, **measured}


def promote(
    store: Store,
    config: Config,
    stage: str,
    version: int,
    why: str,
    alias: str = GUARDED,
    force: bool = False,
) -> Entry:
    """Moves the alias, where the gate lets it; returns the entry of the history, and the command's JSON.

    Raises:
      UserError: the alias has a name that is not allowed, a bundle is damaged, or the candidate cannot be measured.
    """
    check_alias(alias)
    with store.writing():
        current = store.named(alias)
        to = together(store, stage, version, current)
        if to == current:
            return _entry("unchanged", alias, current, to, why, PASSED)
        for name, number in to.items():
            store.directory(name, number)
        verdict = gate(store, config, to, current) if alias == GUARDED else PASSED
        action = "promoted" if verdict["passed"] else "forced" if force else "refused"
        entry = _entry(action, alias, current, to, why, verdict)
        store.move(alias, current if action == "refused" else to, entry)
    return entry


def roll_back(store: Store, why: str, alias: str = GUARDED) -> Entry:
    """Gives the alias back to the versions that had it before the last move that stands; returns the entry.

    Raises:
      UserError: the alias has a name that is not allowed, there is nothing before, or it is damaged.
    """
    check_alias(alias)
    with store.writing():
        stack: list[Versions] = []  # of what each move that stands has replaced
        for entry in store.history():
            if entry["alias"] == alias and entry["action"] == "rolled back":
                stack.pop()
            elif entry["alias"] == alias and entry["action"] != "refused":
                stack.append(entry["from"])
        if not stack or not stack[-1]:
            raise UserError(f"{alias}: there are no versions before these to go back to")
        for name, number in stack[-1].items():
            store.directory(name, number)
        entry = _entry("rolled back", alias, store.named(alias), stack[-1], why, PASSED)
        store.move(alias, stack[-1], entry)
    return entry


def _entry(
    action: str, alias: str, current: Versions, to: Versions, why: str, verdict: dict[str, Any]
) -> Entry:
    who = f"{getpass.getuser()}@{socket.gethostname()}"
    time = datetime.now(UTC).isoformat(timespec="milliseconds")
    return {
        "alias": alias,
        "from": current,
        "to": to,
        "action": action,
        "gate": verdict,
        "why": why,
        "who": who,
        "time": time,
    }


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
            from rec.card import write_card

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
