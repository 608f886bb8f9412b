"""Is the training step starved? The input pipeline alone beside the training step alone, on one dataset.

    python -m bench.input_pipeline --dataset data/ml-100k

Both run over the same epoch of the default two_tower model, in training interactions a second, best of --repeats:
`pipeline` assembles the batches and throws them away, `step` trains on batches that are in memory already.

Not covered: data that does not fit into memory.
"""

import argparse
import json
import time
from collections.abc import Callable

from rec.batches import window_batches
from rec.config import Features, Retrieval, with_data_defaults
from rec.corpus import load_corpus
from rec.data_prep.dataset import open_dataset
from rec.errors import run_command
from rec.optimizer import LazyAdam
from rec.retrieval.model import RetrievalModel

import tensorflow as tf  # isort: skip  (rec goes first: it switches to Keras 2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Compares the input pipeline with the step.", epilog=__doc__
    )
    parser.add_argument(
        "--dataset", default="data/ml-100k", metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument("--arch", default="two_tower", help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    corpus = load_corpus(open_dataset(args.dataset), Features())
    config = with_data_defaults(Retrieval(arch=args.arch), corpus.facts)
    model = RetrievalModel(config, corpus)
    model.compile(LazyAdam(config.learning_rate))
    step = tf.function(model.train_step, reduce_retracing=True)
    epoch = window_batches(corpus, config, corpus.train, 0, 0)
    batches = list(epoch)
    for batch in batches[:3]:  # traces the step
        step(batch)

    def rate(run: Callable[[], object]) -> float:
        seconds = []
        for _ in range(args.repeats):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        return len(corpus.train.items) / min(seconds)

    result = {
        "pipeline": rate(lambda: list(epoch)),
        "step": rate(lambda: [step(batch) for batch in batches]),
    }
    print(
        json.dumps(
            {
                **{name: round(value) for name, value in result.items()},
                "ratio": round(result["pipeline"] / result["step"], 1),
            }
        )
    )


if __name__ == "__main__":
    run_command(main)
