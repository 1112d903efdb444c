r"""The model of Three Moons: one contextual memory that predicts the next point of a signal.

Keys k_t = W_k x_t double as queries, values v_t = W_v x_{t + s} look ahead; the answer is
y_t = Out(sum_{j <= t - s} w_tj v_j) with scores c k_t k_j. Axes: B batch, T time, N heads, H head
width, I coordinates.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

import kreg
from kreg.nn.delay import delay
from kreg.nn.features import unit

# Beside the lengths of keys and values, where these are made unit vectors.
_EPSILON = 1e-3


@dataclass(frozen=True)
class MoonsConfig:
    """Describe the model.

    Args:
      num_heads: number of heads N.
      head_dim: width H of a head.
      input_dim: coordinates I of a point.
      kernel: kernel of the memory.
      bandwidth: factory of the bandwidth rule, called with h = 1.
      score_scale: c; the bandwidth of the Gaussian is 1 / sqrt(c).
      value_shift: s, how many points a value looks ahead.
      blind: so many of the newest keys are not seen.
      rotations: every pair of coordinates is mapped by rotations and scalings alone, as a complex
        number by a complex matrix.
      unit_keys: keys of length 1.
      learned_scale: keys are multiplied by exp(p).
      unit_values: values of length 1.
      project: mix the heads; otherwise they are summed, which takes H = I.
      embed: map points to N H coordinates first.
    """

    num_heads: int
    head_dim: int
    input_dim: int = 6
    kernel: kreg.Kernel = kreg.gaussian
    bandwidth: Callable[[Any], Any] = kreg.Adaptive
    score_scale: float = 50.0
    value_shift: int = 1
    blind: int = 0
    rotations: bool = True
    unit_keys: bool = False
    learned_scale: bool = False
    unit_values: bool = False
    project: bool = True
    embed: bool = False

    def __post_init__(self) -> None:
        if not self.project and self.head_dim != self.input_dim:
            wanted, got = self.input_dim, self.head_dim
            raise ValueError(f"head_dim: expected {wanted} where heads are summed, got {got}")
        if self.rotations and (self.head_dim % 2 or self.input_dim % 2):
            pairs = (self.input_dim, self.head_dim)
            raise ValueError(f"head_dim: rotations take pairs of coordinates, got {pairs}")

    @property
    def width(self) -> int:
        """Coordinates of all heads."""
        return self.num_heads * self.head_dim


def rotations(weight: Float[Array, "O I"]) -> Float[Array, "O I"]:
    """Replace every 2 x 2 block by the nearest rotation with scaling, [[a, b], [-b, a]].

    >>> rotations(jnp.array([[1.0, 2.0], [0.0, 3.0]])).tolist()
    [[2.0, 1.0], [-1.0, 2.0]]
    """
    (a, b), (c, d) = ([weight[i::2, j::2] for j in (0, 1)] for i in (0, 1))
    same, cross = (a + d) / 2, (b - c) / 2
    rows = jnp.stack([jnp.stack([same, cross], -1), jnp.stack([-cross, same], -1)], axis=1)
    return rows.reshape(weight.shape)


class Map(nnx.Module):
    """A matrix [out, in] drawn from U(-1, 1) / sqrt(in), without bias."""

    def __init__(self, fan_in: int, fan_out: int, *, turns: bool, rngs: nnx.Rngs) -> None:
        self.turns = turns
        shape, most = (fan_out, fan_in), fan_in**-0.5
        self.weight = nnx.Param(jax.random.uniform(rngs.params(), shape, minval=-most, maxval=most))

    def matrix(self) -> Float[Array, "O I"]:
        """The matrix as it is applied."""
        weight = self.weight[...]
        return rotations(weight) if self.turns else weight

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        """Map every point."""
        return jnp.matmul(x, self.matrix().T, precision=jax.lax.Precision.HIGHEST)


class MoonsModel(nnx.Module):
    """Predict point t + 1 from the points up to t; maps [B, T, I] to [B, T, I].

    >>> model = MoonsModel(MoonsConfig(num_heads=3, head_dim=2), rngs=nnx.Rngs(0))
    >>> y = model(jnp.ones((1, 5, 6)))
    >>> y.shape, float(abs(y[:, 0]).max())
    ((1, 5, 6), 0.0)
    """

    def __init__(self, config: MoonsConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        points, width, turns = config.input_dim, config.width, config.rotations
        inner = width if config.embed else points

        def drawn(fan_in: int, fan_out: int) -> Map:
            return Map(fan_in, fan_out, turns=turns, rngs=rngs)

        self.embedding = drawn(points, width) if config.embed else None
        self.keys, self.values = drawn(inner, width), drawn(inner, width)
        self.key_scale = nnx.Param(jnp.zeros(())) if config.learned_scale else None
        self.out = drawn(width, points) if config.project else None

    def __call__(self, x: Float[Array, "B T I"]) -> Float[Array, "B T I"]:
        """Predict the point after each."""
        return jnp.sum(self.contributions(x), axis=2)

    def pairs(
        self, x: Float[Array, "B T I"]
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N H"]]:
        """The keys and the values; the last `value_shift` values are 0."""
        config = self.config
        x = x if self.embedding is None else self.embedding(x)
        shape = (*x.shape[:2], config.num_heads, config.head_dim)
        key, value = self.keys(x).reshape(shape), self.values(x).reshape(shape)
        value = delay(value, -config.value_shift)
        key = unit(key, _EPSILON) if config.unit_keys else key
        value = unit(value, _EPSILON) if config.unit_values else value
        return key if self.key_scale is None else jnp.exp(self.key_scale[...]) * key, value

    def recall(
        self, key: Float[Array, "B T N H"], value: Float[Array, "B T N V"]
    ) -> Float[Array, "B T N V"]:
        """Estimate the values at the keys themselves, each from its past."""
        return kreg.attention(key, key, value, **self._reading())

    def support(self, x: Float[Array, "B T I"]) -> Int[Array, "B T N"]:
        """Count the points with weight."""
        key, value = self.pairs(x)
        return kreg.attention(key, key, value, return_stats=True, **self._reading())[1].support

    def _reading(self) -> dict[str, Any]:
        config = self.config
        return {
            "kernel": config.kernel,
            "bandwidth": config.bandwidth(1.0),
            "scale": config.score_scale,
            "is_causal": True,
            "causal_offset": -(config.value_shift + config.blind),
        }

    def contributions(self, x: Float[Array, "B T I"]) -> Float[Array, "B T N I"]:
        """What each head adds to the prediction."""
        answer = self.recall(*self.pairs(x))
        if self.out is None:
            return answer
        heads = self.out.matrix().reshape(-1, *answer.shape[2:])
        highest = jax.lax.Precision.HIGHEST
        return jnp.einsum("btnh,inh->btni", answer, heads, precision=highest)


def continued(
    model: MoonsModel, prompt: Float[Array, "B T I"], steps: int
) -> Float[Array, "B T+steps I"]:
    """Predict the point after each point of a prompt and of `steps` predictions that follow it."""
    batch, given, points = prompt.shape
    known = jnp.concatenate([prompt, jnp.zeros((batch, steps, points), prompt.dtype)], axis=1)

    def advance(known, place):
        # What is not known yet lies in the future, which no prediction sees.
        found = jax.lax.dynamic_index_in_dim(model(known), place, axis=1)
        return jax.lax.dynamic_update_slice_in_dim(known, found, place + 1, axis=1), None

    known, _ = jax.lax.scan(advance, known, given - 1 + jnp.arange(steps))
    return model(known)
