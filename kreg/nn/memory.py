"""The two memories of a block: the context's own pairs, and learned pairs.

Axes: B batch, T time, C width of the stream, N heads, H head width, S pairs, W inputs of a window.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

import kreg
from kreg.nn.compat import Method, dense_norm_relu, inverse_bandwidth, variant
from kreg.nn.config import MosaicConfig
from kreg.nn.features import KeyFeatures, ValueFeatures, normal, project, sparing
from kreg.nn.leaky import LeakyState, per_head
from kreg.stats import Stats


def dropout(x: Float[Array, "*S"], rate: float, key: Array | None) -> Float[Array, "*S"]:
    """Zero entries at random and scale up the rest; without a key, return x."""
    if key is None or rate == 0:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0)


def attend_over(layout: kreg.sharding.Layout | None) -> Callable[..., Any]:
    """The attention of sequences of which every position is a query: on one device, or split."""
    if layout is None:
        return kreg.attention
    return functools.partial(kreg.sharding.attention, form="gather", **layout._asdict())


def split_key(key: Array | None) -> tuple[Array | None, Array | None]:
    """Split a dropout key in two; None, which means no dropout, gives two of them."""
    if key is None:
        return None, None
    first, second = jax.random.split(key)
    return first, second


class Output(nnx.Module):
    """Join the heads and project back into the stream, drawn from N(0, 1 / (C num_layers))."""

    def __init__(self, config: MosaicConfig, *, rngs: nnx.Rngs) -> None:
        width = config.embed_dim
        fan_in = width * config.num_layers
        self.kernel = nnx.Param(normal(rngs.params(), (width, width), fan_in))
        self.bias = nnx.Param(jnp.zeros(width)) if config.use_bias else None

    def __call__(self, heads: Float[Array, "B T N H"]) -> Float[Array, "B T C"]:
        """Map all heads of a position to the stream."""
        y = project(heads.reshape(*heads.shape[:2], -1), self.kernel[...])
        return y if self.bias is None else y + self.bias[...][None, None]


class ContextCache(NamedTuple):
    """What a contextual memory keeps between steps: pairs, recent inputs, the key's average."""

    key: Float[Array, "B S N H"]
    value: Float[Array, "B S N H"]
    window: Float[Array, "B W C"]
    average: LeakyState


class ContextualMemory(nnx.Module):
    r"""Answer every position from the pairs of its past: y_t = Out(sum_{j <= t - s} w_tj v_j).

    Keys are unit leaky averages and double as queries; the value v_j looks s = `value_shift`
    positions ahead, so its key is visible from j + s on. The weights are `kreg.attention`'s for the
    configuration's kernel and rule at bandwidth h = 1 / beta, one beta per head. The first s
    positions have no past: their sum is 0. Maps [B, T, C] to [B, T, C].

    Examples:
      >>> import kreg.nn
      >>> config = kreg.nn.MosaicConfig(7, num_layers=1, num_heads=2, embed_dim=8, memory_size=3)
      >>> memory = kreg.nn.ContextualMemory(config, rngs=nnx.Rngs(0))
      >>> y = nnx.jit(memory)(jnp.ones((1, 5, 8)))
      >>> y.shape, float(jnp.abs(y[:, 0]).max())
      ((1, 5, 8), 0.0)

    References:
      Zhang et al., `Memory Mosaics <https://arxiv.org/abs/2405.06394>`_, 2024
    """

    def __init__(self, config: MosaicConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.keys = KeyFeatures(config, epsilon=variant(config.compat).epsilon, rngs=rngs)
        self.values = ValueFeatures(config, rngs=rngs)
        self.kernel_beta = nnx.Param(jnp.full((config.num_heads,), 0.1, dtype=float))
        self.out = Output(config, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T C"],
        documents: Int[Array, "B T"] | None = None,
        *,
        dropout_key: Array | None = None,
    ) -> Float[Array, "B T C"]:
        """Answer every position from its own document."""
        for_weights, for_output = split_key(dropout_key)
        key, value = sparing(self.features)(x, documents)
        answer = self.regress(key, value, documents, dropout_key=for_weights)
        return dropout(self.out(answer), self.config.hidden_dropout, for_output)

    def features(
        self, x: Float[Array, "B T C"], documents: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N H"]]:
        """Make the key and the value of every position."""
        return self.keys(x, documents), self.values(x, documents)

    def regress(
        self,
        key: Float[Array, "B T N H"],
        value: Float[Array, "B T N V"],
        documents: Int[Array, "B T"] | None = None,
        *,
        dropout_key: Array | None = None,
    ) -> Float[Array, "B T N V"]:
        """Estimate the values at the keys themselves, each from the pairs of its past."""
        config, released = self.config, variant(self.config.compat)
        method = self._method(key)
        rate = config.attention_dropout if released.drops_weights else 0.0
        if method.ahead:
            visible = jnp.tri(key.shape[1], k=-method.delay, dtype=bool)[None, None]
            if documents is not None:
                same = documents[:, None, :, None] == documents[:, None, None, :]
                visible = visible & same
            beta = inverse_bandwidth(self.kernel_beta[...])
            options = {"dropout_rate": rate, "dropout_key": dropout_key}
            return dense_norm_relu(key, value, beta, visible, **options)
        return self._attend(
            key,
            value,
            documents,
            dropout_rate=rate if dropout_key is not None else 0.0,
            dropout_key=dropout_key,
        )

    @property
    def delay(self) -> int:
        """How many positions a query is later than the newest key that it sees."""
        return self._method(self.kernel_beta[...]).delay

    def stats(self, x: Float[Array, "B T C"], documents: Int[Array, "B T"] | None = None) -> Stats:
        """Say of every position and head, each [B, T, N], how many pairs answer it, and the like.

        Raises:
            NotImplementedError: norm_relu with compat "dense", which answers from future tokens.
        """
        if self._method(x).ahead:
            raise NotImplementedError("stats: the dense file's norm_relu has no threshold")
        key, value = self.keys(x, documents), self.values(x, documents)
        return self._attend(key, value, documents, return_stats=True)[1]

    def _attend(self, key: Array, value: Array, documents: Array | None, **options: Any) -> Any:
        method = self._method(key)
        return attend_over(self.config.layout)(
            key,
            key,
            value,
            kernel=self.config.kernel,
            bandwidth=method.rule,
            scale=1.0,
            is_causal=True,
            causal_offset=-method.delay,
            segment_ids=documents,
            implementation=self.config.implementation,
            **options,
        )

    def start(self, batch: int, length: int, dtype: jnp.dtype) -> ContextCache:
        """An empty cache for up to `length` positions."""
        config = self.config
        pairs = jnp.zeros((batch, length, config.num_heads, config.head_dim), dtype)
        span = max(self.keys.projection.span, self.values.projection.span)
        window = jnp.zeros((batch, span, config.embed_dim), dtype)
        return ContextCache(pairs, pairs, window, self.keys.average.start(batch, config.head_dim))

    def step(
        self, cache: ContextCache, x: Float[Array, "B C"], position: Int[Array, ""]
    ) -> tuple[ContextCache, Float[Array, "B C"]]:
        """Take in the input of one position and answer it, as the call on the whole sequence."""
        config = self.config
        method = self._method(x)
        if method.ahead:
            raise NotImplementedError("step: the dense file's norm_relu answers from future tokens")
        window = jnp.concatenate(
            [cache.window[:, 1:], x[:, None].astype(cache.window.dtype)], axis=1
        )
        average, key = self.keys.step(cache.average, window)
        value = self.values.newest(window)
        keys = jax.lax.dynamic_update_slice_in_dim(cache.key, key[:, None], position, axis=1)
        # A value completed before its position exists would land on slot 0, whose own comes later.
        slot = jnp.maximum(position - config.value_shift, 0)
        values = jax.lax.dynamic_update_slice_in_dim(cache.value, value[:, None], slot, axis=1)
        visible = jnp.clip(position + 1 - method.delay, 0, keys.shape[1])
        answer = kreg.attention(
            key[:, None],
            keys,
            values,
            kernel=config.kernel,
            bandwidth=method.rule,
            scale=1.0,
            key_value_seq_lengths=jnp.full(key.shape[0], visible, jnp.int32),
            implementation=config.implementation,
        )
        return ContextCache(keys, values, window, average), self.out(answer)[:, 0]

    def _method(self, x: Float[Array, "..."]) -> Method:
        config = self.config
        beta = inverse_bandwidth(self.kernel_beta[...], variant(config.compat).largest_exponent)
        beta = beta.astype(jnp.promote_types(x.dtype, jnp.float32))[None, :, None, None]
        return variant(config.compat).method(
            config.kernel, config.bandwidth, beta, config.value_shift
        )


class PersistentCache(NamedTuple):
    """What a persistent memory keeps between steps: recent inputs, the key's average."""

    window: Float[Array, "B W C"]
    average: LeakyState


class PersistentMemory(nnx.Module):
    r"""Answer every position from learned pairs, y = Out(exp(10 p) softmax(beta^2 k M_k) M_v).

    The answers of several memories are averaged. The kernel is always the Gaussian; stored keys are
    not normalised. Maps [B, T, C] to [B, T, C].

    Examples:
      >>> import kreg.nn
      >>> config = kreg.nn.MosaicConfig(7, num_layers=1, num_heads=2, embed_dim=8, memory_size=3)
      >>> memory = kreg.nn.PersistentMemory(config, rngs=nnx.Rngs(0))
      >>> memory(jnp.ones((1, 5, 8))).shape
      (1, 5, 8)
      >>> memory.memory_keys.shape  # memories, pairs, heads, width of a head
      (1, 3, 2, 4)
    """

    def __init__(self, config: MosaicConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.keys = KeyFeatures(config, epsilon=variant(config.compat).memory_epsilon, rngs=rngs)
        shape = (config.memory_count, config.memory_size, config.num_heads, config.head_dim)
        self.memory_keys = nnx.Param(normal(rngs.params(), shape, config.head_dim))
        self.memory_values = nnx.Param(normal(rngs.params(), shape, config.head_dim))
        self.kernel_beta = nnx.Param(jnp.full((config.num_heads,), 0.1, dtype=float))
        self.value_beta = nnx.Param(jnp.full((config.num_heads,), -0.05, dtype=float))
        self.out = Output(config, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T C"],
        documents: Int[Array, "B T"] | None = None,
        *,
        dropout_key: Array | None = None,
    ) -> Float[Array, "B T C"]:
        """Answer every position."""
        for_weights, for_output = split_key(dropout_key)
        answer = self.recall(sparing(self.keys)(x, documents), dropout_key=for_weights)
        return dropout(sparing(self._project)(answer), self.config.hidden_dropout, for_output)

    def recall(
        self, key: Float[Array, "B T N H"], *, dropout_key: Array | None = None
    ) -> Float[Array, "B T N H"]:
        """Estimate the stored values at the given keys, before scaling and projection."""
        config = self.config
        keys = self.memory_keys[...].astype(key.dtype)
        values = self.memory_values[...].astype(key.dtype)
        largest = variant(config.compat).largest_memory_exponent
        beta = inverse_bandwidth(self.kernel_beta[...], largest)[None, :, None, None]
        drops = [None] * config.memory_count
        if dropout_key is not None:
            drops = list(jax.random.split(dropout_key, config.memory_count))
        answers = [
            self._attend(
                key,
                keys[i],
                values[i],
                kernel=kreg.gaussian,
                bandwidth=kreg.Adaptive(1 / beta),
                scale=1.0,
                dropout_rate=config.attention_dropout if drops[i] is not None else 0.0,
                dropout_key=drops[i],
                implementation=config.implementation,
            )
            for i in range(config.memory_count)
        ]
        return functools.reduce(jnp.add, answers) / config.memory_count

    def _attend(self, query: Array, key: Array, value: Array, **options: Any) -> Array:
        """Every position sees the same pairs, so batch and time are one axis of queries."""
        layout = self.config.layout
        if layout is not None:
            return kreg.sharding.to_shared_keys(query, key, value, layout, **options)
        flat = query.reshape(1, -1, *query.shape[2:])
        return kreg.attention(flat, key[None], value[None], **options).reshape(query.shape)

    def start(self, batch: int, dtype: jnp.dtype) -> PersistentCache:
        """An empty cache."""
        window = jnp.zeros((batch, self.keys.projection.span, self.config.embed_dim), dtype)
        return PersistentCache(window, self.keys.average.start(batch, self.config.head_dim))

    def step(
        self, cache: PersistentCache, x: Float[Array, "B C"]
    ) -> tuple[PersistentCache, Float[Array, "B C"]]:
        """Take in the input of one position and answer it."""
        window = jnp.concatenate(
            [cache.window[:, 1:], x[:, None].astype(cache.window.dtype)], axis=1
        )
        average, key = self.keys.step(cache.average, window)
        return PersistentCache(window, average), self._project(self.recall(key[:, None]))[:, 0]

    def _project(self, answer: Float[Array, "B T N H"]) -> Float[Array, "B T C"]:
        scale = variant(self.config.compat).memory_scale(self.value_beta[...])
        return self.out(per_head(scale, answer) * answer)
