"""The threshold of a row, as all kernels find it; numbers of rows have any shape.

In units y = z / r the threshold t of a row lies between its best score less one and its best score,
and solves (sum [y - t]_+^r)^(1/r) = 1. This norm is convex and falls. README.md derives the steps.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

LOWEST = float(jnp.finfo(jnp.float32).min)
_MOST_PASSES = 30
# Steps of the guess, in units of y, after which it counts as found: for half types and for float32,
# of orders below 2 and from 2 on. The error of Halley's steps is cubed each time; below 2 there is
# no such bound, and only steps as small as rounding are the last.
_HALF_STEP, _FULL_STEP = (2.0**-10, 2.0**-6), (2.0**-22, 2.0**-9)
# The norm's change by a step counts as well, by these parts: where many keys share the weight it is
# much more than the guess moves.
_HALF_PART, _FULL_PART = (1.0, 0.25), (1.0, 0.5)


def integer(x) -> Array:
    """A 32-bit integer, whatever type JAX would give a Python number."""
    return jnp.asarray(x, jnp.int32)


def power(x: Array, exponent: float) -> Array:
    """Evaluates x^exponent for x >= 0, and 0 at x = 0 whatever the exponent."""
    if exponent == 0:
        return jnp.where(x > 0, 1.0, 0.0)
    if exponent == int(exponent) and exponent <= 4:
        squared = x * x
        return {1: x, 2: squared, 3: squared * x, 4: squared * squared}[int(exponent)]
    return jnp.where(x > 0, jnp.exp2(exponent * jnp.log2(jnp.where(x > 0, x, 1.0))), 0.0)


def root(total: Array, order: float) -> Array:
    """Evaluates total^(1/order)."""
    if order == 1:
        return total
    return jnp.sqrt(total) if order == 2 else power(total, 1 / order)


def inverse(x: Array) -> Array:
    """One over x; 0 where x is 0."""
    return jnp.where(x > 0, 1 / jnp.where(x > 0, x, 1.0), 0.0)


def powers(order: float) -> list[float]:
    """Which powers of the scores above a guess are summed for a step: r, r - 1, from 2 on r - 2."""
    return [order, order - 1, order - 2][: 2 + (order >= 2)]


def raised(order: float, line: tuple, top: Array, sums: Callable) -> tuple:
    """Takes a tile into the bound of its rows, and moves the bound up.

    line: (cut, norm, slope); of the keys so far the norm at t >= cut is at least
    [norm - slope (t - cut)]_+. top: best scores of the tile; sums: of the powers r and r - 1 of its
    scores above a cut.
    """
    cut, norm, slope = line
    new = jnp.maximum(cut, top - 1)
    norm = jnp.maximum(norm - slope * (new - cut), 0)
    upper, lower = sums(new)
    total = power(norm, order) + upper
    slopes = power(norm, order - 1) * slope + lower
    norm = root(total, order)
    slope = slopes * inverse(total) * norm
    new = new + jnp.maximum(norm - 1, 0) * inverse(slope)
    return new, jnp.minimum(norm, 1), slope


def search(
    order: float, is_exact: bool, cut: Array, sums: Callable, largest: Callable, state: tuple
) -> list[Any]:
    """Moves guesses of the thresholds until none of the block moves by more than is enough.

    Sums are formed at `cut`, the best guess, which may be beyond the threshold by a little; tiles
    are dropped when they are below `floor`, which is not.

    is_exact: to float32's precision, not a half type's. sums: (cut, floor, *state) -> (*state, sums
    of `powers`); largest: of numbers of rows, the same for all threads. Returns passes, cut and
    state.
    """
    enough = (_HALF_STEP, _FULL_STEP)[is_exact][order >= 2]
    part = (_HALF_PART, _FULL_PART)[is_exact][order >= 2]

    def advance(carry):
        passes, cut, floor, _, *state = carry
        found = sums(cut, floor, *state)
        state, found = found[: len(state)], found[len(state) :]
        newton, best, steepness = _steps(order, *found)
        floor = jnp.maximum(floor, cut + newton)
        # Steps that do not move the guess are none, nor are those of rows with NaN.
        new = cut + best
        size = jnp.abs(best) * jnp.maximum(part * steepness, 1)
        size = jnp.where((new != cut) & (new == new), size, 0.0)
        return passes + 1, new, floor, largest(size), *state

    def unfinished(carry):
        return (carry[0] < _MOST_PASSES) & (carry[3] > enough)

    start = integer(0), cut, cut, jnp.float32(1), *state
    passes, cut, _, _, *found = lax.while_loop(unfinished, advance, start)
    return [passes, cut, *found]


def _steps(order: float, total, slope, curve=None):
    """Newton's step on the norm of the powers, which never passes the root, the best one, and how
    much the norm falls by moving the guess.

    total, slope, curve: the sums of the powers r, r - 1 and, from order 2 on, r - 2.
    """
    norm, share = root(total, order), inverse(total)
    steepness = slope * share * norm
    newton = (norm - 1) * inverse(steepness)
    if curve is None:
        return newton, jnp.maximum(newton, 0), steepness
    # Halley's, g'' / (2 |g'|) of the norm g; at most twice as far: far off it may be anything. Nor
    # beyond the best score, where there are no sums to come back by: that is at least the mean
    # ratio of the powers away, and Newton's step is shorter.
    bend = (order - 1) / 2 * (curve * inverse(slope) - slope * share)
    halley = newton / jnp.maximum(1 - newton * bend, 0.5)
    return newton, jnp.minimum(halley, (newton + total * inverse(slope)) / 2), steepness
