"""Our popularity and metrics on a split with published figures: u1 of MovieLens 100K.

    python -m bench.popularity --train ml-100k/u1.base --test ml-100k/u1.test

Precision and recall at k, in percent, over all users of the test part together, as the C++ program of
https://github.com/PanJianning/UserCF prints them for its "MostPopular". Where items are equally popular, ours ranks the
one with the lower id first; that is what is left of a difference.

The last line of stdout is JSON: {"5": {"precision": ours, "published_precision", "recall", "published_recall"}, ...}.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix

from rec.baselines import Popularity, rank
from rec.errors import run_command
from rec.metrics import per_user

PUBLISHED = {  # k: precision and recall, in percent
    5: (32.20, 3.69),
    10: (30.39, 6.97),
    20: (25.46, 11.68),
    40: (21.66, 19.88),
    80: (17.55, 32.21),
    160: (13.37, 49.09),
}


def read(path: Path, shape: tuple[int, int]) -> csr_matrix:
    """The user-item matrix of a file of user, item, rating and time, with tabs between them; ids count from 1."""
    user, item = np.loadtxt(path, np.int64, delimiter="\t", usecols=(0, 1)).T - 1
    return csr_matrix((np.ones(len(user), np.float32), (user, item)), shape)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.popularity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--train", type=Path, required=True, help="u1.base")
    parser.add_argument("--test", type=Path, required=True, help="u1.test")
    args = parser.parse_args()
    train, test = (read(path, (943, 1682)) for path in (args.train, args.test))
    users = np.flatnonzero(np.diff(test.indptr))
    popularity = Popularity()
    popularity.fit(train)
    ranked = rank(popularity, train[users], train[users], max(PUBLISHED))
    recall = per_user(ranked, test[users], tuple(PUBLISHED))
    found = {}
    for k, (precision, share) in PUBLISHED.items():
        hits = float((recall[f"recall@{k}"] * np.diff(test.indptr)[users]).sum())
        ours = 100 * hits / k / len(users), 100 * hits / test.nnz
        found[k] = {"precision": round(ours[0], 2), "published_precision": precision}
        found[k] |= {"recall": round(ours[1], 2), "published_recall": share}
        print(
            f"k {k:3}: precision {ours[0]:.2f} ({precision:.2f}), recall {ours[1]:.2f} ({share:.2f})",
            file=sys.stderr,
        )
    print(json.dumps(found))


if __name__ == "__main__":
    run_command(main)
