r"""The threshold of a row: where to cut scores so that the powers above the cut sum to one.

For scores z of one row with best score m and depths d = z - m <= 0, alpha-entmax with
alpha = 1 + a, r = 1/a, has weights [rho + a d]_+^r for the one number rho in [n^(-a), 1] that makes
them sum to 1; the threshold in units of z is t = m - r rho. rho is found to relative precision,
whatever the order: it is 1/n for a flat row under sparsemax and 1 for softmax.

The norm g(rho) = (sum [rho + a d]_+^r)^a is convex for r >= 1, and Newton's method on g - 1 walks
down from rho = 1 without ever passing the root; it is exact in one step on flat and on one-hot
rows, and r (g - 1) bounds what is left, in units of z. For r < 1 convexity is lost and the root is
bracketed.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from kreg.deformed import log1p_quotient, powers, relative_scale
from kreg.kernels import Kernel
from kreg.split import WHOLE, Split

# Name under which the chunked path saves rho, so that its backward pass does not solve again.
THRESHOLD = "kreg_threshold"

# Far above what convergence takes (8 steps are usual); it only ends rows that hold NaN.
_MOST_STEPS = 100
_STRIDE = 8
# Steps on the keys that are here, before any over the mesh: they cost no messages.
_LOCAL_STEPS = 6


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 3))
def relative_gap(
    order: float | None,
    depth: Float[Array, "*rows n"],
    excess: Float[Array, "*#rows 1"],
    split: Split = WHOLE,
) -> Float[Array, "*rows 1"]:
    r"""Solves $\sum_j [\rho + a d_j]_+^{1/a} = 1$ for rho, row by row.

    Args:
        order: r where it is a Python number, None where it is traced.
        depth: d, with row maximum 0, and very negative where a key is inadmissible.
        excess: a = 1/r, broadcast against the rows.
        split: where the keys are.

    Returns:
        rho; 1 for a row without admissible keys.
    """
    kernel = _kernel(order, excess)
    convex = kernel.is_static and kernel.order >= 1
    steps = functools.partial(_newton if convex else _safeguarded, kernel, depth, excess, split)
    rho = _start(kernel, depth, excess, split)
    keys = split.keys(depth.shape[-1])
    low = rho * 0 + keys ** -jnp.asarray(excess, rho.dtype)

    def unfinished(carry):
        step, _, _, _, done = carry
        return (step < _MOST_STEPS) & ~jnp.all(done)

    def advance(carry):
        step, rho, low, high, done = carry
        moved = steps(rho, low, high)
        # A finished row keeps its bits whatever its neighbours still do.
        old = (rho, low, high)
        kept = [jnp.where(done, x, y) for x, y in zip(old, moved[:3], strict=True)]
        return step + 1, *kept, done | moved[3]

    carry = (0, rho, low, jnp.maximum(rho, 1), rho != rho)
    return jax.lax.while_loop(unfinished, advance, carry)[1]


def _start(kernel: Kernel, depth: Array, excess: Array, split: Split) -> Float[Array, "*rows 1"]:
    """Newton's method on a part of the keys, whose root is on the same side as that of all.

    The part is the best of every few keys of a long row; where keys are split, those here.
    """
    rho = depth[..., :1] * 0 + 1
    is_convex = jnp.asarray(excess) <= 1

    def step(part, rho):
        return _newton(kernel, part, excess, WHOLE, rho, rho, rho)[0]

    part = strided(depth)
    if part is not depth:
        near = jax.lax.fori_loop(0, 4, lambda _, rho: step(part, rho), rho)
        rho = jnp.where(is_convex, near, rho)
    if split.axis is None:
        return rho
    near = jax.lax.fori_loop(0, _LOCAL_STEPS, lambda _, rho: step(depth, rho), rho)
    return split.min(jnp.where(is_convex, near, rho))


def strided(z: Float[Array, "*rows n"]) -> Float[Array, "*rows m"]:
    """Takes the greatest of every so many scores of a long row, and so its greatest too.

    Any part of a row bounds its threshold from below; this one does so closely.
    """
    n = z.shape[-1]
    if n < 8 * _STRIDE:
        return z
    even = n // _STRIDE * _STRIDE
    part = jnp.max(z[..., :even].reshape(*z.shape[:-1], _STRIDE, -1), axis=-2)
    if even < n:
        part = jnp.concatenate([part, z[..., even:]], axis=-1)
    # Or XLA reads the whole row again for the greatest.
    return jax.lax.optimization_barrier(part)


def norm(
    kernel: Kernel,
    depth: Float[Array, "*rows n"],
    excess: Float[Array, "*#rows 1"],
    rho: Float[Array, "*rows 1"],
    split: Split = WHOLE,
) -> tuple[Float[Array, "*rows 1"], Float[Array, "*rows 1"]]:
    r"""Evaluates $g = (\sum [\rho + a d]_+^r)^a$ and Newton's step of rho towards g = 1."""
    power, lower = powers(kernel, relative_scale(rho, excess), depth)
    total, slope = split.sums(power, lower)
    root = jnp.where(total > 0, total, 1) ** jnp.asarray(excess, total.dtype)
    step = (rho * root - 1) * total / (root * jnp.where(slope > 0, slope, 1))
    return rho * root, jnp.where(total > 0, step, 0)


def _newton(kernel, depth, excess, split, rho, low, high):
    _, step = norm(kernel, depth, excess, rho, split)
    # No movement at this precision, a step back (rounding), or NaN: the row is finished.
    done = ~(step > 2 * jnp.finfo(rho.dtype).eps * rho)
    return jnp.where(step > 0, rho - step, rho), low, high, done


def _safeguarded(kernel, depth, excess, split, rho, low, high):
    """Newton where the norm is convex (a <= 1), else halves the bracket of log rho."""
    g, step = norm(kernel, depth, excess, rho, split)
    eps = jnp.finfo(rho.dtype).eps
    low, high = jnp.where(g < 1, rho, low), jnp.where(g < 1, high, rho)
    middle = jnp.sqrt(low) * jnp.sqrt(high)
    convex = jnp.asarray(excess) <= 1
    newton_done, halving_done = ~(step > 2 * eps * rho), ~(high - low > 2 * eps * high)
    new = jnp.where(convex, jnp.where(step > 0, rho - step, rho), middle)
    return new, low, high, jnp.where(convex, newton_done, halving_done)


@relative_gap.defjvp
def _relative_gap_jvp(order, split, primals, tangents):
    depth, excess = primals
    rho = checkpoint_name(relative_gap(order, depth, excess, split), THRESHOLD)
    ddepth, dexcess = tangents
    return rho, _change(order, depth, excess, rho, ddepth, dexcess, split)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def known_gap(
    order: float | None,
    depth: Float[Array, "*rows n"],
    excess: Float[Array, "*#rows 1"],
    rho: Float[Array, "*rows 1"],
) -> Float[Array, "*rows 1"]:
    """Returns rho, found before, as the function of depths and excess that it is."""
    return rho


@known_gap.defjvp
def _known_gap_jvp(order, primals, tangents):
    depth, excess, rho = primals
    return rho, _change(order, depth, excess, rho, *tangents[:2])


def _change(
    order, depth, excess, rho, ddepth, dexcess, split: Split = WHOLE
) -> Float[Array, "*rows 1"]:
    """How rho changes, by the implicit function theorem."""
    kernel = _kernel(order, excess)
    power, lower = powers(kernel, relative_scale(rho, excess), depth)
    # u is the derivative of the powers, scaled to have sum 1.
    total, slope = split.sums(power, lower)
    u = lower / jnp.where(slope > 0, slope, 1)
    (moved,) = split.sums(u * ddepth)
    drho = -excess * moved
    if kernel.is_static:
        return drho
    total = jnp.where(total > 0, total, 1)
    reach = excess / rho
    alive = power > 0
    safe = jnp.where(alive, depth, 0)
    logs = safe * log1p_quotient(jnp.where(alive, reach * safe, 0)) / rho
    mean, depths = split.sums(power / total * logs, u * safe)
    entropy = jnp.log(total) - mean
    # u per unit of x, where x = rho (1 + b d) and the powers sum to 1 at the root.
    per_x = jnp.where(slope > 0, slope, 1) / (total * rho)
    return drho - (depths + entropy / per_x) * dexcess


def _kernel(order: float | None, excess: Array) -> Kernel:
    """Rebuilds the kernel from its static order or, where that is None, from its traced excess."""
    return Kernel(order) if order is not None else Kernel.tree_unflatten(None, (excess,))
