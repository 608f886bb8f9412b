"""Draws what docs/guide.md shows of a trained pair: how training went, the map of the catalogue, what is recommended.

    python -m bench.guide_pictures --set dataset=data/guide --output docs

- guide_training.png: loss and validation metrics of retrieval, an epoch a point, from its checkpoint's metrics.jsonl.
- guide_map.png: the items' vectors in their two main directions (PCA), coloured by the first genre.
- guide_popularity.png: how popular items are that test users went on to, and that each system puts among its first ten.

Needs `python -m rec.train --stage retrieval` and `ranking` first, with the same config. The last line of stdout is
JSON: {"pictures": [FILE, ...]}.
"""

import argparse
import json
from pathlib import Path

import matplotlib
import numpy as np

from rec.config import Config, Features, add_config_arguments, load_config
from rec.corpus import load_corpus
from rec.data_prep.dataset import open_dataset
from rec.errors import run_command
from rec.evaluation import Task, load_latest
from rec.features import FIRST_ITEM
from rec.retrieval.train import load_retrieval

matplotlib.use("agg")
from matplotlib import pyplot as plt  # noqa: E402  (after the choice of how to draw)

TOP = 10


def training(config: Config) -> None:
    lines = (
        (Path(config.output.checkpoints) / "retrieval" / "metrics.jsonl").read_text().splitlines()
    )
    epochs = [
        line
        for line in map(json.loads, lines)
        if "loss" in line and "train/examples_per_second" in line
    ]
    _, (left, right) = plt.subplots(1, 2, figsize=(8, 2.6))
    at = [line["epoch"] for line in epochs]
    left.plot(at, [line["loss"] for line in epochs], ".-")
    left.set(title="training loss", xlabel="epoch")
    for metric in ("val/ndcg@10", "val/recall@10", "val/recall@100"):
        right.plot(at, [line[metric] for line in epochs], ".-", label=metric)
    right.set(title="validation", xlabel="epoch", ylim=(0, None))
    right.legend(fontsize=8)


def catalogue(config: Config) -> None:
    trained = load_retrieval(
        Path(config.output.checkpoints) / "retrieval", open_dataset(config.dataset)
    )
    vectors = trained.model.candidates().numpy()[:, : trained.model.config.embedding_dim]
    centred = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    centred -= centred.mean(axis=0)
    points = centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T
    genres = trained.corpus.item_table["genres"].str[0].fillna("none").astype("category")
    colours = plt.get_cmap("tab20")
    plt.figure(figsize=(7, 4.5))
    for number, genre in enumerate(genres.cat.categories):
        of_genre = (genres == genre).to_numpy()
        x, y = points[of_genre].T
        plt.scatter(x, y, s=10, color=colours(number % 20), label=genre)
    plt.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    plt.title("items in the two main directions of their vectors")


def popularity(config: Config) -> None:
    corpus = load_corpus(open_dataset(config.dataset), Features({}, {}))
    task, pair = Task(corpus, "test"), load_latest(config)
    met = corpus.popularity[FIRST_ITEM:]
    groups = {"what test users went on to": met[task.relevant.indices]}
    for name, ask in (
        ("retrieval", pair.module.retrieval.retrieve),
        ("recommender", pair.module.recommend_from),
    ):
        rows = task.ranked(ask)[:, :TOP]
        groups[f"first {TOP} of {name}"] = met[rows[rows >= 0]]
    groups[f"first {TOP} by popularity"] = np.tile(
        np.sort(met)[::-1][:TOP], 2
    )  # but for what they have seen
    _, axes = plt.subplots(figsize=(7, 2.6))
    axes.boxplot(
        list(groups.values()),
        tick_labels=list(groups),
        orientation="horizontal",
        whis=(5, 95),
        sym="",
    )
    axes.set(xlabel="training interactions of an item (5, 25, 50, 75 and 95 %)", xscale="log")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.guide_pictures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=Path("docs"))
    add_config_arguments(parser)
    args = parser.parse_args()
    config = load_config(args.config, args.overrides)
    args.output.mkdir(parents=True, exist_ok=True)
    files = []
    for name, draw in {"training": training, "map": catalogue, "popularity": popularity}.items():
        draw(config)
        plt.tight_layout()
        files.append(str(args.output / f"guide_{name}.png"))
        plt.savefig(files[-1], dpi=90)
        plt.close()
    print(json.dumps({"pictures": files}))


if __name__ == "__main__":
    run_command(main)
