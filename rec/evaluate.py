"""Measures the published bundles on held-out interactions, next to baselines on the same split.

    python -m rec.evaluate --config config/dummy/dummy_small.yaml
    python -m rec.evaluate --split val --baselines

- Systems: `popularity`; `retrieval` (the towers, exact search), `retrieval_ann` (through the bundle's index),
  `recommender` (retrieved, then ranked); with --baselines also recent popularity, iALS, EASE, tuned on validation.
- Every system ranks the full catalogue without what the user has interacted with in earlier splits.
- The bundles answer from the histories given here, so that --split val hides the validation items from them.
- The report also has users without, with short and with long histories, and items that are new or rare: how often each
  system finds them among what users met, and their share of all recommendations.
- A ranker of objective `rating` is also measured by the RMSE of its ratings, next to rating baselines.

If users x items exceeds 10 billion, a random sample of the users is evaluated; the report holds both numbers.

Tables go to stderr; the last line of stdout is JSON: {"dataset", "split", "users", "out_of_users", "systems": {name:
{"ndcg@10": x, "ndcg@10_ci": [low, high], ...}}}.
"""

import json

from rec.config import add_config_arguments, load_config
from rec.errors import command_parser, run_command
from rec.evaluation import evaluate, show_systems
from rec.ops.rating_quality import rating_errors, show_ratings


def main() -> None:
    parser = command_parser("rec.evaluate", __doc__)
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument(
        "--baselines", action="store_true", help="also tune recent popularity, iALS and EASE"
    )
    add_config_arguments(parser)
    args = parser.parse_args()
    config = load_config(args.config, args.overrides)
    report = evaluate(config, args.split, with_baselines=args.baselines, more=rating_errors)
    show_systems(report)
    show_ratings(report)
    print(json.dumps(report))


if __name__ == "__main__":
    run_command(main)
