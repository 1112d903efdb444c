"""Runs, each a method and a seed, from initial weights to a tested checkpoint."""

import statistics
from collections.abc import Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
from jaxtyping import Array, PyTree

from experiments.runs import environment
from experiments.runs.experiment import Config
from experiments.runs.json_files import read_json, write_json
from experiments.runs.results import METRICS, RESULT, RUN, run_folder
from experiments.runs.task import Program, Task, devices_of, step_of, steps_of
from kreg.training import (
    Progress,
    TrainResult,
    init_state,
    load_params,
    read_metrics,
    train,
    train_together,
)
from kreg.training.data import BatchIterator
from kreg.training.run_directory import RunDirectory
from kreg.training.writer import is_first


@dataclass(frozen=True)
class Setting[C: Config]:
    """A method and a seed of an experiment.

    `variant` names what the config has otherwise than the command's other runs; "" for nothing.
    """

    config: C
    method: str
    seed: int
    variant: str = ""

    @property
    def folder(self) -> Path:
        return run_folder(self.config.folder, self.method, self.seed, self.variant)

    @property
    def finished(self) -> bool:
        return (self.folder / RESULT).is_file()

    def described(self) -> dict[str, Any]:
        """Return all that decides the outcome, fit for JSON."""
        return {"method": self.method, "seed": self.seed, "experiment": self.config.experiment()}


def check_owner(setting: Setting) -> None:
    """Raise ValueError where the run's folder was made with another config; change nothing."""
    RunDirectory(setting.folder).check_config(setting.described())


def announce(setting: Setting) -> None:
    """Say in the run's folder that it is wanted, so that a run that never started can be named."""
    if not (setting.folder / RUN).is_file():
        write_json(setting.folder / RUN, setting.described() | {"sessions": []})


def _open_session(setting: Setting, company: int) -> None:
    """Add to the run's record when, by which versions, on what and with how many it goes on."""
    sessions = read_json(setting.folder / RUN, ("sessions",))["sessions"]
    now = {"started": datetime.now(UTC).isoformat(timespec="seconds")} | environment.describe()
    now["together"] = company
    write_json(setting.folder / RUN, setting.described() | {"sessions": [*sessions, now]})


def run[C: Config, D](
    task: Task[C, D],
    settings: Sequence[Setting[C]],
    data: D,
    *,
    time_limit: float | None,
    label: str,
) -> str | None:
    """Train until the steps are done or the time is up, then test; tell what stopped it, if so.

    What is on the disk decides where it starts: a run that was stopped goes on, and ends with the
    losses and parameters that it would have had. The tested parameters are those of the best
    evaluation.

    Args:
        settings: runs of one method that differ in seed or learning rate; more than one are one
            program.
        time_limit: seconds.
        label: what the progress line calls these runs.
    """
    config, method = settings[0].config, settings[0].method
    if is_first():
        for setting in settings:
            _open_session(setting, len(settings))
    program = task.build(config, method)
    params = [program.init(setting.seed) for setting in settings]
    with ExitStack() as open_iterators:
        batches = [
            open_iterators.enter_context(closing(task.batches(config, data, setting.seed)))
            for setting in settings
        ]
        trained = _train(
            settings,
            program,
            params,
            batches,
            label,
            steps=config.steps,
            evaluate=lambda params: program.validate(params, data),
            eval_every=max(1, round(config.steps / config.training.evaluations)),
            log_every=max(1, config.steps // 100),
            tokens_per_batch=task.tokens_per_batch(config, data),
            best=task.best,
            time_limit=time_limit,
        )
    for setting, initial, end in zip(settings, params, trained, strict=True):
        if end.finished and end.stopped_by is None:
            _test(task, setting, data, program, initial, end.best_step)
    return next((end.stopped_by for end in trained if end.stopped_by), None)


def _train(
    settings: Sequence[Setting],
    program: Program,
    params: Sequence[PyTree[Array]],
    batches: Sequence[BatchIterator],
    label: str,
    **options: Any,
) -> list[TrainResult]:
    """Call `train` for one run, `train_together` for more."""
    rates = [setting.config.training.learning_rate for setting in settings]
    states = [
        init_state(initial, program.optimizer(rate), jax.random.key(setting.seed))
        for setting, initial, rate in zip(settings, params, rates, strict=True)
    ]
    folders = [setting.folder for setting in settings]
    configs = [setting.described() for setting in settings]
    if len(settings) == 1:
        devices = devices_of(settings[0].config)
        step = step_of(program, rates[0], devices)
        options |= {"config": configs[0], "progress": Progress(label, quiet=not is_first())}
        options["devices"] = devices
        return [train(folders[0], states[0], step, batches[0], **options)]
    return train_together(
        folders,
        states,
        steps_of(program),
        batches,
        learning_rates=rates,
        configs=configs,
        # The first run speaks for all; the logs have the others.
        progress=[Progress(label), *(Progress(quiet=True) for _ in settings[1:])],
        **options,
    )


def _test(
    task: Task,
    setting: Setting,
    data: Any,
    program: Program,
    like: PyTree[Array],
    best_step: int | None,
) -> None:
    """Measure the best checkpoint and write the result, which ends the run."""
    devices, params = devices_of(setting.config), load_params(setting.folder, "best", like)
    with nullcontext() if devices is None else jax.set_mesh(devices.mesh):
        found = program.test(params if devices is None else devices.place(params), data)
    if not is_first():
        return
    about = {"best_step": best_step, "parameters": sum(x.size for x in jax.tree.leaves(like))}
    cost = _cost(setting, task.tokens_per_batch(setting.config, data))
    write_json(setting.folder / RESULT, found | about | cost)


def _cost(setting: Setting, tokens_per_batch: int) -> dict[str, Any]:
    """What the run took, over all its commands; the speed is that of the steps alone.

    Both are the run's share where it was trained together with others.
    """
    events = read_metrics(setting.folder / METRICS)
    speeds = [e["tokens_per_second"] for e in events if e.get("tokens_per_second")]
    speed = statistics.median(speeds) if speeds else None
    return {
        "steps": setting.config.steps,
        "seconds": events[-1]["seconds"],
        "tokens_per_second": speed,
        "ms_per_step": None if speed is None else 1000 * tokens_per_batch / speed,
    }
