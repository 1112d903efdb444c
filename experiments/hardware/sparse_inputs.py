"""Queries, keys and values whose attention has weight in a stated share of its tiles.

Tokens come in runs of 64 that share a topic. With probability w a run has the common topic, else
one of its own: two runs agree with probability w^2, and scores across topics are far below the
threshold. So about w^2 of the 64 x 64 tiles have weight, and the tiles on the diagonal. What the
share really is, the kernels say.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

RUN = 64
# Sparsities of the published figure of AdaSplash-2, by context length, of the lower triangle.
PUBLISHED = {4096: 0.51, 8192: 0.58, 16384: 0.64, 32768: 0.70, 65536: 0.75, 131072: 0.85}
# How far scores within a topic are above others, in z, and the noise beside the topics.
_ABOVE, _NOISE = 16.0, 0.25


def sparse_inputs(
    batch: int, length: int, heads: int, width: int, share: float, dtype: str, seed: int = 0
) -> list[Array]:
    """Draw query, key, value and the output's cotangent.

    Args:
        share: of the tiles that are to have weight, between 0 and 1.
    """
    keys = jax.random.split(jax.random.key(seed), 6)
    runs = -(-length // RUN)
    common = jax.random.uniform(keys[0], (batch, runs, heads, 1)) < share**0.5
    topics = jax.random.normal(keys[1], (batch, runs, heads, width))
    shared = jax.random.normal(keys[2], (batch, 1, heads, width))
    topics = jnp.where(common, shared, topics)
    topics = topics / jnp.linalg.norm(topics, axis=-1, keepdims=True)
    topics = jnp.repeat(topics, RUN, axis=1)[:, :length] * (_ABOVE * width**0.5) ** 0.5
    shape = batch, length, heads, width
    query, key = (topics + _NOISE * jax.random.normal(k, shape) for k in keys[3:5])
    value, cotangent = jax.random.normal(keys[5], (2, *shape))
    return [x.astype(dtype) for x in (query, key, value, cotangent)]
