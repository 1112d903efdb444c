r"""What is said of a row besides its weights: threshold, support, and how far off t may be."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kreg.bandwidth import Cut, Rows
from kreg.kernels import Kernel
from kreg.split import WHOLE, Split
from kreg.threshold import norm


class Stats(NamedTuple):
    """What a row's threshold search found; no gradients pass through it.

    threshold: t in units of z, float32; -inf for the Gaussian, +inf for a row without keys.
    support: how many keys have weight; the admissible keys of a `Fixed` row that found none.
    residual: certified bound of |t - t*| including rounding; 0 where nothing was solved.
    """

    threshold: Float[Array, "*rows"]
    support: Int[Array, "*rows"]
    residual: Float[Array, "*rows"]

    @classmethod
    def of(
        cls,
        rows: Rows,
        kernel: Kernel,
        cut: Cut,
        solved: bool,
        alive: Bool[Array, "*rows n"] | None = None,
        split: Split = WHOLE,
    ) -> "Stats":
        """Counts, and bounds what was solved.

        `alive` says which keys have weight; None stands for those above the cut.
        A cut at or above the best score is that of a row without keys inside a fixed bandwidth.
        """
        rows, kernel, cut = jax.lax.stop_gradient((rows, kernel, cut))
        if alive is None:
            inside = (rows.depth > -cut.scale.gap) | (cut.scale.gap <= 0)
            alive = rows.where & (inside | kernel.is_gaussian)
        shape = rows.depth.shape[:-1]
        some = jnp.broadcast_to(split.any(rows.where)[..., 0], shape)
        threshold = jnp.broadcast_to(cut.threshold, (*shape, 1))[..., 0]
        threshold = jnp.where(some, threshold, jnp.inf).astype(jnp.float32)
        support = jnp.where(some, split.count(alive)[..., 0], 0)
        if kernel.is_gaussian or not solved:
            return cls(threshold, support, jnp.zeros(shape, jnp.float32))
        residual = jnp.where(some, _residual(rows, kernel, cut, split), 0)
        return cls(threshold, support, residual.astype(jnp.float32))


def _residual(rows: Rows, kernel: Kernel, cut: Cut, split: Split) -> Float[Array, "*rows"]:
    """Bounds |t - t*| by r |g - 1|, the norm's slope being at least one, plus rounding."""
    dtype = rows.depth.dtype
    excess = jnp.asarray(kernel.excess, dtype)
    order = jnp.where(excess > 0, 1 / jnp.where(excess > 0, excess, 1), 0)
    g, _ = norm(kernel, rows.depth, excess, 1 / cut.scale.steepness, split)
    deepest = split.min(rows.depth, where=rows.where, initial=0)
    largest = jnp.maximum(jnp.abs(rows.best), jnp.abs(rows.best + deepest))
    # Stats are float32, whatever the scores are.
    rounding = jnp.finfo(jnp.float32).eps * (16 * (1 + largest) + 4 * order)
    return (jnp.abs(g - 1) * order + rounding)[..., 0]
