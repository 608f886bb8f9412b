"""Recommendations from the published bundles: on the terminal, or as a file for many users.

    python -m rec.recommend --user u7                     from the user's stored history
    python -m rec.recommend --history i1 i2 --k 5         from a history, oldest first
    python -m rec.recommend --user u7 --no-exclude-seen   also what the user has met before
    python -m rec.recommend                               prompts for users, one after the other
    python -m rec.recommend --user u7 --request '{"filter": {"genres": ["Comedy"]}}'
    python -m rec.recommend --users all --k 50 --output recs.parquet      every user that the bundles know
    python -m rec.recommend --users ids.txt --output recs.csv             a file with one user id per line

- The answers are those of the HTTP API. --request takes the options of POST /v1/recommend as JSON.
- A file has one row per recommendation: user_id, rank (from 1), item_id, score, cold_start. It ends in .parquet, .csv
  or .jsonl (JSON lines), and appears when it is complete. To resume an interrupted run, run the same command again
  (rec/ops/recommendations.py).

Tables go to stderr. The last line of stdout is JSON: {"users": [{"user_id", "cold_start", "items": [{"item_id",
"score", "title"}, ..]}, ..]}; `score` is null for an item that has not been scored. With --users it is {"output",
"users", "rows", "seconds", "users_per_second"}.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from rec.api import Recommender, make_request
from rec.bundles import files
from rec.config import Config, add_config_arguments, load_config
from rec.data_prep.dataset import open_dataset
from rec.errors import UserError, command_parser, note, run_command
from rec.ops.recommendations import write_recommendations
from rec.serving.schemas import Item, Recommendations, RecommendRequest

SHOWN_HISTORY = 3  # the latest items of a history that are shown
NOT_IN_A_FILE = ("user_id", "history", "explain")  # options of a request


def title_of(item: Item) -> str:
    """An item's title, or its id if it has none."""
    title = (item.model_extra or {}).get("title")
    return item.item_id if title is None else str(title)


def show(answer: Recommendations) -> None:
    """Prints one user's recommendations, with the history that they were explained by, on stderr."""
    recent = [title_of(item) for item in (answer.history or [])[-SHOWN_HISTORY:]]
    line = f"\nuser {answer.user_id or '-'}, after {', '.join(recent) or 'nothing'}"
    if answer.cold_start:
        line += " (nothing is known about this user: the popular items)"
    note(line)
    for item in answer.items:
        note(item_line(item))


def item_line(item: Item) -> str:
    score = "-" if item.score is None else f"{item.score:.3f}"
    return f"  {score:>8}  {title_of(item)}"


def show_examples(config: Config, users: int = 3, k: int = 5) -> None:
    """Prints what the latest bundles recommend to the first users of the test data."""
    recommender = Recommender.load(config.output.savedmodels)
    k = min(k, recommender.engine.max_k)
    test = open_dataset(config.dataset).interactions("test")
    for user_id in test["user_id"].drop_duplicates().head(users):
        show(recommender.answer(RecommendRequest(user_id=user_id, k=k, explain=True)))


def to_json(answer: Recommendations) -> dict[str, object]:
    """The command's JSON for one user."""
    items = [
        {"item_id": item.item_id, "score": item.score, "title": title_of(item)}
        for item in answer.items
    ]
    return {"user_id": answer.user_id, "cold_start": answer.cold_start, "items": items}


def read_users() -> Iterator[str]:
    """User ids from the keyboard, until an empty line or the end of the input."""
    while True:
        print("\nuser id (empty to end): ", end="", file=sys.stderr, flush=True)
        user_id = sys.stdin.readline().strip()
        if not user_id:
            return
        yield user_id


def parse() -> argparse.Namespace:
    parser = command_parser("rec.recommend", __doc__)
    parser.add_argument("--user", action="append", metavar="ID", help="can be repeated")
    parser.add_argument("--history", nargs="+", metavar="ITEM", help="item ids, oldest first")
    parser.add_argument("--k", type=int, help="items per user (default: 10)")
    parser.add_argument(
        "--exclude-seen",
        action=argparse.BooleanOptionalAction,
        help="whether to leave out what the user has met (default: as the bundles were made)",
    )
    parser.add_argument("--request", metavar="JSON", help="options of POST /v1/recommend")
    parser.add_argument("--users", metavar="FILE", help="one id per line; or all. Needs --output")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="with --users: .parquet, .csv or .jsonl"
    )
    parser.add_argument("--alias", default="latest", help="of the bundles (default: %(default)s)")
    add_config_arguments(parser)
    args = parser.parse_args()
    if (args.users is None) != (args.output is None):
        raise UserError("--users and --output: a file needs both")
    if args.users is not None and (args.user or args.history):
        raise UserError("--users: give it without --user and --history")
    return args


def read_request(args: argparse.Namespace) -> RecommendRequest:
    """The options that the command line gives for all users."""
    try:
        fields = json.loads(args.request or "{}")
    except ValueError as error:
        raise UserError(f"--request: this is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise UserError('--request: must be an object, such as {"exclude": ["i5"]}')
    flags = {"k": args.k, "history": args.history, "exclude_seen": args.exclude_seen}
    return make_request(fields | {name: flag for name, flag in flags.items() if flag is not None})


def main() -> None:
    args = parse()
    config = load_config(args.config, args.overrides)
    request = read_request(args)
    bundles = files.find_pair(Path(config.output.savedmodels), args.alias)
    recommender = Recommender.of(bundles)
    if args.users is not None:
        for name in NOT_IN_A_FILE:
            if getattr(request, name):
                raise UserError(f"--request: {name} is not an option of --users")
        users = files.user_file(bundles[0]) if args.users == "all" else Path(args.users)
        report = write_recommendations(recommender.engine, users, args.output, request)
        print(json.dumps(report))
        return
    if args.user or request.history or request.user_id:
        ids = args.user or [request.user_id]
    else:
        ids = read_users()
    answers = []
    for user_id in ids:
        changes = {"user_id": user_id, "explain": True}
        answer = recommender.answer(request.model_copy(update=changes))
        show(answer)
        answers.append(to_json(answer))
    print(json.dumps({"users": answers}))


if __name__ == "__main__":
    run_command(main)
