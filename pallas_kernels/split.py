r"""Kernels where keys are split over a mesh: thresholds of all keys, averages of those here.

Each device finds the thresholds of its own keys. The greatest of them is a lower bound of that over
all, since the root over any part of a row is. From there Newton's method on the norm walks up: a
round is one pass over the scores here, averaging those above the bound, and a sum of two numbers a
row over the mesh. So the last round is the result.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kreg.bandwidth import Adaptive, Fixed
from kreg.split import Split

_MOST_ROUNDS = 30


def found(forward: Callable, plan: Any, inputs, rest, steep: Array, cut: Array) -> Any:
    """What `forward` finds, of all keys; `lower` and `live` are of those here.

    Summed over the devices `lower` is what one device finds.
    """
    split = rest.split
    at_cut = dataclasses.replace(plan, rule=Fixed)
    best = None
    if plan.rule is not Fixed:
        here = forward(plan, inputs, rest, steep, cut)
        cut, best = _highest(here.rows, split)

    def average(cut):
        part = forward(at_cut, inputs, rest, steep, cut)
        total, slope = split.joined(part.rows.total, part.rows.slope)
        return part, total, slope

    part, total, slope = average(cut)
    if plan.rule is Adaptive:
        cut, part, total, slope = _risen(average, plan.order, cut, part, total, slope)
    (out,) = split.joined(_shared(part.out, part.rows.total, total).astype(jnp.float32))
    support, seen = split.joined(part.rows.support, part.rows.best)
    rows = part.rows._replace(
        cut=cut, total=total, slope=slope, support=support, best=seen if best is None else best
    )
    lower = _shared(part.lower, part.rows.slope, slope)
    return part._replace(out=out.astype(part.out.dtype), lower=lower, rows=rows)


def _highest(rows: Any, split: Split) -> tuple[Array, Array]:
    """The greatest cut of all; and the number of its key on one device that has it, else -1."""
    cut = lax.pmax(rows.cut, split.axis)
    here = lax.axis_index(split.axis)
    holder = lax.pmin(jnp.where(rows.cut == cut, here, lax.axis_size(split.axis)), split.axis)
    return cut, jnp.where(holder == here, rows.best, -1)


def _risen(average: Callable, order: float, cut: Array, part: Any, total: Array, slope: Array):
    """Walks up to the root; ends where no row moves by more than rounding."""

    def step(cut, total, slope):
        size = (total - total ** (1 - 1 / order)) / jnp.where(slope > 0, slope, 1)
        rounding = 4 * jnp.finfo(cut.dtype).eps * (1 + jnp.abs(cut))
        return jnp.where((total > 1) & (size > rounding), size, 0)

    def unfinished(carry):
        count, size, *_ = carry
        return (count < _MOST_ROUNDS) & jnp.any(size > 0)

    def rise(carry):
        count, size, cut, *_ = carry
        cut = cut + size
        part, total, slope = average(cut)
        return count + 1, step(cut, total, slope), cut, part, total, slope

    first = 0, step(cut, total, slope), cut, part, total, slope
    return lax.while_loop(unfinished, rise, first)[2:]


def _shared(
    mean: Float[Array, "B T N V"], here: Float[Array, "B N T"], all: Float[Array, "B N T"]
) -> Array:
    """A device's part of the mean over all: its own mean by its share of the weight."""
    share = jnp.where(all > 0, here / jnp.where(all > 0, all, 1), 0)
    return mean.astype(jnp.float32) * jnp.swapaxes(share, 1, 2)[..., None]
