r"""The one formula: p_j = [z_j - t]_+^r / sum_i [z_i - t]_+^r, with t from the rule."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from kreg import rowwise
from kreg.bandwidth import Adaptive, Cut, Rows, Rule
from kreg.cache import in_cache
from kreg.deformed import powers
from kreg.derivatives import differentiable
from kreg.kernels import Kernel
from kreg.split import WHOLE, Split
from kreg.stats import Stats
from kreg.threshold import THRESHOLD


# Compiled as one, so that calls outside jit do not trace and compile their loops each time.
@functools.partial(jax.jit, static_argnames=("many", "split"))
def weigh(
    scores: Float[Array, "*rows n"],
    where: Bool[Array, "*#rows n"] | None,
    kernel: Kernel,
    rule: Rule,
    fixed: Float[Array, "*#rows 1"] | float = 0.0,
    many: bool = False,
    split: Split = WHOLE,
) -> tuple[Float[Array, "*rows n"], Stats]:
    r"""Weighs scores z = s/h^2 along the last axis.

    Args:
        scores: z in float32 or wider; may hold anything finite where `where` is False.
        where: admissible keys, None for all whose score is not -inf; a row without any gets
            weights 0.
        kernel: K_r.
        rule: where the row is cut.
        fixed: threshold that `Fixed` stands for.
        many: whether the rows may be more than a cache holds; attention's come in blocks already.
        split: where the keys are; each row's weights sum to 1 over all of them.
    """
    powers = rowwise.Powers.of(kernel, rule)
    if (
        split.axis is None
        and powers is not None
        and (kernel.is_gaussian or powers.rule is Adaptive)
    ):
        z = scores if where is None else jnp.where(where, scores, -jnp.inf)
        weights, found = _entmax(powers.order, many)(z, ())
        return weights, powers.stats(z, found, rowwise.At())
    rows = Rows.of(scores, where, split)
    fixed = jnp.asarray(fixed, scores.dtype)
    weights, cut, alive = weigh_depths(rows, kernel, rule, fixed, split)
    return weights, Stats.of(rows, kernel, cut, isinstance(rule, Adaptive), alive, split)


def weigh_depths(
    rows: Rows, kernel: Kernel, rule: Rule, fixed: Array, split: Split = WHOLE
) -> tuple[Float[Array, "*rows n"], Cut, Bool[Array, "*rows n"]]:
    """Weighs by any kernel and rule; also returns where rows are cut and which keys have weight."""
    cut = rule.cut(rows, kernel, fixed, split)
    raw, alive = _raw_weights(rows, kernel, cut)
    (total,) = split.sums(raw)
    # A row without keys has weights 0.
    return raw / jnp.where(total > 0, total, 1), cut, alive


@functools.cache
def _entmax(order: float, many: bool) -> Callable:
    r"""Makes the function z -> (p, rows) of alpha-entmax of static order; rows have no gradient.

    It is what the general path computes, with the derivative in one piece,
    $\dot p = u (\dot z - \langle u, \dot z \rangle / \sum u)$, $u = x^{r-1}$: half the work of
    differentiating the threshold and the powers one after the other.
    """
    method = rowwise.Powers(order, Adaptive)

    def solve(z):
        return method.solve(z, rowwise.At())

    def forward(z, _):
        rows = in_cache(solve, z) if many else solve(z)
        rows = rowwise.Rows(*(checkpoint_name(x, THRESHOLD) for x in rows))
        return method.weights(z, rows, rowwise.At()) * rows.scale[..., None], rows

    def backward(z, _, rows, dp):
        return method.linear(z, rows, rowwise.At())[1](dp * rows.scale[..., None])[0]

    return differentiable(functools.partial(_plain_entmax, order), forward, backward)


def _plain_entmax(order: float, z: Float[Array, "*rows n"], _) -> Float[Array, "*rows n"]:
    rows = rowwise.solve(order, z)
    return rowwise.weights_and_slopes(order, z, rows)[0] * rows.scale[..., None]


def _raw_weights(rows: Rows, kernel: Kernel, cut: Cut) -> tuple[Array, Array]:
    """Weights before normalisation, 1 at the row's best key, and which keys have one."""
    dtype = rows.depth.dtype
    keep = rows.where if cut.keep is None else rows.where & cut.keep
    if kernel.is_static and kernel.order == 0:
        return keep.astype(dtype), keep
    if kernel.is_gaussian:
        return jnp.where(keep, jnp.exp(rows.depth), 0), keep
    raw, _ = powers(kernel, cut.scale, rows.depth)
    alive = keep & (rows.depth > -cut.scale.gap)
    if cut.keep is not None:
        raw = jnp.where(keep, raw, 0)
    if cut.uniform is not None:
        alive = jnp.where(cut.uniform, keep, alive)
        raw = jnp.where(cut.uniform, keep.astype(dtype), raw)
    return raw, alive
