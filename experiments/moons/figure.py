"""The figure: when a model understands the held-out system, and which head predicts which moon."""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.runs.figures import methods_to_draw, new_figure, quiet, save
from experiments.runs.results import Results, Run

# Okabe and Ito's colours, told apart with every common colour blindness.
COLOURS = {"one head": "#D55E00", "three heads": "#0072B2"}


def draw(found: Results, stem: Path) -> list[Path]:
    """Draw a row a method, the mean over its seeds, and write `stem`.png and `stem`.pdf.

    Raises:
        ValueError: matplotlib is missing, or no run is finished.
    """
    groups = methods_to_draw(found)
    figure = new_figure(11, 0.8 + 2.4 * len(groups))
    rows = figure.subplots(len(groups), 3, squeeze=False, width_ratios=(2.4, 1, 1))
    for (name, runs), (errors, outputs, keys) in zip(groups.items(), rows, strict=True):
        _errors(errors, runs, found.benchmark)
        errors.set_title(name, fontsize=10, loc="left")
        _shares(outputs, _mean(runs, "three heads", "outputs"))
        _shares(keys, _mean(runs, "three heads", "keys"))
    first, last = rows[0], rows[-1]
    first[0].legend(frameon=False, fontsize=9, loc="lower left")
    first[1].set_title("head's share in a moon", fontsize=10)
    first[2].set_title("moon's share in keys", fontsize=10)
    last[0].set_xlabel("points read (dotted: a moon's period, dashed: the common one)")
    figure.suptitle(f"Three moons never trained on ({found.experiment['preset']})", fontsize=11)
    return save(figure, stem)


def _mean(runs: list[Run], model: str, key: str) -> np.ndarray:
    return np.mean([run.result[model][key] for run in runs], axis=0)


def _errors(axes: Any, runs: list[Run], facts: dict[str, Any]) -> None:
    """Draw the errors along a window, and where moons and system have come round once."""
    for model, colour in COLOURS.items():
        error = _mean(runs, model, "error")
        axes.plot(np.arange(1, len(error) + 1), error, label=model, color=colour, lw=1.2)
    for period in facts["periods"]:
        axes.axvline(period, color="0.75", lw=0.9, ls=":")
    axes.axvline(facts["common_period"], color="0.4", lw=0.9, ls="--")
    axes.set_yscale("log")
    axes.set_ylabel("squared error")
    quiet(axes)


def _shares(axes: Any, shares: np.ndarray) -> None:
    """Draw a share a head (row) and moon (column), with its number."""
    axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    for head, row in enumerate(shares):
        for moon, share in enumerate(row):
            colour = "white" if share > 0.6 else "black"
            axes.text(moon, head, f"{share:.2f}", ha="center", va="center", color=colour)
    axes.set_xticks(range(shares.shape[1]), [f"moon {m + 1}" for m in range(shares.shape[1])])
    axes.set_yticks(range(len(shares)), [f"head {n + 1}" for n in range(len(shares))])
