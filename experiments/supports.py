"""How many keys answer the queries of a model, and how many they could see.

Axes: B sequences, T positions, L layers, N heads.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kreg.nn import MemoryMosaic, Transformer
from kreg.nn.features import document_index
from kreg.nn.self_attention import places

# So many sequences tell a mean over all their positions well enough.
ROWS = 64


class Counts(NamedTuple):
    """Hold the sums of a batch, which add up."""

    keys: Float[Array, "L N"]
    """Keys that have weight, over all queries."""
    visible: Float[Array, ""]
    """Keys that a query sees, over all queries."""
    queries: Float[Array, ""]


def count(
    model: MemoryMosaic | Transformer,
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None = None,
    inside: Bool[Array, "B T"] | None = None,
) -> Counts:
    """Count the keys of the queries `inside`, of all where nothing is said; no dropout.

    Raises:
        NotImplementedError: norm_relu with compat "dense", which has no support.
    """
    documents = None if segment_ids is None else document_index(segment_ids)
    where = places(tokens.shape[1], segment_ids)

    def mosaic(x, block):
        stats = block.contextual.stats(block.contextual_norm(x).astype(x.dtype), documents)
        return block(x, documents).astype(x.dtype), stats.support

    def transformer(x, block):
        stats = block.attention.stats(block.attention_norm(x).astype(x.dtype), where)
        return block(x, where).astype(x.dtype), stats.support

    x = model.embedding[...][tokens]
    if isinstance(model, MemoryMosaic):
        delay = model.blocks.contextual.delay
        _, found = jax.lax.scan(mosaic, x, model.blocks)
    else:
        delay = 0
        x = x if model.positions is None else x + model.positions[...][where.position]
        _, found = jax.lax.scan(transformer, x, model.blocks)
    inside = jnp.ones(tokens.shape, bool) if inside is None else inside
    visible = jnp.broadcast_to(jnp.maximum(where.position + 1 - delay, 0), tokens.shape)
    return Counts(
        jnp.sum(found.astype(jnp.float32), axis=(1, 2), where=inside[None, :, :, None]),
        jnp.sum(visible.astype(jnp.float32), where=inside),
        jnp.sum(inside.astype(jnp.float32)),
    )


def summary(counts: Sequence[Counts]) -> dict[str, Any]:
    """Return the means over queries: `support` by layer and head, and `visible`."""
    keys, visible, queries = (np.sum(parts, axis=0) for parts in zip(*counts, strict=True))
    return {
        "support": (keys / queries).round(3).tolist(),
        "visible": round(float(visible / queries), 3),
    }
