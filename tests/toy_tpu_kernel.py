"""A small kernel with the parts of the real ones, which it stands in for until they are there.

Tiles of keys are listed by row of tiles; lists and tiles are copied by hand, tiles while the one
before is multiplied; how many there are is known when the kernel runs.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

TILE = 128


def listed_products(count, listed, query, keys):
    """For each tile of queries, the sum of its products with the listed tiles of keys."""
    scratch = [
        pltpu.VMEM((2, TILE, TILE), keys.dtype),
        pltpu.VMEM((TILE, TILE), jnp.float32),
        pltpu.SMEM((1, *listed.shape[1:]), jnp.int32),
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.SemaphoreType.DMA(()),
    ]
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=count.shape,
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.HBM),
            pl.BlockSpec((TILE, TILE), lambda i, count: (i, 0)),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=pl.BlockSpec((TILE, TILE), lambda i, count: (i, 0)),
        scratch_shapes=scratch,
    )
    shape = jax.ShapeDtypeStruct(query.shape, jnp.float32)
    call = pl.pallas_call(_kernel, grid_spec=grid, out_shape=shape, name="listed_products")
    return call(count, listed, query, keys)


def _kernel(count, listed, query, keys, out, tiles, total, mine, copied, told):
    i = pl.program_id(0)
    n = count[i]
    copy = pltpu.make_async_copy(listed.at[pl.ds(i, 1)], mine, told)
    copy.start()
    copy.wait()
    total[...] = jnp.zeros_like(total)

    def tile(j):
        rows = pl.ds(mine[0, 0, j] * TILE, TILE)
        return pltpu.make_async_copy(keys.at[rows, :], tiles.at[j % 2], copied.at[j % 2])

    @pl.when(n > 0)
    def _():
        tile(0).start()

    def multiply(j):
        @pl.when(j + 1 < n)
        def _():
            tile(j + 1).start()

        tile(j).wait()
        total[...] += jnp.dot(query[...], tiles[j % 2], preferred_element_type=jnp.float32)
        return j + 1

    lax.while_loop(lambda j: j < n, multiply, jnp.int32(0))
    out[...] = total[...]
