"""Which versions have an alias such as `production`: chosen, checked by the gate, moved, rolled back.

The gate before `production`: the candidate and what is in production answer for the same users of the test data. The
candidate is refused if the paired 95 % interval says that it is worse, if its index misses its recall target there, or
if its pair does not match.
"""

import getpass
import socket
from datetime import UTC, datetime
from typing import Any

from rec.bundles.files import Entry, Versions, pick
from rec.config import Config
from rec.errors import UserError
from rec.ops.registry import Store, bundles, check_alias, together

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
    from rec.ops.comparison import compare  # TensorFlow: not before it is needed

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
