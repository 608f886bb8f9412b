"""Which versions have an alias such as `production`: chosen, checked by the gate, moved, rolled back.

The gate before `production`: the candidate and what is in production answer for the same users of the test data. The
candidate is refused if the paired 95 % interval says that it is worse, if its index misses its recall target there, or
if its pair does not match.
"""

import getpass
import socket
from datetime import UTC, datetime
from typing import Any

from rec.bundles.files import Entry, Metadata, Versions, pick
from rec.config import Config
from rec.errors import UserError, note
from rec.ops.registry import Store, bundles, check_alias, together

GUARDED = "production"  # the alias before which the gate stands
PASSED: dict[str, Any] = {"passed": True, "reasons": []}  # where nothing had to be measured


def choose(
    store: Store, stage: str, version: str | None, run_id: str | None, metric: str | None
) -> tuple[int, str]:
    """The version that is meant, and why.

    Raises:
      UserError: there is none, or none with that metric.
    """
    published = store.metadata(stage)
    where = f"the registry's {stage}"
    if version is not None or not published:
        number = pick(list(published), store.aliases(stage), version or "latest", where)
        return number, f"version {version}"
    if run_id is not None:
        return _newest_of_run(published, run_id, where), f"run {run_id}"
    assert metric is not None
    return _best(published, metric, where)


def _newest_of_run(published: dict[int, Metadata], run_id: str, where: str) -> int:
    numbers = [number for number, each in published.items() if each.get("run_id") == run_id]
    if not numbers:
        known = ", ".join(sorted({str(each.get("run_id")) for each in published.values()}))
        raise UserError(f"{where} has no version of run {run_id!r}; it has those of {known}")
    return numbers[-1]


def _best(published: dict[int, Metadata], metric: str, where: str) -> tuple[int, str]:
    """The version with the best value of a metric on the latest version's data set, and why."""
    latest = published[max(published)]
    values = {
        number: each["metrics"][metric]
        for number, each in published.items()
        if each["dataset"] == latest["dataset"] and metric in each["metrics"]
    }
    if not values:
        names = ", ".join(latest["metrics"])
        raise UserError(
            f"{where} has no version with the metric {metric!r}; the latest has {names}"
        )
    is_error = metric.endswith(("rmse", "loss"))
    best = min(values, key=values.__getitem__) if is_error else max(values, key=values.__getitem__)
    return best, f"{metric} {values[best]:.4f}, the best of {len(values)} versions"


def gate(store: Store, config: Config, to: Versions, current: Versions) -> dict[str, Any]:
    """Whether `to` may take the place of `current`: {"passed", "reasons", and what was measured}."""
    mismatch = _mismatch(store, to)
    if mismatch is not None:
        return {"passed": False, "reasons": [mismatch]}
    from rec.ops.comparison import compare  # TensorFlow: not before it is needed

    try:
        production = bundles(store, current) if current else None
        measured = compare(config, bundles(store, to), production)
    except UserError as error:
        return {"passed": False, "reasons": [f"it cannot be measured: {error}"]}
    reasons = []
    if measured.get("worse"):
        low, high = measured["ci"]
        reasons.append(
            f"its {measured['metric']} on the test data is {measured['candidate']:.4f}, that in production "
            f"{measured['production']:.4f}: a difference of {measured['difference']:+.4f}, "
            f"95 % {low:+.4f} to {high:+.4f}"
        )
    low, high = measured["index_recall_ci"]
    target = measured["index_recall_target"]
    if high < target:
        reasons.append(
            f"its index finds {measured['index_recall']:.1%} of what exact search finds, "
            f"95 % {low:.1%} to {high:.1%}; its target is {target:.1%}"
        )
    return {"passed": not reasons, "reasons": reasons, **measured}


def _mismatch(store: Store, to: Versions) -> str | None:
    """Why the ranking version of `to` does not belong to its retrieval version, or None."""
    if "ranking" not in to:
        return None
    expected = store.metadata("ranking")[to["ranking"]]["built_from"]["retrieval"]
    retrieval = store.metadata("retrieval").get(to.get("retrieval", 0), {})
    if retrieval.get("id") == expected["id"]:
        return None
    return (
        f"ranking {to['ranking']} was trained for retrieval {expected['version']}, which would not be beside it: "
        "promote --stage recommender, which moves both"
    )


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


def show_history(entries: list[Entry]) -> None:
    """Prints one line per move on stderr, and the gate's reasons against it."""
    for entry in entries:
        note(
            f"{entry['time'][:19]}  {entry['who']}  {entry['alias']} {entry['action']}: "
            f"{_names(entry['from'])} -> {_names(entry['to'])} ({entry['why']})"
        )
        for reason in entry["gate"]["reasons"]:
            note(f"    {reason}")


def _names(versions: Versions) -> str:
    return " ".join(f"{stage} {number}" for stage, number in versions.items()) or "nothing"


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
