"""How a kernel is started: what it is given and gives; vmapped axes join the batch."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array


class Kernel(NamedTuple):
    """A kernel for grids (batch entries, `grid`...).

    body: is called with all arrays by their names. inputs, outputs: how blocks of them are picked;
    shapes: of outputs without the batch, and their types. scratch: a program's own memory. memory:
    see `Sizes`.
    """

    name: str
    body: Callable[[SimpleNamespace], None]
    grid: tuple[int, ...]
    inputs: dict[str, pl.BlockSpec]
    outputs: dict[str, pl.BlockSpec]
    shapes: dict[str, tuple[tuple[int, ...], Any]]
    scratch: dict[str, Any]
    memory: int

    def run(self, *arrays: Array) -> tuple[Array, ...]:
        """Calls it on arrays that all have a batch axis, the first."""

        @jax.custom_batching.custom_vmap
        def call(*arrays):
            return tuple(self._compiled(arrays[0].shape[0])(*arrays))

        @call.def_vmap
        def folded(size, is_mapped, *arrays):
            full = [
                x if mapped else jnp.broadcast_to(x, (size, *x.shape))
                for x, mapped in zip(arrays, is_mapped, strict=True)
            ]
            found = call(*(x.reshape(-1, *x.shape[2:]) for x in full))
            apart = tuple(x.reshape(size, -1, *x.shape[1:]) for x in found)
            return apart, (True,) * len(apart)

        return call(*arrays)

    def _compiled(self, batch: int) -> Callable:
        names = [*self.inputs, *self.outputs, *self.scratch]
        grid = batch, *self.grid
        return pl.pallas_call(
            lambda *refs: self.body(SimpleNamespace(**dict(zip(names, refs, strict=True)))),
            name=self.name,
            grid=grid,
            in_specs=list(self.inputs.values()),
            out_specs=[self.outputs[name] for name in self.shapes],
            out_shape=[
                jax.ShapeDtypeStruct((batch, *shape), dtype)
                for shape, dtype in self.shapes.values()
            ],
            scratch_shapes=list(self.scratch.values()),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=(pltpu.PARALLEL,) * len(grid),
                vmem_limit_bytes=self.memory or None,
            ),
        )


def block(*shape: int | None, at: Callable) -> pl.BlockSpec:
    """A block in vector memory; None where an axis is picked from."""
    return pl.BlockSpec(shape, at)


def scalars(*shape: int | None, at: Callable) -> pl.BlockSpec:
    """A block in scalar memory."""
    return pl.BlockSpec(shape, at, memory_space=pltpu.SMEM)


def remote() -> pl.BlockSpec:
    """An array that stays in the device's memory and is fetched from by hand."""
    return pl.BlockSpec(memory_space=pl.ANY)
