r"""Gradients of queries, keys and values over the live pieces alone.

With p = c x^r and u = c x^(r - 1), c one over the sum of the powers, what flows back to a score z
is u (dp - mean); a row's mean and c come with it. Under `Anchored` the threshold moves with the
best key, to which `away` goes, too. One kernel has a block of queries a program and walks over
keys, the other a tile of keys and walks over queries of all heads that share it: nothing is added
up by more than one program, so that results are the same from run to run.
"""

from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kreg.bandwidth import Anchored, Fixed
from pallas_kernels.attention import Pulled
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
    times,
    times_turned,
)
from pallas_kernels.solver import integer, power

ROWS_GIVEN = Pulled._fields


def backward(
    plan: Plan,
    query: Float[Array, "B N H T'"],
    key: Float[Array, "B K H S'"],
    value: Float[Array, "B K V S'"],
    dout: Float[Array, "B N V T'"],
    rows: Float[Array, "B N 6 T'"],
    seen: Seen,
    live: Int[Array, "B N I 1 J"],
) -> tuple[Array, Array, Array, Float[Array, "B N 2 T'"]]:
    """Runs both kernels; returns the gradients of query, key and value, and two sums of every row.

    With dz what flows back to its scores: the sums of dz y and, under `Fixed`, of dz.
    """
    arrays = query, dout, key, value, rows, *seen
    dquery, sums = _query_kernel(plan).run(*arrays, live)
    # All blocks' bounds at once, in a row: scalar memory may pad a last axis of 4.
    bounds = seen.bounds.reshape(plan.batch, 1, -1)
    arrays = query, dout, key, value, rows, *seen._replace(bounds=bounds)
    dkey, dvalue = _key_kernel(plan).run(*arrays, jnp.swapaxes(live, 2, 4))
    return dquery, dkey, dvalue, sums


def _query_kernel(plan: Plan) -> Kernel:
    size, tile = plan.sizes.block, plan.sizes.tile

    def of_block(count):
        return block(None, None, count, size, at=lambda b, n, i: (b, n, 0, i))

    scratch = {
        "key": pltpu.VMEM((STAGES, plan.width, tile), plan.dtype),
        "value": pltpu.VMEM((STAGES, plan.value_width, tile), plan.dtype),
        "total": pltpu.VMEM((plan.width, size), jnp.float32),
        "list": pltpu.SMEM((plan.tiles,), jnp.int32),
        **_common(plan),
    }
    if plan.by_key:
        scratch["by_key"] = pltpu.VMEM((STAGES, 8, tile), jnp.int32)
    return Kernel(
        "gradient_of_queries",
        lambda refs: _OfQueries(plan, refs).run(),
        (plan.heads, plan.blocks),
        inputs={
            "query": of_block(plan.width),
            "dout": of_block(plan.value_width),
            "keys": remote(),
            "values": remote(),
            "rows": of_block(len(ROWS_GIVEN)),
            "limits": block(None, 3, size, at=lambda b, n, i: (b, 0, i)),
            "bounds": scalars(None, None, 1, 4, at=lambda b, n, i: (b, i, 0, 0)),
            "by_keys": remote(),
            "draws": of_block(1),
            "word": scalars(None, 1, 1, at=lambda b, n, i: (b, 0, 0)),
            "live": scalars(None, None, None, 1, plan.tiles, at=lambda b, n, i: (b, n, i, 0, 0)),
        },
        outputs={"dquery": of_block(plan.width), "sums": of_block(2)},
        shapes={
            "dquery": ((plan.heads, plan.width, plan.rows), plan.dtype),
            "sums": ((plan.heads, 2, plan.rows), jnp.float32),
        },
        scratch=scratch,
        memory=plan.sizes.memory,
    )


def _key_kernel(plan: Plan) -> Kernel:
    tile = plan.sizes.tile

    def of_tile(count):
        return block(None, None, count, tile, at=lambda b, k, j: (b, k, 0, j))

    outputs = {"dkey": of_tile(plan.width), "dvalue": of_tile(plan.value_width)}
    size = plan.sizes.block
    scratch = {
        "query": pltpu.VMEM((STAGES, plan.width, size), plan.dtype),
        "dout": pltpu.VMEM((STAGES, plan.value_width, size), plan.dtype),
        "row": pltpu.VMEM((STAGES, len(ROWS_GIVEN), size), jnp.float32),
        "limit": pltpu.VMEM((STAGES, 3, size), jnp.int32),
        "dkeys": pltpu.VMEM((plan.width, tile), jnp.float32),
        "dvalues": pltpu.VMEM((plan.value_width, tile), jnp.float32),
        "list": pltpu.SMEM((plan.blocks,), jnp.int32),
        **_common(plan, streams=4 + plan.drops),
    }
    if plan.drops:
        scratch["draw"] = pltpu.VMEM((STAGES, 1, size), jnp.int32)
    return Kernel(
        "gradient_of_keys",
        lambda refs: _OfKeys(plan, refs).run(),
        (plan.key_heads, plan.tiles),
        inputs={
            "queries": remote(),
            "douts": remote(),
            "key": of_tile(plan.width),
            "value": of_tile(plan.value_width),
            "rows": remote(),
            "limits": remote(),
            "bounds": scalars(None, 1, 4 * plan.blocks, at=lambda b, k, j: (b, 0, 0)),
            "by_key": block(None, 8, tile, at=lambda b, k, j: (b, 0, j)),
            "draws": remote(),
            "word": scalars(None, 1, 1, at=lambda b, k, j: (b, 0, 0)),
            "live": scalars(
                None, plan.share, None, 1, plan.blocks, at=lambda b, k, j: (b, k, j, 0, 0)
            ),
        },
        outputs=outputs,
        shapes={
            "dkey": ((plan.key_heads, plan.width, plan.columns), plan.dtype),
            "dvalue": ((plan.key_heads, plan.value_width, plan.columns), plan.dtype),
        },
        scratch=scratch,
        memory=plan.sizes.memory,
    )


def _common(plan: Plan, streams: int = 3) -> dict[str, Any]:
    """Memory of both kinds of programs: scores, what flows back to them, and what comes in."""
    piece = plan.sizes.piece, plan.sizes.block
    return {
        "y": pltpu.VMEM(piece, jnp.float32),
        "dz": pltpu.VMEM(piece, jnp.float32),
        "count": pltpu.SMEM((1,), jnp.int32),
        "arrived": pltpu.SemaphoreType.DMA((streams, STAGES)),
    }


def _list(refs, live) -> Array:
    """Lists the tiles with live pieces; returns how many there are. live: bits of a tile."""
    refs.count[0] = integer(0)

    def one(j, carry):
        @pl.when(live(j) != 0)
        def _():
            refs.list[refs.count[0]] = j
            refs.count[0] = refs.count[0] + 1

        return carry

    lax.fori_loop(integer(0), integer(refs.list.shape[0]), one, integer(0))
    return refs.count[0]


class _Piece:
    """The scores of a piece and a block of queries, and what flows back to them.

    numbers: of the queries, by name. start, query_start: index of the first key and query.
    """

    def __init__(self, plan: Plan, refs, rows, seen: SimpleNamespace, is_whole, start, query_start):
        self.plan, self.refs, self.start = plan, refs, start
        self.number = {name: rows[i : i + 1] for i, name in enumerate(ROWS_GIVEN)}
        self.seen, self.is_whole, self.query_start = seen, is_whole, query_start

    def score(self, key, query) -> None:
        """Forms the scores."""
        y = self.refs.y
        y[...] = across(self.plan, key, query) * self.number["steep"]

        @pl.when(~self.is_whole)
        def _():
            y[...] = hidden(self.plan, y[...], self.start, self.seen, self.query_start)

    def power(self, exponent: float) -> Array:
        """Powers of the scores above the threshold, over the sum of the powers."""
        x = jnp.maximum(self.refs.y[...] - self.number["cut"], 0)
        return power(x, exponent) * self.number["scale"]

    def dropped(self, x: Array) -> Array:
        return dropped(self.plan, x, self.seen.draws, self.refs.word, self.start)

    def pull(self, value, dout) -> None:
        """Forms what flows back to the scores."""
        plan, dz = self.plan, self.refs.dz
        dp = self.dropped(across(plan, value, dout))
        dz[...] = self.power(plan.order - 1) * (dp - self.number["mean"])
        if plan.rule is Anchored:
            keys = lax.broadcasted_iota(jnp.int32, dz.shape, 0) + self.start
            best = keys.astype(jnp.float32) == self.number["best"]
            dz[...] -= jnp.where(best, self.number["away"], 0.0)


class _OfQueries:
    """The gradient of one block of queries of one head."""

    def __init__(self, plan: Plan, refs: SimpleNamespace):
        self.plan, self.refs = plan, refs
        self.batch, self.head, self.block = (pl.program_id(i) for i in range(3))
        self.key_head = lax.div(self.head, integer(plan.share))

    def run(self) -> None:
        plan, refs = self.plan, self.refs
        count = _list(refs, lambda j: refs.live[0, j])
        refs.total[...] = jnp.zeros_like(refs.total)
        refs.sums[...] = jnp.zeros_like(refs.sums)
        size, head = plan.sizes.tile, (self.batch, self.key_head)
        sources = [
            (lambda j: columns(refs.keys.at[head], j, size), refs.key),
            (lambda j: columns(refs.values.at[head], j, size), refs.value),
        ]
        if plan.by_key:
            sources.append((lambda j: columns(refs.by_keys.at[self.batch], j, size), refs.by_key))
        stream = Stream(*sources, semaphores=refs.arrived)
        stream.walk(count, lambda t: refs.list[t], self._tile)
        steep = refs.rows[0:1] * plan.order
        refs.dquery[...] = (refs.total[...] * steep).astype(refs.dquery.dtype)

    def _tile(self, t, j, slot) -> None:
        for p in range(self.plan.sizes.pieces):
            live = lax.shift_right_logical(self.refs.live[0, j], integer(p)) & 1
            pl.when(live == 1)(lambda p=p: self._piece(j, slot, p))

    def _piece(self, j, slot, p: int) -> None:
        plan, refs, sizes = self.plan, self.refs, self.plan.sizes
        here = slice(p * sizes.piece, (p + 1) * sizes.piece)
        number = j * sizes.pieces + p
        seen = SimpleNamespace(limits=refs.limits[...], draws=refs.draws[...])
        if plan.by_key:
            seen.by_key = refs.by_key[slot, :, here]
        whole = (number >= refs.bounds[0, 2]) & (number < refs.bounds[0, 3])
        starts = number * sizes.piece, self.block * sizes.block
        piece = _Piece(plan, refs, refs.rows[...], seen, whole, *starts)
        key = refs.key[slot, :, here]
        piece.score(key, refs.query[...])
        piece.pull(refs.value[slot, :, here], refs.dout[...])
        dz = refs.dz[...]
        refs.total[...] += times(plan, key, dz)
        # Keys with weight have y = x + cut; those without may have y = -inf.
        y = jnp.maximum(refs.y[...], piece.number["cut"])
        refs.sums[0:1] += jnp.sum(dz * y, axis=0, keepdims=True)
        if plan.rule is Fixed:
            refs.sums[1:2] += jnp.sum(dz, axis=0, keepdims=True)


class _OfKeys:
    """The gradients of one tile of keys and values, of all heads that share them."""

    def __init__(self, plan: Plan, refs: SimpleNamespace):
        self.plan, self.refs = plan, refs
        self.batch, self.key_head, self.tile = (pl.program_id(i) for i in range(3))

    def run(self) -> None:
        refs = self.refs
        refs.dkeys[...] = jnp.zeros_like(refs.dkeys)
        refs.dvalues[...] = jnp.zeros_like(refs.dvalues)

        def head(i, carry):
            self._head(i)
            return carry

        lax.fori_loop(integer(0), integer(self.plan.share), head, integer(0))
        refs.dkey[...] = refs.dkeys[...].astype(refs.dkey.dtype)
        refs.dvalue[...] = refs.dvalues[...].astype(refs.dvalue.dtype)

    def _head(self, i) -> None:
        """Adds what flows back from the queries of one head."""
        plan, refs, size = self.plan, self.refs, self.plan.sizes.block
        count = _list(refs, lambda block: refs.live[i, 0, block])
        at = self.batch, self.key_head * plan.share + i
        sources = [
            (lambda block: columns(refs.queries.at[at], block, size), refs.query),
            (lambda block: columns(refs.douts.at[at], block, size), refs.dout),
            (lambda block: columns(refs.rows.at[at], block, size), refs.row),
            (lambda block: columns(refs.limits.at[self.batch], block, size), refs.limit),
        ]
        if plan.drops:
            sources.append((lambda block: columns(refs.draws.at[at], block, size), refs.draw))

        def step(t, block, slot):
            for p in range(plan.sizes.pieces):
                live = lax.shift_right_logical(refs.live[i, 0, block], integer(p)) & 1
                pl.when(live == 1)(lambda p=p: self._piece(block, slot, p))

        Stream(*sources, semaphores=refs.arrived).walk(count, lambda t: refs.list[t], step)

    def _piece(self, block, slot, p: int) -> None:
        plan, refs, sizes = self.plan, self.refs, self.plan.sizes
        here = slice(p * sizes.piece, (p + 1) * sizes.piece)
        number = self.tile * sizes.pieces + p
        seen = SimpleNamespace(limits=refs.limit[slot], by_key=refs.by_key[:, here])
        seen.draws = refs.draw[slot] if plan.drops else None
        first, stop = (refs.bounds[0, 4 * block + i] for i in (2, 3))
        whole = (number >= first) & (number < stop)
        starts = number * sizes.piece, block * sizes.block
        piece = _Piece(plan, refs, refs.row[slot], seen, whole, *starts)
        query, dout = refs.query[slot], refs.dout[slot]
        piece.score(refs.key[:, here], query)
        p_ = piece.dropped(piece.power(plan.order))
        refs.dvalues[:, here] += times_turned(plan, dout, p_)
        piece.pull(refs.value[:, here], dout)
        dz = refs.dz[...] * (piece.number["steep"] * plan.order)
        refs.dkeys[:, here] += times_turned(plan, query, dz)
