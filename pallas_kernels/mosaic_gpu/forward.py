"""Threshold and average of every query, in one kernel.

A program has a block of queries. Its first pass over the keys carries a lower bound of every row's
threshold and lists the tiles that reach above it; further passes walk the list, move the bound by
Newton's steps on the norm and drop tiles that it has left behind; the last averages the values of
the tiles that are left. The bound never passes the threshold: a tile that is dropped has no weight.
"""

import dataclasses
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

from kreg.bandwidth import Adaptive, Anchored, Fixed
from pallas_kernels.mosaic_gpu.operands import Draws, Limits
from pallas_kernels.mosaic_gpu.plan import TILE, WORD, Plan, stages, words
from pallas_kernels.mosaic_gpu.tiles import (
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
    rounded,
    some_above,
    staged,
    staging,
    stream,
    zeros,
)
from pallas_kernels.solver import LOWEST, integer, inverse, power, powers, raised, search

_WIDEST = 128

# What is given and what is found of every row: its threshold in units of y, the sums of the powers
# r and r - 1, its best key (under `Fixed` how many it sees, if that is asked), keys with weight.
ROWS_GIVEN = ("steep", "cut")
FOUND = ("cut", "total", "slope", "best", "support")


class Given(NamedTuple):
    """What the kernel reads, in global memory; see `forward` and `operands`."""

    queries: Any
    keys: Any
    values: Any
    rows: Any
    limits: Any
    by_keys: Any
    draws: Any
    draw_word: Any


class Found(NamedTuple):
    """Output and what the backward pass needs.

    out: sum of the powers r times values, over the sum of the powers.
    lower: the same with powers r - 1.
    rows: the numbers named in FOUND.
    live: which tiles of keys have weight, a bit each.
    work: of every block the tiles that the first pass looked at, those that all passes after it did
        until the thresholds were found, those that the last did, and how many passes there were.
    """

    out: Float[Array, "B T N V"]
    lower: Float[Array, "B T N V"]
    rows: Float[Array, "B N I F 64"]
    live: Int[Array, "B N I W"]
    work: Int[Array, "B N I 4"]


def forward(
    plan: Plan,
    query: Float[Array, "P B T N H"],
    key: Float[Array, "P B S K H"],
    value: Float[Array, "P B S K V"],
    rows: Float[Array, "B N I 2 64"],
    limits: Limits,
    draws: Draws,
) -> Found:
    """Runs the kernel; `rows` are those named in ROWS_GIVEN, y = steep q.k."""
    if plan.value_width > _WIDEST:
        return _by_columns(plan, query, key, value, rows, limits, draws)
    arrays = query, key, value, rows, *limits, *draws
    return launch(plan, _Program, functools.partial(_shared, plan), Given(*arrays))


def launch(plan: Plan, program: type, shared: Callable, given: Given, groups: int = 1) -> Found:
    """Runs a program for every block of queries; shared: its memory, by how many tiles it fetches.

    groups: warpgroups of a program.
    """
    grid = plan.batch, plan.heads, plan.blocks
    shape = plan.batch, given.queries.shape[2], plan.heads, plan.value_width
    out = jax.ShapeDtypeStruct(shape, plan.out_dtype)
    count = stages(shared)
    kernel = plgpu.kernel(
        lambda *refs, **shared: program(plan, count, refs, shared).run(),
        out_type=[
            out,
            out,
            jax.ShapeDtypeStruct((*grid, len(FOUND), TILE), jnp.float32),
            jax.ShapeDtypeStruct((*grid, words(plan.tiles)), jnp.int32),
            jax.ShapeDtypeStruct((*grid, 4), jnp.int32),
        ],
        # Blocks of a head run beside each other, and find its keys in the cache.
        grid=grid,
        grid_names=("batch", "head", "block"),
        num_threads=groups,
        thread_name="warpgroup",
        scratch_types=shared(count),
        compiler_params=compiler_params(plan),
    )
    return Found(*kernel(*given))


def _shared(plan: Plan, stages: int) -> dict[str, Any]:
    """Shared memory of a program."""
    shared = {
        "query": operand(plan, plan.width),
        "key": operand(plan, plan.width, stages),
        "value": operand(plan, plan.value_width, stages),
        "row": plgpu.SMEM((len(ROWS_GIVEN), TILE), jnp.float32),
        "limit": plgpu.SMEM((4, TILE), jnp.int32),
        "out": result(plan),
        "found": plgpu.SMEM((len(FOUND), TILE), jnp.float32),
        "list": plgpu.SMEM((max(plan.tiles, 4),), jnp.int32),
        "words": plgpu.SMEM((words(plan.tiles),), jnp.int32),
        "work": plgpu.SMEM((4,), jnp.int32),
        "ready": plgpu.Barrier(num_arrivals=plan.parts + 2 + plan.drops),
        "key_ready": plgpu.Barrier(num_arrivals=plan.parts + plan.by_key, num_barriers=stages),
        "value_ready": plgpu.Barrier(num_arrivals=plan.parts, num_barriers=stages),
    }
    if plan.drops:
        shared["drawn"] = plgpu.SMEM((TILE,), jnp.int32)
    if plan.by_key:
        shared["by_key"] = plgpu.SMEM((stages, 3, TILE), jnp.int32)
    return shared | staging(plan)


def _by_columns(plan: Plan, query, key, value, *rest) -> Found:
    """Takes wide values in parts: registers hold sums of so many columns."""
    found = []
    for first in range(0, plan.value_width, _WIDEST):
        some = value[..., first : first + _WIDEST]
        part = dataclasses.replace(plan, value_width=some.shape[-1])
        found.append(forward(part, query, key, some, *rest))
    out, lower = (jnp.concatenate(x, axis=-1) for x in zip(*(f[:2] for f in found), strict=True))
    return found[0]._replace(out=out, lower=lower)


class Program:
    """What programs of one block of queries of one head have in common."""

    def __init__(self, plan: Plan, stages: int, refs, shared: dict[str, Any]):
        self.plan, self.stages = plan, stages
        count = len(Given._fields)
        self.given, self.shared = Given(*refs[:count]), SimpleNamespace(**shared)
        self.to = SimpleNamespace(**dict(zip(Found._fields, refs[count:], strict=True)))
        # From the last block on: under a causal mask it is the longest.
        self.block = plan.blocks - 1 - lax.axis_index("block")
        self.head, self.batch = lax.axis_index("head"), lax.axis_index("batch")
        self.key_head = lax.div(self.head, integer(plan.share))

    def _load(self) -> None:
        """Fetches the block, and its rows' numbers, and clears the map of live tiles."""
        self._copy()
        plgpu.barrier_wait(self.shared.ready)
        self.first, self.stop = (self.shared.limit[3, i] for i in range(2))
        self.word = self.given.draw_word[0] if self.plan.drops else None
        self.steep = plgpu.load(self.shared.row.at[0], layout=ROWS)

    def _copy(self) -> None:
        plan, at = self.plan, (self.batch, self.head, self.block)
        fetch(
            plan,
            self.given.queries,
            self.batch,
            self.block * TILE,
            self.head,
            self.shared.query,
            self.shared.ready,
        )
        plgpu.copy_gmem_to_smem(self.given.rows.at[at], self.shared.row, self.shared.ready)
        plgpu.copy_gmem_to_smem(
            self.given.limits.at[self.batch, self.block], self.shared.limit, self.shared.ready
        )
        if plan.drops:
            plgpu.copy_gmem_to_smem(self.given.draws.at[at], self.shared.drawn, self.shared.ready)

        def clear(i, carry):
            self.shared.words[i] = integer(0)
            return carry

        lax.fori_loop(integer(0), integer(words(plan.tiles)), clear, integer(0))

    def _nearest(self, t):
        """Tiles by themselves, the last ones first: they are the nearest under a causal mask."""
        return self.stop - 1 - t

    def _listed(self, t):
        return self.shared.list[t]

    def _stream(self, count, tile, step, carry, with_values: bool = False):
        def begin(j, slot):
            self._fetch_keys(j, slot)
            if with_values:
                self._fetch(self.given.values, j, slot, self.shared.value, self.shared.value_ready)

        return stream(count, self.stages, tile, begin, step, carry)

    def _fetch_keys(self, j, slot) -> None:
        self._fetch(self.given.keys, j, slot, self.shared.key, self.shared.key_ready)
        if self.plan.by_key:
            numbers = self.given.by_keys.at[self.batch, j]
            plgpu.copy_gmem_to_smem(
                numbers, self.shared.by_key.at[slot], self.shared.key_ready.at[slot]
            )

    def _fetch(self, source, j, slot, into, ready) -> None:
        into, ready = into.at[slot], ready.at[slot]
        fetch(self.plan, source, self.batch, j * TILE, self.key_head, into, ready)

    def _scores(self, j, slot) -> Float[Array, "64 64"]:
        plgpu.barrier_wait(self.shared.key_ready.at[slot])
        y = product(self.plan, self.shared.query, self.shared.key.at[slot].transpose((0, 2, 1)))
        by_key = self.shared.by_key.at[slot] if self.plan.by_key else None
        seen = Seen(self.plan, self.block, j, self.shared.limit, by_key)
        return seen.masked(y * across(self.steep))

    def _dropped(self, x, j):
        return dropped(self.plan, x, getattr(self.shared, "drawn", None), self.word, j)


class _Program(Program):
    """One warpgroup, which forms the scores of a tile anew whenever it needs them."""

    def run(self) -> None:
        self._load()
        best, seen, passes = filled(-1.0), integer(0), integer(0)
        if self.plan.rule is Adaptive:
            cut, count = self._bound()
            cut, count, seen, passes = self._refine(cut, count)
            tile = self._listed
        elif self.plan.rule is Anchored:
            cut, best, count = self._greatest()
            tile = self._listed
        else:
            cut = plgpu.load(self.shared.row.at[1], layout=ROWS)
            count, tile = self.stop - self.first, self._nearest
        first = 0 if self.plan.rule is Fixed else self.stop - self.first
        for i, work in enumerate((first, seen, count, passes)):
            self.shared.work[i] = integer(work)
        self._average(cut, best, count, tile)

    def _bound(self):
        """Bounds the thresholds from below, and lists the tiles that reach above."""
        order = self.plan.order

        def step(j, slot, carry):
            y = self._scores(j, slot)
            top = jnp.max(y, axis=1)

            def sums(cut):
                x = jnp.maximum(y - across(cut), 0)
                return [jnp.sum(power(x, m), axis=1) for m in (order, order - 1)]

            def move(cut, norm, slope, count):
                self.shared.list[count] = j
                return *raised(order, (cut, norm, slope), top, sums), count + 1

            live = some_above(top - carry[0])
            return lax.cond(live, move, lambda *carry: carry, *carry)

        start = filled(LOWEST), filled(0.0), filled(0.0), integer(0)
        cut, _, _, count = self._stream(self.stop - self.first, self._nearest, step, start)
        return cut, count

    def _greatest(self):
        """Finds the greatest score of every row and its key, and the threshold that follows."""

        def step(j, slot, carry):
            y = self._scores(j, slot)
            top = jnp.max(y, axis=1)

            def move(cut, best, count):
                self.shared.list[count] = j
                keys = plgpu.broadcasted_iota(jnp.int32, (TILE, TILE), 1, layout=GRID) + j * TILE
                where = jnp.where(y == across(top), keys.astype(jnp.float32), -1.0)
                best = jnp.where(top - 1 > cut, jnp.max(where, axis=1), best)
                return jnp.maximum(cut, top - 1), best, count + 1

            live = some_above(top - carry[0])
            return lax.cond(live, move, lambda *carry: carry, *carry)

        start = filled(LOWEST), filled(-1.0), integer(0)
        return self._stream(self.stop - self.first, self._nearest, step, start)

    def _refine(self, cut, count):
        """Moves the bounds until they are found, over fewer and fewer tiles."""
        exponents = powers(self.plan.order)

        def sums(cut, floor, count, seen):
            def step(j, slot, carry):
                y = self._scores(j, slot)

                def add(kept, *sums):
                    self.shared.list[kept] = j
                    x = jnp.maximum(y - across(cut), 0)
                    new = (jnp.sum(power(x, m), axis=1) for m in exponents)
                    return kept + 1, *(a + b for a, b in zip(sums, new, strict=True))

                live = some_above(jnp.max(y, axis=1) - floor)
                return lax.cond(live, add, lambda *carry: carry, *carry)

            start = integer(0), *(filled(0.0) for _ in exponents)
            kept, *found = self._stream(count, self._listed, step, start)
            return kept, seen + count, *found

        passes, cut, count, seen = search(
            self.plan.order, self.plan.parts > 1, cut, sums, jnp.max, (count, integer(0))
        )
        return cut, count, seen, passes

    def _average(self, cut, best, count, tile) -> None:
        """Averages the values above the thresholds, and notes which tiles have any."""
        plan = self.plan
        counts = plan.rule is Fixed and plan.with_support

        def step(j, slot, carry):
            *carry, seen = carry
            y = self._scores(j, slot)
            if counts:
                seen = seen + jnp.sum(jnp.where(y > -jnp.inf, 1.0, 0.0), axis=1)
            x = jnp.maximum(y - across(cut), 0)
            plgpu.barrier_wait(self.shared.value_ready.at[slot])

            def add(out, lower, weight, total, slope, support):
                self._note(j)
                values, through = self.shared.value.at[slot], staged(self.shared)
                p = power(x, plan.order)
                total = total + jnp.sum(p, axis=1)
                if plan.sums_rounded:
                    p = rounded(plan, p)
                    weight = weight + jnp.sum(p, axis=1)
                out = add_product(plan, out, self._dropped(p, j), values, through)
                u = power(x, plan.order - 1)
                slope = slope + jnp.sum(u, axis=1)
                lower = add_product(plan, lower, self._dropped(u, j), values, through)
                if plan.with_support:
                    support = support + jnp.sum(power(x, 0), axis=1)
                return out, lower, weight, total, slope, support

            live = some_above(jnp.max(x, axis=1))
            return *lax.cond(live, add, lambda *carry: carry, *carry), seen

        nothing, none = zeros(plan.value_width), filled(0.0)
        carry = nothing, nothing, none, none, none, none, none
        out, lower, weight, *rows, seen = self._stream(count, tile, step, carry, True)
        total, slope, support = rows
        weight = weight if plan.sums_rounded else total
        found = cut, total, slope, seen if counts else best, support
        self._store((out, lower), (weight, slope), *found)

    def _note(self, j) -> None:
        word, bit = lax.div(j, integer(WORD)), lax.rem(j, integer(WORD))
        self.shared.words[word] = self.shared.words[word] | lax.shift_left(integer(1), bit)

    def _store(self, averages, weights, *rows) -> None:
        at = self.batch, self.head, self.block
        for i, numbers in enumerate(rows):
            self.shared.found.at[i][...] = numbers
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(self.shared.found, self.to.rows.at[at])
        plgpu.copy_smem_to_gmem(self.shared.words, self.to.live.at[at])
        plgpu.copy_smem_to_gmem(self.shared.work, self.to.work.at[at])
        rows = pl.ds(self.block * TILE, TILE)
        results = self.to.out, self.to.lower
        for average, weight, to in zip(averages, weights, results, strict=True):
            x = average * across(inverse(weight), self.plan.value_width)
            put(x, self.shared.out, to.at[self.batch, rows, self.head])
