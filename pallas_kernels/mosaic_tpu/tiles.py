"""What all kernels do with a piece of keys: fetch it, score it, hide what is not seen.

Scores stand with keys down and queries across: [piece, block]. Numbers of queries are [1, block],
so that what is summed over keys is summed register by register. Scores are kept as y = z / r.
"""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.counter import stays
from pallas_kernels.mosaic_tpu.plan import Plan
from pallas_kernels.solver import integer

STAGES = 2
_DOWN, _LAST, _INNER = ((0,), (0,)), ((1,), (1,)), ((1,), (0,))


def across(plan: Plan, left: Float[Array, "D k"], right: Float[Array, "D q"]) -> Array:
    """Products of all columns of two operands, [k, q]."""
    return _dot(plan, left, right, _DOWN)


def times(plan: Plan, left: Float[Array, "D k"], right: Float[Array, "k q"]) -> Array:
    """The product of an operand and a piece of numbers, [D, q]."""
    return _dot(plan, left, right.astype(left.dtype), _INNER)


def times_turned(plan: Plan, left: Float[Array, "D q"], right: Float[Array, "k q"]) -> Array:
    """The product of an operand and a piece of numbers on its side, [D, k]."""
    return _dot(plan, left, right.astype(left.dtype), _LAST)


def _dot(plan: Plan, left, right, contracted) -> Array:
    return lax.dot_general(
        left,
        right,
        (contracted, ((), ())),
        precision=plan.precision,
        preferred_element_type=jnp.float32,
    )


class Stream:
    """Tiles of arrays in the device's memory that come in while others are worked on.

    sources: from a tile to the part of an array that is fetched, and the buffers it goes to.
    """

    def __init__(self, *sources: tuple[Callable, Any], semaphores):
        self.sources, self.semaphores = sources, semaphores

    def _copies(self, tile, slot):
        for i, (part, into) in enumerate(self.sources):
            yield pltpu.make_async_copy(part(tile), into.at[slot], self.semaphores.at[i, slot])

    def _begin(self, tile, slot) -> None:
        for copy in self._copies(tile, slot):
            copy.start()

    def walk(self, count, entry: Callable, step: Callable) -> None:
        """Takes a step (t, tile, slot) for each entry (t), in order."""

        def ahead(t):
            self._begin(entry(t), lax.rem(t, integer(STAGES)))

        for t in range(STAGES):
            pl.when(t < count)(functools.partial(ahead, integer(t)))

        def one(t, carry):
            tile, slot = entry(t), lax.rem(t, integer(STAGES))
            for copy in self._copies(tile, slot):
                copy.wait()
            step(t, tile, slot)
            pl.when(t + STAGES < count)(lambda: ahead(t + STAGES))
            return carry

        lax.fori_loop(integer(0), count, one, integer(0))


def columns(ref, tile, size: int):
    """Picks a tile of the last axis of what is left of an array."""
    start = pl.multiple_of(tile * size, size)
    return ref.at[:, pl.ds(start, size)]


def hidden(plan: Plan, y, start, seen: SimpleNamespace, query_start) -> Array:
    """Makes scores of keys that are not seen -inf.

    start: index of the first key; query_start: of the first query; seen: numbers of queries in
    `limits` and of these keys in `by_key`.
    """
    keys = lax.broadcasted_iota(jnp.int32, y.shape, 0) + start
    ok = (keys >= seen.limits[0:1]) & (keys < seen.limits[1:2])
    if plan.by_key:
        first, stop, segment = (jnp.transpose(seen.by_key)[:, i : i + 1] for i in range(3))
        queries = lax.broadcasted_iota(jnp.int32, y.shape, 1) + query_start
        ok &= (queries >= first) & (queries < stop) & (seen.limits[2:3] == segment)
    return jnp.where(ok, y, -jnp.inf)


def dropped(plan: Plan, x: Array, draws, word, start) -> Array:
    """Drops numbers of a piece and scales the others up, by the counter of `kreg.dropout`.

    draws: what the counter makes of key, batch entry, head and query, [1, block]; word: the key's
    second; start: index of the first key.
    """
    if not plan.drops:
        return x
    keys = lax.broadcasted_iota(jnp.int32, x.shape, 0) + start
    keep = stays(draws, keys, word[0, 0], plan.dropout_rate)
    return jnp.where(keep, x * (1 / (1 - plan.dropout_rate)), 0.0)


def some_above(rows: Array) -> Array:
    """True where any row's number is above 0; NaN counts as above.

    What a row with NaN has must not keep a piece from its neighbours.
    """
    return ~(jnp.max(rows) <= 0)
