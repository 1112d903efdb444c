r"""The deformed exponential: powers of 1 + b d that stay accurate when the order is large.

p = (1 + b d)^r = exp(s log1p(b d) / b) with s = r b. As r grows b falls to 0 and p tends to
exp(s d); the quotient log1p(x) / x and its derivative are formed without cancellation at x = 0.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kreg.kernels import Kernel

# Up to this integer order powers are products; beyond it log and exp are as fast and as accurate.
_LARGEST_PRODUCT = 8


class Scale(NamedTuple):
    """How depths d are measured: x = 1 + d / gap.

    gap: distance from the row's best score to its threshold; infinite for the Gaussian.
    reach: 1 / gap.
    steepness: r / gap; x^r = exp(steepness d q) with q = log1p(d / gap) / (d / gap).
    """

    gap: Float[Array, "*#rows 1"]
    reach: Float[Array, "*#rows 1"]
    steepness: Float[Array, "*#rows 1"]


def relative_scale(rho: Float[Array, "*rows 1"], excess: Float[Array, "*#rows 1"]) -> Scale:
    """Makes the scale of a relative gap rho = gap / r, with excess a = 1 / r."""
    gap = jnp.where(excess > 0, rho / jnp.where(excess > 0, excess, 1), jnp.inf)
    return Scale(gap, excess / rho, 1 / rho)


def powers(
    kernel: Kernel, scale: Scale, depth: Float[Array, "*rows n"]
) -> tuple[Float[Array, "*rows n"], Float[Array, "*rows n"]]:
    r"""Evaluates $x^r$ and $x^{r-1}$ for $x = [1 + d / gap]_+$, with $0^0 = 0$.

    A key exactly at the threshold gets exactly 0: d + gap is exact there, 1 + d / gap is not.
    """
    order = kernel.order
    alive = depth > -scale.gap
    if kernel.is_static and order == int(min(order, 1e9)) and 1 <= order <= _LARGEST_PRODUCT:
        x = jnp.where(alive, depth + scale.gap, 0) * scale.reach
        lower = alive.astype(x.dtype) if order == 1 else jax.lax.integer_pow(x, int(order) - 1)
        return lower * x, lower
    depth = jnp.where(alive, depth, 0)
    least = jnp.finfo(depth.dtype).eps / 2 - 1
    share = jnp.maximum(scale.reach * depth, least)
    power = jnp.where(alive, jnp.exp(scale.steepness * depth * log1p_quotient(share)), 0)
    return power, power / (1 + share)


@functools.partial(jax.custom_jvp)
def log1p_quotient(x: Float[Array, "..."]) -> Float[Array, "..."]:
    r"""Evaluates $\log(1 + x) / x$ for x > -1, with the value 1 at 0."""
    small = jnp.abs(x) < jnp.finfo(x.dtype).eps
    safe = jnp.where(small, 1, x)
    return jnp.where(small, 1, jnp.log1p(safe) / safe)


@log1p_quotient.defjvp
def _log1p_quotient_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return log1p_quotient(x), log1p_curvature(x) * dx


def log1p_curvature(x: Float[Array, "..."]) -> Float[Array, "..."]:
    r"""Evaluates $(x/(1+x) - \log(1+x)) / x^2$, the derivative of log1p(x)/x; -1/2 at 0.

    With w = x/(2+x) the numerator is $-2 w^2 (1/(1+w) + w/3 + w^3/5 + ...)$, a sum without
    cancellation, used where |w| < 0.15; eleven terms leave an error below 1e-17.
    """
    near = (x > -0.26) & (x < 0.35)
    w = jnp.where(near, x, 0)
    w = w / (2 + w)
    series = sum(w ** (2 * k - 1) / (2 * k + 1) for k in range(1, 12))
    close = -((1 - w) ** 2) / 2 * (1 / (1 + w) + series)
    far = jnp.where(near, 1, x)
    return jnp.where(near, close, (far / (1 + far) - jnp.log1p(far)) / far**2)
