"""The configurations of the models: plain numbers, one kernel and one bandwidth factory."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Array

import kreg


@dataclass(frozen=True)
class MosaicConfig:
    r"""Describe a Memory Mosaic; the default is the theory, not one of the two released files.

    The configuration is static: it holds no array and hashes, so it can be an argument that jit
    does not trace. `bandwidth` maps h = 1 / beta (an array [1, N, 1, 1]) to a bandwidth rule: a
    rule's class, or a partial of it. Two partials are never equal in Python: build one, share it.

    Args:
      vocab_size: number of tokens V.
      num_layers: number of blocks.
      num_heads: number of heads N; divides `embed_dim`.
      embed_dim: width C of the residual stream.
      memory_size: pairs of key and value that a persistent memory holds per head.
      memory_count: persistent memories whose answers are averaged.
      kernel: kernel of the contextual memories (persistent ones always use the Gaussian).
      bandwidth: factory of the bandwidth rule.
      value_shift: how many positions a value looks ahead; its key becomes visible that much later.
      key_kernel: taps of the causal convolution that makes keys; 1 is a linear map.
      value_kernel: taps that make a value. A low-rank value mixes exactly two.
      low_rank_keys: a linear map followed by a mixture of two positions per head.
      low_rank_values: the same for values; False is a full convolution.
      attention_dropout: rate on the weights of both memories.
      hidden_dropout: rate after each output projection.
      use_bias: biases in projections and layer norms.
      pre_norm: normalise what a memory reads; False normalises the residual stream itself.
      tie_weights: the output matrix is the embedding.
      contextual_only: no persistent memories.
      skip_tokens: positions at the front for which no logits are computed.
      logit_scale: factor on the logits; None is 1 / sqrt(embed_dim), or 1 with compat "nano".
      remat: recompute the activations of each block in the backward pass.
      compat: None (the theory), "dense", "eft" or "nano": the released files, see
        `kreg.nn.compat`.
      implementation: handed to `kreg.attention`.
      layout: axes of the mesh of `jax.set_mesh` over which batch and sequence are split; None on
        one device.

    Raises:
      ValueError: a number out of range, or a combination that means nothing.

    Examples:
      >>> import functools
      >>> config = MosaicConfig(20, 2, 8, 128, 448, bandwidth=functools.partial(kreg.Nearest, 16))
      >>> config.head_dim
      16
    """

    vocab_size: int
    num_layers: int
    num_heads: int
    embed_dim: int
    memory_size: int
    memory_count: int = 1
    kernel: kreg.Kernel = kreg.biweight
    bandwidth: Callable[[Array], Any] = kreg.Adaptive
    value_shift: int = 1
    key_kernel: int = 1
    value_kernel: int = 2
    low_rank_keys: bool = False
    low_rank_values: bool = True
    attention_dropout: float = 0.05
    hidden_dropout: float = 0.05
    use_bias: bool = False
    pre_norm: bool = True
    tie_weights: bool = True
    contextual_only: bool = False
    skip_tokens: int = 0
    logit_scale: float | None = None
    remat: bool = False
    compat: str | None = None
    implementation: str | None = None
    layout: kreg.sharding.Layout | None = None

    def __post_init__(self) -> None:
        sizes = "vocab_size num_layers num_heads embed_dim memory_size memory_count"
        _check_counts(self, f"{sizes} key_kernel value_kernel")
        _check_counts(self, "value_shift skip_tokens", least=0)
        _check_rates(self, "attention_dropout hidden_dropout")
        _check_heads(self.embed_dim, self.num_heads)
        for kind in ("key", "value"):
            taps = getattr(self, f"{kind}_kernel")
            if getattr(self, f"low_rank_{kind}s") and taps != 2:
                raise ValueError(f"{kind}_kernel: low-rank features mix 2 positions, got {taps}")
        if self.compat not in (known := (None, "dense", "eft", "nano")):
            raise ValueError(f"compat: expected one of {known}, got {self.compat!r}")

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.embed_dim // self.num_heads


@dataclass(frozen=True)
class TransformerConfig:
    r"""Describe a Transformer in the manner of GPT-2; only its attention is kreg's.

    Static, as `MosaicConfig`. `bandwidth` maps h to a bandwidth rule: a rule's class, or a partial
    of it, which two configurations share if they are to be equal.

    Args:
      vocab_size: number of tokens V.
      num_layers: number of blocks.
      num_heads: number of heads N; divides `embed_dim`.
      embed_dim: width C of the residual stream.
      hidden_dim: width of the perceptrons; None is 4 C.
      max_length: learned positions for so many tokens; None has none.
      alibi_heads: so many heads at the front lower the scores of keys d positions back by d / n,
        n = 1, 2, 3, ... Half of the heads is NAPE. They cannot go with `Fixed`.
      kernel: kernel of the attention; `kreg.gaussian` is the usual softmax.
      bandwidth: factory of the bandwidth rule.
      initial_bandwidth: h at the start, or for good.
      learned_bandwidth: learn log h, one a head.
      length_scaled: divide h^2 by 1 + softplus(b) log(n)^g for queries that see n keys, with b and
        g learned, one a head, so that scores grow with the context; the heads that `alibi_heads`
        counts are left out.
      cosine: scores are cosines of queries and keys, as `Fixed` demands, not q.k / sqrt(H).
      attention_dropout: rate on the weights.
      hidden_dropout: rate after each output projection.
      embedding_dropout: rate on the embeddings.
      use_bias: biases in projections and layer norms.
      exact_gelu: GELU itself, not its approximation by tanh.
      tie_weights: the output matrix is the embedding.
      remat: recompute the activations of each block in the backward pass.
      implementation: handed to `kreg.attention`.
      layout: axes of the mesh of `jax.set_mesh` over which batch and sequence are split; None on
        one device.

    Raises:
      ValueError: a number out of range, or a combination that means nothing.

    Examples:
      >>> config = TransformerConfig(20, 2, 8, 128, max_length=512, kernel=kreg.gaussian)
      >>> config.head_dim, config.hidden
      (16, 512)

    References:
      Vasylenko et al., `Long-Context Generalization with Sparse Attention
      <https://arxiv.org/abs/2506.16640>`_, 2025 (NAPE, `length_scaled`)
    """

    vocab_size: int
    num_layers: int
    num_heads: int
    embed_dim: int
    hidden_dim: int | None = None
    max_length: int | None = None
    alibi_heads: int = 0
    kernel: kreg.Kernel = kreg.biweight
    bandwidth: Callable[[Any], Any] = kreg.Adaptive
    initial_bandwidth: float = 1.0
    learned_bandwidth: bool = False
    length_scaled: bool = False
    cosine: bool = False
    attention_dropout: float = 0.05
    hidden_dropout: float = 0.05
    embedding_dropout: float = 0.05
    use_bias: bool = True
    exact_gelu: bool = False
    tie_weights: bool = True
    remat: bool = False
    implementation: str | None = None
    layout: kreg.sharding.Layout | None = None

    def __post_init__(self) -> None:
        _check_counts(self, "vocab_size num_layers num_heads embed_dim hidden_dim max_length")
        _check_counts(self, "alibi_heads", least=0)
        _check_rates(self, "attention_dropout hidden_dropout embedding_dropout")
        _check_heads(self.embed_dim, self.num_heads)
        if self.alibi_heads > self.num_heads:
            most, got = self.num_heads, self.alibi_heads
            raise ValueError(f"alibi_heads: expected at most num_heads={most}, got {got}")
        if not self.initial_bandwidth > 0:
            raise ValueError(f"initial_bandwidth: expected > 0, got {self.initial_bandwidth}")
        rule = self.bandwidth(self.initial_bandwidth)
        if isinstance(rule, kreg.Fixed) and self.kernel != kreg.gaussian:
            if not self.cosine:
                raise ValueError("cosine: expected True with Fixed, whose scores are cosines")
            if self.alibi_heads:
                raise ValueError(f"alibi_heads: expected 0 with Fixed, got {self.alibi_heads}")

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.embed_dim // self.num_heads

    @property
    def hidden(self) -> int:
        """Width of the perceptrons."""
        return 4 * self.embed_dim if self.hidden_dim is None else self.hidden_dim


def _check_counts(config: Any, names: str, least: int = 1) -> None:
    for name in names.split():
        if (value := getattr(config, name)) is not None and value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")


def _check_rates(config: Any, names: str) -> None:
    for name in names.split():
        if not 0 <= (rate := getattr(config, name)) < 1:
            raise ValueError(f"{name}: expected a rate in [0, 1), got {rate}")


def _check_heads(embed_dim: int, heads: int) -> None:
    if embed_dim % heads:
        raise ValueError(f"embed_dim: expected a multiple of {heads=}, got {embed_dim}")
