"""Which versions have an alias such as `production`: chooses them, checks them at the gate, moves the alias and back.

The gate before `production`: the candidate and what is in production answer for the same users of the test data. The
candidate is refused if the paired 95 % interval says that it is worse, if its index misses its recall target there, or
if its pair does not match.
"""

import getpass
import socket
from collections.abc import Mapping
from datetime import UTC, datetime

from rec.bundles.aliases import Move, Verdict, Versions
from rec.bundles.files import pick
from rec.bundles.metadata import BundleMetadata
from rec.config import Config
from rec.errors import UserError
from rec.ops.registry import Store, check_alias, directories, together

GUARDED = "production"  # the alias before which the gate stands
PASSED = Verdict(passed=True, reasons=[])  # nothing had to be measured
LOWER_IS_BETTER = ("rmse", "loss")  # ends of the names of metrics


# ------------------------------------------------------------------------------------------------------------
# Which version?


def choose(
    store: Store, stage: str, version: str | None, run_id: str | None, metric: str | None
) -> tuple[int, str]:
    """The version that a number or alias, a training run or a metric selects, and the reason in words.

    Raises:
      UserError: there is none, or none with that metric.
    """
    bundles = store.bundles(stage)
    where = f"the registry's {stage}"
    if version is not None or not bundles:
        number = pick(list(bundles), store.aliases(stage), version or "latest", where)
        return number, f"version {version}"
    if run_id is not None:
        return _version_of_run(bundles, run_id, where), f"run {run_id}"
    assert metric is not None
    return _best_version(bundles, metric, where)


def _version_of_run(bundles: Mapping[int, BundleMetadata], run_id: str, where: str) -> int:
    numbers = [number for number, bundle in bundles.items() if bundle.run_id == run_id]
    if not numbers:
        known = ", ".join(sorted({bundle.run_id for bundle in bundles.values()}))
        raise UserError(f"{where} has no version of run {run_id!r}; it has those of {known}")
    return max(numbers)


def _best_version(
    bundles: Mapping[int, BundleMetadata], metric: str, where: str
) -> tuple[int, str]:
    """The best version among those of the latest version's data set. Metrics of other data cannot be compared."""
    latest = bundles[max(bundles)]
    values = {
        number: bundle.metrics[metric]
        for number, bundle in bundles.items()
        if bundle.dataset == latest.dataset and metric in bundle.metrics
    }
    if not values:
        known = ", ".join(latest.metrics)
        raise UserError(
            f"{where} has no version with the metric {metric!r}; the latest has {known}"
        )
    sign = -1 if metric.endswith(LOWER_IS_BETTER) else 1
    best = max(values, key=lambda number: sign * values[number])
    return best, f"{metric} {values[best]:.4f}, the best of {len(values)} versions"


# ------------------------------------------------------------------------------------------------------------
# The gate


def gate(store: Store, config: Config, to: Versions, current: Versions) -> Verdict:
    """Whether the versions `to` may replace `current`."""
    mismatch = _mismatch(store, to)
    if mismatch is not None:
        return Verdict(passed=False, reasons=[mismatch])
    from rec.ops.comparison import compare  # TensorFlow: not before it is needed

    try:
        candidate = directories(store, to)
        production = directories(store, current) if current else None
        comparison = compare(config, candidate, production)
    except UserError as error:
        return Verdict(passed=False, reasons=[f"it cannot be measured: {error}"])
    reasons = []
    if comparison.get("worse"):
        low, high = comparison["ci"]
        reasons.append(
            f"its {comparison['metric']} on the test data is {comparison['candidate']:.4f}, that in production "
            f"{comparison['production']:.4f}: a difference of {comparison['difference']:+.4f}, "
            f"95 % {low:+.4f} to {high:+.4f}"
        )
    low, high = comparison["index_recall_ci"]
    target = comparison["index_recall_target"]
    if high < target:
        reasons.append(
            f"its index finds {comparison['index_recall']:.1%} of what exact search finds, "
            f"95 % {low:.1%} to {high:.1%}; its target is {target:.1%}"
        )
    return Verdict(passed=not reasons, reasons=reasons, **comparison)


def _mismatch(store: Store, to: Versions) -> str | None:
    """Why a ranking version does not match its retrieval version; None if it does."""
    if "ranking" not in to:
        return None
    source = store.bundles("ranking")[to["ranking"]].built_from["retrieval"]
    retrieval = store.bundles("retrieval").get(to.get("retrieval", 0))
    if retrieval is not None and retrieval.id == source.id:
        return None
    return (
        f"ranking {to['ranking']} was trained for retrieval {source.version}, which would not be beside it: "
        "promote --stage recommender, which moves both"
    )


# ------------------------------------------------------------------------------------------------------------
# Moves


def promote(
    store: Store,
    config: Config,
    stage: str,
    version: int,
    why: str,
    alias: str = GUARDED,
    force: bool = False,
) -> Move:
    """Moves the alias if the gate allows it, or by `force`; returns what the history says about it.

    Raises:
      UserError: the alias has a name that is not allowed, or a bundle is damaged.
    """
    check_alias(alias)
    with store.writing():
        current = store.versions_of(alias)
        to = together(store, stage, version, current)
        if to == current:
            return _move("unchanged", alias, current, to, why)
        _verify(store, to)
        verdict = gate(store, config, to, current) if alias == GUARDED else PASSED
        if verdict.passed:
            action = "promoted"
        elif force:
            action = "forced"
        else:
            action = "refused"
        move = _move(action, alias, current, to, why, verdict)
        store.move(move, current if action == "refused" else to)
    return move


def roll_back(store: Store, why: str, alias: str = GUARDED) -> Move:
    """Gives the alias back to the versions before its last move that was not rolled back.

    Raises:
      UserError: the alias has a name that is not allowed, no versions came before, or one of them is damaged.
    """
    check_alias(alias)
    with store.writing():
        to = _previous(store, alias)
        if not to:
            raise UserError(f"{alias}: there are no versions before these to go back to")
        _verify(store, to)
        move = _move("rolled back", alias, store.versions_of(alias), to, why)
        store.move(move, to)
    return move


def _previous(store: Store, alias: str) -> Versions:
    """The versions that the last move has replaced, of those that were not rolled back; {} if there are none."""
    replaced: list[Versions] = []
    for move in store.history():
        if move.alias != alias or move.action == "refused":
            continue
        if move.action == "rolled back":
            replaced.pop()
        else:
            replaced.append(move.previous)
    return replaced[-1] if replaced else {}


def _verify(store: Store, versions: Versions) -> None:
    """Raises UserError if a version's files are missing or have changed."""
    for stage, version in versions.items():
        store.directory(stage, version)


def _move(
    action: str, alias: str, current: Versions, to: Versions, why: str, gate: Verdict = PASSED
) -> Move:
    return Move(
        alias=alias,
        previous=current,
        to=to,
        action=action,
        gate=gate,
        why=why,
        who=f"{getpass.getuser()}@{socket.gethostname()}",
        time=datetime.now(UTC).isoformat(timespec="milliseconds"),
    )
