"""The k-th and the next best of a row's scores, wherever the row's keys are."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kreg.split import Split

# So many thresholds are tried in one message: each halves what is left two times.
_PIVOTS = 3


def ranked(
    depth: Float[Array, "*rows n"], k: int, split: Split
) -> tuple[Float[Array, "*rows 1"], Float[Array, "*rows 1"]]:
    """Finds the k-th greatest and the one after it, the last of all where there are fewer.

    Gradients flow to the one after alone: the k-th is only compared with.
    """
    n = split.keys(depth.shape[-1])
    if split.axis is None:
        found = jax.lax.top_k(depth, min(k + 1, n))[0]
        return found[..., min(k, n) - 1, None], found[..., -1:]
    # Scores are at most 0 here: the greater, the less the bits of the magnitude as an integer.
    bits = jax.lax.stop_gradient(jnp.abs(depth))
    bits = jax.lax.bitcast_convert_type(bits, jnp.dtype(f"int{8 * bits.dtype.itemsize}"))
    kth, next_best = (_least(bits, min(rank, n), split) for rank in (k, k + 1))
    at = -jax.lax.bitcast_convert_type(kth, depth.dtype)
    is_next = split.at_best(jnp.where(bits == next_best, 0.0, -1.0)) & (bits == next_best)
    (after,) = split.sums(jnp.where(is_next, depth, 0))
    return at, after


def _least(bits: Int[Array, "*rows n"], rank: int, split: Split) -> Int[Array, "*rows 1"]:
    """Finds the least number that at least `rank` of a row do not exceed, two bits a message."""
    width = 8 * bits.dtype.itemsize - 1

    def refine(i, low):
        # The answer is in [low, low + 4 step).
        step = jnp.ones((), bits.dtype) << jnp.maximum(width - 2 - 2 * i, 0).astype(bits.dtype)
        tops = [low + j * step - 1 for j in range(1, _PIVOTS + 1)]
        counts = split.joined(*(_count(bits, top) for top in tops))
        return low + step * sum((count < rank).astype(bits.dtype) for count in counts)

    start = jnp.zeros_like(split.min(bits))
    return jax.lax.fori_loop(0, -(-width // 2), refine, start)


def _count(bits: Int[Array, "*rows n"], top: Int[Array, "*rows 1"]) -> Int[Array, "*rows 1"]:
    return jnp.sum(bits <= top, axis=-1, keepdims=True, dtype=jnp.int32)
