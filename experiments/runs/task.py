"""What an experiment trains: data, programs, and the numbers they are judged by."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import optax
from jaxtyping import Array, Float, PyTree

from experiments.runs.experiment import Config
from kreg.sharding import Layout
from kreg.training import Devices, adamw, decay_matrices, make_step, make_steps
from kreg.training.data import BatchIterator
from kreg.training.schedules import warmup_cosine
from kreg.training.step import LossFn, StepFn
from kreg.training.together import StepsFn


@dataclass(frozen=True, eq=False)
class Program:
    """Hold what is compiled once for all seeds and learning rates of a method.

    Args:
        init: the initial parameters of a seed.
        loss: `(params, batch, key) -> (loss, metrics)`.
        optimizer: the optimizer with so high a (peak) learning rate.
        validate: `(params, data)` -> the numbers of an evaluation, one of which chooses the best.
        test: `(params, data)` -> the numbers of a result, fit for JSON.
    """

    init: Callable[[int], PyTree[Array]]
    loss: LossFn
    optimizer: Callable[[float | Float[Array, ""]], optax.GradientTransformation]
    validate: Callable[[PyTree[Array], Any], dict[str, float]]
    test: Callable[[PyTree[Array], Any], dict[str, Any]]


def matrix_decay(
    training: Any, rate: float | Float[Array, ""], *, accumulate: int = 1
) -> optax.GradientTransformation:
    """Make AdamW that decays matrices alone, with a linear warm-up to `rate` and then a cosine.

    `training` has the fields steps, warmup, floor, beta2, weight_decay and clip.
    """
    schedule = warmup_cosine(
        rate, warmup_steps=training.warmup, decay_steps=training.steps, floor=training.floor
    )
    return adamw(
        schedule,
        betas=(0.9, training.beta2),
        weight_decay=training.weight_decay,
        decays=decay_matrices(),
        clip=training.clip,
        accumulate=accumulate,
    )


def operations(parameters: int, *, layers: int, width: int, batch: int, length: int) -> float:
    """Reckon the operations of an update: 2 P a position forward, and twice as much backward.

    To these P come 2 C T for the causal half of a layer's scores and sums, C the width.

    >>> operations(100, layers=1, width=10, batch=2, length=5)
    9000.0
    """
    return 3 * batch * length * 2.0 * (parameters + layers * width * length)


def devices_of(config: Config) -> Devices | None:
    """How a run is split over devices; None for one."""
    text = getattr(config, "devices", "")
    return Devices.of(text) if text else None


def layout_of(config: Config) -> Layout | None:
    """What a model is to be told of it."""
    devices = devices_of(config)
    return None if devices is None else devices.layout


# Cached, so that the runs of a method are compiled once, not one by one.
@functools.cache
def step_of(program: Program, learning_rate: float, devices: Devices | None = None) -> StepFn:
    """Return the update of a run alone."""
    return make_step(program.loss, program.optimizer(learning_rate), devices=devices)


@functools.cache
def steps_of(program: Program) -> StepsFn:
    """Return the update of several runs in one program."""
    return make_steps(program.loss, program.optimizer)


@dataclass(frozen=True)
class Task[C: Config, D]:
    """Hold the functions that the runs of an experiment are made of.

    Args:
        load: the data, the same for all runs of a command.
        describe: facts about the data for experiment.json, and a sentence for the terminal.
        baselines: scores that need no training, by name; {} where there are none.
        build: the program of a method. It caches by what the program depends on, which is neither
            seed nor learning rate.
        batches: the training batches of a seed, without end.
        tokens_per_batch: without padding, on average.
        operations: additions and multiplications of an update by formula, from config, data and the
            number of parameters.
        best: which number of `validate` chooses the tested checkpoint, and "min" or "max".
    """

    load: Callable[[C], D]
    describe: Callable[[C, D], tuple[dict[str, Any], str]]
    baselines: Callable[[D], dict[str, dict[str, Any]]]
    build: Callable[[C, str], Program]
    batches: Callable[[C, D, int], BatchIterator]
    tokens_per_batch: Callable[[C, D], int]
    operations: Callable[[C, D, int], float] | None = None
    best: tuple[str, Literal["min", "max"]] = ("loss", "min")
