"""Says whether rec works on this machine, and how to fix what does not.

    python -m rec.doctor                 a few seconds
    python -m rec.doctor --smoke         also makes data, trains a small model on it, and asks it for an answer

Each check is a line on stderr. The last line of stdout is JSON: {"ok", "checks": {NAME: {"ok", "text"}}}. The exit code
is 1 if something has to be fixed.
"""

import json

from rec.errors import UserError, command_parser, note, run_command
from rec.ops.doctor import Check, examine


def show(check: Check) -> None:
    note(f"{'ok ' if check.is_ok else 'FIX'}  {check.name:<15} {check.text}")


def main() -> None:
    parser = command_parser("rec.doctor", __doc__)
    parser.add_argument("--smoke", action="store_true", help="train something tiny, end to end")
    parser.add_argument("--port", type=int, default=8000, help="of the server (%(default)s)")
    args = parser.parse_args()
    checks = examine(args.port, args.smoke, show)
    failed = [check.name for check in checks if not check.is_ok]
    report = {check.name: {"ok": check.is_ok, "text": check.text} for check in checks}
    print(json.dumps({"ok": not failed, "checks": report}), flush=True)
    if failed:
        raise UserError(f"fix {', '.join(failed)}: the lines above say how")


if __name__ == "__main__":
    run_command(main)
