"""How often what was shown is chosen, and which variant is better.

    python -m rec.feedback --shown shown --events events.sqlite
    python -m rec.feedback --shown shown --events events.sqlite --days 7 --kinds purchase --compare stable canary

`rec.serve --shown DIR --events STORE` keeps both. Tables go to stderr. The last line of stdout is JSON: {"all",
"variant", "position", "segment": [{"name", "shown", "chosen", "rate", "low", "high"}, ..], "unattributed",
"comparison"}.
"""

import json
import time
from dataclasses import asdict
from pathlib import Path

from rec.errors import command_parser, note, run_command
from rec.ops.loop.events import open_store
from rec.ops.loop.feedback import DIMENSIONS, Feedback, compare, table_of, to_json


def main() -> None:
    parser = command_parser("rec.feedback", __doc__)
    add = parser.add_argument
    add("--shown", required=True, type=Path, metavar="DIR", help="what rec.serve --shown keeps")
    add("--events", required=True, metavar="STORE", help="what rec.serve --events keeps")
    add("--days", type=float, default=30, help="the latest days (default: %(default)s)")
    add("--kinds", nargs="+", default=[], help="events that choose an item (default: all)")
    add("--compare", nargs=2, metavar=("A", "B"), help="two variants")
    args = parser.parse_args()
    now = time.time()
    begin = now - args.days * 86_400
    feedback = Feedback(args.shown, open_store(args.events), begin, now, args.kinds)
    report: dict[str, object] = {"all": to_json([feedback.total()])}
    for dimension in DIMENSIONS:
        rates = feedback.rates(dimension)
        note(f"by {dimension}\n{table_of(rates)}\n")
        report[dimension] = to_json(rates)
    report["unattributed"] = feedback.unattributed
    if args.compare:
        first, second = args.compare
        found = compare(feedback.counts(first), feedback.counts(second))
        better = {"first": first, "second": second, "neither": "neither"}[found.verdict]
        note(
            f"{second} - {first}: {found.difference:+.4f}, 95 %: {found.low:+.4f} {found.high:+.4f}"
        )
        note(f"better: {better}")
        report["comparison"] = {**asdict(found), "better": better}
    print(json.dumps(report))


if __name__ == "__main__":
    run_command(main)
