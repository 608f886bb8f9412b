"""Draws the dashboard of deploy/grafana from a Prometheus, without Grafana: each panel's queries over the last minutes.

    python -m bench.dashboard --prometheus http://127.0.0.1:9090 --minutes 5 --output docs/dashboard.png

The last line of stdout is JSON: {"output", "panels", "empty"}; `empty` lists the panels without an answer.
"""

import json
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rec.errors import UserError, command_parser, run_command

BOARD = Path(__file__).parent.parent / "deploy" / "grafana" / "dashboards" / "rec.json"
INTERVAL = "20s"  # Grafana's $__rate_interval with a scrape every 5 seconds
COLUMNS = 3


def query(prometheus: str, expression: str, minutes: float) -> list[dict[str, Any]]:
    """The series of a PromQL expression. Raises UserError if Prometheus refuses it or is not there."""
    end = time.time()
    options = {
        "query": expression.replace("$__rate_interval", INTERVAL),
        "start": end - 60 * minutes,
        "end": end,
        "step": max(minutes * 60 / 200, 1),
    }
    url = f"{prometheus}/api/v1/query_range?{urllib.parse.urlencode(options)}"
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            return json.load(response)["data"]["result"]
    except OSError as error:
        raise UserError(f"{prometheus}: {expression}: {error}") from error


def draw(axes: Axes, panel: dict[str, Any], prometheus: str, minutes: float) -> bool:
    """One panel. Returns whether there was anything to draw."""
    axes.set_title(panel["title"], fontsize=8, loc="left")
    axes.tick_params(labelsize=7)
    for target in panel["targets"]:
        for series in query(prometheus, target["expr"], minutes):
            times = [time - float(series["values"][-1][0]) for time, _ in series["values"]]
            values = [float(value) for _, value in series["values"]]
            label = target["legendFormat"]
            for name, value in series["metric"].items():
                label = label.replace(f"{{{{{name}}}}}", value)
            axes.plot([each / 60 for each in times], values, linewidth=1, label=label)
    axes.set_ylim(bottom=0)
    is_drawn = bool(axes.lines)
    if is_drawn:
        axes.legend(fontsize=6, frameon=False)
    return is_drawn


def main() -> None:
    parser = command_parser("bench.dashboard", __doc__)
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--output", type=Path, default=Path("dashboard.png"))
    args = parser.parse_args()
    panels = json.loads(BOARD.read_text())["panels"]
    rows = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(4 * COLUMNS, 2.1 * rows), layout="constrained")
    grid = figure.subplots(rows, COLUMNS, squeeze=False)
    empty = []
    for axes, panel in zip(grid.flat, panels, strict=False):
        if not draw(axes, panel, args.prometheus, args.minutes):
            empty.append(panel["title"])
    figure.supxlabel("minutes", fontsize=7)
    figure.savefig(args.output, dpi=90)
    print(json.dumps({"output": str(args.output), "panels": len(panels), "empty": empty}))


if __name__ == "__main__":
    run_command(main)
