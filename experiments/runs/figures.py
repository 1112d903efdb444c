"""Pieces of a figure: colours, markers, curves over the training, the two files it becomes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.runs.results import Results, Run

# Okabe and Ito's colours, distinguishable with every common colour blindness; black is for others.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def methods_to_draw(found: Results) -> dict[str, list[Run]]:
    """Return the finished runs by method; ValueError where there is none."""
    if not (groups := found.by_method()):
        raise ValueError(f"{found.folder}: expected a finished run to draw, found none")
    return groups


def new_figure(width: float, height: float) -> Any:
    """Make a matplotlib figure that needs no display; ValueError where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("matplotlib: needed for the figure; pip install matplotlib") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, stem: Path) -> list[Path]:
    """Write `stem`.png and `stem`.pdf."""
    paths = [stem.with_suffix(suffix) for suffix in (".png", ".pdf")]
    for path in paths:
        figure.savefig(path, dpi=160)
    return paths


def style(index: int) -> dict[str, Any]:
    """Return colour and marker of a method by its place."""
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}


def draw_curves(axes: Any, groups: dict[str, list[Run]], key: str) -> None:
    """Draw a number of the evaluations along the training: a line a method, its seeds' mean.

    Folders that hold results alone, without the trainings' logs, have no such panel.
    """
    means = {name: mean_curve(runs, key) for name, runs in groups.items()}
    axes.set_visible(any(steps for steps, _ in means.values()))
    for row, (name, (steps, values)) in enumerate(means.items()):
        axes.plot(
            steps,
            values,
            label=name,
            # Set off from each other, so that the markers of lines that coincide do not.
            markevery=(row % 3, max(3, len(steps) // 6)),
            markersize=5,
            linewidth=1.4,
            **style(row),
        )
    axes.set_xlabel("step")
    axes.legend(frameon=False, fontsize=9, ncols=1 + len(groups) // 9)
    axes.grid(color="0.9")
    quiet(axes)


def mean_curve(runs: Sequence[Run], key: str) -> tuple[list[int], list[float]]:
    """Average the seeds at the steps where all were evaluated."""
    curves = [dict(zip(*run.curve(key), strict=True)) for run in runs]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    return steps, [sum(curve[step] for curve in curves) / len(curves) for step in steps]


def quiet(axes: Any) -> None:
    """Leave two sides of the frame away."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
