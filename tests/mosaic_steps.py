"""A train step of a Memory Mosaic, to be compiled and not run."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from kreg import training
from kreg.nn import MemoryMosaic, MosaicConfig


def mosaic_step(documents: bool = False, **sizes: Any):
    """A step in bfloat16, with dropout, and the shapes of its state; `sizes`: of the config.

    documents: whether sequences consist of several that know nothing of each other.
    """
    config = MosaicConfig(**{"vocab_size": 64, "num_layers": 1, "memory_size": 64} | sizes)
    graph, params = nnx.split(
        nnx.eval_shape(lambda: MemoryMosaic(config, rngs=nnx.Rngs(0))), nnx.Param
    )

    def loss_of(params, tokens, key):
        segments = tokens // 16 if documents else None
        logits = nnx.merge(graph, params)(tokens, dropout_key=key, segment_ids=segments)
        return training.mean_token_cross_entropy(logits, tokens, ignore=-1), {}

    tx = optax.adamw(1e-3)
    step = training.make_step(loss_of, tx, compute_dtype=jnp.bfloat16)
    return step, jax.eval_shape(lambda p: training.init_state(p, tx, jax.random.key(0)), params)
