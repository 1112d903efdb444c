"""Which keys each query may see, and which queries and keys take part at all."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from kreg.problem import Problem


def admissible(problem: Problem) -> Bool[Array, "#B #N T S"]:
    """Combines range, segments, mask and biases of -inf for the problem's block of queries."""
    low, high = key_range(problem)
    keys = jnp.arange(problem.key.shape[1])[None, None, :]
    where = (keys >= low[..., None]) & (keys < high[..., None])
    where = where[:, None]
    if problem.query_segments is not None and problem.key_segments is not None:
        same = problem.query_segments[:, :, None] == problem.key_segments[:, None, :]
        where &= same[:, None]
    if problem.mask is not None:
        where = where & problem.mask
    if problem.bias is not None:
        where = where & (problem.bias != -jnp.inf)
    return where


def key_range(problem: Problem) -> tuple[Int[Array, "#B T"], Int[Array, "#B T"]]:
    """Range [low, high) of keys by causality, window and lengths, for each query; may be empty."""
    keys = problem.key.shape[1]
    rows = problem.rows[None, :]
    centre = rows + problem.offset[:, None]
    low, high = jnp.zeros_like(centre), jnp.full_like(centre, keys)
    if problem.is_causal:
        high = jnp.minimum(high, centre + 1)
    if problem.window is not None:
        low = jnp.maximum(low, centre - problem.window[0])
        high = jnp.minimum(high, centre + problem.window[1] + 1)
    if problem.key_lengths is not None:
        high = jnp.minimum(high, problem.key_lengths[:, None])
    if problem.query_lengths is not None:
        high = jnp.where(rows < problem.query_lengths[:, None], high, 0)
    return low, high


def plain(problem: Problem) -> bool:
    """True where every query may see every key, known when the function is traced."""
    fields = ("bias", "mask", "query_lengths", "key_lengths", "query_segments", "window")
    return not problem.is_causal and all(getattr(problem, field) is None for field in fields)
