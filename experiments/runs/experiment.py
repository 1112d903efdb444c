"""An experiment as the code that runs it sees it: a handful of functions.

Light to import: what takes seconds (flax, optax, orbax) comes with `Experiment.task`.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from experiments.methods import method
from experiments.runs.results import Results

if TYPE_CHECKING:
    from experiments.runs.task import Task


class DataError(ValueError):
    """Say that the data that a command names are not there, or cannot be used."""


class Training(Protocol):
    """What a run's loop has to know of the training; a config's `training` has more fields."""

    @property
    def batch_size(self) -> int: ...

    @property
    def learning_rate(self) -> float: ...

    @property
    def evaluations(self) -> int: ...


class Config(Protocol):
    """What every experiment's command can be told: a frozen, hashable dataclass with defaults.

    The options of a command line are its fields, their help the strings below them, and the
    command's help its docstring.
    """

    @property
    def preset(self) -> str: ...

    @property
    def methods(self) -> tuple[str, ...]: ...

    @property
    def seeds(self) -> tuple[int, ...]: ...

    @property
    def learning_rates(self) -> tuple[float, ...]: ...

    @property
    def time_limit(self) -> float | None: ...

    @property
    def together(self) -> str: ...

    @property
    def training(self) -> Training: ...

    @property
    def folder(self) -> Path:
        """The folder of the runs."""
        ...

    @property
    def steps(self) -> int:
        """The updates of one run."""
        ...

    def experiment(self) -> dict[str, Any]:
        """Return what decides the outcome besides method and seed, fit for JSON."""
        ...


@dataclass(frozen=True)
class Experiment[C: Config]:
    """Hold the parts of an experiment.

    Args:
        name: `python -m experiments.NAME` is its command.
        presets: what the options start from, by name; the first one is the default.
        check: raise ValueError for a config that no run could start with, DataError where that is
            for want of data.
        scores: keys that every result must have, besides steps and seconds.
        table: Markdown, from what a folder holds.
        draw: write the figure as `stem`.png and `stem`.pdf; ValueError where it cannot be drawn.
        load_task: import what trains; see `task.py`.
        published: what others have published and the table leaves out: Markdown, with provenance.
        leading: fields that decide the defaults of others, as the preset does.
        complete: those defaults for a preset with its leading fields; ValueError for unknown ones.
    """

    name: str
    presets: Mapping[str, C]
    check: Callable[[C], None]
    scores: tuple[str, ...]
    table: Callable[[Results], str]
    draw: Callable[[Results, Path], list[Path]]
    load_task: Callable[[], "Task[C, Any]"]
    published: str = ""
    leading: tuple[str, ...] = ()
    complete: Callable[[C], C] = lambda config: config

    @property
    def program(self) -> str:
        """The command, as it is typed."""
        return f"python -m experiments.{self.name}"


def check_runs(config: Config) -> None:
    """Raise ValueError for methods, seeds or a time limit that make no sweep."""
    for name, given in (("methods", config.methods), ("seeds", config.seeds)):
        if not given or len(set(given)) < len(given):
            raise ValueError(f"--{name}: expected one or more, none twice, got {given}")
    for name in config.methods:
        method(name)
    rates = config.learning_rates
    if len(set(rates)) < len(rates) or not all(rate > 0 for rate in rates):
        raise ValueError(f"--learning-rates: expected positive numbers, none twice, got {rates}")
    if config.together != "auto" and not re.fullmatch(r"[1-9]\d*", config.together):
        raise ValueError(f"--together: expected auto or at least 1, got {config.together!r}")
    if config.time_limit is not None and not config.time_limit > 0:
        raise ValueError(f"--time-limit: expected a positive number, got {config.time_limit}")
    check_devices(config)


def check_devices(config: Config) -> None:
    """Raise ValueError for devices that are none, or over which a batch cannot be split."""
    # As `kreg.training.Devices.of` reads it, which takes seconds to import.
    text, counts = getattr(config, "devices", ""), {}
    for part in filter(None, text.split(",")):
        axis, _, count = part.partition("=")
        if axis not in ("data", "fsdp", "sequence") or axis in counts or not count.isdigit():
            raise ValueError(
                f"--devices: expected data, fsdp or sequence, each once with =COUNT, got {part!r}"
            )
        counts[axis] = int(count)
    rows, size = counts.get("data", 1) * counts.get("fsdp", 1), config.training.batch_size
    if size % max(rows, 1) or 0 in counts.values():
        raise ValueError(
            f"--devices: expected counts from 1, data times fsdp dividing the batch size {size}, "
            f"got {text!r}"
        )
    if text and config.together not in ("auto", "1"):
        raise ValueError(f"--together: expected 1 with --devices, got {config.together}")


def check_heads(config: Config, part: str) -> None:
    """Raise ValueError where a part's `width` cannot be split into its `heads`."""
    sizes = getattr(config, part)
    if sizes.width % sizes.heads:
        raise ValueError(
            f"--{part}.width: expected a multiple of --{part}.heads {sizes.heads}, "
            f"got {sizes.width}"
        )


def check_warmup(config: Config) -> None:
    """Raise ValueError where `training` does not end after its warm-up."""
    training: Any = config.training
    if not 0 <= training.warmup < training.steps:
        raise ValueError(
            f"--training.warmup: expected 0 to below --training.steps {training.steps}, "
            f"got {training.warmup}"
        )


def check_counts(config: Config, counts: Mapping[str, tuple[str, ...]]) -> None:
    """Raise ValueError where a count is below one; `counts` names fields by part of the config."""
    for part, names in counts.items():
        for name in names:
            if (value := getattr(getattr(config, part), name)) < 1:
                option = f"--{part}.{name.replace('_', '-')}"
                raise ValueError(f"{option}: expected at least 1, got {value}")
