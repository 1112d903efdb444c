r"""Gradients of queries, keys and values over the live tiles alone.

With p = c x^r and u = c x^(r - 1), c one over the sum of the powers, what flows back to a score z
is u (dp - mean); a row's mean and c come with it. Under `Anchored` the threshold moves with the
best key, to which `away` goes, too. One kernel has a block of queries a program and walks over
keys, the other a tile of keys and walks over queries of all heads that share it: nothing is added
up by more than one program, so that results are the same from run to run.
"""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from kreg.bandwidth import Anchored, Fixed
from pallas_kernels.attention import Pulled
from pallas_kernels.mosaic_gpu.operands import Draws, Limits, turned, unpack
from pallas_kernels.mosaic_gpu.plan import TILE, WORD, Plan, stages, words
from pallas_kernels.mosaic_gpu.tiles import (
    COLUMNS,
    GRID,
    ROWS,
    Seen,
    across,
    add_product,
    compiler_params,
    dropped,
    fetch,
    filled,
    operand,
    product,
    put,
    result,
    staged,
    staging,
    stream,
    zeros,
)
from pallas_kernels.solver import integer, power

_WIDEST = 128
# What is given of every row.
ROWS_GIVEN = Pulled._fields


class Given(NamedTuple):
    """What the kernels read, in global memory; `live` by block of queries or by tile of keys."""

    queries: Any
    keys: Any
    values: Any
    douts: Any
    rows: Any
    limits: Any
    by_keys: Any
    draws: Any
    draw_word: Any
    live: Any


def backward(
    plan: Plan,
    query: Float[Array, "P B T N H"],
    key: Float[Array, "P B S K H"],
    value: Float[Array, "P B S K V"],
    dout: Float[Array, "P B T N V"],
    rows: Float[Array, "B N I 6 64"],
    live: Int[Array, "B N I W"],
    limits: Limits,
    draws: Draws,
) -> tuple[Array, Array, Array, Float[Array, "2 B N T"]]:
    """Runs both kernels; returns the gradients of query, key and value, and two sums of every row.

    With dz what flows back to its scores: the sums of dz y and, under `Fixed`, of dz.
    """
    arrays = query, key, value, dout, rows, *limits, *draws
    dquery, sums = _query_kernel(plan, query.shape[2])(*arrays, live)
    arrays, length = (*arrays, turned(plan, live)), key.shape[2]
    if max(plan.width, plan.value_width) <= _WIDEST:
        dkey, dvalue = _key_kernel(plan, length, True, True)(*arrays)
    else:
        # One after the other: registers do not hold both.
        (dkey,) = _key_kernel(plan, length, True, False)(*arrays)
        (dvalue,) = _key_kernel(plan, length, False, True)(*arrays)
    return dquery, dkey, dvalue, unpack(plan, sums)


def _query_kernel(plan: Plan, length: int) -> Callable:
    grid = plan.batch, plan.heads, plan.blocks
    count = stages(functools.partial(_query_shared, plan))
    return plgpu.kernel(
        lambda *refs, **shared: _OfQueries(plan, count, refs, shared).run(),
        out_type=[
            _gradient(plan, length, plan.heads, plan.width),
            jax.ShapeDtypeStruct((*grid, 2, TILE), jnp.float32),
        ],
        grid=grid,
        grid_names=("batch", "head", "block"),
        num_threads=1,
        thread_name="warpgroup",
        scratch_types=_query_shared(plan, count),
        compiler_params=compiler_params(plan),
    )


def _query_shared(plan: Plan, stages: int) -> dict[str, Any]:
    """Shared memory of a program with a block of queries."""
    shared = {
        "query": operand(plan, plan.width),
        "dout": operand(plan, plan.value_width),
        "key": operand(plan, plan.width, stages),
        "value": operand(plan, plan.value_width, stages),
        "row": plgpu.SMEM((len(ROWS_GIVEN), TILE), jnp.float32),
        "limit": plgpu.SMEM((4, TILE), jnp.int32),
        "out": result(plan),
        "sums": plgpu.SMEM((2, TILE), jnp.float32),
        "list": plgpu.SMEM((max(plan.tiles, 4),), jnp.int32),
        "words": plgpu.SMEM((words(plan.tiles),), jnp.int32),
        "ready": plgpu.Barrier(num_arrivals=2 * plan.parts + 3 + plan.drops),
        "key_ready": plgpu.Barrier(num_arrivals=plan.parts + plan.by_key, num_barriers=stages),
        "value_ready": plgpu.Barrier(num_arrivals=plan.parts, num_barriers=stages),
    }
    if plan.drops:
        shared["drawn"] = plgpu.SMEM((TILE,), jnp.int32)
    if plan.by_key:
        shared["by_key"] = plgpu.SMEM((stages, 3, TILE), jnp.int32)
    return shared | staging(plan)


def _key_kernel(plan: Plan, length: int, of_key: bool, of_value: bool) -> Callable:
    widths = [plan.width] * of_key + [plan.value_width] * of_value
    count = stages(functools.partial(_key_shared, plan))
    return plgpu.kernel(
        lambda *refs, **shared: _OfKeys(plan, count, of_key, of_value, refs, shared).run(),
        out_type=[_gradient(plan, length, plan.key_heads, width) for width in widths],
        grid=(plan.batch, plan.key_heads, plan.tiles),
        grid_names=("batch", "head", "tile"),
        num_threads=1,
        thread_name="warpgroup",
        scratch_types=_key_shared(plan, count),
        compiler_params=compiler_params(plan),
    )


def _key_shared(plan: Plan, stages: int) -> dict[str, Any]:
    """Shared memory of a program with a tile of keys."""
    arrivals = plan.parts + 2 + plan.drops
    shared = {
        "key": operand(plan, plan.width),
        "value": operand(plan, plan.value_width),
        "query": operand(plan, plan.width, stages),
        "dout": operand(plan, plan.value_width, stages),
        "row": plgpu.SMEM((stages, len(ROWS_GIVEN), TILE), jnp.float32),
        "limit": plgpu.SMEM((stages, 4, TILE), jnp.int32),
        "out": result(plan),
        "list": plgpu.SMEM((max(plan.blocks, 4),), jnp.int32),
        "words": plgpu.SMEM((words(plan.blocks),), jnp.int32),
        "ready": plgpu.Barrier(num_arrivals=2 * plan.parts + plan.by_key),
        "listed": plgpu.Barrier(),
        "query_ready": plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages),
        "dout_ready": plgpu.Barrier(num_arrivals=plan.parts, num_barriers=stages),
    }
    if plan.drops:
        shared["drawn"] = plgpu.SMEM((stages, TILE), jnp.int32)
    if plan.by_key:
        shared["by_key"] = plgpu.SMEM((3, TILE), jnp.int32)
    return shared | staging(plan)


def _gradient(plan: Plan, length: int, heads: int, width: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((plan.batch, length, heads, width), plan.out_dtype)


def _list(words, into) -> Array:
    """Lists the set bits of a map, both in shared memory; returns how many there are."""

    def one(i, found):
        def unfinished(carry):
            return carry[0] != 0

        def take(carry):
            left, found = carry
            lowest = left & -left
            into[found] = i * WORD + (WORD - 1) - lax.clz(lowest)
            return left ^ lowest, found + 1

        return lax.while_loop(unfinished, take, (words[i], found))[1]

    count = lax.fori_loop(integer(0), integer(words.shape[0]), one, integer(0))
    plgpu.commit_smem()
    return count


def _pulled(plan: Plan, x, dp, number: Callable[[str], Array], key, axis: int) -> Array:
    """What flows back to the scores of a tile; `number` repeats a row's number over it."""
    dz = power(x, plan.order - 1) * number("scale") * (dp - number("mean"))
    if plan.rule is not Anchored:
        return dz
    keys = plgpu.broadcasted_iota(jnp.int32, (TILE, TILE), 1 - axis, layout=GRID) + key
    best = keys.astype(jnp.float32) == number("best")
    return dz - jnp.where(best, number("away"), 0.0)


class _OfQueries:
    """The gradient of one block of queries of one head."""

    def __init__(self, plan: Plan, stages: int, refs, shared: dict[str, Any]):
        self.plan, self.stages = plan, stages
        *given, self.to, self.sums_to = refs
        self.given, self.shared = Given(*given), SimpleNamespace(**shared)
        self.block = plan.blocks - 1 - lax.axis_index("block")
        self.head, self.batch = lax.axis_index("head"), lax.axis_index("batch")
        self.key_head = lax.div(self.head, integer(plan.share))

    def run(self) -> None:
        plan, at = self.plan, (self.batch, self.head, self.block)
        start = self.block * TILE
        fetch(
            plan,
            self.given.queries,
            self.batch,
            start,
            self.head,
            self.shared.query,
            self.shared.ready,
        )
        fetch(
            plan,
            self.given.douts,
            self.batch,
            start,
            self.head,
            self.shared.dout,
            self.shared.ready,
        )
        plgpu.copy_gmem_to_smem(self.given.rows.at[at], self.shared.row, self.shared.ready)
        plgpu.copy_gmem_to_smem(
            self.given.limits.at[self.batch, self.block], self.shared.limit, self.shared.ready
        )
        if plan.drops:
            plgpu.copy_gmem_to_smem(self.given.draws.at[at], self.shared.drawn, self.shared.ready)
        plgpu.copy_gmem_to_smem(self.given.live.at[at], self.shared.words, self.shared.ready)
        plgpu.barrier_wait(self.shared.ready)
        count = _list(self.shared.words, self.shared.list)
        self.word = self.given.draw_word[0] if plan.drops else None
        self.numbers = {
            name: plgpu.load(self.shared.row.at[i], layout=ROWS)
            for i, name in enumerate(ROWS_GIVEN)
        }
        carry = zeros(plan.width), filled(0.0), filled(0.0)
        found = stream(
            count, self.stages, lambda t: self.shared.list[t], self._begin, self._step, carry
        )
        self._store(*found)

    def _begin(self, j, slot) -> None:
        for source, into, ready in (
            (self.given.keys, self.shared.key, self.shared.key_ready),
            (self.given.values, self.shared.value, self.shared.value_ready),
        ):
            into, ready = into.at[slot], ready.at[slot]
            fetch(self.plan, source, self.batch, j * TILE, self.key_head, into, ready)
        if self.plan.by_key:
            numbers = self.given.by_keys.at[self.batch, j]
            plgpu.copy_gmem_to_smem(
                numbers, self.shared.by_key.at[slot], self.shared.key_ready.at[slot]
            )

    def _step(self, j, slot, carry):
        plan, (total, *sums) = self.plan, carry
        plgpu.barrier_wait(self.shared.key_ready.at[slot])
        y = product(plan, self.shared.query, self.shared.key.at[slot].transpose((0, 2, 1)))
        by_key = self.shared.by_key.at[slot] if plan.by_key else None
        seen = Seen(plan, self.block, j, self.shared.limit, by_key)
        y = seen.masked(y * across(self.numbers["steep"]))
        x = jnp.maximum(y - across(self.numbers["cut"]), 0)
        plgpu.barrier_wait(self.shared.value_ready.at[slot])
        dp = product(plan, self.shared.dout, self.shared.value.at[slot].transpose((0, 2, 1)))
        dp = dropped(plan, dp, getattr(self.shared, "drawn", None), self.word, j)
        dz = _pulled(plan, x, dp, lambda name: across(self.numbers[name]), j * TILE, 0)
        # Keys with weight have y = x + cut; those without may have y = -inf.
        sums[0] = sums[0] + jnp.sum(dz * (x + across(self.numbers["cut"])), axis=1)
        if plan.rule is Fixed:
            sums[1] = sums[1] + jnp.sum(dz, axis=1)
        return add_product(plan, total, dz, self.shared.key.at[slot], staged(self.shared)), *sums

    def _store(self, total, *sums) -> None:
        plan, steep = self.plan, self.numbers["steep"]
        for i, numbers in enumerate(sums):
            self.shared.sums.at[i][...] = numbers
        plgpu.commit_smem()
        at = self.batch, self.head, self.block
        plgpu.copy_smem_to_gmem(self.shared.sums, self.sums_to.at[at])
        rows = pl.ds(self.block * TILE, TILE)
        total = total * across(steep * plan.order, plan.width)
        put(total, self.shared.out, self.to.at[self.batch, rows, self.head])


class _OfKeys:
    """The gradients of one tile of keys and values, of all heads that share them."""

    def __init__(self, plan: Plan, stages: int, of_key: bool, of_value: bool, refs, shared):
        self.plan, self.stages, self.of_key, self.of_value = plan, stages, of_key, of_value
        count = len(Given._fields)
        self.given, self.to = Given(*refs[:count]), refs[count:]
        self.shared = SimpleNamespace(**shared)
        self.tile, self.batch = lax.axis_index("tile"), lax.axis_index("batch")
        self.key_head = lax.axis_index("head")

    def run(self) -> None:
        plan, start = self.plan, self.tile * TILE
        fetch(
            plan,
            self.given.keys,
            self.batch,
            start,
            self.key_head,
            self.shared.key,
            self.shared.ready,
        )
        fetch(
            plan,
            self.given.values,
            self.batch,
            start,
            self.key_head,
            self.shared.value,
            self.shared.ready,
        )
        if plan.by_key:
            numbers = self.given.by_keys.at[self.batch, self.tile]
            plgpu.copy_gmem_to_smem(numbers, self.shared.by_key, self.shared.ready)
        plgpu.barrier_wait(self.shared.ready)
        self.word = self.given.draw_word[0] if plan.drops else None
        carry = (zeros(plan.width),) * self.of_key + (zeros(plan.value_width),) * self.of_value
        found = lax.fori_loop(integer(0), integer(plan.share), self._head, carry)
        rows = self.batch, pl.ds(start, TILE), self.key_head
        for x, to in zip(found, self.to, strict=True):
            put(x, self.shared.out, to.at[rows])

    def _head(self, i, carry):
        """Adds what flows back from the queries of one head."""
        head = self.key_head * self.plan.share + i
        at = self.batch, head, self.tile
        plgpu.copy_gmem_to_smem(self.given.live.at[at], self.shared.words, self.shared.listed)
        plgpu.barrier_wait(self.shared.listed)
        count = _list(self.shared.words, self.shared.list)

        def begin(block, slot):
            ready = self.shared.query_ready.at[slot]
            where = self.batch, block * TILE, head
            fetch(self.plan, self.given.queries, *where, self.shared.query.at[slot], ready)
            plgpu.copy_gmem_to_smem(
                self.given.rows.at[self.batch, head, block], self.shared.row.at[slot], ready
            )
            plgpu.copy_gmem_to_smem(
                self.given.limits.at[self.batch, block], self.shared.limit.at[slot], ready
            )
            if self.plan.drops:
                drawn = self.given.draws.at[self.batch, head, block]
                plgpu.copy_gmem_to_smem(drawn, self.shared.drawn.at[slot], ready)
            fetch(
                self.plan,
                self.given.douts,
                *where,
                self.shared.dout.at[slot],
                self.shared.dout_ready.at[slot],
            )

        return stream(count, self.stages, lambda t: self.shared.list[t], begin, self._step, carry)

    def _step(self, block, slot, carry):
        plan, found = self.plan, list(carry)

        # Numbers of columns take many registers: they are loaded where they are needed.
        def number(name):
            return across(
                plgpu.load(self.shared.row.at[slot, ROWS_GIVEN.index(name)], layout=COLUMNS), axis=1
            )

        plgpu.barrier_wait(self.shared.query_ready.at[slot])
        y = product(plan, self.shared.key, self.shared.query.at[slot].transpose((0, 2, 1)))
        by_key = self.shared.by_key if plan.by_key else None
        seen = Seen(plan, block, self.tile, self.shared.limit.at[slot], by_key, axis=1)
        y = seen.masked(y * number("steep"))

        # Formed anew where it is needed: what its powers share would be kept across the products.
        def above():
            return jnp.maximum(y - number("cut"), 0)

        plgpu.barrier_wait(self.shared.dout_ready.at[slot])

        def drop(x):
            return dropped(plan, x, self._drawn(slot), self.word, self.tile, axis=1)

        if self.of_value:
            p = drop(power(above(), plan.order) * number("scale"))
            found[-1] = add_product(
                plan, found[-1], p, self.shared.dout.at[slot], staged(self.shared)
            )
        if self.of_key:
            dp = product(plan, self.shared.value, self.shared.dout.at[slot].transpose((0, 2, 1)))
            dz = _pulled(plan, above(), drop(dp), number, self.tile * TILE, 1)
            dz = dz * (number("steep") * plan.order)
            found[0] = add_product(
                plan, found[0], dz, self.shared.query.at[slot], staged(self.shared)
            )
        return tuple(found)

    def _drawn(self, slot):
        return self.shared.drawn.at[slot] if self.plan.drops else None
