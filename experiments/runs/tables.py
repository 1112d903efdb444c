"""Pieces of a table in Markdown, from the results of an experiment."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from experiments.methods import KERNELS, RULES, pair
from experiments.runs.results import Results, Run


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Write a mean, and with more than one value ± their standard deviation.

    >>> spread([0.5]), spread([0.25, 0.75])
    ('0.500', '0.500 ± 0.354')
    """
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


COST_HEADS = ("steps", "minutes a run", "ms a step")


def cost_cells(runs: Sequence[Run]) -> tuple[str, str, str]:
    """Write what the runs of a method took, under the heads `COST_HEADS`."""
    speeds = [run.result["ms_per_step"] for run in runs if run.result.get("ms_per_step")]
    return (
        f"{runs[0].result['steps']:,}",
        f"{statistics.fmean(run.result['seconds'] for run in runs) / 60:.1f}",
        f"{statistics.fmean(speeds):.1f}" if speeds else "",
    )


SUPPORT_HEAD = "keys in use"
SUPPORT_MEANING = (
    "Keys in use, on a sample of the sequences: how many have weight in the attention, mean over "
    "positions, heads and layers, and their share of those that could have"
)


def support_cell(results: Sequence[Mapping[str, Any]]) -> str:
    """Write how many keys have weight, and their share; "" where no result has them.

    >>> support_cell([{"support": [[2.0, 4.0]], "visible": 12.0}, {"support": [[6.0, 8.0]]}])
    '5.0'
    >>> support_cell([{"support": [[2.0, 4.0]], "visible": 12.0}])
    '3.0 (25 %)'
    """
    found = [result for result in results if result.get("support")]
    if not found:
        return ""
    keys = statistics.fmean(
        value for result in found for layer in result["support"] for value in layer
    )
    # Older results do not say how many keys were visible.
    if not all("visible" in result for result in found):
        return f"{keys:.1f}"
    share = keys / statistics.fmean(result["visible"] for result in found)
    return f"{keys:.1f} ({100 * share:.3g} %)"


def grid(
    groups: Mapping[str, list[Run]], score: str, cell: Callable[[list[Run]], str]
) -> list[str]:
    """Lay the methods out as kernels by rules: a sentence and a table, or none.

    A grid with fewer than three kernels or rules, or that would be half empty, says nothing that
    the list does not. Runs of learning rates of their own are left to the list.
    """
    cells = {pair(name): cell(runs) for name, runs in groups.items() if runs[0].method == name}
    kernels = sorted({kernel for kernel, _ in cells}, key=_order(KERNELS))
    rules = sorted({rule for _, rule in cells}, key=_order(RULES))
    if min(len(kernels), len(rules)) < 3 or 2 * len(cells) <= len(kernels) * len(rules):
        return []
    rows = [(kernel, *(cells.get((kernel, rule), "") for rule in rules)) for kernel in kernels]
    about = (
        f"{score}, kernels by bandwidth rules (the Gaussian is one and the same under adaptive, "
        "fixed and anchored; a box has no adaptive and no anchored bandwidth):"
    )
    return [about, table(("kernel", *rules), rows)]


def _order(names: Iterable[str]) -> Callable[[str], tuple[int, str]]:
    """Sort by the place in a list, what is not in it by name at the end."""
    places = {name: place for place, name in enumerate(names)}
    return lambda name: (places.get(name, len(places)), name)


def unfinished(found: Results, steps: int) -> list[str]:
    """Name the runs that a table leaves out: one paragraph, or none."""
    lines = [f"- {run.name}, seed {run.seed}: {run.state(steps)}" for run in found.unfinished]
    return ["Not in the table, because unfinished:\n\n" + "\n".join(lines)] if lines else []


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Lay out a Markdown table that reads well as text; all but `left` columns flush right.

    >>> print(table(("method", "loss"), [("softmax", "0.5")]))
    | method  | loss |
    |---------|-----:|
    | softmax |  0.5 |
    """
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return f"| {' | '.join(padded)} |"

    rule = "|".join(
        "-" * (width + 2) if i < left else "-" * (width + 1) + ":" for i, width in enumerate(widths)
    )
    return "\n".join([line(header), f"|{rule}|", *map(line, rows)])
