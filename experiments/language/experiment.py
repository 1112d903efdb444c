"""Language modelling as the shared code runs it."""

from typing import TYPE_CHECKING

from experiments.language.config import PRESETS, check
from experiments.language.figure import draw
from experiments.language.table import markdown
from experiments.runs.experiment import Experiment

if TYPE_CHECKING:
    from experiments.runs.task import Task


def _load_task() -> "Task":
    from experiments.language.task import TASK

    return TASK


EXPERIMENT = Experiment(
    name="language",
    presets=PRESETS,
    check=check,
    scores=("loss", "perplexity", "bits_per_byte", "by_position", "edges", "support"),
    table=markdown,
    draw=draw,
    load_task=_load_task,
)
