"""All methods and seeds of a command in one folder: seeds in company, companies in turn."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from experiments.runs.experiment import Config, Experiment
from experiments.runs.json_files import read_json, write_json
from experiments.runs.results import BASELINES, EXPERIMENT
from experiments.runs.run import Setting, announce, check_owner, run
from experiments.runs.task import Task, devices_of
from kreg.training.run_directory import as_json, first_difference
from kreg.training.writer import as_first_says, is_first, wait_for_all


def settings(config: Config) -> list[Setting]:
    """List the runs of a command: the first seed of all methods before the second."""
    variants = _variants(config)
    return [
        Setting(changed, name, seed, variant)
        for seed in config.seeds
        for name in config.methods
        for variant, changed in variants.items()
    ]


def _variants[C: Config](config: C) -> dict[str, C]:
    """The config with each learning rate that is asked for; its own one needs no name."""
    own, changed = config.training.learning_rate, {}
    for rate in config.learning_rates or (own,):
        # Protocols do not say that both are dataclasses.
        parts: Any = config, config.training
        training = dataclasses.replace(parts[1], learning_rate=rate)
        name = "" if rate == own else f"lr{rate!r}"
        changed[name] = dataclasses.replace(parts[0], training=training)
    return changed


def prepare[C: Config](experiment: Experiment[C], config: C) -> None:
    """Check that the runs can be made where they are to be made, before anything is changed.

    Raises:
        ValueError: a value is impossible, or the folder belongs to another experiment; the message
            names the field.
        OSError: the folder cannot be made.
    """
    experiment.check(config)
    stored = config.folder / EXPERIMENT
    if stored.is_file():
        found = read_json(stored, ("experiment",))["experiment"]
        if difference := first_difference(as_json(config.experiment()), found):
            field, wanted, there = difference
            raise ValueError(
                f"--out: {config.folder} holds runs of another experiment: {field} is {there} "
                f"there and {wanted} in this command. Choose another --out; nothing was changed."
            )
    for setting in settings(config):
        check_owner(setting)
    config.folder.mkdir(parents=True, exist_ok=True)


def sweep[C: Config](
    experiment: Experiment[C], config: C, say: Callable[[str], None]
) -> str | None:
    """Do the runs that are not finished; tell what stopped that, if something did."""
    clock = _Clock(config.time_limit)
    task = experiment.load_task()
    data = task.load(config)
    _describe(experiment.name, task, config, data, say)
    everything = settings(config)
    if is_first():
        for setting in everything:
            announce(setting)
    waiting = [setting for setting in everything if not setting.finished]
    wait_for_all("the list of runs")
    if skipped := len(everything) - len(waiting):
        say(f"{skipped} of {len(everything)} runs are finished already")
    companies = in_company(waiting, company_size(config))
    for number, company in enumerate(companies, 1):
        what = _name(company)
        say(f"[{number}/{len(companies)}] {what}, {clock.told(number - 1, len(companies))}")
        stopped_by, left = "time", as_first_says(clock.left)
        if left != 0:
            stopped_by = run(task, company, data, time_limit=left, label=what)
        if stopped_by is not None:
            say(f"stopped in {what} by {stopped_by}; the same command goes on from there")
            return stopped_by
    return None


def company_size(config: Config) -> int:
    """Return how many runs of a method are one program: as `together` says.

    On an accelerator a run of these sizes leaves most of it idle, so all seeds go together; on a
    CPU there is nothing idle, and two runs together take as long as one after the other.
    """
    if config.together != "auto":
        return int(config.together)
    if devices_of(config) is not None:
        return 1
    return 1 if jax.default_backend() == "cpu" else len(settings(config)) // len(config.methods)


def in_company(waiting: Sequence[Setting], size: int) -> list[list[Setting]]:
    """Put runs of one method together, so many at most, in the order of their first ones."""
    companies = []
    for method in dict.fromkeys(setting.method for setting in waiting):
        own = [setting for setting in waiting if setting.method == method]
        companies += [own[start : start + size] for start in range(0, len(own), size)]
    return sorted(companies, key=lambda company: waiting.index(company[0]))


def _name(company: Sequence[Setting]) -> str:
    seeds = ", ".join(f"{s.seed} {s.variant}".strip() for s in company)
    return f"{company[0].method} seed{'s' if len(company) > 1 else ''} {seeds}"


@dataclass
class _Clock:
    """How long the command has taken, and what its time limit leaves."""

    minutes: float | None

    def __post_init__(self) -> None:
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    @property
    def left(self) -> float | None:
        return None if self.minutes is None else max(0.0, 60 * self.minutes - self.seconds)

    def told(self, done: int, count: int) -> str:
        """Put the time gone, and the time to come as far as the runs so far tell it, in words."""
        gone = f"{self.seconds / 60:.1f} min so far"
        if not done:
            return gone
        return f"{gone}, about {self.seconds / done * (count - done) / 60:.1f} min left"


def _describe(name: str, task: Task, config: Config, data: Any, say: Callable[[str], None]) -> None:
    """Write what the runs share, facts about their data, and what scores without training."""
    facts, sentence = task.describe(config, data)
    shared = {"name": name, "experiment": config.experiment(), "benchmark": facts}
    if not is_first():
        return
    write_json(config.folder / EXPERIMENT, shared)
    say(sentence)
    if not (config.folder / BASELINES).is_file() and (baselines := task.baselines(data)):
        write_json(config.folder / BASELINES, baselines)
