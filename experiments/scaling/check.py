"""The formulas beside what XLA makes of a training step, for devices that are not there.

Nothing is run: virtual CPU devices are compiled for, and the collectives counted in the program.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import use_abstract_mesh

from experiments.scaling.collectives import Message, messages, sent
from experiments.scaling.model import Sizes, Split
from experiments.scaling.model import sent as predicted
from kreg import nn, training


class Checked(NamedTuple):
    """One split: bytes that a device sends by formula and in the program, and its memory."""

    split: Split
    predicted: float
    compiled: float
    messages: list[Message]
    state_bytes: int
    temporary_bytes: int


def check(
    sizes: Sizes,
    split: Split,
    among: tuple[Any, ...] | None = None,
    implementation: str | None = "xla",
) -> Checked:
    """Compiles a training step of a Memory Mosaic for split.devices devices, or some of these."""
    devices = training.Devices(*split, among=among)
    step, state, batch = _step(sizes, devices, implementation)
    with use_abstract_mesh(devices.mesh.abstract_mesh):
        compiled = step.lower(state, batch).compile()
    found = messages(compiled.as_text())
    memory = compiled.memory_analysis()
    return Checked(
        split,
        sum(predicted(sizes, split, narrow=4)),
        sent(found),
        found,
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
    )


def _step(sizes: Sizes, devices: training.Devices, implementation: str | None):
    """The step, and the shapes of its arguments."""
    config = nn.MosaicConfig(
        sizes.vocabulary,
        sizes.layers,
        sizes.width // 64,
        sizes.width,
        sizes.slots,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        implementation=implementation,
        layout=devices.layout,
    )
    tx = training.adamw(1e-3)
    model = nnx.eval_shape(lambda: nn.MemoryMosaic(config, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(model)

    def loss(params, batch, key):
        logits = nnx.merge(graph, params)(batch["tokens"])
        return training.mean_token_cross_entropy(logits, batch["labels"], ignore=-1), {}

    def start():
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params)
        return training.init_state(zeros, tx, jax.random.key(0))

    shapes = jax.eval_shape(start)
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        devices.shardings(shapes),
    )
    where = jax.NamedSharding(devices.mesh, jax.P(("data", "fsdp"), "sequence"))
    tokens = jax.ShapeDtypeStruct((sizes.rows, sizes.length), jnp.int32, sharding=where)
    step: Any = training.make_step(loss, tx, devices=devices)
    return step, state, {"tokens": tokens, "labels": tokens}
