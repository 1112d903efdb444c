"""Threshold and average of every query, in one kernel.

A program has a block of queries. Its first pass over the keys carries a lower bound of every row's
threshold and lists the tiles that reach above it, piece by piece; further passes walk the list,
move the bound by Newton's steps on the norm and drop what it has left behind; the last averages the
values of what is left. The bound never passes the threshold: a piece that is dropped has no weight.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kreg.bandwidth import Adaptive, Anchored, Fixed
from pallas_kernels.mosaic_tpu.launch import Kernel, block, remote, scalars
from pallas_kernels.mosaic_tpu.operands import Seen
from pallas_kernels.mosaic_tpu.plan import Plan
from pallas_kernels.mosaic_tpu.tiles import (
    STAGES,
    Stream,
    across,
    columns,
    dropped,
    hidden,
    some_above,
    times,
)
from pallas_kernels.solver import LOWEST, integer, inverse, power, powers, raised, search

# What is given and what is found of every row: its threshold in units of y, the sums of the powers
# r and r - 1, its best key (under `Fixed` how many it sees, if that is asked), keys with weight.
ROWS_GIVEN = ("steep", "cut")
FOUND = ("cut", "total", "slope", "best", "support")
# What is counted of every block, in pieces but for the last.
WORK = ("first", "refined", "averaged", "passes")


class Found(NamedTuple):
    """Output and what the backward pass needs.

    out: sum of the powers r times values, over the sum of the powers.
    lower: the same with powers r - 1.
    rows: the numbers named in FOUND.
    live: of every tile of keys which pieces have weight, a bit each.
    work: the numbers named in WORK: pieces that the first pass looked at, those that all passes
        after it did until the thresholds were found, those that the last did; passes.
    """

    out: Float[Array, "B N V T'"]
    lower: Float[Array, "B N V T'"]
    rows: Float[Array, "B N F T'"]
    live: Int[Array, "B N I 1 J"]
    work: Int[Array, "B N I 1 4"]


def forward(
    plan: Plan,
    query: Float[Array, "B N H T'"],
    key: Float[Array, "B K H S'"],
    value: Float[Array, "B K V S'"],
    rows: Float[Array, "B N 2 T'"],
    seen: Seen,
) -> Found:
    """Runs the kernel; `rows` are those named in ROWS_GIVEN, y = steep q.k."""
    kernel = Kernel(
        "threshold_and_average",
        lambda refs: _Program(plan, refs).run(),
        (plan.heads, plan.blocks),
        _inputs(plan),
        _outputs(plan),
        _shapes(plan),
        _scratch(plan),
        plan.sizes.memory,
    )
    return Found(*kernel.run(query, key, value, rows, *seen))


def _inputs(plan: Plan) -> dict[str, Any]:
    size = plan.sizes.block
    return {
        "query": block(None, None, plan.width, size, at=lambda b, n, i: (b, n, 0, i)),
        "keys": remote(),
        "values": remote(),
        "rows": block(None, None, len(ROWS_GIVEN), size, at=lambda b, n, i: (b, n, 0, i)),
        "limits": block(None, 3, size, at=lambda b, n, i: (b, 0, i)),
        "bounds": scalars(None, None, 1, 4, at=lambda b, n, i: (b, i, 0, 0)),
        "by_keys": remote(),
        "draws": block(None, None, 1, size, at=lambda b, n, i: (b, n, 0, i)),
        "word": scalars(None, 1, 1, at=lambda b, n, i: (b, 0, 0)),
    }


def _outputs(plan: Plan) -> dict[str, Any]:
    size = plan.sizes.block

    def of_block(count):
        return block(None, None, count, size, at=lambda b, n, i: (b, n, 0, i))

    def counts(count):
        return scalars(None, None, None, 1, count, at=lambda b, n, i: (b, n, i, 0, 0))

    return {
        "out": of_block(plan.value_width),
        "lower": of_block(plan.value_width),
        "found": of_block(len(FOUND)),
        "live": counts(plan.tiles),
        "work": counts(len(WORK)),
    }


def _shapes(plan: Plan) -> dict[str, Any]:
    heads, blocks = plan.heads, plan.blocks
    return {
        "out": ((heads, plan.value_width, plan.rows), plan.dtype),
        "lower": ((heads, plan.value_width, plan.rows), plan.dtype),
        "found": ((heads, len(FOUND), plan.rows), jnp.float32),
        "live": ((heads, blocks, 1, plan.tiles), jnp.int32),
        "work": ((heads, blocks, 1, len(WORK)), jnp.int32),
    }


def _scratch(plan: Plan) -> dict[str, Any]:
    """What a program has of its own; `count` counts listed tiles, then pieces."""
    sizes, dtype = plan.sizes, plan.dtype
    slots = plan.tiles * sizes.pieces if plan.keeps else 1
    scratch = {
        "key": pltpu.VMEM((STAGES, plan.width, sizes.tile), dtype),
        "value": pltpu.VMEM((STAGES, plan.ones + plan.value_width, sizes.tile), dtype),
        "y": pltpu.VMEM((slots, sizes.piece, sizes.block), jnp.float32),
        "line": pltpu.VMEM((8, sizes.block), jnp.float32),
        "sums": pltpu.VMEM((8, sizes.block), jnp.float32),
        "outs": pltpu.VMEM((2, plan.ones + plan.value_width, sizes.block), jnp.float32),
        "tile": pltpu.SMEM((plan.tiles,), jnp.int32),
        "bits": pltpu.SMEM((plan.tiles,), jnp.int32),
        "count": pltpu.SMEM((2,), jnp.int32),
        "arrived": pltpu.SemaphoreType.DMA((3, STAGES)),
    }
    if plan.by_key:
        scratch["by_key"] = pltpu.VMEM((STAGES, 8, sizes.tile), jnp.int32)
    return scratch


class _Program:
    """One block of queries of one head."""

    def __init__(self, plan: Plan, refs: SimpleNamespace):
        self.plan, self.refs = plan, refs
        self.batch, self.head, self.block = (pl.program_id(i) for i in range(3))
        self.key_head = lax.div(self.head, integer(plan.share))
        first, stop, *full = (refs.bounds[0, i] for i in range(4))
        self.first, self.stop, self.full = first, stop, full
        pieces = integer(plan.sizes.pieces)
        self.first_tile = lax.div(first, pieces)
        self.tiles = jnp.maximum(lax.div(stop + pieces - 1, pieces) - self.first_tile, 0)
        self.steep = refs.rows[0:1]
        self.seen = SimpleNamespace(limits=refs.limits[...])

    def run(self) -> None:
        refs, plan = self.refs, self.plan
        refs.found[...] = jnp.zeros(refs.found.shape, jnp.float32)
        refs.count[0] = integer(0)
        if plan.ones:
            refs.value[:, : plan.ones] = jnp.ones_like(refs.value[:, : plan.ones])
        for j in range(4):
            refs.work[0, j] = integer(0)

        def clear(j, carry):
            refs.live[0, j] = integer(0)
            return carry

        lax.fori_loop(integer(0), integer(plan.tiles), clear, integer(0))
        if plan.rule is Adaptive:
            self._bound()
            self._refine()
        elif plan.rule is Anchored:
            self._greatest()
        self._average()

    def _nearest(self, t):
        """Tiles by themselves, the last ones first: they are the nearest under a causal mask."""
        return self.first_tile + self.tiles - 1 - t

    def _listed(self, t):
        return self.refs.tile[t]

    def _stream(self, keys: bool, values: bool) -> Stream:
        refs, size = self.refs, self.plan.sizes.tile
        sources = []
        if keys:
            sources.append(
                (lambda j: columns(refs.keys.at[self.batch, self.key_head], j, size), refs.key)
            )
            if self.plan.by_key:
                sources.append(
                    (lambda j: columns(refs.by_keys.at[self.batch], j, size), refs.by_key)
                )
        if values:
            into = refs.value.at[:, self.plan.ones :]
            sources.append(
                (lambda j: columns(refs.values.at[self.batch, self.key_head], j, size), into)
            )
        return Stream(*sources, semaphores=refs.arrived)

    def _scores(self, j, slot, p: int, is_kept: bool):
        """The memory in which the scores of a piece are, formed now if they were not kept."""
        plan, refs = self.plan, self.refs
        piece = j * plan.sizes.pieces + p
        y = refs.y.at[piece if plan.keeps else 0]
        if is_kept and plan.keeps:
            return y
        here = slice(p * plan.sizes.piece, (p + 1) * plan.sizes.piece)
        y[...] = across(plan, refs.key[slot, :, here], refs.query[...]) * self.steep
        whole = (piece >= self.full[0]) & (piece < self.full[1])

        @pl.when(~whole)
        def _():
            seen = self.seen
            if plan.by_key:
                seen = SimpleNamespace(limits=seen.limits, by_key=refs.by_key[slot, :, here])
            start = piece * plan.sizes.piece
            y[...] = hidden(plan, y[...], start, seen, self.block * plan.sizes.block)

        return y

    def _walk(
        self, step: Callable, note: Callable, counter: str, *, listed: bool, values: bool = False
    ) -> None:
        """Takes a step (tile, slot, piece, scores) for pieces that are seen, or listed.

        A step says whether a piece is live. note: (tile, bits of its live pieces), where any is;
        counter: of WORK, by the pieces that were looked at.
        """
        plan, refs = self.plan, self.refs
        at = WORK.index(counter)

        def tile(t, j, slot):
            bits = refs.bits[t] if listed else None
            refs.count[1] = integer(0)
            for p in reversed(range(plan.sizes.pieces)):

                @pl.when(self._is_wanted(bits, j, p))
                def _(p=p):
                    refs.work[0, at] = refs.work[0, at] + 1
                    live = step(j, slot, p, self._scores(j, slot, p, listed))

                    @pl.when(live)
                    def _():
                        refs.count[1] = refs.count[1] | (1 << p)

            found = refs.count[1]
            pl.when(found != 0)(lambda: note(j, found))

        stream = self._stream(keys=not (listed and plan.keeps), values=values)
        count = refs.count[0] if listed else self.tiles
        refs.count[0] = integer(0)
        stream.walk(count, self._listed if listed else self._nearest, tile)

    def _is_wanted(self, bits, j, p: int):
        if bits is not None:
            return (lax.shift_right_logical(bits, integer(p)) & 1) == 1
        piece = j * self.plan.sizes.pieces + p
        return (piece >= self.first) & (piece < self.stop)

    def _list(self, j, bits) -> None:
        """Appends a tile to the list, which never overtakes the walk over it."""
        count = self.refs.count[0]
        self.refs.tile[count], self.refs.bits[count] = j, bits
        self.refs.count[0] = count + 1

    def _bound(self) -> None:
        """Bounds the thresholds from below, and lists what reaches above."""
        order, line = self.plan.order, self.refs.line
        line[0:1] = jnp.full_like(line[0:1], LOWEST)
        line[1:3] = jnp.zeros_like(line[1:3])

        def step(j, slot, p, y):
            top = jnp.max(y[...], axis=0, keepdims=True)
            live = some_above(top - line[0:1])

            def sums(cut):
                return [self._sum(y, cut, m) for m in (order, order - 1)]

            @pl.when(live)
            def _():
                before = line[0:1], line[1:2], line[2:3]
                line[0:1], line[1:2], line[2:3] = raised(order, before, top, sums)

            return live

        self._walk(step, self._list, "first", listed=False)

    def _sum(self, y, cut, exponent: float) -> Float[Array, "1 q"]:
        return jnp.sum(power(jnp.maximum(y[...] - cut, 0), exponent), axis=0, keepdims=True)

    def _greatest(self) -> None:
        """Finds the greatest score of every row and its key, and the threshold that follows."""
        line, piece = self.refs.line, self.plan.sizes.piece
        line[0:1] = jnp.full_like(line[0:1], LOWEST)
        line[1:2] = jnp.full_like(line[1:2], -1)

        def step(j, slot, p, y):
            top = jnp.max(y[...], axis=0, keepdims=True)
            live = some_above(top - line[0:1])

            @pl.when(live)
            def _():
                keys = lax.broadcasted_iota(jnp.int32, y.shape, 0)
                keys = (keys + (j * self.plan.sizes.tile + p * piece)).astype(jnp.float32)
                best = jnp.max(jnp.where(y[...] == top, keys, -1), axis=0, keepdims=True)
                line[1:2] = jnp.where(top - 1 > line[0:1], best, line[1:2])
                line[0:1] = jnp.maximum(line[0:1], top - 1)

            return live

        self._walk(step, self._list, "first", listed=False)
        self.refs.found[3:4] = line[1:2]

    def _refine(self) -> None:
        """Moves the bounds until they are found, over fewer and fewer pieces."""
        plan, refs = self.plan, self.refs
        exponents = powers(plan.order)

        def sums(cut, floor):
            refs.sums[...] = jnp.zeros_like(refs.sums)

            def step(j, slot, p, y):
                live = some_above(jnp.max(y[...], axis=0, keepdims=True) - floor)

                @pl.when(live)
                def _():
                    for i, m in enumerate(exponents):
                        refs.sums[i : i + 1] += self._sum(y, cut, m)

                return live

            self._walk(step, self._list, "refined", listed=True)
            return tuple(refs.sums[i : i + 1] for i in range(len(exponents)))

        passes, cut = search(plan.order, plan.is_exact, refs.line[0:1], sums, jnp.max, ())
        refs.line[0:1] = cut
        refs.work[0, WORK.index("passes")] = passes

    def _average(self) -> None:
        """Averages the values above the thresholds, and notes which pieces have any."""
        plan, refs = self.plan, self.refs
        is_fixed = plan.rule is Fixed
        cut = refs.rows[1:2] if is_fixed else refs.line[0:1]
        refs.sums[...] = jnp.zeros_like(refs.sums)
        refs.outs[...] = jnp.zeros_like(refs.outs)

        def step(j, slot, p, y):
            if is_fixed and plan.with_support:
                some = jnp.where(y[...] > -jnp.inf, 1.0, 0.0)
                refs.sums[3:4] += jnp.sum(some, axis=0, keepdims=True)
            live = some_above(jnp.max(y[...], axis=0, keepdims=True) - cut)

            @pl.when(live)
            def _():
                here = slice(p * plan.sizes.piece, (p + 1) * plan.sizes.piece)
                value, start = refs.value[slot, :, here], j * plan.sizes.tile + p * plan.sizes.piece
                for i, exponent in enumerate((plan.order, plan.order - 1)):
                    x = power(jnp.maximum(y[...] - cut, 0), exponent)
                    refs.sums[i : i + 1] += jnp.sum(x, axis=0, keepdims=True)
                    x = dropped(plan, x, refs.draws[...], refs.word, start)
                    refs.outs[i] += times(plan, value, x)
                if plan.with_support:
                    refs.sums[2:3] += self._sum(y, cut, 0)

            return live

        self._walk(step, self._note, "averaged", listed=not is_fixed, values=True)
        self._store(cut)

    def _note(self, j, bits) -> None:
        self.refs.live[0, j] = bits

    def _store(self, cut) -> None:
        refs = self.refs
        total, slope, support = (refs.sums[i : i + 1] for i in range(3))
        for i, numbers in enumerate((cut, total, slope)):
            refs.found[i : i + 1] = numbers
        if self.plan.rule is Fixed and self.plan.with_support:
            refs.found[3:4] = refs.sums[3:4]
        refs.found[4:5] = support
        for i, (weight, to) in enumerate(((total, refs.out), (slope, refs.lower))):
            if self.plan.ones:
                weight = refs.outs[i, 0:1]
            to[...] = (refs.outs[i, self.plan.ones :] * inverse(weight)).astype(to.dtype)
