"""The smallest experiment: the toy training of training_run.py as the shared code runs it."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import training_run

from experiments.runs.experiment import Experiment, check_counts, check_runs
from experiments.runs.figures import draw_curves, methods_to_draw, new_figure, save
from experiments.runs.results import Results
from experiments.runs.tables import COST_HEADS, cost_cells, spread, table, unfinished
from experiments.runs.task import Program, Task
from kreg.training import adamw, batches
from kreg.training.schedules import warmup_cosine


@dataclass(frozen=True)
class Training:
    batch_size: int = 16
    learning_rate: float = 1e-2
    evaluations: int = 3
    steps: int = 12


@dataclass(frozen=True)
class Config:
    """Fit a toy."""

    preset: str = "smoke"
    methods: tuple[str, ...] = ("softmax", "biweight")
    seeds: tuple[int, ...] = (0,)
    out: Path | None = None
    learning_rates: tuple[float, ...] = ()
    time_limit: float | None = None
    together: str = "auto"
    training: Training = field(default_factory=Training)

    @property
    def folder(self) -> Path:
        return self.out or Path("runs/toy")

    @property
    def steps(self) -> int:
        return self.training.steps

    def experiment(self) -> dict[str, Any]:
        return {"preset": self.preset, "training": asdict(self.training)}


def check(config: Config) -> None:
    check_runs(config)
    check_counts(config, {"training": ("batch_size", "evaluations", "steps")})


def init(seed: int) -> dict[str, Any]:
    noise = np.random.default_rng(seed).normal(size=(8, 4)).astype(np.float32)
    params = training_run.initial_params()
    return params | {"head": params["head"] + 0.1 * noise}


def optimizer(rate):
    return adamw(warmup_cosine(rate, warmup_steps=5, decay_steps=30, floor=1e-4), clip=1.0)


PROGRAM = Program(
    init=init,
    loss=training_run.loss,
    optimizer=optimizer,
    validate=lambda params, data: {"loss": float(training_run.validation(params))},
    test=lambda params, data: {"error": float(training_run.validation(params))},
)
TASK = Task(
    load=lambda config: training_run.rows(),
    describe=lambda config, data: ({"rows": len(data)}, f"{len(data)} rows"),
    baselines=lambda data: {},
    build=lambda config, method: PROGRAM,
    batches=lambda config, data, seed: batches(data, config.training.batch_size, seed=seed),
    tokens_per_batch=lambda config, data: config.training.batch_size,
)


def markdown(found: Results) -> str:
    rows = [
        (name, spread([run.result["error"] for run in runs]), *cost_cells(runs))
        for name, runs in found.by_method().items()
    ]
    parts = [table(("method", "error", *COST_HEADS), rows)]
    return "\n\n".join([*parts, *unfinished(found, found.experiment["training"]["steps"])]) + "\n"


def draw(found: Results, stem: Path) -> list[Path]:
    figure = new_figure(4, 3)
    draw_curves(figure.subplots(), methods_to_draw(found), "loss")
    return save(figure, stem)


EXPERIMENT = Experiment(
    name="toy",
    presets={"smoke": Config()},
    check=check,
    scores=("error",),
    table=markdown,
    draw=draw,
    load_task=lambda: TASK,
)


def params_of(folder: Path, which: str = "last") -> list[jax.Array]:
    """The arrays of a run's checkpoint, in order."""
    from kreg.training import load_params

    return jax.tree.leaves(load_params(folder, which, init(0)))
