"""The table of an experiment in Markdown, from its folder alone."""

from collections.abc import Sequence
from typing import Any

from experiments.runs.results import Results, Run
from experiments.runs.tables import (
    COST_HEADS,
    SUPPORT_HEAD,
    SUPPORT_MEANING,
    cost_cells,
    grid,
    spread,
    support_cell,
    table,
    unfinished,
)

# What the second table tells of a length, by the key of a result.
DETAILS = {
    "exact_with_eos": "exact, EOS too",
    "token_accuracy": "tokens",
    "generated_exact": "generated",
    "bleu": "BLEU",
    "released_exact": "released metric",
    "associative_recall": "recall",
}


def markdown(found: Results) -> str:
    """Return the table: exact at every length, the other scores, what is unfinished."""
    groups = found.by_method()
    lengths = found.benchmark["test_lengths"]
    heads = ("method", "seeds", *(length_name(found, length) for length in lengths), *COST_HEADS)
    rows = [
        (name, str(len(runs)), *(cell(runs, n, "exact") for n in lengths), *cost_cells(runs))
        for name, runs in groups.items()
    ]
    parts = [
        f"## Length generalisation: {title(found)}",
        _caption(found),
        table(heads, rows),
        *_grid(found, groups, lengths),
        *_details(groups, lengths),
    ]
    return "\n\n".join([*parts, *unfinished(found, found.experiment["training"]["steps"])]) + "\n"


def title(found: Results) -> str:
    """Name an experiment in a few words."""
    about = found.experiment
    model = {"mosaic": "Memory Mosaics", "transformer": "Transformers"}[about["model"]]
    return f"{about['task']}, {model}, {about['preset']}"


def length_name(found: Results, length: int) -> str:
    """Write a length and what multiple it is of the longest training length.

    The longest training length itself is ID: in distribution.
    """
    multiple = length / found.benchmark["trained_lengths"][1]
    return f"{length:,} (ID)" if multiple == 1 else f"{length:,} ({multiple:g}x)"


def at(runs: Sequence[Run], length: int) -> list[dict[str, Any]]:
    """Return the scores of the runs at a length."""
    return [run.result["lengths"].get(str(length), {}) for run in runs]


def values(runs: Sequence[Run], length: int, key: str) -> list[float]:
    """Return a score of the runs at a length: of those that have it."""
    return [scores[key] for scores in at(runs, length) if key in scores]


def cell(runs: Sequence[Run], length: int, key: str) -> str:
    """Write a score of the runs in per cent; "" where none has it."""
    if not (numbers := values(runs, length, key)):
        return ""
    return spread([100 * x for x in numbers], digits=1)


def _grid(found: Results, groups: dict[str, list[Run]], lengths: Sequence[int]) -> list[str]:
    """Kernels by rules at the first length beyond the trained ones."""
    longest = found.benchmark["trained_lengths"][1]
    beyond = next((n for n in lengths if n > longest), lengths[-1])
    score = f"Exact match in % at {length_name(found, beyond)}"
    return grid(groups, score, lambda runs: cell(runs, beyond, "exact"))


def _details(groups: dict[str, list[Run]], lengths: Sequence[int]) -> list[str]:
    """A row a method and length: the scores that any run has, and the keys in use."""
    everything = [run for runs in groups.values() for run in runs]
    keys = [key for key in DETAILS if any(values(everything, n, key) for n in lengths)]
    if not keys:
        return []
    rows = [
        (name, f"{n:,}", *(cell(runs, n, key) for key in keys), support_cell(at(runs, n)))
        for name, runs in groups.items()
        for n in lengths
    ]
    return [table(("method", "length", *(DETAILS[key] for key in keys), SUPPORT_HEAD), rows)]


def _caption(found: Results) -> str:
    sizes, training, testing = (found.experiment[k] for k in ("sizes", "training", "testing"))
    low, high = found.benchmark["trained_lengths"]
    runs = [run for runs in found.by_method().values() for run in runs]
    sentences = (
        f"Exact match in % on {testing['samples']:,} fresh sequences of each length, teacher "
        "forcing, EOS aside; mean ± standard deviation over seeds",
        f"Learned on lengths {low} to {high} from {found.benchmark['sequences']:,} sequences in "
        f"batches of {training['batch_size']}, none seen twice",
        f"Layers {sizes['layers']}, heads {sizes['heads']}, width {sizes['width']}, "
        f"hidden {sizes['hidden']}"
        + (f", {runs[0].result['parameters']:,} parameters" if runs else ""),
        "The checkpoint is that of the lowest loss at the longest training length",
        "generated: greedy, all target tokens and then EOS",
        SUPPORT_MEANING,
    )
    return ". ".join(sentences) + "."
