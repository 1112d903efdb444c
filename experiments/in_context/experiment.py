"""In-context learning as the shared code runs it."""

from typing import TYPE_CHECKING

from experiments.in_context.config import PRESETS, check
from experiments.in_context.figure import draw
from experiments.in_context.published import others
from experiments.in_context.table import markdown
from experiments.runs.experiment import Experiment

if TYPE_CHECKING:
    from experiments.runs.task import Task


def _load_task() -> "Task":
    from experiments.in_context.task import TASK

    return TASK


EXPERIMENT = Experiment(
    name="in_context",
    presets=PRESETS,
    check=check,
    scores=("accuracy", "tvd", "kl"),
    table=markdown,
    draw=draw,
    load_task=_load_task,
    published=others(),
)
