"""A version's card: a page of Markdown, with plots, that says what it is, how good, for whom, and how it was made.

Mitchell et al., "Model Cards for Model Reporting", FAT* 2019. `python -m rec.promote --card` writes it to
SAVEDMODELS/cards/STAGE-VERSION/. It measures the bundles again for it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from matplotlib.figure import Figure

from rec.bundles.files import draft
from rec.bundles.metadata import BundleMetadata, PairMetadata
from rec.bundles.recommender import Recommender
from rec.config import Config
from rec.data_prep.dataset import Dataset
from rec.evaluation import SHOWN, Report, evaluate
from rec.files import replace_directory, sole_writer
from rec.ops.comparison import data_of
from rec.ops.registry import Store, built_from, directories

CURVES = ("loss", "val/ndcg@10", "val/recall@100", "val/rmse")  # of training, if there are such


def write_card(store: Store, config: Config, stage: str, version: int) -> Path:
    """Measures a version on its test data and writes its card; returns the page's path.

    A ranking version is measured with the retrieval version that it was trained for.

    Raises:
      UserError: a bundle is damaged, or its data set is missing.
    """
    versions = built_from(store, stage, version) | {stage: version}
    pair = Recommender.load(*directories(store, versions))
    dataset = data_of(pair, config)
    report = evaluate(replace(config, dataset=str(dataset.path)), "test", pair=pair)
    cards = Path(config.output.savedmodels) / "cards"
    place = cards / f"{stage}-{version}"
    with draft(cards) as beside:
        _plot_quality(report, beside / "quality.png")
        for bundle in pair.metadata.bundles:
            _plot_training(bundle, beside / f"{bundle.stage}.png")
        page = _page(store.bundles(stage)[version], pair.metadata, dataset, report)
        (beside / "card.md").write_text(page)
        with sole_writer(place, wait=True):
            replace_directory(beside, place)
    return place / "card.md"


def _plot_quality(report: Report, path: Path) -> None:
    """Draws the NDCG@10 of each system with its interval."""
    systems = report["systems"]
    values = [metrics["ndcg@10"] for metrics in systems.values()]
    intervals = [metrics["ndcg@10_ci"] for metrics in systems.values()]
    below = [value - low for value, (low, _) in zip(values, intervals, strict=True)]
    above = [high - value for value, (_, high) in zip(values, intervals, strict=True)]
    figure = Figure((6, 0.6 * len(systems) + 1), dpi=120, layout="tight")
    axes = figure.subplots()
    axes.barh(list(systems), values, xerr=[below, above], capsize=3)
    axes.invert_yaxis()
    axes.set_xlabel(f"NDCG@10 of {report['users']:,} users, 95 % intervals")
    figure.savefig(path)


def _plot_training(bundle: BundleMetadata, path: Path) -> None:
    """Draws how the loss and the validation metrics went, epoch by epoch."""
    history = bundle.history or [{}]
    names = [name for name in CURVES if name in history[-1]]
    figure = Figure((3 * len(names), 2.5), dpi=120, layout="tight")
    plots = figure.subplots(1, len(names), squeeze=False)[0]
    for axes, name in zip(plots, names, strict=True):
        epochs = [epoch for epoch, metrics in enumerate(history) if name in metrics]
        axes.plot(epochs, [history[epoch][name] for epoch in epochs])
        axes.set(title=name, xlabel="epoch")
    figure.savefig(path)


def _page(bundle: BundleMetadata, pair: PairMetadata, dataset: Dataset, report: Report) -> str:
    counts = ", ".join(f"{count:,} {name}" for name, count in dataset.manifest["counts"].items())
    system = list(report["systems"])[-1]
    segments = {
        f"{name}, {part['users']:,} users": part["systems"][system]
        for name, part in report["segments"].items()
    }
    images = "\n".join(f"![{name}]({name}.png)" for name in ("quality", *pair.versions))
    index = pair.retrieval.index or {}
    template = (Path(__file__).parent / "card.md").read_text(encoding="utf-8")
    return template.format(
        title=f"{bundle.stage.capitalize()} {bundle.version}",
        bundle=bundle,
        manifest=dataset.manifest,
        counts=counts,
        report=report,
        systems=_table(report["systems"], SHOWN),
        system=system,
        segments=_table(segments, SHOWN[:3]),
        index="; ".join(f"{key} {value}" for key, value in index.items()),
        training="\n".join(map(_training, pair.bundles)),
        images=images,
    )


def _training(bundle: BundleMetadata) -> str:
    commit = (bundle.git_commit or "unknown")[:10]
    return (
        f"- {bundle.stage} {bundle.version}: {bundle.architecture}, run {bundle.run_id}, {bundle.created}, "
        f"commit {commit}\n\n      {bundle.command}\n"
    )


def _table(rows: Mapping[str, Report], metrics: Sequence[str]) -> str:
    lines = [f"| | {' | '.join(metrics)} |", "|---" * (len(metrics) + 1) + "|"]
    for name, values in rows.items():
        cells = [_cell(values, metric) for metric in metrics]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: Report, metric: str) -> str:
    text = f"{values[metric]:.4f}"
    if f"{metric}_ci" not in values:
        return text
    low, high = values[f"{metric}_ci"]
    return f"{text} ({low:.4f} to {high:.4f})"
