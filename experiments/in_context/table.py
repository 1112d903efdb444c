"""The table of an experiment in Markdown, from its folder alone."""

import statistics
from collections.abc import Sequence

from experiments.in_context.published import MEMORY_MOSAICS, SOURCE
from experiments.in_context.results import Experiment, Run
from experiments.regbench import AutomataConfig

HEADER = ("method", "seeds", "accuracy", "TVD", "KL", "steps", "minutes a run", "ms a step")


def markdown(found: Experiment) -> str:
    """Return the table: methods, n-gram baselines, published numbers, what is unfinished."""
    rows = [_method_row(name, runs) for name, runs in found.by_method().items()]
    rows += [
        (name, "", *(f"{values[key]:.3f}" for key in ("accuracy", "tvd", "kl")), "", "", "")
        for name, values in found.baselines.items()
    ]
    parts = [
        f"## In-context learning of unseen automata: {title(found)}",
        _caption(found),
        _table(HEADER, rows, left=1),
        _published(found),
    ]
    return "\n\n".join([*parts, *_unfinished(found)]) + "\n"


def title(found: Experiment) -> str:
    """Name an experiment in a few words."""
    about = found.experiment
    name = f"{about['preset']}, n = {about['data']['train']:,}"
    return f"{name}, compat {about['compat']}" if about["compat"] else name


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Write a mean, and with more than one value ± their standard deviation.

    >>> spread([0.5]), spread([0.25, 0.75])
    ('0.500', '0.500 ± 0.354')
    """
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def has_official_automata(found: Experiment) -> bool:
    """Tell whether the automata are drawn as the published benchmark draws them."""
    automata = found.experiment["data"]["automata"]
    return automata | {"max_tokens": None} == vars(AutomataConfig())


def is_official(found: Experiment) -> bool:
    """Tell whether sequences, too, are as long as the published benchmark's."""
    cut = found.experiment["data"]["automata"]["max_tokens"]
    return has_official_automata(found) and cut is None


def _method_row(name: str, runs: list[Run]) -> tuple[str, ...]:
    def of(key: str, digits: int = 3, scale: float = 1.0) -> str:
        return spread([run.result[key] * scale for run in runs], digits)

    seconds = [run.result["seconds"] for run in runs]
    return (
        name,
        str(len(runs)),
        of("accuracy"),
        of("tvd"),
        of("kl"),
        f"{runs[0].result['steps']:,}",
        f"{statistics.fmean(seconds) / 60:.1f}",
        f"{statistics.fmean(run.result['ms_per_step'] for run in runs):.1f}",
    )


def _caption(found: Experiment) -> str:
    data, model, training = (found.experiment[key] for key in ("data", "model", "training"))
    facts, automata = found.benchmark, data["automata"]
    low, mean, high = facts["states"]
    kind = "The benchmark's own automata" if has_official_automata(found) else "Small automata"
    cut = automata["max_tokens"]
    runs = [run for runs in found.by_method().values() for run in runs]
    sentences = (
        f"Measured on {facts['test_automata']:,} automata whose languages are not in the training "
        f"set, {facts['test_positions']:,} positions",
        f"{kind}: {low} to {high} states ({mean:.1f} on average), alphabets of "
        f"{automata['min_alphabet']} to {automata['max_alphabet']} letters, at most "
        f"{automata['max_out_degree']} edges a state, "
        + ("whole sequences" if cut is None else f"sequences cut to {cut} tokens"),
        f"Learned from n = {data['train']:,} sequences in {training['epochs']} epochs, batches of "
        f"{training['batch_size']}",
        f"Memory Mosaics (layers {model['layers']}, heads {model['heads']}, width "
        f"{model['width']}, slots {model['slots']})"
        + (f", {runs[0].result['parameters']:,} parameters" if runs else ""),
        "Accuracy: share of positions whose likeliest symbol is legal; TVD: total variation "
        "distance to the automaton's distribution; mean ± standard deviation over seeds",
        "The n-grams (with back-off) read the same positions",
    )
    return ". ".join(sentences) + "."


def _published(found: Experiment) -> str:
    heads = ("published: Memory Mosaics", *(f"n = {p.train:,}" for p in MEMORY_MOSAICS))
    rows = [
        ("accuracy", *(f"{p.accuracy:.3f}" for p in MEMORY_MOSAICS)),
        ("TVD", *(f"{p.tvd:.3f}" for p in MEMORY_MOSAICS)),
    ]
    note = f"{SOURCE}."
    if not is_official(found):
        note += " **Not the task above**: do not compare number by number."
    return f"{_table(heads, rows, left=1)}\n\n{note}"


def _unfinished(found: Experiment) -> list[str]:
    training = found.experiment["training"]
    steps = -(-found.experiment["data"]["train"] // training["batch_size"]) * training["epochs"]
    lines = [f"- {run.method}, seed {run.seed}: {run.state(steps)}" for run in found.unfinished]
    return ["Not in the table, because unfinished:\n\n" + "\n".join(lines)] if lines else []


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> str:
    """Lay out a Markdown table that reads well as text; all but `left` columns flush right."""
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
