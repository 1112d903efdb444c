"""The model of a method, and what it gives: a logit for every class at every position."""

import math
from collections.abc import Callable

import jax
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

import kreg
from experiments.length.config import Config
from experiments.length_tasks import Layout
from experiments.methods import method
from kreg.nn import MemoryMosaic, MosaicConfig, Transformer, TransformerConfig
from kreg.sharding import Layout as Split

# (parameters, tokens, dropout key or None) -> logits
type Apply = Callable[[PyTree[Array], Int[Array, "B T"], Array | None], Float[Array, "B T C"]]
type Model = MemoryMosaic | Transformer
type Merge = Callable[[PyTree[Array]], Model]


def make_model(
    config: Config, name: str, layout: Layout, seed: int, split: Split | None = None
) -> Model:
    """Build the model of a method with its initial parameters, to be split over devices or not.

    It has a row of the vocabulary for every id and for every class, whichever are more.
    """
    build = _mosaic if config.model == "mosaic" else _transformer
    return build(config, name, max(layout.vocab_size, layout.classes), seed, split)


def _mosaic(
    config: Config, name: str, vocab_size: int, seed: int, split: Split | None
) -> MemoryMosaic:
    sizes = config.sizes
    about = MosaicConfig(
        vocab_size=vocab_size,
        num_layers=sizes.layers,
        num_heads=sizes.heads,
        embed_dim=sizes.width,
        memory_size=sizes.hidden,
        **method(name)._asdict(),
        attention_dropout=sizes.dropout,
        hidden_dropout=sizes.dropout,
        tie_weights=sizes.tied,
        layout=split,
    )
    return MemoryMosaic(about, rngs=nnx.Rngs(seed))


def _transformer(
    config: Config, name: str, vocab_size: int, seed: int, split: Split | None
) -> Transformer:
    sizes, chosen = config.sizes, method(name)
    # Fixed thresholds are of cosines, and biases would make them something else.
    fixed = chosen.kernel != kreg.gaussian and isinstance(chosen.bandwidth(1.0), kreg.Fixed)
    about = TransformerConfig(
        vocab_size=vocab_size,
        num_layers=sizes.layers,
        num_heads=sizes.heads,
        embed_dim=sizes.width,
        hidden_dim=sizes.hidden,
        alibi_heads=0 if fixed else sizes.heads // 2,
        **chosen._asdict(),
        cosine=fixed,
        # Keys at right angles are at the edge: wide enough for a gradient at the start.
        initial_bandwidth=math.sqrt(2) if fixed else 1.0,
        learned_bandwidth=fixed,
        length_scaled=sizes.length_scaled,
        attention_dropout=sizes.dropout,
        hidden_dropout=sizes.dropout,
        embedding_dropout=sizes.dropout,
        tie_weights=sizes.tied,
        layout=split,
    )
    return Transformer(about, rngs=nnx.Rngs(seed))


def initial(config: Config, name: str, layout: Layout, seed: int) -> PyTree[Array]:
    """Return the initial parameters of a seed."""
    return nnx.to_pure_dict(nnx.state(make_model(config, name, layout, seed), nnx.Param))


def merger(config: Config, name: str, layout: Layout, split: Split | None = None) -> Merge:
    """Return what makes a model of parameters."""
    abstract = nnx.eval_shape(lambda: make_model(config, name, layout, 0, split))
    graph, _ = nnx.split(abstract, nnx.Param)
    return lambda params: nnx.merge(graph, params)


def applier(merge: Merge, layout: Layout, *, drops: bool) -> Apply:
    """Return the model as a function; with `drops` False it ignores dropout keys."""

    def apply(
        params: PyTree[Array], tokens: Int[Array, "B T"], key: jax.Array | None
    ) -> Float[Array, "B T C"]:
        logits = merge(params)(tokens, dropout_key=key if drops else None)
        return logits[..., : layout.classes]

    return apply
