"""How often what was shown is chosen, and which variant is better.

    python -m rec.feedback --shown shown --events events.sqlite
    python -m rec.feedback --shown shown --events events.sqlite --days 7 --kinds purchase --compare stable canary

`rec.serve --shown DIR --events STORE` keeps both. Tables go to stderr. The last line of stdout is JSON: {"all":
{"name", "shown", "chosen", "rate", "low", "high"}, "variant": [{the same}, ..], "position", "segment", "unattributed",
"comparison"}.
"""

from pathlib import Path

from rec.errors import command_parser, run_command
from rec.ops.loop.feedback import report


def main() -> None:
    parser = command_parser("rec.feedback", __doc__)
    add = parser.add_argument
    add("--shown", required=True, type=Path, metavar="DIR", help="what rec.serve --shown keeps")
    add("--events", required=True, metavar="STORE", help="what rec.serve --events keeps")
    add("--days", type=float, default=30, help="the latest days (default: %(default)s)")
    add("--kinds", nargs="+", default=[], help="events that choose an item (default: all)")
    add("--compare", nargs=2, metavar=("A", "B"), help="two variants")
    report(parser.parse_args())


if __name__ == "__main__":
    run_command(main)
