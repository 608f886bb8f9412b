"""Draws what the other benchmarks printed: the last line of their output, saved to files, becomes PNG charts.

    python -m bench.index --items 100000 --curve | tail -1 > index.json
    python -m bench.charts --index index.json --step step.json --growth growth.json --output docs

- `--index`: docs/index_recall.png, recall@100 against milliseconds a query (needs --curve), and docs/index_items.png,
  milliseconds against the catalogue's size, where there is more than one.
- `--step`: docs/step.png, milliseconds of a training step against the catalogue's size.
- `--growth`: docs/training.png and docs/evaluation.png, seconds against interactions and users, with the exponents.
- `--quality`: docs/quality.png, NDCG@10 against seconds of training, beside EASE.

The last line of stdout is JSON: {"charts": {FILE: bytes}}.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from rec.errors import UserError, run_command

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  the backend goes first
from matplotlib.axes import Axes  # noqa: E402


def sizes(values: dict[str, Any]) -> list[str]:
    """The keys that are sizes, as JSON has them, from the smallest."""
    return sorted((key for key in values if key.isdigit()), key=int)


def index_recall(axes: Axes, report: dict[str, Any]) -> None:
    items = sizes(report)[-1]
    for name, values in report[items].items():
        if values and values.get("curve"):
            recall, milliseconds = np.array(values["curve"]).T
            axes.plot(recall, milliseconds, ".-", label=name)
        elif values:
            axes.plot([values["recall@100"]], [values["p50_ms"]], "*", markersize=10, label=name)
    axes.set(
        xlabel="recall@100",
        ylabel="median ms a query",
        yscale="log",
        title=f"{int(items):,} items, one thread",
    )


def index_items(axes: Axes, report: dict[str, Any]) -> None:
    found = {items: report[items] for items in sizes(report)}
    for name in found[next(iter(found))]:
        points = [
            (int(items), values[name]["p50_ms"]) for items, values in found.items() if values[name]
        ]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", label=name)
    axes.set(
        xlabel="items",
        ylabel="median ms a query",
        xscale="log",
        yscale="log",
        title="recall@100 of .95, exact 1",
    )


def step(axes: Axes, report: dict[str, Any]) -> None:
    for label, values in (("rec (LazyAdam)", report), ("Keras' Adam", report["keras_adam"])):
        axes.plot(
            [int(items) for items in sizes(values)],
            [values[items] for items in sizes(values)],
            "o-",
            label=label,
        )
    axes.set(
        xlabel="items",
        ylabel="median ms a step",
        xscale="log",
        ylim=(0, None),
        title="two_tower training step",
    )


def growth(axes: Axes, report: dict[str, Any], what: str, unit: str) -> None:
    values = report[what]
    at = np.array([int(size) for size in sizes(values)])
    seconds = np.array([values[size] for size in sizes(values)])
    slope, start = np.polyfit(np.log(at), np.log(seconds), 1)
    axes.plot(at, seconds, "o", label="measured")
    axes.plot(at, np.exp(start) * at**slope, "--", label=f"exponent {values['exponent']}")
    axes.set(xlabel=unit, ylabel="seconds", xscale="log", yscale="log", title=what)


def quality(axes: Axes, report: dict[str, Any]) -> None:
    axes.plot(*np.array(report["rec"]["curve"]).T, ".-", label="rec")
    if report["ease"]:
        axes.axhline(
            report["ease"]["val/ndcg@10"], linestyle="--", color="grey", label="EASE, tuned"
        )
    axes.set(
        xlabel="seconds of training",
        ylabel="NDCG@10 on validation",
        title=f"{report['interactions']:,} interactions",
    )


def draw(file: Path, plot: Any, *data: Any) -> int:
    """Writes one chart and returns its bytes."""
    figure, axes = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
    plot(axes, *data)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=110)
    plt.close(figure)
    return file.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("index", "step", "growth", "quality"):
        parser.add_argument(f"--{name}", type=Path, metavar="JSON")
    parser.add_argument(
        "--output", type=Path, default=Path("docs"), metavar="DIR", help="default: %(default)s"
    )
    args = parser.parse_args()
    reports: dict[str, dict[str, Any]] = {}
    for name in ("index", "step", "growth", "quality"):
        if file := getattr(args, name):
            try:
                reports[name] = json.loads(file.read_text().splitlines()[-1])
            except (IndexError, json.JSONDecodeError):
                raise UserError(
                    f"{file}: its last line is not JSON, as bench.{name} prints it"
                ) from None
    if not reports:
        raise UserError("name what to draw: --index, --step, --growth or --quality")
    args.output.mkdir(parents=True, exist_ok=True)
    charts: dict[str, int] = {}
    if "index" in reports:
        charts["index_recall.png"] = draw(
            args.output / "index_recall.png", index_recall, reports["index"]
        )
        if len(sizes(reports["index"])) > 1:
            charts["index_items.png"] = draw(
                args.output / "index_items.png", index_items, reports["index"]
            )
    if "step" in reports:
        charts["step.png"] = draw(args.output / "step.png", step, reports["step"])
    for name, unit in (("training", "interactions"), ("evaluation", "users")):
        if "growth" in reports and len(sizes(reports["growth"][name])) > 1:
            charts[f"{name}.png"] = draw(
                args.output / f"{name}.png", growth, reports["growth"], name, unit
            )
    if "quality" in reports:
        charts["quality.png"] = draw(args.output / "quality.png", quality, reports["quality"])
    print(json.dumps({"charts": charts}))


if __name__ == "__main__":
    run_command(main)
