"""A recommender system, from raw interactions to an API. Its commands, each with --help and examples:

    rec prep tabular                      raw files -> a dataset directory; or movielens, public, dummy
    rec prep embed                        texts -> vectors, as a feature
    rec train                             -> bundles
    rec evaluate                          what they are worth on held-out data
    rec recommend                         recommendations on the terminal, or as a file
    rec export                            bundles anew, without training
    rec promote                           which of them is in production
    rec serve                             answers HTTP requests with them
    rec feedback                          how often what was shown is chosen
    rec doctor                            whether rec works on this machine

`rec train` and `python -m rec.train` are the same, and so are `rec prep dummy` and `python -m rec.data_prep.dummy`.
README.md says how they go together.
"""

import runpy
import sys

from rec import __version__
from rec.errors import command_parser

COMMANDS = (
    "prep tabular",
    "prep movielens",
    "prep dummy",
    "prep public",
    "prep embed",
    "train",
    "evaluate",
    "recommend",
    "export",
    "promote",
    "serve",
    "feedback",
    "doctor",
)


def main() -> None:
    for name in COMMANDS:
        words = name.split()
        here = slice(1, 1 + len(words))
        if sys.argv[here] == words:
            del sys.argv[here]
            module = name.replace("prep ", "data_prep.")
            runpy.run_module(f"rec.{module}", run_name="__main__", alter_sys=True)
            return
    parser = command_parser("rec", __doc__)
    parser.add_argument("--version", action="version", version=f"rec {__version__}")
    parser.parse_args()
    parser.print_help()


if __name__ == "__main__":
    main()
