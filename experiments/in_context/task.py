"""Memory Mosaics that learn random automata: the model of a method, its data and its judges."""

import functools
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, PyTree

from experiments import supports
from experiments.in_context.config import Config, Model
from experiments.in_context.objective import (
    Rows,
    blank,
    evaluate,
    held_out,
    make_loss,
    make_measure,
    summary,
)
from experiments.methods import method
from experiments.regbench import VOCAB_SIZE, Benchmark, make_split, ngram
from experiments.runs.task import Program, Task, devices_of, layout_of, operations
from kreg.nn import MemoryMosaic, MosaicConfig
from kreg.sharding import Layout
from kreg.training import adamw, batches
from kreg.training.data import BatchIterator
from kreg.training.schedules import regbench
from kreg.training.writer import fetch

ORDERS = {"2-gram": 2, "3-gram": 3}


@dataclass(frozen=True)
class Data:
    """The benchmark, and its held-out sets on the device once they are wanted."""

    benchmark: Benchmark
    batch_size: int

    @cached_property
    def validation(self) -> list[dict[str, Array]]:
        return held_out(self.benchmark.validation, self.batch_size)

    @cached_property
    def test(self) -> list[dict[str, Array]]:
        return held_out(self.benchmark.test, self.batch_size)


def make_model(
    name: str, sizes: Model, compat: str | None, seed: int, layout: Layout | None = None
) -> MemoryMosaic:
    """Build the model of a method with its initial parameters."""
    config = MosaicConfig(
        vocab_size=VOCAB_SIZE,
        num_layers=sizes.layers,
        num_heads=sizes.heads,
        embed_dim=sizes.width,
        memory_size=sizes.slots,
        **method(name)._asdict(),
        attention_dropout=sizes.attention_dropout,
        hidden_dropout=sizes.hidden_dropout,
        compat=compat,
        layout=layout,
    )
    return MemoryMosaic(config, rngs=nnx.Rngs(seed))


def _build(config: Config, name: str) -> Program:
    training = config.training
    optimizer = (training.weight_decay, training.clip, config.steps)
    return _program(name, config.model, config.compat, layout_of(config), *optimizer)


@functools.cache
def _program(
    name: str,
    sizes: Model,
    compat: str | None,
    layout: Layout | None,
    weight_decay: float,
    clip: float,
    total_steps: int,
) -> Program:
    graph, _ = nnx.split(
        nnx.eval_shape(lambda: make_model(name, sizes, compat, 0, layout)), nnx.Param
    )

    def apply(params, tokens, key):
        return nnx.merge(graph, params)(tokens, dropout_key=key)

    measure = make_measure(apply)

    @jax.jit
    def count(params: PyTree[Array], batch: dict[str, Array]) -> supports.Counts:
        places = jnp.arange(batch["tokens"].shape[1])[None]
        inside = places < batch["lengths"][:, None]
        return supports.count(nnx.merge(graph, params), batch["tokens"], inside=inside)

    def init(seed: int) -> PyTree[Array]:
        return nnx.to_pure_dict(nnx.state(make_model(name, sizes, compat, seed), nnx.Param))

    def optimizer(rate):
        schedule = regbench(rate, total_steps=total_steps)
        return adamw(schedule, weight_decay=weight_decay, clip=clip)

    def validate(params: PyTree[Array], data: Data) -> dict[str, float]:
        found = evaluate(measure, params, data.validation)
        return {name: found[name] for name in ("loss", "tvd", "accuracy", "kl")}

    def test(params: PyTree[Array], data: Data) -> dict[str, Any]:
        rows = data.test[: -(-supports.ROWS // data.batch_size)]
        try:
            found = supports.summary(fetch([count(params, batch) for batch in rows]))
        except NotImplementedError:
            found = {}
        return evaluate(measure, params, data.test) | found

    return Program(init, make_loss(apply), optimizer, validate, test)


def _load(config: Config) -> Data:
    options = config.data
    benchmark = make_split(
        options.automata,
        train=options.train,
        validation=options.validation,
        test=options.test,
        seed=options.seed,
    )
    return Data(benchmark, config.training.batch_size)


def _describe(config: Config, data: Data) -> tuple[dict[str, Any], str]:
    """Tell how large the held-out set came out."""
    test, sizes = data.benchmark.test, data.benchmark.test.automata.sizes
    facts = {
        "test_automata": len(test),
        "test_positions": int(test.lengths.sum()),
        "states": [int(sizes.min()), float(np.mean(sizes)), int(sizes.max())],
        "longest": int(data.benchmark.train.input_ids.shape[1]),
    }
    return facts, (
        f"{config.data.train:,} automata to learn from, {facts['test_automata']:,} unseen ones to "
        f"test on ({facts['test_positions']:,} positions)"
    )


def _baselines(data: Data) -> dict[str, dict[str, Any]]:
    """Score the n-grams on the same positions."""
    test = data.benchmark.test
    return {name: summary(ngram.score(test, order)) for name, order in ORDERS.items()}


def _batches(config: Config, data: Data, seed: int) -> BatchIterator:
    size = config.training.batch_size
    devices = devices_of(config)
    return batches(Rows(data.benchmark.train), size, seed=seed, blank=blank, devices=devices)


def _tokens_per_batch(config: Config, data: Data) -> int:
    return round(config.training.batch_size * float(data.benchmark.train.lengths.mean()))


def _operations(config: Config, data: Data, parameters: int) -> float:
    """Positions are those of a batch with its padding."""
    return operations(
        parameters,
        layers=config.model.layers,
        width=config.model.width,
        batch=config.training.batch_size,
        length=data.benchmark.train.input_ids.shape[1],
    )


TASK = Task(
    load=_load,
    describe=_describe,
    baselines=_baselines,
    build=_build,
    batches=_batches,
    tokens_per_batch=_tokens_per_batch,
    operations=_operations,
)
