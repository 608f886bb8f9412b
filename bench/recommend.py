"""How fast does `rec.recommend` answer many users, beside asking the API for each of them?

    python -m bench.recommend                              makes data and a model first: 100k items, some 5 minutes
    python -m bench.recommend --savedmodels DIR            with a pair that is there, made by bench.serving

The API is asked for k = 50 over connections that stay open, by 1 and by 32 clients at a time. JSON: {"processor",
"api": {CLIENTS: users per second}, "file": {"users", "seconds", "start_seconds", "users_per_second", "peak_mb"}}.
`users_per_second` counts from the first user to the complete file, and `start_seconds` is what loading takes before.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from bench.serving import PAUSE, SECONDS, USERS, Load, Server, ask, make_model, processor
from rec.errors import UserError, run_command

K = 50


def ask_api(savedmodels: Path) -> dict[str, float]:
    """Users per second, by the number of clients."""
    command = ["rec.serve", "--ranking-bundle", f"{savedmodels}/ranking/latest"]
    request = partial(ask, f"/v1/users/{{}}/recommendations?k={K}")
    rates = {}
    with Server(*command, savedmodels=savedmodels) as server:
        load = Load(server.port, request)
        for clients in (1, 32):
            load.run(clients, PAUSE)
            rates[str(clients)] = load.run(clients, SECONDS)["rps"]
    return rates


def write_file(savedmodels: Path, count: int) -> dict[str, Any]:
    """What `python -m rec.recommend` reports, and what it took."""
    with tempfile.TemporaryDirectory() as folder:
        users = Path(folder) / "users.txt"
        users.write_text("".join(f"u{number % USERS}\n" for number in range(count)))
        flags = ["--users", str(users), "--k", str(K), "--output", f"{folder}/recs.parquet"]
        command = [sys.executable, "-m", "rec.recommend", *flags]
        start = time.perf_counter()
        process = subprocess.Popen(
            [*command, "--set", f"output.savedmodels={savedmodels}"], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        report = json.loads(process.stdout.read() or "{}")
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise UserError("python -m rec.recommend failed")
        total = time.perf_counter() - start
    names = ("users", "seconds", "users_per_second")
    return {
        **{name: report[name] for name in names},
        "start_seconds": round(total - report["seconds"], 1),
        "peak_mb": usage.ru_maxrss // 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--savedmodels", type=Path, help="a directory of bundles; without it, one is made"
    )
    parser.add_argument("--users", type=int, default=100_000, help="(default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        savedmodels = args.savedmodels or make_model(Path(root))
        report = {
            "processor": processor(),
            "api": ask_api(savedmodels),
            "file": write_file(savedmodels, args.users),
        }
        print(json.dumps(report))


if __name__ == "__main__":
    run_command(main)
