"""The Transformer that Memory Mosaics are compared with: GPT-2, its attention a kernel regression.

Axes: B batch, T time, C width of the stream, V vocabulary; parameters of blocks have a leading
layer axis.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from kreg.nn.config import TransformerConfig
from kreg.nn.memory import dropout, split_key
from kreg.nn.mosaic import layer_norm
from kreg.nn.self_attention import AttentionCache, Linear, Places, SelfAttention, drawn, places


class Perceptron(nnx.Module):
    """Map each position by itself: Out(GELU(In(x))), four times as wide in between."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        width, hidden, bias = config.embed_dim, config.hidden, config.use_bias
        shrink = (2 * config.num_layers) ** -0.5
        self.into = Linear(width, hidden, bias=bias, rngs=rngs)
        self.out = Linear(hidden, width, bias=bias, shrink=shrink, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T C"], *, dropout_key: Array | None = None
    ) -> Float[Array, "B T C"]:
        """Map every position."""
        y = self.out(jax.nn.gelu(self.into(x), approximate=not self.config.exact_gelu))
        return dropout(y, self.config.hidden_dropout, dropout_key)


class TransformerBlock(nnx.Module):
    """Add to the stream what attention, then what the perceptron makes of its norm."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
        self.attention_norm = layer_norm(config, rngs)
        self.attention = SelfAttention(config, rngs=rngs)
        self.perceptron_norm = layer_norm(config, rngs)
        self.perceptron = Perceptron(config, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T C"], where: Places, *, dropout_key: Array | None = None
    ) -> Float[Array, "B T C"]:
        """Map the stream of whole sequences."""
        for_attention, for_perceptron = split_key(dropout_key)
        y = self.attention_norm(x).astype(x.dtype)
        x = x + self.attention(y, where, dropout_key=for_attention)
        return self._perceive(x, for_perceptron)

    def step(
        self, cache: AttentionCache, x: Float[Array, "B 1 C"], position: Int[Array, ""]
    ) -> tuple[AttentionCache, Float[Array, "B 1 C"]]:
        """Map the stream of one position."""
        y = self.attention_norm(x).astype(x.dtype)
        cache, answer = self.attention.step(cache, y, position)
        return cache, self._perceive(x + answer, None)

    def _perceive(self, x: Float[Array, "B T C"], key: Array | None) -> Float[Array, "B T C"]:
        return x + self.perceptron(self.perceptron_norm(x).astype(x.dtype), dropout_key=key)


class Transformer(nnx.Module):
    r"""Predict the next token: embedding and positions, pre-norm blocks, layer norm, tied head.

    Parameters are drawn as GPT-2's: from N(0, 0.02^2), the projections into the stream from
    N(0, 0.02^2 / (2 num_layers)), biases 0. The blocks are one module whose parameters have a
    leading layer axis, and are scanned.

    Args:
      config: what to build.
      rngs: source of the initial parameters.

    Examples:
      >>> import kreg.nn
      >>> config = kreg.nn.TransformerConfig(7, 2, num_heads=2, embed_dim=8, max_length=9)
      >>> model = kreg.nn.Transformer(config, rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((1, 5), jnp.int32)).shape
      (1, 5, 7)

    References:
      Radford et al., Language Models are Unsupervised Multitask Learners, 2019
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        width, tied, most = config.embed_dim, config.tie_weights, config.max_length
        self.embedding = drawn(rngs, config.vocab_size, width)
        self.positions = None if most is None else drawn(rngs, most, width)
        block = nnx.vmap(lambda r: TransformerBlock(config, rngs=r))
        self.blocks = block(rngs.split(config.num_layers))
        self.norm = layer_norm(config, rngs)
        self.head = None if tied else drawn(rngs, config.vocab_size, width)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        key_value_seq_lengths: Int[Array, " B"] | None = None,
        dropout_key: Array | None = None,
    ) -> Float[Array, "B T V"]:
        """Return the logits of the next token at every position, in at least float32.

        Dropout is active exactly when a `dropout_key` is given.

        Args:
          tokens: the sequences.
          segment_ids: runs of equal ids are documents that know nothing of each other: each gives
            what it gives alone. One longer than `max_length` makes NaN of its sequence.
          key_value_seq_lengths: positions from here on are padding, which no position attends to.
          dropout_key: source of dropout.

        Raises:
          ValueError: sequences longer than `max_length`, or ids of another shape than the tokens.
        """
        length, most = tokens.shape[1], self.config.max_length
        if segment_ids is not None and segment_ids.shape != tokens.shape:
            wanted, got = tokens.shape, segment_ids.shape
            raise ValueError(f"segment_ids: expected the tokens' shape {wanted}, got {got}")
        if segment_ids is None and most is not None and length > most:
            raise ValueError(f"tokens: expected at most max_length={most} positions, got {length}")
        where = places(length, segment_ids, key_value_seq_lengths)
        keys, for_embedding = None, None
        if dropout_key is not None:
            for_embedding, rest = jax.random.split(dropout_key)
            keys = jax.random.split(rest, self.config.num_layers)

        def body(x, layer):
            block, key = layer
            return block(x, where, dropout_key=key).astype(x.dtype), None

        body = jax.checkpoint(body) if self.config.remat else body
        x = dropout(self._embed(tokens, where), self.config.embedding_dropout, for_embedding)
        x, _ = jax.lax.scan(body, x, (self.blocks, keys))
        return self.logits(x)

    def logits(self, x: Float[Array, "*B C"]) -> Float[Array, "*B V"]:
        """Map the stream after the last block to logits."""
        head = self.embedding if self.head is None else self.head
        wide = jnp.promote_types(x.dtype, jnp.float32)
        return jnp.einsum("...c,vc->...v", self.norm(x), head[...], preferred_element_type=wide)

    def start(self, batch: int, length: int) -> AttentionCache:
        """Empty caches of all layers, for up to `length` positions of `batch` sequences."""
        most = self.config.max_length
        if most is not None and length > most:
            raise ValueError(f"length: expected at most max_length={most} positions, got {length}")
        dtype = self.embedding[...].dtype

        def one_layer(block):
            return block.attention.start(batch, length, dtype)

        return jax.vmap(one_layer)(self.blocks)

    def step(
        self, cache: AttentionCache, token: Int[Array, " B"], position: Int[Array, ""]
    ) -> tuple[AttentionCache, Float[Array, "B V"]]:
        """Read one token and return the logits of the next, as the call on the whole sequence."""

        def body(x, layer):
            block, kept = layer
            kept, y = block.step(kept, x, position)
            return y.astype(x.dtype), kept

        x = self._embed(token[:, None], Places(position[None, None]))
        x, cache = jax.lax.scan(body, x, (self.blocks, cache))
        return cache, self.logits(x[:, 0])

    def _embed(self, tokens: Int[Array, "B T"], where: Places) -> Float[Array, "B T C"]:
        x = self.embedding[...][tokens]
        if self.positions is None:
            return x
        # Clamping, which is the default, would read a wrong position without a word.
        return x + self.positions[...].at[where.position].get(mode="fill", fill_value=jnp.nan)
