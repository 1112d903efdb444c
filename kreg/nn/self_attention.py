"""Causal self-attention of a Transformer with any kernel, and where its tokens stand.

Axes: B batch, T time, C width of the stream, N heads, H head width, S cached positions.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

import kreg
from kreg.bandwidth import Rule
from kreg.nn.config import TransformerConfig
from kreg.nn.features import document_index, project, unit
from kreg.nn.memory import attend_over, dropout, split_key
from kreg.stats import Stats

_SPREAD = 0.02


def drawn(rngs: nnx.Rngs, *shape: int, shrink: float = 1.0) -> nnx.Param:
    """Draw a matrix as GPT-2 does, from N(0, 0.02^2)."""
    return nnx.Param(_SPREAD * shrink * jax.random.normal(rngs.params(), shape))


class Linear(nnx.Module):
    """Map x W + b, drawn as GPT-2 does: b is 0, and W smaller by `shrink`."""

    def __init__(
        self, fan_in: int, fan_out: int, *, bias: bool, shrink: float = 1.0, rngs: nnx.Rngs
    ) -> None:
        self.kernel = drawn(rngs, fan_in, fan_out, shrink=shrink)
        self.bias = nnx.Param(jnp.zeros(fan_out)) if bias else None

    def __call__(self, x: Float[Array, "B T I"]) -> Float[Array, "B T O"]:
        """Map every position."""
        y = project(x, self.kernel[...])
        return y if self.bias is None else y + self.bias[...][None, None]


class Places(NamedTuple):
    """Where the tokens stand: the position in their document, the document, the padding's start."""

    position: Int[Array, "#B T"]
    documents: Int[Array, "B T"] | None = None
    lengths: Int[Array, " B"] | None = None


def places(
    length: int,
    segment_ids: Int[Array, "B T"] | None = None,
    lengths: Int[Array, " B"] | None = None,
) -> Places:
    """Count the positions of every run of equal `segment_ids` from 0.

    Examples:
      >>> places(4, jnp.array([[7, 7, 3, 7]])).position.tolist()
      [[0, 1, 0, 0]]
    """
    index = jnp.arange(length, dtype=jnp.int32)[None]
    if segment_ids is None:
        return Places(index, None, lengths)
    documents = document_index(segment_ids)
    starts = jnp.pad(documents[:, 1:] != documents[:, :-1], ((0, 0), (1, 0)))
    first = jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
    return Places(index - first, documents, lengths)


class AttentionCache(NamedTuple):
    """What attention keeps between steps: all keys and values so far."""

    key: Float[Array, "B S N H"]
    value: Float[Array, "B S N H"]


class SelfAttention(nnx.Module):
    r"""Average the values of the past, y_t = Out(sum_{j <= t} w_tj v_j), with `kreg.attention`.

    Linear biases take memory O(N T) and not O(N T^2): m_n j stands for m_n (j - t), because a
    constant on all scores of a query changes no weight. Its rounding error in float32 is that of
    m_n t, 2e-4 at 4,096 positions in the steepest head.

    Examples:
      >>> import kreg.nn
      >>> from kreg.nn.self_attention import SelfAttention, places
      >>> config = kreg.nn.TransformerConfig(7, num_layers=1, num_heads=2, embed_dim=8)
      >>> SelfAttention(config, rngs=nnx.Rngs(0))(jnp.ones((1, 5, 8)), places(5)).shape
      (1, 5, 8)
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        width, heads, bias = config.embed_dim, config.num_heads, config.use_bias
        shrink = (2 * config.num_layers) ** -0.5
        self.query_key_value = Linear(width, 3 * width, bias=bias, rngs=rngs)
        self.out = Linear(width, width, bias=bias, shrink=shrink, rngs=rngs)
        log_h = jnp.full((heads,), jnp.log(config.initial_bandwidth))
        self.log_bandwidth = nnx.Param(log_h) if config.learned_bandwidth else None
        # softplus(-3) = 0.05: scores start close to what they are without the scale.
        scaled = config.length_scaled
        self.length_weight = nnx.Param(jnp.full((heads,), -3.0)) if scaled else None
        self.length_power = nnx.Param(jnp.ones((heads,))) if scaled else None

    def __call__(
        self, x: Float[Array, "B T C"], where: Places, *, dropout_key: Array | None = None
    ) -> Float[Array, "B T C"]:
        """Answer every position from its own document."""
        config = self.config
        for_weights, for_output = split_key(dropout_key)
        answer = self._attend(
            x,
            where,
            dropout_rate=config.attention_dropout if for_weights is not None else 0.0,
            dropout_key=for_weights,
        )
        y = self.out(answer.reshape(x.shape))
        return dropout(y, config.hidden_dropout, for_output)

    def stats(self, x: Float[Array, "B T C"], where: Places) -> Stats:
        """Say of every position and head, each [B, T, N], how many keys answer it, and the like."""
        return self._attend(x, where, return_stats=True)[1]

    def _attend(self, x: Array, where: Places, **options: Any) -> Any:
        config = self.config
        query, key, value = self._project(x)
        query, rule = self._sharpened(query, where.position)
        return attend_over(config.layout)(
            query,
            key,
            value,
            self._bias(key),
            kernel=config.kernel,
            bandwidth=rule,
            scale=1.0 if config.cosine else None,
            is_causal=True,
            segment_ids=where.documents,
            key_value_seq_lengths=where.lengths,
            implementation=config.implementation,
            **options,
        )

    def start(self, batch: int, length: int, dtype: jnp.dtype) -> AttentionCache:
        """An empty cache for up to `length` positions."""
        config = self.config
        pairs = jnp.zeros((batch, length, config.num_heads, config.head_dim), dtype)
        return AttentionCache(pairs, pairs)

    def step(
        self, cache: AttentionCache, x: Float[Array, "B 1 C"], position: Int[Array, ""]
    ) -> tuple[AttentionCache, Float[Array, "B 1 C"]]:
        """Take in the input of one position and answer it, as the call on the whole sequence."""
        config = self.config
        query, key, value = self._project(x)
        query, rule = self._sharpened(query, position[None, None])
        keys, values = (
            jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), position, axis=1)
            for old, new in zip(cache, (key, value), strict=True)
        )
        answer = kreg.attention(
            query,
            keys,
            values,
            self._bias(keys),
            kernel=config.kernel,
            bandwidth=rule,
            scale=1.0 if config.cosine else None,
            key_value_seq_lengths=jnp.full(x.shape[0], position + 1, jnp.int32),
            implementation=config.implementation,
        )
        return AttentionCache(keys, values), self.out(answer.reshape(x.shape))

    def _project(self, x: Float[Array, "B T C"]) -> tuple[Array, Array, Array]:
        """Queries, keys and values, each [B, T, N, H]."""
        config = self.config
        shape = (*x.shape[:2], 3, config.num_heads, config.head_dim)
        query, key, value = jnp.moveaxis(self.query_key_value(x).reshape(shape), 2, 0)
        return (unit(query), unit(key), value) if config.cosine else (query, key, value)

    def _bias(self, key: Float[Array, "B S N H"]) -> Float[Array, "1 N 1 S"] | None:
        """The linear biases up to a constant for each query."""
        if self.config.alibi_heads == 0:
            return None
        dtype = jnp.promote_types(key.dtype, jnp.float32)
        head = jnp.arange(self.config.num_heads)
        slope = jnp.where(head < self.config.alibi_heads, 1 / (head + 1), 0).astype(dtype)
        return slope[None, :, None, None] * jnp.arange(key.shape[1], dtype=dtype)[None, None, None]

    def _sharpened(
        self, query: Float[Array, "B T N H"], position: Int[Array, "#B T"]
    ) -> tuple[Float[Array, "B T N H"], Rule]:
        """Scale queries or bandwidths by the lengths of their contexts."""
        config = self.config
        h = config.initial_bandwidth
        if self.log_bandwidth is not None:
            h = jnp.exp(_wide(self.log_bandwidth))[None, :, None, None]
        if self.length_weight is None or self.length_power is None:
            return query, config.bandwidth(h)
        scale = length_scale(position, _wide(self.length_weight), _wide(self.length_power))
        if config.alibi_heads == 0:
            return query, config.bandwidth(h / jnp.sqrt(scale))
        # With biases, attention has its fastest paths for one h alone. Heads with biases have no
        # scale, and the others no bias, so that scaling the queries does the same.
        head = jnp.arange(config.num_heads)[None, None, :, None]
        scale = jnp.where(head < config.alibi_heads, 1, jnp.swapaxes(scale, 1, 2))
        return (query * scale).astype(query.dtype), config.bandwidth(h)


def length_scale(
    position: Int[Array, "#B T"], weight: Float[Array, " N"], power: Float[Array, " N"]
) -> Float[Array, "#B N T 1"]:
    r"""Return 1 + softplus(b) log(n)^g for the query at each position, which sees n keys.

    It is 1 where n = 1, whatever the power g.

    Examples:
      >>> scale = length_scale(jnp.array([[0, 1]]), jnp.zeros(1), jnp.ones(1))
      >>> scale[0, 0, :, 0].tolist()  # 1 and 1 + log(2)^2
      [1.0, 1.480]
    """
    seen = position[:, None, :, None]
    log = jnp.log(jnp.where(seen > 0, seen + 1, 2).astype(weight.dtype))
    weight, power = (x[None, :, None, None] for x in (jax.nn.softplus(weight), power))
    return 1 + jnp.where(seen > 0, weight * log**power, 0)


def _wide(numbers: nnx.Param) -> Float[Array, " N"]:
    values = numbers[...]
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))
