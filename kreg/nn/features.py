"""Keys and values of a memory: projections over time, unit vectors, document boundaries.

Axes: B batch, T time, C width of the stream, N heads, H head width, K taps of a convolution.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from kreg.nn.compat import variant
from kreg.nn.config import MosaicConfig
from kreg.nn.delay import delay
from kreg.nn.leaky import LeakyAverage, LeakyState, per_head


def document_index(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Number the runs of equal ids 0, 1, ...: an id that comes back later is a new document.

    Examples:
      >>> document_index(jnp.array([[7, 7, 3, 7]])).tolist()
      [[0, 0, 1, 2]]
    """
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.cumsum(jnp.pad(changes, ((0, 0), (1, 0))), axis=1, dtype=jnp.int32)


def unit(x: Float[Array, "*B H"], epsilon: float = 0.0) -> Float[Array, "*B H"]:
    """Scale to length 1, x / (|x| + epsilon); the zero vector stays zero, with zero gradient.

    Examples:
      >>> unit(jnp.array([[0.0, 2.0], [0.0, 0.0]])).tolist()
      [[0.0, 1.0], [0.0, 0.0]]
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    square = jnp.sum(wide * wide, axis=-1, keepdims=True)
    # One division a vector, none an entry, forward and in the gradient.
    inverse = 1 / (jnp.sqrt(jnp.where(square > 0, square, 1)) + epsilon)
    return (wide * jnp.where(square > 0, inverse, 0)).astype(x.dtype)


def sparing(function: Callable) -> Callable:
    """Let the backward pass compute a cheap function again, but for its projections.

    To keep what is in between costs more time than to compute it, and most of the memory.
    """
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint(function, policy=policy)


def project(x: Float[Array, "*B C"], kernel: Float[Array, "C D"]) -> Float[Array, "*B D"]:
    """Return x @ kernel, in a form whose gradient by the kernel is faster on CPU.

    Of the plain product's gradient XLA makes one that transposes the whole cotangent; across the
    barrier it transposes the small result. The one behind the product has the cotangent computed
    once: both products of the gradient would each compute it again, one of them by columns.
    """
    across = jax.lax.optimization_barrier(kernel.T)
    y = jax.lax.dot_general(x, across, (((x.ndim - 1,), (1,)), ((), ())))
    return jax.lax.optimization_barrier(y)


def normal(key: Array, shape: tuple[int, ...], fan_in: int) -> Float[Array, "..."]:
    """Draw from N(0, 1 / fan_in)."""
    return jax.random.normal(key, shape) * fan_in**-0.5


class Projection(nnx.Module):
    r"""Map the stream over time: a convolution of K taps, or a linear map and a mixture per head.

    Convolution: y_t = sum_i x_{t + ahead - (K - 1) + i} W_i + b. Low rank: w = x W + b and
    y_t = (1 - c) w_{t + ahead} + c w_t with one c per head. Positions outside the document are 0.
    """

    def __init__(
        self, config: MosaicConfig, *, taps: int, low_rank: bool, ahead: int, rngs: nnx.Rngs
    ) -> None:
        width = config.embed_dim
        self.num_heads, self.ahead = config.num_heads, ahead
        # How many inputs, up to the newest, fix the features `ahead` positions before it.
        self.span = ahead + 1 if low_rank else max(taps, ahead + 1)
        shape = (width, width) if low_rank else (taps, width, width)
        fan_in = width if low_rank else width * taps
        self.kernel = nnx.Param(normal(rngs.params(), shape, fan_in))
        self.bias = nnx.Param(jnp.zeros(width)) if config.use_bias else None
        mix = jax.random.uniform(rngs.params(), (config.num_heads,)) if low_rank else None
        self.mix = None if mix is None else nnx.Param(mix)

    def __call__(
        self, x: Float[Array, "B T C"], documents: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T N H"]:
        """Return the features of every position, split into heads."""
        kernel = self.kernel[...]
        if self.mix is not None:
            w = self._heads(self._biased(project(x, kernel)))
            return self._mixture(w, self.mix[...], documents)
        newest = kernel.shape[0] - 1 - self.ahead
        taps = [project(delay(x, newest - i, documents), kernel[i]) for i in range(kernel.shape[0])]
        return self._heads(self._biased(functools.reduce(jnp.add, taps)))

    def _mixture(
        self,
        w: Float[Array, "B T N H"],
        mix: Float[Array, " N"],
        documents: Int[Array, "B T"] | None,
    ) -> Float[Array, "B T N H"]:
        mix = per_head(mix, w)
        ahead = delay(w, -self.ahead, documents)
        return ahead + mix * (w - ahead)

    def _biased(self, y: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
        return y if self.bias is None else y + self.bias[...][None, None]

    def _heads(self, y: Float[Array, "B T C"]) -> Float[Array, "B T N H"]:
        return y.reshape(*y.shape[:2], self.num_heads, -1)

    def newest(self, window: Float[Array, "B W C"]) -> Float[Array, "B N H"]:
        """The features `ahead` positions before the end of a window of at least `span` inputs."""
        return self(window)[:, -1 - self.ahead]


class KeyFeatures(nnx.Module):
    """Make unit keys: project, average over time with one decay per head, normalise."""

    def __init__(self, config: MosaicConfig, *, epsilon: float = 0.0, rngs: nnx.Rngs) -> None:
        released = variant(config.compat)
        self.epsilon = epsilon
        self.projection = Projection(
            config, taps=config.key_kernel, low_rank=config.low_rank_keys, ahead=0, rngs=rngs
        )
        self.average = LeakyAverage(
            config.num_heads,
            normalised=released.normalised_average,
            # Unit vectors do not see the average's positive factor, so it need not be formed.
            bare=released.bare_average or epsilon == 0,
            layout=config.layout,
        )

    def __call__(
        self, x: Float[Array, "B T C"], documents: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T N H"]:
        """Return the unit key of every position."""
        return unit(self.average(self.projection(x, documents), documents), self.epsilon)

    def step(
        self, state: LeakyState, window: Float[Array, "B W C"]
    ) -> tuple[LeakyState, Float[Array, "B N H"]]:
        """Return the unit key of the newest input of a window."""
        state, average = self.average.step(state, self.projection.newest(window))
        return state, unit(average, self.epsilon)


class ValueFeatures(nnx.Module):
    """Make values: project with a look ahead, normalise, scale each head by exp(10 p)."""

    def __init__(self, config: MosaicConfig, *, rngs: nnx.Rngs) -> None:
        self.compat = config.compat
        self.projection = Projection(
            config,
            taps=config.value_kernel,
            low_rank=config.low_rank_values,
            ahead=config.value_shift,
            rngs=rngs,
        )
        self.value_beta = nnx.Param(jnp.full((config.num_heads,), -0.05, dtype=float))

    def __call__(
        self, x: Float[Array, "B T C"], documents: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T N H"]:
        """Return the value of every position."""
        return self._scaled(self.projection(x, documents))

    def newest(self, window: Float[Array, "B W C"]) -> Float[Array, "B N H"]:
        """Return the newest value that a window of inputs completes."""
        return self._scaled(self.projection.newest(window))

    def _scaled(self, y: Float[Array, "*B N H"]) -> Float[Array, "*B N H"]:
        released = variant(self.compat)
        scale = per_head(released.value_scale(self.value_beta[...]), y)
        return scale * unit(y, released.epsilon)
