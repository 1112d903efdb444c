r"""The deformed exponential: powers of 1 + b d that stay accurate when the order is large.

p = (1 + b d)^r = exp(s log1p(b d) / b) with s = r b. As r grows b falls to 0 and p tends to
exp(s d); the quotient log1p(x) / x and its derivative are formed without cancellation at x = 0.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kreg.kernels import Kernel

# Up to this integer order powers are products; beyond it log and exp are as fast and as accurate.
_LARGEST_PRODUCT = 8


def powers(
    kernel: Kernel,
    reach: Float[Array, "*#rows 1"],
    steepness: Float[Array, "*#rows 1"],
    depth: Float[Array, "*rows n"],
) -> tuple[Float[Array, "*rows n"], Float[Array, "*rows n"]]:
    r"""Evaluates $x^r$ and $x^{r-1}$ for $x = [1 + b d]_+$, with $0^0 = 0$.

    Args:
        kernel: gives r.
        reach: b, one over the distance from the row's best score to its threshold.
        steepness: s = r b, used where r is not a small integer.
        depth: d <= 0, the scores less the row's best.
    """
    order = kernel.order
    if kernel.is_static and order == int(min(order, 1e9)) and 1 <= order <= _LARGEST_PRODUCT:
        x = 1 + reach * depth
        x = jnp.where(x > 0, x, 0)
        lower = (x > 0).astype(x.dtype) if order == 1 else jax.lax.integer_pow(x, int(order) - 1)
        return lower * x, lower
    x = 1 + reach * depth
    alive = x > 0
    depth = jnp.where(alive, depth, 0)
    power = jnp.where(alive, jnp.exp(steepness * depth * log1p_quotient(reach * depth)), 0)
    return power, jnp.where(alive, power / jnp.where(alive, x, 1), 0)


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
