"""The figure: when a model understands the held-out system, and which head predicts which moon."""

from pathlib import Path
from typing import Any

import numpy as np

# Okabe and Ito's colours, told apart with every common colour blindness.
COLOURS = {"one head": "#D55E00", "three heads": "#0072B2"}


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw what `findings` found into a PNG.

    Raises:
        ValueError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("matplotlib: needed for the figure; pip install matplotlib") from error
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    errors, outputs, keys = figure.subplots(1, 3, width_ratios=(2, 1, 1))
    _errors(errors, found)
    three = found["models"]["three heads"]
    _shares(outputs, three["outputs"], "share in the prediction of a moon")
    _shares(keys, three["keys"], "share of a moon in a head's keys")
    config = found["config"]
    words = f"{config['method']}, {config['preset']}, seed {config['seed']}"
    figure.suptitle(f"Three moons that were never trained on ({words})", fontsize=11)
    figure.savefig(path, dpi=160, format="png")


def _errors(axes: Any, found: dict[str, Any]) -> None:
    """Draw the errors along a window, and where moons and system have come round once."""
    for name, model in found["models"].items():
        error = np.array(model["error"])
        axes.plot(np.arange(1, len(error) + 1), error, label=name, color=COLOURS[name], lw=1.2)
    for period in found["periods"]:
        axes.axvline(period, color="0.75", lw=0.9, ls=":")
    axes.axvline(found["common_period"], color="0.4", lw=0.9, ls="--")
    axes.set_yscale("log")
    axes.set_xlabel("points read (dotted: a moon's period, dashed: the common one)")
    axes.set_ylabel("squared error of the next point")
    axes.legend(frameon=False, fontsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _shares(axes: Any, shares: list[list[float]], title: str) -> None:
    """Draw a share a head (row) and moon (column), with its number."""
    axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    for head, row in enumerate(shares):
        for moon, share in enumerate(row):
            colour = "white" if share > 0.6 else "black"
            axes.text(moon, head, f"{share:.2f}", ha="center", va="center", color=colour)
    axes.set_xticks(range(len(shares[0])), [f"moon {m + 1}" for m in range(len(shares[0]))])
    axes.set_yticks(range(len(shares)), [f"head {n + 1}" for n in range(len(shares))])
    axes.set_title(title, fontsize=10)
