"""Pieces of a table in Markdown, from the results of an experiment."""

import statistics
from collections.abc import Sequence

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
