"""The configuration of a Memory Mosaic: plain numbers, one kernel and one bandwidth factory."""

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
      logit_scale: factor on the logits; None is 1 / sqrt(embed_dim).
      remat: recompute the activations of each block in the backward pass.
      compat: None (the theory), "dense" or "eft": the released files, see `kreg.nn.compat`.
      implementation: handed to `kreg.attention`.

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

    def __post_init__(self) -> None:
        sizes = "vocab_size num_layers num_heads embed_dim memory_size memory_count"
        for name in f"{sizes} key_kernel value_kernel".split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("value_shift", "skip_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        for name in ("attention_dropout", "hidden_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a rate in [0, 1), got {getattr(self, name)}")
        if self.embed_dim % self.num_heads:
            heads = self.num_heads
            raise ValueError(f"embed_dim: expected a multiple of {heads=}, got {self.embed_dim}")
        for kind in ("key", "value"):
            taps = getattr(self, f"{kind}_kernel")
            if getattr(self, f"low_rank_{kind}s") and taps != 2:
                raise ValueError(f"{kind}_kernel: low-rank features mix 2 positions, got {taps}")
        if self.compat not in (None, "dense", "eft"):
            raise ValueError(f'compat: expected None, "dense" or "eft", got {self.compat!r}')

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.embed_dim // self.num_heads
