"""The table of an experiment in Markdown, from its folder alone."""

import statistics
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

HEADER = ("method", "seeds", "loss", "perplexity", "bits per byte", SUPPORT_HEAD, *COST_HEADS)
MODELS = {"mosaic": "Memory Mosaics", "transformer": "Transformer"}


def markdown(found: Results) -> str:
    """Return the table: methods, n-grams, support by layer, what is unfinished."""
    methods = found.by_method()
    rows = [_method_row(name, runs) for name, runs in methods.items()]
    rows += [(name, "", *_scores([values]), *[""] * 4) for name, values in found.baselines.items()]
    parts = [
        f"## Language modelling: {title(found)}",
        _caption(found),
        table(HEADER, rows),
        *grid(methods, "Loss", lambda runs: _scores([run.result for run in runs])[0]),
        *_against(found),
        *_supports(methods),
    ]
    training = found.experiment["training"]
    steps = training["steps"] * training["accumulate"]
    return "\n\n".join([*parts, *unfinished(found, steps)]) + "\n"


def title(found: Results) -> str:
    """Name an experiment in a few words."""
    about = found.experiment
    name = f"{about['preset']}, {about['data']['name']}, {about['text']['tokenizer']}"
    name += f", {MODELS[about['model']]}"
    return f"{name}, compat {about['compat']}" if about["compat"] else name


def where(found: Results) -> str:
    """Say what the positions of `by_position` are counted from."""
    return "document" if found.experiment["text"]["windows"] == "packed" else "window"


def _method_row(name: str, runs: list[Run]) -> tuple[str, ...]:
    results = [run.result for run in runs]
    return (name, str(len(runs)), *_scores(results), support_cell(results), *cost_cells(runs))


def _scores(results: list[dict[str, Any]]) -> tuple[str, str, str]:
    def column(key: str, digits: int) -> str:
        return spread([result[key] for result in results], digits)

    return column("loss", 4), column("perplexity", 3), column("bits_per_byte", 4)


def _against(found: Results) -> list[str]:
    """Say how far each method is from the n-grams: one paragraph, or none."""
    methods = found.by_method()
    lines = []
    for name, values in found.baselines.items():
        told = []
        for method, runs in methods.items():
            gap = statistics.fmean(run.result["loss"] for run in runs) - values["loss"]
            told.append(f"{method} {gap:+.4f}")
        lines += [f"- {name}: {', '.join(told)}"] if told else []
    if not lines:
        return []
    head = "Nats a token away from the n-grams (below 0 is better than they are):"
    return [f"{head}\n\n" + "\n".join(lines)]


def _supports(methods: dict[str, list[Run]]) -> list[str]:
    """Show the support of each layer, its heads from the least to the most: one table, or none."""
    first = {name: runs[0].result["support"] for name, runs in methods.items()}
    first = {name: support for name, support in first.items() if support}
    if not first:
        return []
    layers = range(max(map(len, first.values())))
    rows = [
        (name, *(" ".join(f"{value:.3g}" for value in sorted(layer)) for layer in support))
        for name, support in first.items()
    ]
    head = "Keys in use by layer, the heads in order of it (the first seed):"
    return [f"{head}\n\n{table(('method', *(f'layer {n + 1}' for n in layers)), rows)}"]


def _caption(found: Results) -> str:
    about, facts = found.experiment, found.benchmark
    options, sizes, training = (about[key] for key in ("text", "sizes", "training"))
    runs = [run for runs in found.by_method().values() for run in runs]
    slots = f", slots {sizes['slots']}" if about["model"] == "mosaic" else ""
    batch = training["batch_size"] * training["accumulate"]
    packed = options["windows"] == "packed"
    train, validation = facts["train"], facts["validation"]
    sentences = (
        f"All {validation['tokens']:,} tokens ({validation['documents']:,} documents) of the "
        "validation set, each once; loss in nats a token, bits per byte of the text (ends of "
        "documents are paid for, not counted), mean ± standard deviation over seeds",
        "The same set chose the best of a run's evaluations",
        f"Learned from {train['tokens']:,} tokens: {training['steps']:,} updates of {batch} "
        f"windows of {options['block']}, "
        + ("documents packed and apart" if packed else "at random places"),
        f"{MODELS[about['model']]} (layers {sizes['layers']}, heads {sizes['heads']}, width "
        f"{sizes['width']}{slots})"
        + (f", {runs[0].result['parameters']:,} parameters" if runs else ""),
        SUPPORT_MEANING,
        "The n-grams (interpolated Kneser-Ney) learn from the same training tokens"
        + ("" if packed else ", and know what stands before a window, which a model does not"),
    )
    return ". ".join(sentences) + "."
