"""What a command of this experiment can be told, and the presets it starts from."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from experiments.methods import PAPER
from experiments.runs.experiment import check_counts, check_runs


@dataclass(frozen=True)
class Data:
    """Windows that hold three repeats of the slowest system."""

    length: int = 800
    """Points of a window."""
    windows: int = 32
    """Windows of the held-out system that the result is measured on, and as many of the trained
    ones that choose the checkpoint."""
    seed: int = 0
    """Seed of both; training windows are drawn by the run's own seed."""


@dataclass(frozen=True)
class Training:
    """AdamW without weight decay; the learning rate falls along a line."""

    steps: int = 500
    """Updates."""
    batch_size: int = 64
    """Windows in a step."""
    learning_rate: float = 1e-2
    """What the rate starts from."""
    floor: float = 5e-6
    """What it ends at."""
    evaluations: int = 10
    """Evaluations on windows of trained systems; the lowest loss among them is tested."""


@dataclass(frozen=True)
class Config:
    """Learn to predict systems of three moons, with one head and with three.

    A run trains both models of a method and seed: one head that sees all six coordinates, and three
    of width two. Finished runs are skipped, unfinished ones go on. `table OUT...` and
    `figure OUT...` in place of the options redo the table and the figure from the folders. Exit
    status: 0 done, or stopped by SIGTERM, 2 impossible, 3 stopped with runs left to do.
    """

    preset: Literal["smoke", "small", "paper"] = "smoke"
    """Where all other options start from. smoke: 200 points. small: 400. paper: the published
    setting, 800 points."""
    methods: tuple[str, ...] = tuple(PAPER)
    """The paper's names or any kernel@rule, as in experiments.in_context."""
    seeds: tuple[int, ...] = (0,)
    """A run each: initial weights and training windows."""
    learning_rates: tuple[float, ...] = ()
    """Runs for each of them, in place of training.learning-rate; a row of the table each."""
    out: Path | None = None
    """Folder of the runs; by default runs/moons/ and the preset."""
    time_limit: float | None = None
    """Stop cleanly after this many minutes; the same command goes on from there."""
    together: str = "auto"
    """Seeds of a method in one program: a number, or auto (all on an accelerator, 1 on a CPU)."""
    data: Data = field(default_factory=Data)
    training: Training = field(default_factory=Training)

    @property
    def folder(self) -> Path:
        return self.out or Path("runs/moons") / self.preset

    @property
    def steps(self) -> int:
        return self.training.steps

    def experiment(self) -> dict[str, Any]:
        """Return what the runs of a folder share: all that matters but method and seed."""
        shared = ("preset", "data", "training")
        return {name: value for name, value in dataclasses.asdict(self).items() if name in shared}


PRESETS = {
    "smoke": Config(data=Data(length=200), training=Training(steps=300, batch_size=16)),
    "small": Config("small", data=Data(length=400), training=Training(steps=400, batch_size=32)),
    "paper": Config("paper"),
}


def check(config: Config) -> None:
    """Raise ValueError for a value that no run could start with, before anything is written."""
    check_runs(config)
    counts = {"data": ("length", "windows"), "training": ("steps", "batch_size", "evaluations")}
    check_counts(config, counts)
