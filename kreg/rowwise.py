r"""Weights of rows of scores, and their derivative, for orders 1 to 8 and the Gaussian.

Rows hold scores z, -inf where inadmissible. With best score m and gap g = (m - t) / r every rule
weighs by p = s x^r, x = [g + (z - m) / r]_+, the Gaussian by p = s exp(z - m); rules differ in how
g is found and moves. What is kept of a row is three numbers. Passes over a row form x anew, never
store it: that is what makes them fast. Only exp costs more than to store and read it once.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kreg.bandwidth import Adaptive, Anchored, Fixed, Rule, from_relative_gap
from kreg.bandwidth import Rows as Depths
from kreg.kernels import Kernel
from kreg.stats import Stats
from kreg.threshold import strided

_LARGEST_ORDER = 8
_MOST_STEPS = 100
# Columns that are summed side by side, and at most how many of them into one number: XLA writes out
# sums of up to 24 as straight code, several times faster than the loops it makes of longer ones.
_LANES = 64
_LONGEST_SUM = 24
# 2^f for |f| <= 1/2, highest power first: the polynomial of least relative error, 2e-9; and where
# exp is less than any normal number.
_POWER_OF_TWO = (
    0.00015345812058061484,
    0.0013399931362311059,
    0.009618488958124193,
    0.05550328776612811,
    0.24022646890613444,
    0.693147205737429,
    1.0,
)
_LEAST_EXPONENT = -126 * math.log(2)


class Rows(NamedTuple):
    """What the weights of a row are formed from.

    best: greatest score; 0 for a row without keys.
    gap: (best - t) / r, 1 for the Gaussian; 0 or less where no key is within a fixed bandwidth.
    scale: one over the sum of the powers r; 0 for a row without keys.
    """

    best: Float[Array, "*rows"]
    gap: Float[Array, "*rows"]
    scale: Float[Array, "*rows"]


class At(NamedTuple):
    """What is given with the rows, [*#rows, 1] each: t for `Fixed`, 1/r where it is an array."""

    threshold: Float[Array, "*#rows 1"] | None = None
    excess: Float[Array, "*#rows 1"] | None = None


class Powers(NamedTuple):
    """A static order and a rule's class: how rows of scores are weighed."""

    order: float
    rule: type

    @classmethod
    def of(cls, kernel: Kernel, rule: Rule) -> "Powers | None":
        """None for what is not done here; powers of greater orders are formed from logarithms."""
        order = kernel.static_order
        if order is None or not (order == math.inf or 1 <= order <= _LARGEST_ORDER):
            return None
        return cls(order, type(rule)) if type(rule) in (Adaptive, Anchored, Fixed) else None

    def weigh(self, z: Float[Array, "*rows n"], at: At) -> tuple[Rows, Array]:
        """Finds the gap of every row and the sums at it, and evaluates p / s."""
        if self.order != math.inf:
            rows = self.solve(z, at)
            return rows, self.weights(z, rows, at)
        best = _greatest(z)
        w = lax.optimization_barrier(_exp(z - best[..., None]))
        return Rows(best, jnp.ones_like(best), _inverse(*totals(w))), w

    def solve(self, z: Float[Array, "*rows n"], at: At) -> Rows:
        """Finds the gap of every row, and the sums at it."""
        if self.order == math.inf or self.rule is Adaptive:
            return solve(self.order, z)
        best = _greatest(z)
        gap = jnp.ones_like(best)
        if self.rule is Fixed:
            gap = (best - jnp.broadcast_to(_threshold(at), (*best.shape, 1))[..., 0]) / self.order
        return Rows(best, gap, _inverse(_sums(self.order, z, best, gap)[0]))

    def weights(self, z: Float[Array, "*rows n"], rows: Rows, at: At) -> Array:
        """Evaluates p / s: it is cheaper to scale what becomes of a row than the row."""
        return weights_and_slopes(self.order, z, rows)[0]

    def stats(self, z: Float[Array, "*rows n"], rows: Rows, at: At) -> Stats:
        """Threshold, support and certificate of every row."""
        depths = Depths.of(z)
        excess = jnp.asarray(1 / self.order, z.dtype)
        gap = lax.stop_gradient(rows.gap)[..., None]
        cut = from_relative_gap(gap, excess, depths)
        return Stats.of(depths, Kernel(self.order), cut, self.rule is Adaptive)

    def linear(
        self, z: Float[Array, "*rows n"], rows: Rows, at: At
    ) -> tuple[Array, Callable[[Array], tuple[Array, At]]]:
        """Evaluates p / s, and makes the function from s dp to dz and the gradients of `at`."""
        w, lower = weights_and_slopes(self.order, z, rows)
        if self.order == math.inf:
            w = lower = lax.optimization_barrier(w)

        def pull(dp):
            # Always more than one sum, or XLA stores what is summed.
            if self.order == math.inf or self.rule is Adaptive:
                mean, total = lax.optimization_barrier(totals(lower * dp, lower))
                return lower * (dp - (mean * _inverse(total))[..., None]), At()
            mean, away, total = (x[..., None] for x in totals(w * dp, lower * dp, lower))
            mean = mean * rows.scale[..., None]
            # Equal weights do not move with the scores.
            moves = jnp.where(rows.gap[..., None] > 0, 1, 0).astype(z.dtype)
            dz, away = lower * (dp - mean) * moves, (away - mean * total) * moves
            if self.rule is Fixed:
                return dz, At(-away)
            keys = lax.broadcasted_iota(jnp.int32, z.shape, z.ndim - 1)
            # The first of the best; argmax is the same, several times slower.
            is_best = z == lax.optimization_barrier(jnp.max(z, axis=-1))[..., None]
            first = jnp.min(jnp.where(is_best, keys, z.shape[-1]), axis=-1)
            return dz - jnp.where(keys == lax.optimization_barrier(first)[..., None], away, 0), At()

        return w, pull


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def solve(order: float, z: Float[Array, "*rows n"]) -> Rows:
    """Finds the gaps at which the powers of every row sum to 1: alpha-entmax."""
    part = strided(z)
    best = _greatest(part)
    gap = jnp.ones_like(best)
    if order == math.inf:
        scale = _inverse(*totals(_exp(z - best[..., None])))
        return Rows(best, gap, scale)

    if part is not z:
        gap = lax.fori_loop(0, 3, lambda _, gap: gap - _step(order, part, best, gap)[0], gap)

    def advance(carry):
        count, gap, size, *_ = carry
        # A finished row stays: it keeps its bits whatever its neighbours still do.
        gap = gap - jnp.where(size > _last_step(order, z, gap), size, 0)
        return count + 1, gap, *_step(order, z, best, gap)

    def unfinished(carry):
        count, gap, size, *_ = carry
        return (count == 0) | ((count < _MOST_STEPS) & jnp.any(size > _last_step(order, z, gap)))

    zero = jnp.zeros_like(gap)
    _, before, size, total, slope = lax.while_loop(unfinished, advance, (0, gap, zero, zero, zero))
    gap = before - size
    return Rows(best, gap, _inverse(total - order * (before - gap) * slope))


def _step(order: float, z: Array, best: Array, gap: Array) -> tuple[Array, Array, Array]:
    """Newton's step on the norm, never back; and the sums of the powers r and r - 1."""
    # Together, or XLA forms what does not change with the gap before the loop, and stores it.
    z, best, gap = lax.optimization_barrier((z, best, gap))
    total, slope = _sums(order, z, best, gap)
    size = (total - _shrunk(order, total)) * _inverse(slope)
    return jnp.maximum(size, 0), total, slope


def _last_step(order: float, z: Array, gap: Array) -> Array:
    r"""Bounds the steps after which nothing is left that rounding would show.

    The norm's second derivative is at most (r - 1) n gap^(r - 2) for r >= 2. A step s leaves half
    of that times s^2 to the root, and the sum of the powers is off by r times as much if it is
    moved along its slope. For lesser orders only steps no greater than rounding are last.
    """
    eps = jnp.finfo(z.dtype).eps
    rounding = 2 * eps * gap
    if order < 2:
        return rounding
    # Not a constant, so that rows of all lengths share the code.
    keys = lax.optimization_barrier(jnp.asarray(z.shape[-1], z.dtype))
    curvature = (order - 1) * keys * gap ** (order - 2)
    return jnp.maximum(rounding, jnp.sqrt(eps / 2 * gap / curvature))


@solve.defjvp
def _solve_jvp(order, primals, tangents):
    (z,), (dz,) = primals, tangents
    rows = solve(order, z)
    zero = jnp.zeros_like(rows.best)  # weights do not depend on what scores are measured from
    if order == math.inf:
        change = jnp.sum(_exp(z - rows.best[..., None]) * dz, axis=-1)
        return rows, Rows(zero, zero, -jnp.square(rows.scale) * change)
    lower = _power(_above(order, z, rows.best, rows.gap), order - 1)
    # The powers r sum to 1 wherever the scores move to.
    dgap = -jnp.sum(lower * dz, axis=-1) * _inverse(jnp.sum(lower, axis=-1)) / order
    return rows, Rows(zero, dgap, zero)


def weights_and_slopes(
    order: float, z: Float[Array, "*rows n"], rows: Rows
) -> tuple[Float[Array, "*rows n"], Float[Array, "*rows n"]]:
    r"""Evaluates w = p / s and u with $\dot p = s\, u (\dot z - r\, \dot t)$, s the row's scale."""
    if order == math.inf:
        w = _exp(z - rows.best[..., None])
        return w, w
    x = _above(order, z, rows.best, rows.gap)
    lower = _power(x, order - 1)
    return lower * x, lower


def _above(order: float, z: Array, best: Array, gap: Array) -> Float[Array, "*rows n"]:
    """Evaluates x; 1 for all keys of a row whose threshold is above its best score."""
    # So small that scores make no difference, but for those of -inf.
    unit = jnp.where(gap > 0, 1 / order, jnp.finfo(z.dtype).tiny)
    gap = jnp.where(gap > 0, gap, 1)
    return jnp.maximum(gap[..., None] + (z - best[..., None]) * unit[..., None], 0)


def _sums(order: float, z: Array, best: Array, gap: Array) -> list[Array]:
    x = _above(order, z, best, gap)
    lower = _power(x, order - 1)
    return totals(x if order == 1 else lower * x, lower)


def totals(*terms: Float[Array, "*rows n"]) -> list[Float[Array, "*rows"]]:
    """Sums arrays along the last axis, in one pass and without storing them; no derivative.

    A row is summed in lanes: sums of their own would be a pass each, one running sum would wait for
    every addition, and lose digits.
    """
    n = terms[0].shape[-1]
    if n < 2 * _LANES:
        return _reduced(terms, -1)
    count = _addends(n // _LANES)
    size = _LANES * count
    even = n // size * size
    cut = [x[..., :even].reshape(*x.shape[:-1], -1, count, _LANES) for x in terms]
    sums = [jnp.sum(x, axis=(-2, -1)) for x in _reduced(cut, -2)]
    if even == n:
        return sums
    rest = totals(*(x[..., even:] for x in terms))
    return [a + b for a, b in zip(sums, rest, strict=True)]


def _addends(columns: int) -> int:
    """How many columns to sum into one number: as many as may be, and best without a rest."""
    most = min(columns, _LONGEST_SUM)
    return next((i for i in range(most, most // 2, -1) if columns % i == 0), most)


def _reduced(terms, axis: int) -> list[Array]:
    zeros = tuple(jnp.zeros((), x.dtype) for x in terms)
    axis = terms[0].ndim + axis
    return list(lax.reduce(tuple(terms), zeros, lambda a, b: tuple(map(jnp.add, a, b)), (axis,)))


def _greatest(z: Float[Array, "*rows n"]) -> Float[Array, "*rows"]:
    best = jnp.max(z, axis=-1)
    return jnp.where(best == -jnp.inf, 0, best)


def _threshold(at: At) -> Array:
    assert at.threshold is not None
    return at.threshold


def _inverse(total: Array) -> Array:
    return jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1), 0)


@jax.custom_jvp
def _exp(x: Array) -> Array:
    r"""Evaluates exp(x) for x <= 0: in float32 as $2^n 2^f$ with $|f| \le 1/2$, which is faster.

    Off by 6e-8 at most; the relative error grows with |x|, as that of x log2(e) does.
    """
    if x.dtype != jnp.float32:
        return jnp.exp(x)
    y = jnp.maximum(x * math.log2(math.e), -126)
    whole = jnp.round(y)
    f = y - whole
    p = functools.reduce(lambda p, c: p * f + c, _POWER_OF_TWO[1:], _POWER_OF_TWO[0])
    bits = lax.bitcast_convert_type(p, jnp.int32) + (whole.astype(jnp.int32) << 23)
    y = lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(x < _LEAST_EXPONENT, 0, y)


@_exp.defjvp
def _exp_jvp(primals, tangents):
    y = _exp(*primals)
    return y, y * tangents[0]


def _shrunk(order: float, total: Array) -> Array:
    """Evaluates total^(1 - 1/r)."""
    if order == 1:
        return jnp.minimum(total, 1)
    return jnp.sqrt(total) if order == 2 else total ** (1 - 1 / order)


def _power(x: Array, exponent: float) -> Array:
    """Evaluates x^exponent for x >= 0, and 0 at x = 0 whatever the exponent."""
    if exponent == 0:
        return jnp.where(x > 0, 1, 0).astype(x.dtype)
    if exponent == int(exponent):
        return x if exponent == 1 else lax.integer_pow(x, int(exponent))
    alive = x > 0
    return jnp.where(alive, jnp.exp(exponent * jnp.log(jnp.where(alive, x, 1))), 0)
