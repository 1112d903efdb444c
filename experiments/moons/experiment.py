"""Three Moons as the shared code runs it."""

from typing import TYPE_CHECKING

from experiments.moons.config import PRESETS, check
from experiments.moons.figure import draw
from experiments.moons.table import markdown
from experiments.runs.experiment import Experiment

if TYPE_CHECKING:
    from experiments.runs.task import Task


def _load_task() -> "Task":
    from experiments.moons.task import TASK

    return TASK


EXPERIMENT = Experiment(
    name="moons",
    presets=PRESETS,
    check=check,
    scores=("one head", "three heads"),
    table=markdown,
    draw=draw,
    load_task=_load_task,
)
