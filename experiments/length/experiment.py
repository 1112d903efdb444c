"""Length generalisation as the shared code runs it."""

from typing import TYPE_CHECKING

from experiments.length.config import check
from experiments.length.figure import draw
from experiments.length.presets import PRESETS, complete
from experiments.length.published import others
from experiments.length.table import markdown
from experiments.runs.experiment import Experiment

if TYPE_CHECKING:
    from experiments.runs.task import Task


def _load_task() -> "Task":
    from experiments.length.task import TASK

    return TASK


EXPERIMENT = Experiment(
    name="length",
    presets=PRESETS,
    check=check,
    scores=("lengths",),
    table=markdown,
    draw=draw,
    load_task=_load_task,
    published=others(),
    leading=("task", "model"),
    complete=complete,
)
