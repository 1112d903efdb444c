"""The Memory Mosaic: blocks of two memories, stacked and scanned, between embedding and head.

Axes: B batch, T time, C width of the stream, V vocabulary; parameters of blocks have a leading
layer axis.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from kreg.nn.compat import variant
from kreg.nn.config import MosaicConfig, TransformerConfig
from kreg.nn.features import document_index, normal, sparing
from kreg.nn.memory import (
    ContextCache,
    ContextualMemory,
    PersistentCache,
    PersistentMemory,
    split_key,
)

# So many layers are written out one by one: a loop over them stacks what the backward pass reads.
_WRITTEN_OUT = 4


def layer_norm(config: MosaicConfig | TransformerConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Build a layer norm as the released model has it: epsilon 1e-5, a bias only if configured."""
    return nnx.LayerNorm(
        config.embed_dim,
        epsilon=1e-5,
        use_bias=config.use_bias,
        use_fast_variance=False,
        rngs=rngs,
    )


class Block(nnx.Module):
    """Add what the contextual memory, then what the persistent memory answers to the stream.

    Pre-norm: x + f(norm(x)). Post-norm: norm(x) + f(norm(x)), the stream itself is normalised.
    """

    def __init__(self, config: MosaicConfig, *, rngs: nnx.Rngs) -> None:
        self.pre_norm = config.pre_norm
        self.contextual_norm = layer_norm(config, rngs)
        self.contextual = ContextualMemory(config, rngs=rngs)
        alone = config.contextual_only
        self.persistent_norm = None if alone else layer_norm(config, rngs)
        self.persistent = None if alone else PersistentMemory(config, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T C"],
        documents: Int[Array, "B T"] | None = None,
        *,
        dropout_key: Array | None = None,
    ) -> Float[Array, "B T C"]:
        """Map the stream of whole sequences."""
        for_context, for_memory = split_key(dropout_key)
        y = sparing(self.contextual_norm)(x).astype(x.dtype)
        x = x if self.pre_norm else y
        x = x + self.contextual(y, documents, dropout_key=for_context)
        if self.persistent is None or self.persistent_norm is None:
            return x
        y = sparing(self.persistent_norm)(x).astype(x.dtype)
        x = x if self.pre_norm else y
        return x + self.persistent(y, documents, dropout_key=for_memory)

    def start(
        self, batch: int, length: int, dtype: jnp.dtype
    ) -> tuple[ContextCache, PersistentCache | None]:
        """Empty caches for up to `length` positions."""
        memory = self.persistent
        return (
            self.contextual.start(batch, length, dtype),
            None if memory is None else memory.start(batch, dtype),
        )

    def step(
        self,
        cache: tuple[ContextCache, PersistentCache | None],
        x: Float[Array, "B C"],
        position: Int[Array, ""],
    ) -> tuple[tuple[ContextCache, PersistentCache | None], Float[Array, "B C"]]:
        """Map the stream of one position."""
        context, memory = cache
        y = self.contextual_norm(x).astype(x.dtype)
        context, answer = self.contextual.step(context, y, position)
        x = (x if self.pre_norm else y) + answer
        if self.persistent is None or self.persistent_norm is None or memory is None:
            return (context, memory), x
        y = self.persistent_norm(x).astype(x.dtype)
        memory, answer = self.persistent.step(memory, y)
        return (context, memory), (x if self.pre_norm else y) + answer


class MemoryMosaic(nnx.Module):
    r"""Predict the next token: embedding, blocks, layer norm, head.

    Parameters are drawn as the released model draws them: matrices from N(0, 1 / fan_in), output
    projections from N(0, 1 / (fan_in num_layers)), an untied embedding from N(0, 1). The blocks are
    one module whose parameters have a leading layer axis, and are scanned; a few are written out.

    Args:
      config: what to build.
      rngs: source of the initial parameters.

    Examples:
      >>> import kreg.nn
      >>> config = kreg.nn.MosaicConfig(7, num_layers=2, num_heads=2, embed_dim=8, memory_size=3)
      >>> model = kreg.nn.MemoryMosaic(config, rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((1, 5), jnp.int32)).shape
      (1, 5, 7)

    References:
      Zhang et al., `Memory Mosaics <https://arxiv.org/abs/2405.06394>`_, 2024
    """

    def __init__(self, config: MosaicConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        shape, width = (config.vocab_size, config.embed_dim), config.embed_dim
        fan_in = width if config.tie_weights else 1
        self.embedding = nnx.Param(normal(rngs.params(), shape, fan_in))
        self.blocks = nnx.vmap(lambda r: Block(config, rngs=r))(rngs.split(config.num_layers))
        self.norm = layer_norm(config, rngs)
        tied = config.tie_weights
        self.head = None if tied else nnx.Param(normal(rngs.params(), shape, width))

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        dropout_key: Array | None = None,
    ) -> Float[Array, "B T V"]:
        """Return the logits of the next token at every position, in at least float32.

        Runs of equal `segment_ids` are documents that know nothing of each other: each gives what
        it gives alone. Dropout is active exactly when a `dropout_key` is given. With `skip_tokens`
        configured, the logits of that many positions at the front are left out.
        """
        documents = None
        if segment_ids is not None:
            if segment_ids.shape != tokens.shape:
                wanted, got = tokens.shape, segment_ids.shape
                raise ValueError(f"segment_ids: expected the tokens' shape {wanted}, got {got}")
            documents = document_index(segment_ids)
        keys = None
        if dropout_key is not None:
            keys = jax.random.split(dropout_key, self.config.num_layers)

        def body(x, layer):
            block, key = layer
            return block(x, documents, dropout_key=key).astype(x.dtype), None

        body = jax.checkpoint(body) if self.config.remat else body
        unroll = self.config.num_layers if self.config.num_layers <= _WRITTEN_OUT else 1
        x, _ = jax.lax.scan(body, self.embedding[...][tokens], (self.blocks, keys), unroll=unroll)
        return self.logits(x[:, self.config.skip_tokens :])

    def logits(self, x: Float[Array, "*B C"]) -> Float[Array, "*B V"]:
        """Map the stream after the last block to logits."""
        head = self.embedding if self.head is None else self.head
        scale = self.config.logit_scale
        if scale is None:
            divides = variant(self.config.compat).divides_logits
            scale = self.config.embed_dim**-0.5 if divides else 1.0
        wide = jnp.promote_types(x.dtype, jnp.float32)
        y = self.norm(x)
        return scale * jnp.einsum("...c,vc->...v", y, head[...], preferred_element_type=wide)

    def start(self, batch: int, length: int) -> tuple[ContextCache, PersistentCache | None]:
        """Empty caches of all layers, for up to `length` positions of `batch` sequences."""
        dtype = self.embedding[...].dtype

        def one_layer(block):
            return block.start(batch, length, dtype)

        return jax.vmap(one_layer)(self.blocks)

    def step(
        self,
        cache: tuple[ContextCache, PersistentCache | None],
        token: Int[Array, " B"],
        position: Int[Array, ""],
    ) -> tuple[tuple[ContextCache, PersistentCache | None], Float[Array, "B V"]]:
        """Read one token and return the logits of the next, as the call on the whole sequence."""

        def body(x, layer):
            block, kept = layer
            kept, y = block.step(kept, x, position)
            return y.astype(x.dtype), kept

        x, cache = jax.lax.scan(body, self.embedding[...][token], (self.blocks, cache))
        return cache, self.logits(x)
