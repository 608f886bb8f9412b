"""A recommender system, from raw interactions to an API. Its commands, each with --help and examples:

    python -m rec.data_prep.dummy, .movielens, .tabular    raw files -> a dataset directory
    python -m rec.train                                    -> bundles
    python -m rec.evaluate                                 what they are worth on held-out data
    python -m rec.recommend                                recommendations on the terminal, or as a file
    python -m rec.export                                   bundles anew, without training
    python -m rec.promote                                  which of them is in production
    python -m rec.serve                                    answers HTTP requests with them

README.md says how they go together.
"""

from rec import __version__
from rec.errors import command_parser

parser = command_parser("rec", __doc__)
parser.add_argument("--version", action="version", version=f"rec {__version__}")
parser.parse_args()
parser.print_help()
