"""The figure of an experiment, from its folder alone: both scores, and how they were reached."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.in_context.results import Experiment, Run
from experiments.in_context.table import title

# Okabe and Ito's colours, distinguishable with every common colour blindness; black is for n-grams.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = {"2-gram": (0, (1.2, 1.6)), "3-gram": (0, (5, 2.5))}
SCORES = {"accuracy": "accuracy (higher is better)", "tvd": "TVD (lower is better)"}


def draw(found: Experiment, stem: Path) -> list[Path]:
    """Draw the finished runs and write `stem`.png and `stem`.pdf.

    Raises:
        ValueError: matplotlib is missing, or no run is finished.
    """
    groups = found.by_method()
    if not groups:
        raise ValueError(f"{found.folder}: expected a finished run to draw, found none")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("matplotlib: needed for the figure; pip install matplotlib") from error
    figure = Figure(figsize=(12, max(3.6, 2.0 + 0.34 * len(groups))), layout="constrained")
    FigureCanvasAgg(figure)
    *scores, curves = figure.subplots(1, 3, width_ratios=(1, 1, 1.2))
    for axes, (key, label) in zip(scores, SCORES.items(), strict=True):
        _scores(axes, groups, found.baselines, key)
        axes.set_xlabel(label)
    scores[1].set_yticklabels([])
    _curves(curves, groups)
    count = found.benchmark["test_automata"]
    figure.suptitle(f"{count:,} unseen automata, in context ({title(found)})", fontsize=11)
    paths = [stem.with_suffix(suffix) for suffix in (".png", ".pdf")]
    for path in paths:
        figure.savefig(path, dpi=160)
    return paths


def _style(index: int) -> dict[str, Any]:
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}


def _scores(
    axes: Any, groups: dict[str, list[Run]], baselines: dict[str, dict[str, float]], key: str
) -> None:
    """Draw a row a method: seeds small, their mean large; the n-grams are vertical lines."""
    for row, runs in enumerate(groups.values()):
        values = [run.result[key] for run in runs]
        style = {"linestyle": "", **_style(row)}
        if len(values) > 1:
            axes.plot(values, [row] * len(values), alpha=0.45, markersize=4, **style)
        axes.plot(sum(values) / len(values), row, markersize=8, **style)
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
    _quiet(axes)


def _curves(axes: Any, groups: dict[str, list[Run]]) -> None:
    """Draw the validation TVD along the training: a line a method, the mean of its seeds."""
    for row, (name, runs) in enumerate(groups.items()):
        steps, values = _mean_curve(runs, "tvd")
        axes.plot(
            steps,
            values,
            label=name,
            # Set off from each other, so that the markers of lines that coincide do not.
            markevery=(row % 3, max(3, len(steps) // 6)),
            markersize=5,
            linewidth=1.4,
            **_style(row),
        )
    axes.set_xlabel("step")
    axes.set_ylabel("TVD on the validation automata")
    axes.legend(frameon=False, fontsize=9, ncols=1 + len(groups) // 9)
    axes.grid(color="0.9")
    _quiet(axes)


def _mean_curve(runs: Sequence[Run], key: str) -> tuple[list[int], list[float]]:
    """Average the seeds at the steps where all were evaluated."""
    curves = [dict(zip(*run.curve(key), strict=True)) for run in runs]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    return steps, [sum(curve[step] for curve in curves) / len(curves) for step in steps]


def _quiet(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
