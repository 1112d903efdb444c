"""Models that learn a task on short sequences: programs, batches, and tests at every length."""

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from experiments.length.batches import Numbers
from experiments.length.config import Config
from experiments.length.evaluate import (
    generate_length,
    make_count,
    make_measure,
    make_write,
    measure_length,
    support_length,
)
from experiments.length.model import applier, initial, merger
from experiments.length.tasks import task_of
from experiments.length_tasks import IGNORED, asentmax_layout, batch_key, device_batch
from experiments.runs.task import Program, Task, devices_of, matrix_decay, operations
from kreg.training import Devices, mean_token_cross_entropy
from kreg.training.data import BatchIterator

# Sequences of each length whose supports are counted: all their queries, so a few will do.
SUPPORT_SAMPLES = 8


def _build(config: Config, name: str) -> Program:
    # All but what the program does not depend on.
    training = replace(config.training, learning_rate=1.0, evaluations=1)
    plain = replace(config, methods=(), seeds=(), learning_rates=(), out=None, time_limit=None)
    return _program(replace(plain, together="auto", training=training), name)


@functools.cache
def _program(config: Config, name: str) -> Program:
    task = task_of(config)
    layout = asentmax_layout(task)
    training, testing, seed = config.training, config.testing, config.data.seed
    tables = task.tables(seed, "train")
    devices = devices_of(config) or Devices()
    merge = merger(config, name, layout, devices.layout)
    apply = applier(merge, layout, drops=config.sizes.dropout > 0)
    measure = make_measure(apply, task, layout, devices)
    count = make_count(merge, devices)
    write = make_write(merger(config, name, layout), layout, devices)

    def loss(params: PyTree[Array], batch: dict[str, Array], key: Array):
        which = batch_key(batch["seed"], "train", batch["number"])
        shared = jax.tree.map(jnp.asarray, tables)
        # Each device draws its own rows.
        drawn: Any = devices.split_batch(
            device_batch(task, layout, which, training.batch_size, shared)
        )
        logits = apply(params, drawn.inputs, key)
        return mean_token_cross_entropy(logits, drawn.labels, ignore=IGNORED), {}

    def optimizer(rate):
        return matrix_decay(training, rate)

    def validate(params: PyTree[Array], data: None) -> dict[str, float]:
        return measure_length(
            measure,
            params,
            task,
            layout,
            length=config.trained_length,
            split="validation",
            seed=seed,
            samples=config.data.validation,
            positions=testing.positions,
            devices=devices,
        )

    def test(params: PyTree[Array], data: None) -> dict[str, Any]:
        found = {}
        for number, length in enumerate(config.lengths):
            where: dict[str, Any] = {"length": length, "split": f"test_{length}", "seed": seed}
            where |= {"positions": testing.positions, "devices": devices}
            scores = measure_length(measure, params, task, layout, samples=testing.samples, **where)
            few = min(SUPPORT_SAMPLES, testing.samples)
            scores |= support_length(count, params, task, layout, samples=few, **where)
            if number < testing.generated_lengths:
                few = min(testing.generated, testing.samples)
                scores |= generate_length(write, params, task, layout, samples=few, **where)
            found[str(length)] = scores
        return {"lengths": found}

    def init(seed: int) -> PyTree[Array]:
        return initial(config, name, layout, seed)

    return Program(init, loss, optimizer, validate, test)


def _describe(config: Config, data: None) -> tuple[dict[str, Any], str]:
    """Tell what is learned and what is tested."""
    low, high = task_of(config).lengths[0], config.trained_length
    facts = {
        "trained_lengths": [low, high],
        "test_lengths": list(config.lengths),
        "sequences": config.training.steps * config.training.batch_size,
    }
    return facts, (
        f"{config.task}: {facts['sequences']:,} sequences of lengths {low} to {high} to learn "
        f"from, {config.testing.samples:,} of each of {', '.join(map(str, config.lengths))} to "
        "test on"
    )


def _batches(config: Config, data: None, seed: int) -> BatchIterator:
    return Numbers(seed)


def _tokens_per_batch(config: Config, data: None) -> int:
    """Positions of sources and targets of the mean length; shorter for some of the tasks."""
    task = task_of(config)
    layout = asentmax_layout(task)
    return config.training.batch_size * layout.width(task.at(config.data.seq_len))


def _operations(config: Config, data: None, parameters: int) -> float:
    """Positions are those of a batch with its padding."""
    task = task_of(config)
    return operations(
        parameters,
        layers=config.sizes.layers,
        width=config.sizes.width,
        batch=config.training.batch_size,
        length=asentmax_layout(task).width(task),
    )


TASK = Task(
    load=lambda config: None,
    describe=_describe,
    baselines=lambda data: {},
    build=_build,
    batches=_batches,
    tokens_per_batch=_tokens_per_batch,
    operations=_operations,
)
