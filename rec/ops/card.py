"""A version's card: a page of Markdown, with plots, that says what it is, how good, for whom, and how it was made.

Mitchell et al., "Model Cards for Model Reporting", FAT* 2019. `python -m rec.promote --card` writes it to
SAVEDMODELS/cards/STAGE-VERSION/: its numbers are measured anew, from the bundles.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from rec.bundles.files import Metadata, draft
from rec.bundles.recommender import Recommender
from rec.config import Config
from rec.evaluation import SHOWN, Report, evaluate
from rec.files import replace_directory, sole_writer
from rec.ops.comparison import data_of
from rec.ops.registry import Store, built_from, bundles


def write_card(store: Store, config: Config, stage: str, version: int) -> Path:
    """Measures a version on its test data and writes its card; returns the page's path.

    A ranking version is measured with the retrieval version that it was trained for.

    Raises:
      UserError: a bundle is damaged, or its data are not at hand.
    """
    pair = Recommender.load(*bundles(store, built_from(store, stage, version) | {stage: version}))
    dataset = data_of(pair, config)
    report = evaluate(replace(config, dataset=str(dataset.path)), "test", pair=pair)
    cards = Path(config.output.savedmodels) / "cards"
    place = cards / f"{stage}-{version}"
    with draft(cards) as beside:
        _plot(report, pair.metadata, beside)
        page = _page(store.metadata(stage)[version], pair.metadata, dataset.manifest, report)
        (beside / "card.md").write_text(page)
        with sole_writer(place, wait=True):
            replace_directory(beside, place)
    return place / "card.md"


def _plot(report: Report, parts: dict[str, Metadata], place: Path) -> None:
    """Draws what was measured, quality.png, and how training went, STAGE.png."""
    systems = report["systems"]
    values = [of["ndcg@10"] for of in systems.values()]
    errors = [
        [abs(of["ndcg@10"] - of["ndcg@10_ci"][side]) for of in systems.values()] for side in (0, 1)
    ]
    figure = Figure((6, 0.6 * len(systems) + 1), dpi=120, layout="tight")
    axes = figure.subplots()
    axes.barh(list(systems), values, xerr=errors, capsize=3)
    axes.invert_yaxis()
    axes.set_xlabel(f"NDCG@10 of {report['users']:,} users, 95 % intervals")
    figure.savefig(place / "quality.png")
    for stage, part in parts.items():
        epochs = part["history"]
        shown = [
            name
            for name in ("loss", "val/ndcg@10", "val/recall@100", "val/rmse")
            if name in epochs[-1]
        ]
        figure = Figure((3 * len(shown), 2.5), dpi=120, layout="tight")
        for axes, name in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
            points = [(epoch, of[name]) for epoch, of in enumerate(epochs) if name in of]
            axes.plot(*zip(*points, strict=True))
            axes.set(title=name, xlabel="epoch")
        figure.savefig(place / f"{stage}.png")


def _page(
    metadata: Metadata, parts: dict[str, Metadata], manifest: dict[str, Any], report: Report
) -> str:
    stage, version, system = metadata["stage"], metadata["version"], list(report["systems"])[-1]
    counts = ", ".join(f"{count:,} {name}" for name, count in manifest["counts"].items())
    made = "\n".join(
        f"- {stage} {part['version']}: {part['architecture']}, run {part['run_id']}, {part['created']}, commit "
        f"{(part['git_commit'] or 'unknown')[:10]}\n\n      {part['command']}\n"
        for stage, part in parts.items()
    )
    slices = {
        f"{name}, {of['users']:,} users": of["systems"][system]
        for name, of in report["segments"].items()
    }
    images = "\n".join(f"![{name}]({name}.png)" for name in ("quality", *parts))
    index = parts["retrieval"]["index"]
    template = (Path(__file__).parent / "card.md").read_text(encoding="utf-8")
    return template.format(
        title=f"{stage.capitalize()} {version}",
        metadata=metadata,
        manifest=manifest,
        counts=counts,
        report=report,
        systems=_table(report["systems"], SHOWN),
        system=system,
        slices=_table(slices, SHOWN[:3]),
        index="; ".join(f"{key} {value}" for key, value in index.items()),
        made=made,
        images=images,
    )


def _table(rows: dict[str, dict[str, Any]], columns: Sequence[str]) -> str:
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [
        f"| {name} | {' | '.join(_number(of, at) for at in columns)} |" for name, of in rows.items()
    ]
    return "\n".join(lines)


def _number(of: dict[str, Any], metric: str) -> str:
    low, high = of.get(f"{metric}_ci", (None, None))
    return f"{of[metric]:.4f}" + (f" ({low:.4f} to {high:.4f})" if low is not None else "")
