"""The models of a method, and how many keys answer their queries.

Axes: B windows, T positions, L layers, N heads.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

import kreg
from experiments.language.config import Sizes
from experiments.methods import method
from kreg.nn import MemoryMosaic, MosaicConfig, Transformer, TransformerConfig
from kreg.nn.features import document_index
from kreg.nn.self_attention import places

type Model = MemoryMosaic | Transformer


def make_model(
    kind: str,
    name: str,
    sizes: Sizes,
    *,
    vocab_size: int,
    block: int,
    compat: str | None = None,
    seed: int = 0,
) -> Model:
    """Build the model of a method with its initial parameters.

    A Transformer is GPT-2 without biases. Only under a fixed bandwidth its scores are cosines, with
    a learned bandwidth for each head.
    """
    chosen = method(name)
    shared: dict[str, Any] = {
        "vocab_size": vocab_size,
        "num_layers": sizes.layers,
        "num_heads": sizes.heads,
        "embed_dim": sizes.width,
        **chosen._asdict(),
        "attention_dropout": sizes.attention_dropout,
        "hidden_dropout": sizes.hidden_dropout,
        "remat": sizes.remat,
    }
    rngs = nnx.Rngs(seed)
    if kind == "mosaic":
        config = MosaicConfig(memory_size=sizes.slots, compat=compat, **shared)
        return MemoryMosaic(config, rngs=rngs)
    fixed = isinstance(chosen.bandwidth(1.0), kreg.Fixed)
    config = TransformerConfig(
        max_length=block,
        cosine=fixed,
        learned_bandwidth=fixed,
        embedding_dropout=sizes.hidden_dropout,
        use_bias=False,
        **shared,
    )
    return Transformer(config, rngs=rngs)


def supports(
    model: Model, tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None = None
) -> Float[Array, "L N"]:
    """Average over all positions how many keys have weight in each layer and head; no dropout.

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
        _, found = jax.lax.scan(mosaic, x, model.blocks)
    else:
        x = x if model.positions is None else x + model.positions[...][where.position]
        _, found = jax.lax.scan(transformer, x, model.blocks)
    return jnp.mean(found.astype(jnp.float32), axis=(1, 2))
