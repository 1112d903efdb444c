"""What all kernels do with a tile: fetch it, score it, raise it to powers, multiply it.

A program is one warpgroup with one block of 64 queries (or keys), and walks over tiles of the
other. Everything of a tile stays in registers, but for operands of products. Scores are kept as
y = z / r: the threshold of a row is then between its best score less one, and its best score.
"""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.counter import stays
from pallas_kernels.mosaic_gpu.plan import ACROSS_WARPS_BYTES, TILE, Plan
from pallas_kernels.solver import integer

SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
GRID = plgpu.Layout.WGMMA
# Numbers of the rows and of the columns of a tile.
ROWS, COLUMNS = GRID.reduce(1), GRID.reduce(0)


def filled(value: float, layout=ROWS) -> Array:
    """One number for every row."""
    return plgpu.layout_cast(jnp.full((TILE,), value, jnp.float32), layout)


def zeros(width: int) -> Array:
    """Sums of a block that nothing has been added to."""
    return plgpu.layout_cast(jnp.zeros((TILE, width), jnp.float32), GRID)


def across(x: Array, width: int = TILE, axis: int = 0) -> Array:
    """Repeats numbers of rows (axis 0) or of columns (axis 1) over a tile."""
    return lax.broadcast_in_dim(x, (TILE, width), [axis])


def compiler_params(plan: Plan):
    """Approximate roots and quotients are good for half types; sums across warps take little."""
    return plgpu.CompilerParams(
        approx_math=plan.parts == 1, reduction_scratch_bytes=ACROSS_WARPS_BYTES
    )


def staging(plan: Plan, groups: int = 1) -> dict[str, Any]:
    """Shared memory for a tile of numbers on its way into a product, where it is needed.

    Of several warpgroups each has its own.
    """
    if plan.in_registers:
        return {}
    shape = (TILE, TILE) if groups == 1 else (groups, TILE, TILE)
    return {"staged": plgpu.SMEM(shape, plan.dtype, transforms=SWIZZLED)}


def staged(shared: SimpleNamespace) -> Any:
    """The memory of `staging`, None where there is none."""
    return getattr(shared, "staged", None)


def operand(plan: Plan, width: int, stages: int | None = None):
    """Shared memory for a block of an operand, in all its parts; or for several."""
    shape = (plan.parts, TILE, width) if stages is None else (stages, plan.parts, TILE, width)
    return plgpu.SMEM(shape, plan.dtype, transforms=SWIZZLED)


def result(plan: Plan):
    """Shared memory through which results leave, 64 columns at a time."""
    columns = 128 // jnp.dtype(plan.out_dtype).itemsize
    transforms = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM((TILE, TILE), plan.out_dtype, transforms=transforms)


def put(x: Float[Array, "64 n"], through, to) -> None:
    """Writes a block of results, rows past the end of `to` left out."""
    for first in range(0, x.shape[1], TILE):
        through[...] = x[:, first : first + TILE].astype(through.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(through, to.at[:, pl.ds(first, TILE)])
        plgpu.wait_smem_to_gmem(0)


def fetch(plan: Plan, source, batch, start, head, into, barrier) -> None:
    """Begins to copy a block of an operand; rows past its end arrive as zeros."""
    for part in range(plan.parts):
        rows = source.at[part, batch, pl.ds(start, TILE), head]
        plgpu.copy_gmem_to_smem(rows, into.at[part], barrier)


def stream(count, stages: int, entry: Callable, begin: Callable, step: Callable, carry):
    """Walks over entries (t) of a list of tiles while the next ones are on their way.

    begin: (entry, slot), starts the copies; step: (entry, slot, carry) -> carry, waits for them.
    """

    def ahead(t):
        begin(entry(t), lax.rem(t, integer(stages)))

    for t in range(stages):
        pl.when(t < count)(functools.partial(ahead, integer(t)))

    def one(t, carry):
        carry = step(entry(t), lax.rem(t, integer(stages)), carry)
        # All four warps have read the slot before it is filled again.
        plgpu.commit_smem()
        pl.when(t + stages < count)(lambda: ahead(t + stages))
        return carry

    return lax.fori_loop(integer(0), count, one, carry)


def product(plan: Plan, left, right) -> Float[Array, "64 n"]:
    """Multiplies two operands, [64, k] and [k, n] in parts."""

    def multiply(total):
        for i, j in plan.pairs:
            plgpu.wgmma(total, left.at[i], right.at[j])
        return total[...]

    return pl.run_scoped(multiply, plgpu.ACC((TILE, right.shape[-1]), jnp.float32))


def add_product(plan: Plan, total, left: Float[Array, "64 64"], right, through) -> Any:
    """Adds the product of a tile of numbers and an operand [64, n]; through: see `staged`."""
    if plan.in_registers:
        left = left.astype(plan.dtype)
        return pl.run_state(lambda found: plgpu.wgmma(found, left, right.at[0]))(
            plgpu.ACC.init(total)
        )
    for i in range(plan.parts):
        part = left.astype(plan.dtype)
        left = left - part.astype(jnp.float32)
        through[...] = part
        plgpu.commit_smem()

        def multiply(found, i=i):
            for j in range(plan.parts - i):
                plgpu.wgmma(found, through, right.at[j])
            return found[...] if plan.interpreted else None

        if plan.interpreted:
            total = total + pl.run_scoped(multiply, plgpu.ACC(total.shape, jnp.float32))
        else:
            total = pl.run_state(multiply)(plgpu.ACC.init(total))
        plgpu.commit_smem()
    return total


def rounded(plan: Plan, x: Array) -> Array:
    """Numbers as `add_product` takes them, still in float32."""
    return x.astype(plan.dtype).astype(jnp.float32)


class Seen(NamedTuple):
    """What says which keys of a tile a block of queries sees; queries are along `axis`.

    limits: shared memory with the numbers of queries; by_key: with those of keys.
    """

    plan: Plan
    block: Array
    tile: Array
    limits: Any
    by_key: Any
    axis: int = 0

    def masked(self, y: Array) -> Array:
        """Scores of keys that are not seen become -inf; most tiles are seen whole."""
        full = (self.tile >= self.limits[3, 2]) & (self.tile < self.limits[3, 3])
        return lax.cond(full, lambda y: y, self._excluded, y)

    def _excluded(self, y: Array) -> Array:
        # One after the other: all at once would take more registers.
        keys = self._index(1 - self.axis) + self.tile * TILE
        y = jnp.where(keys >= self._row(0), y, -jnp.inf)
        y = jnp.where(keys < self._row(1), y, -jnp.inf)
        if self.plan.by_key:
            queries = self._index(self.axis) + self.block * TILE
            y = jnp.where(queries >= self._key(0), y, -jnp.inf)
            y = jnp.where(queries < self._key(1), y, -jnp.inf)
            y = jnp.where(self._row(2) == self._key(2), y, -jnp.inf)
        return y

    def _index(self, axis: int) -> Array:
        layout = COLUMNS if axis else ROWS
        return across(plgpu.broadcasted_iota(jnp.int32, (TILE,), 0, layout=layout), axis=axis)

    def _row(self, i: int) -> Array:
        return self._along(self.limits.at[i], self.axis)

    def _key(self, i: int) -> Array:
        return self._along(self.by_key.at[i], 1 - self.axis)

    def _along(self, numbers, axis: int) -> Array:
        layout = COLUMNS if axis else ROWS
        return across(plgpu.load(numbers, layout=layout), axis=axis)


def dropped(plan: Plan, x: Array, drawn, word, tile, axis: int = 0) -> Array:
    """Drops numbers of a tile and scales the others up, by the counter of `kreg.dropout`.

    drawn: shared memory with what the counter makes of key, batch entry, head and query; word: the
    key's second.
    """
    if not plan.drops:
        return x
    layout = ROWS if axis else COLUMNS
    keys = plgpu.broadcasted_iota(jnp.int32, (TILE,), 0, layout=layout) + tile * TILE
    queries = across(plgpu.load(drawn, layout=COLUMNS if axis else ROWS), axis=axis)
    keep = stays(queries, across(keys, axis=1 - axis), word, plan.dropout_rate)
    return jnp.where(keep, x * (1 / (1 - plan.dropout_rate)), 0.0)


def some_above(rows: Array) -> Array:
    """True where any row's number is above 0, for all threads alike; NaN counts as above.

    What a row with NaN has must not keep a tile from its neighbours.
    """
    return ~(jnp.max(rows) <= 0)
