"""From a `Problem` to what kernels read: ranges of keys, numbers of rows, padded operands."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kreg.dropout import row_states
from kreg.masks import Mask
from kreg.problem import Problem
from pallas_kernels.mosaic_gpu.plan import LENGTH, TILE, Plan, words


class Ranges(NamedTuple):
    """Which keys each query may see: those in [low, high) that, by their own numbers, see it too.

    limits: low, high and segment of every query of a block; and, in the first four numbers of a
        fourth row, first tile and end of those that any query of the block sees, first and end of
        those that all of them see whole.
    by_key: first query, end of queries and segment of every key of a tile.
    """

    limits: Int[Array, "B I 4 64"]
    by_key: Int[Array, "B J 3 64"]

    @classmethod
    def of(cls, mask: Mask, plan: Plan) -> "Ranges":
        low, high = (_blocked(x, plan.blocks) for x in _row_ranges(mask, plan))
        some = high > low
        first = jnp.min(jnp.where(some, low, plan.keys), axis=-1) // TILE
        stop = -(-jnp.max(jnp.where(some, high, 0), axis=-1) // TILE)
        full = -(-jnp.max(low, axis=-1) // TILE), jnp.min(high, axis=-1) // TILE
        if plan.by_key:
            tiles = mask.tiles(plan.queries, plan.keys, TILE, TILE)[:, 0]
            (first, stop), full = (_run(tiles > 0, True), _run(tiles > 1, False))
        bounds = jnp.stack(jnp.broadcast_arrays(jnp.minimum(first, stop), stop, *full), axis=-1)
        bounds = jnp.broadcast_to(bounds, (plan.batch, *bounds.shape[1:])).astype(jnp.int32)
        bounds = jnp.pad(bounds, ((0, 0), (0, 0), (0, TILE - bounds.shape[-1])))
        segments, by_key = _by_key(mask, plan)
        return cls(jnp.stack([low, high, segments, bounds], axis=2), by_key)

    @property
    def empty(self) -> Array:
        """Which queries see nothing by their own numbers, [B, T']."""
        low, high = self.limits[:, :, 0], self.limits[:, :, 1]
        return (high <= low).reshape(low.shape[0], -1)


def _blocked(x: Int[Array, "#B L"], count: int) -> Int[Array, "B I 64"]:
    return x.reshape(x.shape[0], count, TILE)


def _run(tiles: Bool[Array, "#B I J"], widest: bool) -> tuple[Array, Array]:
    """First and end of the tiles that are True; where others lie between, of all or of none."""
    count, last = jnp.sum(tiles, axis=-1), tiles.shape[-1]
    first = jnp.argmax(tiles, axis=-1)
    stop = jnp.where(count > 0, last - jnp.argmax(tiles[..., ::-1], axis=-1), first)
    return first, stop if widest else jnp.where(stop - first == count, stop, first)


def _by_key(mask: Mask, plan: Plan) -> tuple[Array, Int[Array, "B J 3 64"]]:
    """Segments of queries, [B, I, 64], and what keys say of queries."""
    rows, columns = plan.blocks * TILE, plan.tiles * TILE

    def full(x, size):
        x = jnp.asarray(x, jnp.int32)
        x = jnp.broadcast_to(x, (plan.batch, x.shape[-1]))
        if x.shape[1] == 1:
            return jnp.broadcast_to(x, (plan.batch, size))
        return jnp.pad(x, ((0, 0), (0, size - x.shape[1])))

    pair = mask.segments[0] if mask.segments else ([[0]], [[0]])
    start = [[0]] if mask.query_start is None else mask.query_start
    stop = [[plan.queries]] if mask.query_stop is None else mask.query_stop
    by_key = jnp.stack([full(x, columns) for x in (start, stop, pair[1])], axis=1)
    by_key = jnp.swapaxes(by_key.reshape(plan.batch, 3, plan.tiles, TILE), 1, 2)
    return _blocked(full(pair[0], rows), plan.blocks), by_key


def _row_ranges(mask: Mask, plan: Plan) -> tuple[Array, Array]:
    """Finds low and high of every query, padded ones too; both 0 where there is no key."""
    i = jnp.arange(plan.blocks * TILE, dtype=jnp.int32)[None]
    low = jnp.zeros((plan.batch, i.size), jnp.int32)
    high = jnp.where(i < plan.queries, plan.keys, low)

    def rows(x):
        x = jnp.asarray(x, jnp.int32)
        x = x.reshape(-1, 1) if x.ndim < 2 else x
        return x if x.shape[1] == 1 else jnp.pad(x, ((0, 0), (0, i.size - x.shape[1])))

    if mask.lower is not None:
        low = jnp.maximum(low, i + rows(mask.lower))
    if mask.upper is not None:
        high = jnp.minimum(high, i + rows(mask.upper) + 1)
    if mask.key_start is not None:
        low = jnp.maximum(low, rows(mask.key_start))
    if mask.key_stop is not None:
        high = jnp.minimum(high, rows(mask.key_stop))
    # These are by key, and of queries where they are the same for all keys.
    if mask.query_start is not None and mask.query_start.shape[1] == 1:
        high = jnp.where(i >= rows(mask.query_start), high, 0)
    if mask.query_stop is not None and mask.query_stop.shape[1] == 1:
        high = jnp.where(i < rows(mask.query_stop), high, 0)
    some = high > low
    return jnp.where(some, low, 0), jnp.where(some, high, 0)


def pack(plan: Plan, *rows: Float[Array, "B N T'"]) -> Float[Array, "B N I R 64"]:
    """Brings numbers of rows together block by block, for one copy to fetch."""
    x = jnp.stack(rows, axis=2).astype(jnp.float32)
    x = x.reshape(plan.batch, plan.heads, len(rows), plan.blocks, TILE)
    return jnp.swapaxes(x, 2, 3)


def unpack(plan: Plan, x: Float[Array, "B N I R 64"]) -> Float[Array, "R B N T'"]:
    """Takes numbers of rows apart again."""
    return jnp.moveaxis(x, 3, 0).reshape(x.shape[3], plan.batch, plan.heads, -1)


def by_row(plan: Plan, x: Float[Array, "#B #N #T"]) -> Float[Array, "B N T'"]:
    """Gives every query, padded ones too, its number; 1 where there is none."""
    full = jnp.broadcast_to(x, (plan.batch, plan.heads, plan.queries))
    pad = plan.blocks * TILE - plan.queries
    return jnp.pad(full, ((0, 0), (0, 0), (0, pad)), constant_values=1)


def parts(plan: Plan, x: Float[Array, "B T N H"]) -> Float[Array, "P B T' N H'"]:
    """Pads width and length, and writes float32 as a sum of bfloat16 parts."""
    length = -x.shape[1] % LENGTH
    x = jnp.pad(x, ((0, 0), (0, length), (0, 0), (0, -x.shape[-1] % TILE)))
    if plan.parts == 1:
        return x.astype(plan.dtype)[None]
    found = []
    for _ in range(plan.parts):
        # Not a conversion there and back, which compilers leave out.
        part = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        found.append(part.astype(plan.dtype))
        x = x - part
    return jnp.stack(found)


class Draws(NamedTuple):
    """What dropout draws from: a number of every query, and the second word of its key."""

    queries: Int[Array, "#B #N #I 64"]
    word: Int[Array, " 1"]

    @classmethod
    def of(cls, problem: Problem, plan: Plan) -> "Draws":
        """Without dropout nobody reads them."""
        words = problem.dropout_key
        if words is None:
            return cls(jnp.zeros((1, 1, 1, TILE), jnp.int32), jnp.zeros(1, jnp.int32))
        rows = jnp.pad(problem.rows, (0, plan.blocks * TILE - plan.queries))
        found = row_states(words, problem.pairs, rows).astype(jnp.int32)
        shape = plan.batch, plan.heads, plan.blocks, TILE
        return cls(found.reshape(shape), words[1:].astype(jnp.int32))


def turned(plan: Plan, live: Int[Array, "B N I W"]) -> Int[Array, "B N J V"]:
    """Turns the map of live tiles, bits of keys by block of queries, the other way around."""
    x = live.astype(jnp.uint32)[..., None]
    x = x >> lax.broadcasted_iota(jnp.uint32, (*live.shape, 32), 4) & 1
    x = x.reshape(*live.shape[:3], -1)[..., : plan.tiles]
    count = words(plan.blocks)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, count * 32 - plan.blocks), (0, 0)))
    x = x.reshape(plan.batch, plan.heads, count, 32, plan.tiles)
    x = jnp.sum(x << lax.broadcasted_iota(jnp.uint32, x.shape, 3), axis=3, dtype=jnp.uint32)
    return jnp.swapaxes(x, 2, 3).astype(jnp.int32)
