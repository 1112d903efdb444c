"""The figure of an experiment, from its folder alone: exact match against length, and training."""

from pathlib import Path
from typing import Any

from experiments.length.table import title, values
from experiments.runs.figures import (
    draw_curves,
    methods_to_draw,
    new_figure,
    quiet,
    save,
    style,
)
from experiments.runs.results import Results, Run


def draw(found: Results, stem: Path) -> list[Path]:
    """Draw the finished runs and write `stem`.png and `stem`.pdf.

    Raises:
        ValueError: matplotlib is missing, or no run is finished.
    """
    groups = methods_to_draw(found)
    figure = new_figure(11, 4)
    by_length, curves = figure.subplots(1, 2)
    _lengths(by_length, groups, found)
    draw_curves(curves, groups, "exact")
    curves.set_ylabel("exact match at the longest training length")
    figure.suptitle(f"Length generalisation ({title(found)})", fontsize=11)
    return save(figure, stem)


def _lengths(axes: Any, groups: dict[str, list[Run]], found: Results) -> None:
    """Draw a line a method: the seeds' mean, and a band from the worst seed to the best."""
    low, high = found.benchmark["trained_lengths"]
    lengths = found.benchmark["test_lengths"]
    axes.axvspan(low, high, color="0.92", label="training lengths")
    for row, (name, runs) in enumerate(groups.items()):
        columns = [[100 * x for x in values(runs, length, "exact")] for length in lengths]
        means = [sum(column) / len(column) for column in columns]
        axes.plot(lengths, means, label=name, markersize=6, linewidth=1.4, **style(row))
        if len(runs) > 1:
            ends = [min(column) for column in columns], [max(column) for column in columns]
            axes.fill_between(lengths, *ends, color=style(row)["color"], alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    axes.set_ylim(-4, 104)
    axes.set_xlabel("length")
    axes.set_ylabel("exact match in %")
    axes.legend(frameon=False, fontsize=9)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    quiet(axes)
