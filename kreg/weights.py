r"""The one formula: p_j = [z_j - t]_+^r / sum_i [z_i - t]_+^r, with t from the rule."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from kreg import rowwise
from kreg.bandwidth import Adaptive, Cut, Nearest, Rows, Rule, from_relative_gap
from kreg.deformed import powers
from kreg.derivatives import differentiable
from kreg.kernels import Kernel
from kreg.threshold import THRESHOLD, norm


class Stats(NamedTuple):
    """What a row's threshold search found; no gradients pass through it.

    threshold: t in units of z, float32; -inf for the Gaussian, +inf for a row without keys.
    support: how many keys have weight; the admissible keys of a `Fixed` row that found none.
    residual: certified bound of |t - t*| including rounding; 0 where nothing was solved.
    """

    threshold: Float[Array, "*rows"]
    support: Int[Array, "*rows"]
    residual: Float[Array, "*rows"]


# Compiled as one, so that calls outside jit do not trace and compile their loops each time.
@jax.jit
def weigh(
    scores: Float[Array, "*rows n"],
    where: Bool[Array, "*#rows n"] | None,
    kernel: Kernel,
    rule: Rule,
    fixed: Float[Array, "*#rows 1"] | float = 0.0,
) -> tuple[Float[Array, "*rows n"], Stats]:
    r"""Weighs scores z = s/h^2 along the last axis.

    Args:
        scores: z in float32 or wider; may hold anything finite where `where` is False.
        where: admissible keys, None for all whose score is not -inf; a row without any gets
            weights 0.
        kernel: K_r.
        rule: where the row is cut.
        fixed: threshold that `Fixed` stands for.
    """
    order = kernel.static_order
    plain = is_gaussian(kernel) and not isinstance(rule, Nearest)
    fast = isinstance(rule, Adaptive) and rowwise.Powers.takes(order, Adaptive)
    if order is not None and (plain or fast):
        z = scores if where is None else jnp.where(where, scores, -jnp.inf)
        weights, found = _entmax(order)(z, ())
        return weights, row_stats(z, found.gap, kernel, Adaptive())
    if where is None:
        # NaN is not > -inf, and at an admissible entry it is the caller's.
        where = (scores > -jnp.inf) | jnp.isnan(scores)
    rows = _rows(jnp.where(where, scores, 0), where)
    cut = rule.cut(rows, kernel, jnp.asarray(fixed, scores.dtype))
    raw, alive = _raw_weights(rows, kernel, cut)
    return raw / _total(raw), _stats(rows, kernel, rule, cut, alive)


def row_stats(
    z: Float[Array, "*rows n"], gap: Float[Array, "*rows"], kernel: Kernel, rule: Rule
) -> Stats:
    """Stats of rows of scores, -inf where inadmissible, with gap = (best - t) / r.

    A gap of 0 or less says that no key is within a fixed bandwidth.
    """
    where = z > -jnp.inf
    rows = _rows(jnp.where(where, z, 0), where)
    gap = jax.lax.stop_gradient(gap)[..., None]
    cut = from_relative_gap(gap, jnp.asarray(kernel.excess, gap.dtype), rows)
    alive = where if is_gaussian(kernel) else where & ((rows.depth > -cut.scale.gap) | (gap <= 0))
    return _stats(rows, kernel, rule, cut, alive)


@functools.cache
def _entmax(order: float) -> Callable:
    r"""Makes the function z -> (p, gap) of alpha-entmax of static order; gaps have no gradient.

    It is what the general path computes, with the derivative in one piece,
    $\dot p = u (\dot z - \langle u, \dot z \rangle / \sum u)$, $u = x^{r-1}$: half the work of
    differentiating the threshold and the powers one after the other.
    """
    method = rowwise.Powers(order, Adaptive)

    def forward(z, _):
        rows = rowwise.Rows(*(checkpoint_name(x, THRESHOLD) for x in method.solve(z, None)))
        return method.weights(z, rows, None), rows

    def backward(z, _, rows, dp):
        return method.linear(z, rows, None)[1](dp)[0]

    return differentiable(functools.partial(_plain_entmax, order), forward, backward)


def _plain_entmax(order: float, z: Float[Array, "*rows n"], _) -> Float[Array, "*rows n"]:
    return rowwise.weights_and_slopes(order, z, rowwise.solve(order, z))[0]


def _total(raw: Float[Array, "*rows n"]) -> Float[Array, "*rows 1"]:
    """Sums a row of weights; 1 for a row without keys, whose weights are 0."""
    total = jnp.sum(raw, axis=-1, keepdims=True)
    return jnp.where(total > 0, total, 1)


def is_gaussian(kernel: Kernel) -> bool:
    """True where the kernel is known to be the Gaussian when the function is traced."""
    return kernel.is_static and bool(kernel.order == float("inf"))


def _rows(scores: Float[Array, "*rows n"], where: Bool[Array, "*#rows n"]) -> Rows:
    """Measures scores from the row's best, inadmissible ones far below any threshold."""
    floor = -(jnp.finfo(scores.dtype).max ** 0.5)
    best = jnp.max(scores, axis=-1, keepdims=True, where=where, initial=-jnp.inf)
    # Scores of +inf are the caller's; a row without keys has best -inf here.
    best = jax.lax.stop_gradient(jnp.where(best == -jnp.inf, 0, best))
    depth = jnp.where(where, jnp.maximum(scores - best, floor), floor)
    return Rows(depth, where, best)


def _raw_weights(rows: Rows, kernel: Kernel, cut: Cut) -> tuple[Array, Array]:
    """Weights before normalisation, 1 at the row's best key, and which keys have one."""
    dtype = rows.depth.dtype
    keep = rows.where if cut.keep is None else rows.where & cut.keep
    if kernel.is_static and kernel.order == 0:
        return keep.astype(dtype), keep
    if is_gaussian(kernel):
        return jnp.where(keep, jnp.exp(rows.depth), 0), keep
    raw, _ = powers(kernel, cut.scale, rows.depth)
    alive = keep & (rows.depth > -cut.scale.gap)
    if cut.keep is not None:
        raw = jnp.where(keep, raw, 0)
    if cut.uniform is not None:
        alive = jnp.where(cut.uniform, keep, alive)
        raw = jnp.where(cut.uniform, keep.astype(dtype), raw)
    return raw, alive


def _stats(rows: Rows, kernel: Kernel, rule: Rule, cut: Cut, alive: Array) -> Stats:
    rows, kernel, cut = jax.lax.stop_gradient((rows, kernel, cut))
    shape = rows.depth.shape[:-1]
    some = jnp.broadcast_to(jnp.any(rows.where, axis=-1), shape)
    threshold = jnp.broadcast_to(cut.threshold, (*shape, 1))[..., 0]
    threshold = jnp.where(some, threshold, jnp.inf).astype(jnp.float32)
    support = jnp.where(some, jnp.sum(alive, axis=-1, dtype=jnp.int32), 0)
    if is_gaussian(kernel) or not isinstance(rule, Adaptive):
        return Stats(threshold, support, jnp.zeros(shape, jnp.float32))
    residual = jnp.where(some, _residual(rows, kernel, cut), 0)
    return Stats(threshold, support, residual.astype(jnp.float32))


def _residual(rows: Rows, kernel: Kernel, cut: Cut) -> Float[Array, "*rows"]:
    """Bounds |t - t*| by r |g - 1|, the norm's slope being at least one, plus rounding."""
    dtype = rows.depth.dtype
    excess = jnp.asarray(kernel.excess, dtype)
    order = jnp.where(excess > 0, 1 / jnp.where(excess > 0, excess, 1), 0)
    g, _ = norm(kernel, rows.depth, excess, 1 / cut.scale.steepness)
    deepest = jnp.min(rows.depth, axis=-1, keepdims=True, where=rows.where, initial=0)
    largest = jnp.maximum(jnp.abs(rows.best), jnp.abs(rows.best + deepest))
    # Stats are float32, whatever the scores are.
    rounding = jnp.finfo(jnp.float32).eps * (16 * (1 + largest) + 4 * order)
    return (jnp.abs(g - 1) * order + rounding)[..., 0]
