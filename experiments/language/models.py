"""The models of a method."""

from typing import Any

from flax import nnx

import kreg
from experiments.language.config import Sizes
from experiments.methods import method
from kreg.nn import MemoryMosaic, MosaicConfig, Transformer, TransformerConfig
from kreg.sharding import Layout

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
    layout: Layout | None = None,
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
        "layout": layout,
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
