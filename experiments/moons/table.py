"""The table of an experiment in Markdown, from its folder alone."""

from experiments.runs.results import Results, Run
from experiments.runs.tables import COST_HEADS, cost_cells, spread, table, unfinished

MODELS = ("one head", "three heads")
HEADER = (
    *("method", "model", "seeds", "error after moons", "error after all"),
    *("disentanglement", "points with weight", *COST_HEADS),
)


def markdown(found: Results) -> str:
    """Return the table, two rows a method, and what is unfinished."""
    groups = found.by_method().items()
    rows = [_row(name, model, runs) for name, runs in groups for model in MODELS]
    data, training = found.experiment["data"], found.experiment["training"]
    *_, slowest = found.benchmark["periods"]
    caption = (
        f"Squared error of the next point on {data['windows']} windows of {data['length']} points "
        "of a system that was never trained on. After moons: from where every moon has come round "
        f"({slowest:.0f} points) until all have come round together "
        f"({found.benchmark['common_period']:.0f}). After all: from there on. Disentanglement: the "
        "share of its own head in the prediction of a moon, 1/3 where all heads do the same. Mean "
        "± standard deviation over seeds. A run trains both models, and its cost is that of both."
    )
    parts = [f"## Three Moons: {found.experiment['preset']}", caption]
    parts.append(table(HEADER, rows, left=2))
    return "\n\n".join([*parts, *unfinished(found, training["steps"])]) + "\n"


def _row(name: str, model: str, runs: list[Run]) -> tuple[str, ...]:
    def cell(key: str, digits: int) -> str:
        values = [run.result[model][key] for run in runs]
        return "" if None in values else spread(values, digits)

    return (
        *(name, model, str(len(runs))),
        *(cell("error_after_moons", 4), cell("error_after_all", 4)),
        *(cell("disentanglement", 2), cell("support", 1), *cost_cells(runs)),
    )
