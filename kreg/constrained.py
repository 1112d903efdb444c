r"""Maps whose threshold solves another equation: the norm of the weights, or a budget with a cap.

Arguments and rows without admissible entries are treated as in `kreg.maps`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from kreg.arguments import along_last, as_scores, check_values, is_number, per_row
from kreg.deformed import powers, relative_scale
from kreg.kernels import Kernel
from kreg.threshold import relative_gap


def normmax(
    x: Float[ArrayLike, "..."],
    alpha: float | Float[ArrayLike, "..."] = 2.0,
    axis: int = -1,
    where: Bool[ArrayLike, "..."] | None = None,
) -> Float[Array, "..."]:
    r"""Maximises $\langle x, p \rangle - \|p\|_\alpha$ over the simplex.

    The weights are $p_j \propto [x_j - \tau]_+^r$ with r = 1 / (alpha - 1), and tau is such that
    $\sum_j [x_j - \tau]_+^{r+1} = 1$: no key further than 1 below the best has weight.

    Args:
        x: scores.
        alpha: > 1, the order of the norm. A number, or an array of x's rank with size 1 along
            `axis`; differentiable. A traced value of 1 or below gives NaN.
        axis: the axis that sums to 1.
        where: admissible entries.

    Raises:
        ValueError: a concrete alpha of 1 or below, or an alpha of the wrong shape.

    Examples:
        >>> import jax.numpy as jnp
        >>> import kreg
        >>> kreg.normmax(jnp.array([0.4, 0.2, -1.0])).tolist()
        [0.571, 0.429, 0.0]

    References:
        Blondel, Martins and Niculae, `Learning with Fenchel-Young Losses
        <https://arxiv.org/abs/1901.02324>`_, 2020.
    """
    check_values("alpha", alpha, lambda a: a > 1, "values > 1")
    x = as_scores("x", x, axis)
    # The order of the powers that sum to 1, where it is static.
    order = Kernel.from_alpha(alpha).order + 1 if is_number(alpha) else None
    alpha = per_row("alpha", alpha, x, axis)
    weights = _normmax(order, *along_last(x, axis, where), jnp.where(alpha > 1, alpha, jnp.nan))
    return jnp.moveaxis(weights, -1, axis).astype(x.dtype)


def budget(
    x: Float[ArrayLike, "..."],
    budget: float | Float[ArrayLike, "..."] = 1.0,
    axis: int = -1,
    where: Bool[ArrayLike, "..."] | None = None,
) -> Float[Array, "..."]:
    r"""Projects scores onto $\{0 \le p_j \le 1, \sum_j p_j = B\}$: $p_j = \min([x_j - \tau]_+, 1)$.

    A relaxed choice of B keys; sparsemax where B = 1. With fewer than B admissible entries, each
    gets 1.

    Args:
        x: scores.
        budget: B > 0, a number or an array of x's rank with size 1 along `axis`; differentiable.
            A traced value of 0 or below gives NaN.
        axis: the axis that sums to B.
        where: admissible entries.

    Raises:
        ValueError: a concrete budget of 0 or below, or a budget of the wrong shape.

    Examples:
        >>> import jax.numpy as jnp
        >>> import kreg
        >>> kreg.budget(jnp.array([3.0, 0.5, 0.25, -1.0]), budget=2.0).tolist()
        [1.0, 0.625, 0.375, 0.0]

    References:
        Wang and Lu, `Projection onto the Capped Simplex
        <https://arxiv.org/abs/1503.01002>`_, 2015.
    """
    check_values("budget", budget, lambda b: b > 0, "values > 0")
    x = as_scores("x", x, axis)
    budget = per_row("budget", budget, x, axis)
    weights = _budget(*along_last(x, axis, where), jnp.where(budget > 0, budget, jnp.nan))
    return jnp.moveaxis(weights, -1, axis).astype(x.dtype)


@functools.partial(jax.jit, static_argnums=0)
def _normmax(
    order: float | None,
    scores: Float[Array, "*rows n"],
    where: Bool[Array, "*rows n"],
    alpha: Float[Array, "*#rows 1"] | Float[Array, ""],
) -> Float[Array, "*rows n"]:
    """Weighs by the powers r of x_j - tau, the powers r + 1 summing to 1."""
    dtype = scores.dtype
    excess = (alpha - 1) / alpha if order is None else jnp.asarray(1 / order, dtype)
    kernel = Kernel(order) if order is not None else Kernel.tree_unflatten(None, (excess,))
    floor = -(jnp.finfo(dtype).max ** 0.5)
    best = jnp.max(scores, axis=-1, keepdims=True, where=where, initial=-jnp.inf)
    depth = jnp.maximum((scores - jax.lax.stop_gradient(best)) / excess, floor)
    depth = jnp.where(where, depth, floor)
    gap = relative_gap(order, depth, excess)
    _, weights = powers(kernel, relative_scale(gap, excess), depth)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1)


@jax.jit
def _budget(
    scores: Float[Array, "*rows n"],
    where: Bool[Array, "*rows n"],
    budget: Float[Array, "*#rows 1"] | Float[Array, ""],
) -> Float[Array, "*rows n"]:
    """Caps e + v at 1, e being measured from the k-th best score, k = ceil(B), and 0 < v <= 1."""
    target = jnp.minimum(budget, jnp.sum(where, axis=-1, keepdims=True, dtype=scores.dtype))
    n = scores.shape[-1]
    rank = jnp.clip(jnp.ceil(target).astype(jnp.int32), 1, n)
    ranked = jnp.sort(jnp.where(where, jax.lax.stop_gradient(scores), -jnp.inf), axis=-1)
    e = jnp.where(where, scores - jnp.take_along_axis(ranked, n - rank, axis=-1), -jnp.inf)
    v = jax.lax.stop_gradient(_exact_shift(e, target, _bisected_shift(e, target)))
    x = e + _exact_shift(e, target, v)
    return jnp.where(x <= 0, 0, jnp.where(x >= 1, 1, x))


def _bisected_shift(
    e: Float[Array, "*rows n"], target: Float[Array, "*rows 1"]
) -> Float[Array, "*rows 1"]:
    """Finds the smallest v in (0, 1] that reaches the target, to the last bit."""
    e, target = jax.lax.stop_gradient((e, target))

    def middle(bracket):
        low, high = bracket
        return (low + high) / 2

    def unfinished(bracket):
        low, high = bracket
        return jnp.any((low < middle(bracket)) & (middle(bracket) < high))

    def halve(bracket):
        v = middle(bracket)
        enough = jnp.sum(jnp.clip(e + v, 0, 1), axis=-1, keepdims=True) >= target
        return jnp.where(enough, bracket[0], v), jnp.where(enough, v, bracket[1])

    # All ones and zeros at v = 1: a rounded sum could reach the target short of it.
    free, capped = _split(e + 1)
    low = jnp.where((capped == target) & ~jnp.any(free, axis=-1, keepdims=True), 1, target * 0)
    return jax.lax.while_loop(unfinished, halve, (low, low * 0 + 1))[1]


def _exact_shift(
    e: Float[Array, "*rows n"], target: Float[Array, "*rows 1"], v: Float[Array, "*rows 1"]
) -> Float[Array, "*rows 1"]:
    """Solves for v among the keys that are neither 0 nor 1 at v; keeps v where there are none."""
    free, capped = _split(e + v)
    count = jnp.sum(free, axis=-1, keepdims=True, dtype=e.dtype)
    inside = jnp.sum(jnp.where(free, e, 0), axis=-1, keepdims=True)
    return jnp.where(count > 0, (target - capped - inside) / jnp.where(count > 0, count, 1), v)


def _split(x: Float[Array, "*rows n"]) -> tuple[Bool[Array, "*rows n"], Float[Array, "*rows 1"]]:
    """Tells which entries are strictly between 0 and 1, and how many are 1 or more."""
    capped = jnp.sum(x >= 1, axis=-1, keepdims=True, dtype=x.dtype)
    return (x > 0) & (x < 1), capped
