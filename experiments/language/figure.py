"""The figure of an experiment, from its folder alone: loss by position, and along the training."""

import itertools
import statistics
from pathlib import Path
from typing import Any

from experiments.language.table import title, where
from experiments.runs.figures import draw_curves, methods_to_draw, new_figure, quiet, save, style
from experiments.runs.results import Results, Run

DASHES = ((0, (5, 2.5)), (0, (1.2, 1.6)), (0, (5, 2, 1, 2)))


def draw(found: Results, stem: Path) -> list[Path]:
    """Draw the finished runs and write `stem`.png and `stem`.pdf.

    Raises:
        ValueError: matplotlib is missing, or no run is finished.
    """
    groups = methods_to_draw(found)
    figure = new_figure(11, 4.2)
    positions, curves = figure.subplots(1, 2)
    _positions(positions, groups)
    positions.set_xlabel(f"tokens of the {where(found)} read before")
    positions.set_ylabel("loss, nats a token")
    draw_curves(curves, groups, "loss")
    curves.set_ylabel("loss on the validation set")
    for axes in (positions, curves):
        for number, (name, values) in enumerate(found.baselines.items()):
            dashes = DASHES[number % len(DASHES)]
            axes.axhline(values["loss"], color="black", linewidth=1, linestyle=dashes, label=name)
        axes.legend(frameon=False, fontsize=9)
    figure.suptitle(title(found), fontsize=11)
    return save(figure, stem)


def _positions(axes: Any, groups: dict[str, list[Run]]) -> None:
    """Draw the mean of the seeds in each bin; a logarithmic axis that has a place for 0."""
    for row, (name, runs) in enumerate(groups.items()):
        edges = runs[0].result["edges"]
        # The middle of a bin's positions, its last one included: that of 0 alone is 0.
        middles = [(a + b - 1) / 2 for a, b in itertools.pairwise(edges)]
        losses = [
            statistics.fmean(values)
            for values in zip(*(run.result["by_position"] for run in runs), strict=True)
        ]
        axes.plot(middles, losses, label=name, linewidth=1.4, markersize=5, **style(row))
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(left=0)
    axes.grid(color="0.9")
    quiet(axes)
