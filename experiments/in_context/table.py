"""The table of an experiment in Markdown, from its folder alone."""

from experiments.in_context.published import MEMORY_MOSAICS, SOURCE
from experiments.regbench import AutomataConfig
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

HEADER = ("method", "seeds", "accuracy", "TVD", "KL", SUPPORT_HEAD, *COST_HEADS)


def markdown(found: Results) -> str:
    """Return the table: methods, n-gram baselines, published numbers, what is unfinished."""
    groups = found.by_method()
    rows = [_method_row(name, runs) for name, runs in groups.items()]
    rows += [
        (name, "", *(f"{values[key]:.3f}" for key in ("accuracy", "tvd", "kl")), *[""] * 4)
        for name, values in found.baselines.items()
    ]
    parts = [
        f"## In-context learning of unseen automata: {title(found)}",
        _caption(found),
        table(HEADER, rows),
        *grid(groups, "TVD", lambda runs: _score(runs, "tvd")),
        _published(found),
    ]
    training = found.experiment["training"]
    steps = -(-found.experiment["data"]["train"] // training["batch_size"]) * training["epochs"]
    return "\n\n".join([*parts, *unfinished(found, steps)]) + "\n"


def title(found: Results) -> str:
    """Name an experiment in a few words."""
    about = found.experiment
    name = f"{about['preset']}, n = {about['data']['train']:,}"
    return f"{name}, compat {about['compat']}" if about["compat"] else name


def has_official_automata(found: Results) -> bool:
    """Tell whether the automata are drawn as the published benchmark draws them."""
    automata = found.experiment["data"]["automata"]
    return automata | {"max_tokens": None} == vars(AutomataConfig())


def is_official(found: Results) -> bool:
    """Tell whether sequences, too, are as long as the published benchmark's."""
    cut = found.experiment["data"]["automata"]["max_tokens"]
    return has_official_automata(found) and cut is None


def _method_row(name: str, runs: list[Run]) -> tuple[str, ...]:
    scores = (_score(runs, key) for key in ("accuracy", "tvd", "kl"))
    support = support_cell([run.result for run in runs])
    return (name, str(len(runs)), *scores, support, *cost_cells(runs))


def _score(runs: list[Run], key: str) -> str:
    return spread([run.result[key] for run in runs])


def _caption(found: Results) -> str:
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
        SUPPORT_MEANING,
        "The n-grams (with back-off) read the same positions",
    )
    return ". ".join(sentences) + "."


def _published(found: Results) -> str:
    heads = ("published: Memory Mosaics", *(f"n = {p.train:,}" for p in MEMORY_MOSAICS))
    rows = [
        ("accuracy", *(f"{p.accuracy:.3f}" for p in MEMORY_MOSAICS)),
        ("TVD", *(f"{p.tvd:.3f}" for p in MEMORY_MOSAICS)),
    ]
    note = f"{SOURCE}."
    if not is_official(found):
        note += " **Not the task above**: do not compare number by number."
    return f"{table(heads, rows)}\n\n{note}"
