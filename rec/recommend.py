"""Recommendations on the terminal, from the published bundles.

    python -m rec.recommend --user u7                     from the user's stored history
    python -m rec.recommend --history i1 i2 --k 5         from a history, oldest first
    python -m rec.recommend --user u7 --no-exclude-seen   also what the user has met before
    python -m rec.recommend                               prompts for users, one after the other

Tables go to stderr. The last line of stdout is JSON: {"users": [{"user_id", "cold_start", "items": [{"item_id",
"score", "title"}, ..]}, ..]}; `score` is null for an item that has not been scored.
"""

import json
import sys
from argparse import BooleanOptionalAction
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from rec import LOWEST
from rec.bundles import files
from rec.bundles.recommender import Recommender
from rec.config import Config, add_config_arguments, load_config
from rec.data_prep.dataset import open_dataset
from rec.errors import UserError, command_parser, run_command

SHOWN_HISTORY = 3  # the latest items of a history that are shown


@dataclass(frozen=True)
class RecommendedItem:
    item_id: str
    score: float | None  # None: it has not been scored
    title: str


@dataclass(frozen=True)
class Answer:
    """The JSON for one user."""

    user_id: str | None
    cold_start: bool  # nothing is known about the user, who gets the popular items
    items: list[RecommendedItem]


def recommend(
    recommender: Recommender,
    user_id: str | None,
    history: list[str] | None,
    k: int,
    exclude_seen: bool | None = None,
) -> Answer:
    """The k best items for a user with a stored history, or for a given history.

    `exclude_seen`: whether what the user has met is left out; None: as the bundle was made.

    Raises:
      UserError: k is below 1, or more than the bundle retrieves.
    """
    rule = None if exclude_seen is None else [exclude_seen]
    candidates = recommender.answer([user_id or ""], [history], [[]], rule)
    rows = candidates.rows[0]
    scores = candidates.scores[0]
    if not 1 <= k <= len(rows):
        raise UserError(f"--k: must be from 1 to {len(rows)}, what the bundle retrieves, not {k}")
    items = []
    for row, score in zip(rows[:k], scores[:k], strict=True):
        if row >= 0:  # -1 is an empty place: no more items are left
            item_id = recommender.items.index[row]
            title = title_of(recommender.items, item_id)
            known_score = float(score) if score > LOWEST else None
            items.append(RecommendedItem(item_id, known_score, title))
    return Answer(user_id, bool(candidates.cold[0]), items)


def title_of(items: pd.DataFrame, item_id: str) -> str:
    """An item's title, or its id if it has none. `items` is items.parquet, indexed by item_id."""
    title = items["title"].get(item_id) if "title" in items else None
    is_missing = title is None or (np.ndim(title) == 0 and pd.isna(title))
    return item_id if is_missing else str(title)


def show(recommender: Recommender, answer: Answer, history: list[str]) -> None:
    """Prints one user's recommendations on stderr."""
    recent = [title_of(recommender.items, item_id) for item_id in history[-SHOWN_HISTORY:]]
    lines = [f"\nuser {answer.user_id or '-'}, after {', '.join(recent) or 'nothing'}"]
    if answer.cold_start:
        lines[0] += " (nothing is known about this user: the popular items)"
    for item in answer.items:
        lines.append(item_line(item))
    print("\n".join(lines), file=sys.stderr)


def show_examples(config: Config, users: int = 3, k: int = 5) -> None:
    """Prints what the latest bundles recommend to the first users of the test data."""
    recommender = Recommender.load(*files.find_pair(Path(config.output.savedmodels)))
    k = min(k, recommender.metadata.retrieval.config.index.k)
    test = open_dataset(config.dataset).interactions("test")
    for user_id in test["user_id"].drop_duplicates().head(users):
        answer = recommend(recommender, user_id, None, k)
        show(recommender, answer, recommender.histories([user_id])[0])


def item_line(item: RecommendedItem) -> str:
    score = "-" if item.score is None else f"{item.score:.3f}"
    return f"  {score:>8}  {item.title}"


def read_users() -> Iterator[str]:
    """User ids from the keyboard, until an empty line or the end of the input."""
    while True:
        print("\nuser id (empty to end): ", end="", file=sys.stderr, flush=True)
        user_id = sys.stdin.readline().strip()
        if not user_id:
            return
        yield user_id


def main() -> None:
    parser = command_parser("rec.recommend", __doc__)
    parser.add_argument("--user", action="append", metavar="ID", help="can be repeated")
    parser.add_argument("--history", nargs="+", metavar="ITEM", help="item ids, oldest first")
    parser.add_argument("--k", type=int, default=10, help="items per user (default: %(default)s)")
    parser.add_argument("--exclude-seen", action=BooleanOptionalAction, help="default: as bundled")
    parser.add_argument("--alias", default="latest", help="of the bundles (default: %(default)s)")
    add_config_arguments(parser)
    args = parser.parse_args()
    config = load_config(args.config, args.overrides)
    recommender = Recommender.load(*files.find_pair(Path(config.output.savedmodels), args.alias))
    if args.user or args.history:
        users = args.user or [None]
    else:
        users = read_users()
    answers = []
    for user_id in users:
        answer = recommend(recommender, user_id, args.history, args.k, args.exclude_seen)
        show(recommender, answer, args.history or recommender.histories([user_id])[0])
        answers.append(answer)
    print(json.dumps({"users": [asdict(answer) for answer in answers]}))


if __name__ == "__main__":
    run_command(main)
