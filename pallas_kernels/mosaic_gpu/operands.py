"""From a `Problem` to what kernels read: ranges of keys, numbers of rows, padded operands."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kreg.dropout import row_states
from kreg.masks import Mask
from kreg.problem import Problem
from pallas_kernels.mosaic_gpu.plan import LENGTH, TILE, Plan, words
from pallas_kernels.ranges import ranges


class Limits(NamedTuple):
    """Which keys each query may see, in blocks of queries and tiles of keys.

    limits: low, high and segment of every query of a block; and in the first four numbers of a
        fourth row the block's bounds; see `pallas_kernels.ranges`.
    by_key: first query, end of queries and segment of every key of a tile.
    """

    limits: Int[Array, "B I 4 64"]
    by_key: Int[Array, "B J 3 64"]

    @classmethod
    def of(cls, mask: Mask, plan: Plan) -> "Limits":
        found = ranges(
            mask, plan.batch, plan.queries, plan.keys, TILE, TILE, columns=plan.tiles * TILE
        )
        rows = (x.reshape(plan.batch, -1, TILE) for x in (found.low, found.high, found.segments))
        bounds = jnp.pad(found.bounds, ((0, 0), (0, 0), (0, TILE - found.bounds.shape[-1])))
        by_key = found.by_key.reshape(plan.batch, 3, plan.tiles, TILE)
        return cls(jnp.stack([*rows, bounds], axis=2), jnp.swapaxes(by_key, 1, 2))


def pack(plan: Plan, *rows: Float[Array, "B N T"]) -> Float[Array, "B N I R 64"]:
    """Brings numbers of rows together block by block, for one copy to fetch; padded rows get 0."""
    x = jnp.stack(rows, axis=2).astype(jnp.float32)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, plan.blocks * TILE - plan.queries)))
    x = x.reshape(plan.batch, plan.heads, len(rows), plan.blocks, TILE)
    return jnp.swapaxes(x, 2, 3)


def unpack(plan: Plan, x: Float[Array, "B N I R 64"]) -> Float[Array, "R B N T"]:
    """Takes numbers of rows apart again."""
    x = jnp.moveaxis(x, 3, 0).reshape(x.shape[3], plan.batch, plan.heads, -1)
    return x[..., : plan.queries]


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
        rows = jnp.pad(problem.drawn[0], (0, plan.blocks * TILE - plan.queries))
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
