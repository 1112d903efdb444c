"""The figure of an experiment, from its folder alone: both scores, and how they were reached."""

from pathlib import Path
from typing import Any

from experiments.in_context.table import title
from experiments.runs.figures import (
    draw_curves,
    methods_to_draw,
    new_figure,
    quiet,
    save,
    style,
)
from experiments.runs.results import Results, Run

DASHES = {"2-gram": (0, (1.2, 1.6)), "3-gram": (0, (5, 2.5))}
SCORES = {"accuracy": "accuracy (higher is better)", "tvd": "TVD (lower is better)"}


def draw(found: Results, stem: Path) -> list[Path]:
    """Draw the finished runs and write `stem`.png and `stem`.pdf.

    Raises:
        ValueError: matplotlib is missing, or no run is finished.
    """
    groups = methods_to_draw(found)
    figure = new_figure(12, max(3.6, 2.0 + 0.34 * len(groups)))
    *scores, curves = figure.subplots(1, 3, width_ratios=(1, 1, 1.2))
    for axes, (key, label) in zip(scores, SCORES.items(), strict=True):
        _scores(axes, groups, found.baselines, key)
        axes.set_xlabel(label)
    scores[1].set_yticklabels([])
    draw_curves(curves, groups, "tvd")
    curves.set_ylabel("TVD on the validation automata")
    count = found.benchmark["test_automata"]
    figure.suptitle(f"{count:,} unseen automata, in context ({title(found)})", fontsize=11)
    return save(figure, stem)


def _scores(
    axes: Any, groups: dict[str, list[Run]], baselines: dict[str, dict[str, float]], key: str
) -> None:
    """Draw a row a method: seeds small, their mean large; the n-grams are vertical lines."""
    for row, runs in enumerate(groups.values()):
        values = [run.result[key] for run in runs]
        look = {"linestyle": "", **style(row)}
        if len(values) > 1:
            axes.plot(values, [row] * len(values), alpha=0.45, markersize=4, **look)
        axes.plot(sum(values) / len(values), row, markersize=8, **look)
    for name, values in baselines.items():
        axes.axvline(values[key], color="black", linewidth=1.2, linestyle=DASHES[name], label=name)
    axes.set_yticks(range(len(groups)), list(groups))
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.locator_params(axis="x", nbins=6, steps=(1, 2, 5, 10))
    axes.margins(x=0.08)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    if baselines:
        place = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0)}
        axes.legend(**place, ncols=2, frameon=False, fontsize=9)
    quiet(axes)
