r"""alpha-entmax on rows of scores without a mask: threshold, weights and their slopes.

Rows hold y = z / r (z for the Gaussian), with inadmissible entries far below all others; weights
are p = [y - tau]_+^r / sum. What is kept of a row is three numbers.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

_LARGEST_ORDER = 8
_MOST_STEPS = 100
# Newton's method starts on the greatest of every so many scores, a part of the row.
_STRIDE = 8


class Rows(NamedTuple):
    """What the weights of a row are formed from.

    shift: tau; the greatest score for the Gaussian.
    scale: one over the sum of the powers; 0 for a row without keys.
    slope: one over the sum of the powers r - 1; for the Gaussian the scale.
    """

    shift: Float[Array, "*rows"]
    scale: Float[Array, "*rows"]
    slope: Float[Array, "*rows"]


def takes(order: float) -> bool:
    """True for the orders that are done here; powers of greater ones are formed from logarithms."""
    return order == math.inf or 1 <= order <= _LARGEST_ORDER


def floor(dtype) -> Float[Array, ""]:
    """Stands for an inadmissible score: far below any other, with room for differences."""
    return jnp.asarray(-(jnp.finfo(dtype).max ** 0.75), dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def solve(order: float, y: Float[Array, "*rows n"]) -> Rows:
    """Finds the threshold of every row."""
    if order == math.inf:
        best = jnp.max(y, axis=-1)
        total = jnp.sum(jnp.exp(y - best[..., None]), axis=-1)
        scale = jnp.where(best > floor(y.dtype), 1 / total, 0)
        return Rows(best, scale, scale)
    shift = _start(order, y)
    total, slope = _sums(order, y, shift)
    eps = jnp.finfo(y.dtype).eps

    def step(shift, total, slope):
        """Newton's step on the norm; 0 where it is no more than rounding."""
        size = (total - total ** (1 - 1 / order)) / jnp.where(slope > 0, slope, 1)
        return jnp.where(size > 2 * eps * (1 + jnp.abs(shift)), size, 0)

    def unfinished(carry):
        count, size, *_ = carry
        return (count < _MOST_STEPS) & jnp.any(size > 0)

    def advance(carry):
        count, size, shift, total, slope = carry
        moved = shift + size
        sums = _sums(order, y, moved)
        # A finished row keeps its bits whatever its neighbours still do.
        total, slope = (
            jnp.where(size > 0, new, old) for new, old in zip(sums, (total, slope), strict=True)
        )
        size = jnp.where(size > 0, step(moved, total, slope), 0)
        return count + 1, size, moved, total, slope

    carry = (0, step(shift, total, slope), shift, total, slope)
    _, _, shift, total, slope = lax.while_loop(unfinished, advance, carry)
    some = total > 0
    return Rows(
        shift,
        jnp.where(some, 1 / jnp.where(some, total, 1), 0),
        1 / jnp.where(slope > 0, slope, 1),
    )


@solve.defjvp
def _solve_jvp(order, primals, tangents):
    (y,), (dy,) = primals, tangents
    rows = solve(order, y)
    shift, scale, slope = rows
    if order == math.inf:
        # The shift is a constant: weights do not depend on it.
        dscale = -jnp.square(scale) * jnp.sum(jnp.exp(y - shift[..., None]) * dy, axis=-1)
        return rows, Rows(jnp.zeros_like(shift), dscale, dscale)
    u = jnp.maximum(y - shift[..., None], 0)
    dshift = jnp.sum(_power(u, order - 1) * dy, axis=-1) * slope
    if order == 1:
        return rows, Rows(dshift, jnp.zeros_like(scale), jnp.zeros_like(slope))
    # The powers r sum to 1 wherever the scores move to.
    bend = (order - 1) * _power(u, order - 2)
    dslope = -jnp.square(slope) * jnp.sum(bend * (dy - dshift[..., None]), axis=-1)
    return rows, Rows(dshift, jnp.zeros_like(scale), dslope)


def weights(order: float, y: Float[Array, "*rows n"], rows: Rows) -> Float[Array, "*rows n"]:
    """Evaluates p."""
    return weights_and_slopes(order, y, rows)[0]


def weights_and_slopes(
    order: float, y: Float[Array, "*rows n"], rows: Rows
) -> tuple[Float[Array, "*rows n"], Float[Array, "*rows n"]]:
    r"""Evaluates p and u with $\dot p = r s\, u (\dot y - \langle u, \dot y \rangle / \sum u)$.

    s is the row's scale; for the Gaussian u = p and r s counts as 1.
    """
    shift, scale = rows.shift[..., None], rows.scale[..., None]
    if order == math.inf:
        p = jnp.exp(y - shift)
        return p * scale, p
    u = jnp.maximum(y - shift, 0)
    lower = _power(u, order - 1)
    return lower * u * scale, lower


def _start(order: float, y: Float[Array, "*rows n"]) -> Float[Array, "*rows"]:
    """Starts below the root: at the root, nearly, of a part of the row that holds its greatest."""
    n = y.shape[-1]
    if n < 8 * _STRIDE:
        return jnp.max(y, axis=-1) - 1
    even = n // _STRIDE * _STRIDE
    part = jnp.max(y[..., :even].reshape(*y.shape[:-1], _STRIDE, -1), axis=-2)
    if even < n:
        part = jnp.concatenate([part, y[..., even:]], axis=-1)
    # Or XLA reads the whole row again for the greatest.
    part = lax.optimization_barrier(part)
    shift = jnp.max(part, axis=-1) - 1
    for _ in range(3):
        total, slope = _sums(order, part, shift)
        shift += (total - total ** (1 - 1 / order)) / jnp.where(slope > 0, slope, 1)
    return shift


def _sums(order: float, y: Array, shift: Array) -> tuple[Array, Array]:
    u = jnp.maximum(y - shift[..., None], 0)
    lower = _power(u, order - 1)
    return jnp.sum(lower * u, axis=-1), jnp.sum(lower, axis=-1)


def _power(u: Array, exponent: float) -> Array:
    """Evaluates u^exponent for u >= 0, and 0 at u = 0 whatever the exponent."""
    if exponent == 0:
        return (u > 0).astype(u.dtype)
    if exponent == int(exponent):
        return u if exponent == 1 else lax.integer_pow(u, int(exponent))
    alive = u > 0
    return jnp.where(alive, jnp.exp(exponent * jnp.log(jnp.where(alive, u, 1))), 0)
