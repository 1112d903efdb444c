"""From what is given of an attention call to what the kernels read: positions along lanes.

Everything is turned so that queries, or keys, are the last axis: a head's width then needs no
padding to 128, numbers of rows lie beside each other, and sums over keys are sums of registers.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kreg.dropout import row_states
from kreg.problem import Problem
from pallas_kernels.mosaic_tpu.plan import Plan
from pallas_kernels.ranges import Ranges


def turned(x: Float[Array, "B L N D"], width: int, length: int) -> Float[Array, "B N D' L'"]:
    """Brings positions to the end, and pads width and length with zeros."""
    padding = ((0, 0), (0, length - x.shape[1]), (0, 0), (0, width - x.shape[-1]))
    return jnp.transpose(jnp.pad(x, padding), (0, 2, 3, 1))


def turned_back(x: Float[Array, "B N D' L'"], width: int, length: int) -> Float[Array, "B L N D"]:
    """Undoes `turned`."""
    return jnp.transpose(x[:, :, :width, :length], (0, 3, 1, 2))


def pack(plan: Plan, *rows: Float[Array, "B N T"]) -> Float[Array, "B N R T'"]:
    """Brings numbers of rows together; padded queries get 0."""
    x = jnp.stack(rows, axis=2).astype(jnp.float32)
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, plan.rows - plan.queries)))


class Seen(NamedTuple):
    """`Ranges` as the kernels read them, and what dropout draws from.

    limits: low, high and segment of every query. draws: a number of every query. word: the second
    of dropout's key.
    """

    limits: Int[Array, "B 3 T'"]
    bounds: Int[Array, "B I 1 4"]
    by_key: Int[Array, "B 8 S'"]
    draws: Int[Array, "B N 1 T'"]
    word: Int[Array, "B 1 1"]

    @classmethod
    def of(cls, ranges: Ranges, problem: Problem, plan: Plan) -> "Seen":
        limits = jnp.stack([ranges.low, ranges.high, ranges.segments], axis=1)
        by_key = jnp.pad(ranges.by_key, ((0, 0), (0, 5), (0, 0)))
        return cls(limits, ranges.bounds[:, :, None], by_key, *_draws(problem, plan))


def _draws(problem: Problem, plan: Plan) -> tuple[Array, Array]:
    """Without dropout nobody reads them."""
    words = problem.dropout_key
    if words is None:
        draws = jnp.zeros((plan.batch, plan.heads, 1, plan.rows), jnp.int32)
        return draws, jnp.zeros((plan.batch, 1, 1), jnp.int32)
    rows = jnp.pad(problem.drawn[0], (0, plan.rows - plan.queries))
    found = row_states(words, problem.pairs, rows).astype(jnp.int32)[:, :, None]
    return found, jnp.broadcast_to(words[1:].astype(jnp.int32), (plan.batch, 1, 1))
