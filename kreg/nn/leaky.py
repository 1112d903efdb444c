"""The leaky average over time, in O(T): by chunks, and one step at a time.

Axes: B batch, T time, N heads, H head width, C chunks, L positions in a chunk (I, J as indices).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from kreg.nn.delay import delay
from kreg.sharding.places import Layout, Places

# A chunk costs L^2 multiplications per head and column but saves L sequential steps; on two CPU
# cores 16 to 64 take the same time, which is less than a scan over T or an associative scan.
_CHUNK = 32


def magnitude(x: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """Return |x| with derivative 0 at 0, as in the released model; `jnp.abs` has 1 there."""
    return jnp.sign(x) * x


def per_head(numbers: Float[Array, " N"], like: Float[Array, "*B N H"]) -> Float[Array, "*B N 1"]:
    """Lay one number per head out against heads on the axis before the last, in their type."""
    return numbers.astype(like.dtype).reshape((1,) * (like.ndim - 2) + (-1, 1))


def decayed_sum(
    x: Float[Array, "B T N H"],
    rate: Float[Array, " N"],
    documents: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:
    r"""Sum the past with exponentially falling weights, S_t = sum_{i<=t} exp(-rate (t - i)) x_i.

    With `documents` the sum runs over the positions of t's own document; ids must be equal exactly
    within a run of positions. Accumulates in at least float32 and returns x's type.

    Examples:
      >>> x = jnp.ones((1, 3, 1, 1))
      >>> decayed_sum(x, jnp.log(jnp.array([2.0])))[0, :, 0, 0].tolist()
      [1.0, 1.5, 1.75]
    """
    return _decayed_sum(x, rate, documents).astype(x.dtype)


@jax.custom_jvp
def _decayed_sum(x: Array, rate: Array, documents: Array | None) -> Float[Array, "B T N H"]:
    """Sum without rounding to x's type."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    length = x.shape[1]
    chunk = min(_CHUNK, length)
    count = -(-length // chunk)
    pad = count * chunk - length
    z = jnp.pad(x.astype(dtype), ((0, 0), (0, pad), (0, 0), (0, 0)))
    z = z.reshape(x.shape[0], count, chunk, *x.shape[2:])
    if documents is not None:
        documents = jnp.pad(documents, ((0, 0), (0, pad)), mode="edge")
        documents = documents.reshape(x.shape[0], count, chunk)
    local = _within_chunks(z, rate.astype(dtype), documents)
    if count > 1:
        local = local + _from_earlier_chunks(local[:, :, -1], rate.astype(dtype), documents, chunk)
    return local.reshape(x.shape[0], count * chunk, *x.shape[2:])[:, :length]


@_decayed_sum.defjvp
def _decayed_sum_jvp(primals, tangents):
    """By S_t = a S_{t-1} + x_t the change is another such sum, of dx_t + da S_{t-1}."""
    (_, rate, documents), (dx, drate, _) = primals, tangents
    total = _decayed_sum(*primals)
    before = delay(total, 1, documents)
    change = dx.astype(total.dtype) - per_head(drate * jnp.exp(-rate), total) * before
    return total, _decayed_sum(change, rate, documents)


def _within_chunks(
    z: Float[Array, "B C L N H"], rate: Float[Array, " N"], documents: Int[Array, "B C L"] | None
) -> Float[Array, "B C L N H"]:
    """Multiply each chunk by its triangle of weights exp(-rate (i - j))."""
    position = jnp.arange(z.shape[2])
    lag = (position[:, None] - position[None, :])[None]
    weights = jnp.exp(-rate[:, None, None] * jnp.maximum(lag, 0))
    weights = jnp.where(lag >= 0, weights, 0)
    highest = jax.lax.Precision.HIGHEST
    if documents is None:
        return jnp.einsum("nij,bcjnh->bcinh", weights, z, precision=highest)
    same = documents[..., :, None] == documents[..., None, :]
    weights = jnp.where(same[:, :, None], weights[None, None], 0)
    return jnp.einsum("bcnij,bcjnh->bcinh", weights, z, precision=highest)


def _from_earlier_chunks(
    last: Float[Array, "B C N H"],
    rate: Float[Array, " N"],
    documents: Int[Array, "B C L"] | None,
    chunk: int,
) -> Float[Array, "B C #L N H"]:
    """What each chunk inherits: the sums at the ends of the chunks before, carried on."""
    across = per_head(jnp.exp(-rate * chunk), last[:, 0])
    if documents is None:
        going_on = heirs = None
    else:
        of_ends = documents[:, :, -1]
        before = jnp.pad(of_ends[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
        going_on = jnp.moveaxis(of_ends == before, 1, 0)[:, :, None, None]
        heirs = (documents == before[..., None])[..., None, None]

    def carry_on(total, step):
        end, alive = step
        kept = across * total if alive is None else jnp.where(alive, across * total, 0)
        return kept + end, kept + end

    ends = jnp.moveaxis(last, 1, 0)
    rest = None if going_on is None else going_on[1:-1]
    _, sums = jax.lax.scan(carry_on, ends[0], (ends[1:-1], rest))
    inherited = jnp.pad(jnp.concatenate([ends[:1], sums]), ((1, 0), (0, 0), (0, 0), (0, 0)))
    steps = jnp.arange(1, chunk + 1)
    # Not by arrays made alike first: gradients would keep those.
    fading = jnp.exp(-rate[None, :] * steps[:, None])
    highest = jax.lax.Precision.HIGHEST
    inherited = jnp.einsum("in,cbnh->bcinh", fading, inherited, precision=highest)
    return inherited if heirs is None else jnp.where(heirs, inherited, 0)


def split_decayed_sum(
    x: Float[Array, "B T N H"],
    rate: Float[Array, " N"],
    documents: Int[Array, "B T"] | None,
    layout: Layout,
) -> Float[Array, "B T N H"]:
    """Sum as `decayed_sum` does, with time split over a mesh.

    Devices sum their own parts, then tell each other the sums at their ends: one vector a head of
    every sequence. What a part inherits is a sum over the parts before it.
    """
    places = Places.of(None, layout._replace(heads=None))
    places.check({"b": x.shape[0]})
    length = x.shape[1]
    after = ((0, 0), (0, -length % places.size("t")))
    x = jnp.pad(x, (*after, (0, 0), (0, 0)))
    specs = [places.spec(x.shape, "bt.."), jax.sharding.PartitionSpec()]
    arguments = [x, rate]
    if documents is not None:
        specs.append(places.spec(documents.shape, "bt"))
        arguments.append(jnp.pad(documents, after, mode="edge"))
    axis = places.sequence

    def body(x, rate, documents=None):
        total = _decayed_sum(x, rate, documents)
        if axis is not None:
            total = total + _from_earlier_parts(total, rate.astype(total.dtype), documents, axis)
        return total.astype(x.dtype)

    total = places.run(body, tuple(specs), specs[0], tuple(arguments), checks=True)
    return total[:, :length]


def _from_earlier_parts(
    here: Float[Array, "B T N H"],
    rate: Float[Array, " N"],
    documents: Int[Array, "B T"] | None,
    axis: str,
) -> Float[Array, "B T N H"]:
    """What the sums at the ends of earlier parts have become at each position of this one."""
    steps, index = here.shape[1], lax.axis_index(axis)
    part = jnp.arange(lax.axis_size(axis))
    ends = lax.all_gather(here[:, -1], axis)
    # From the end of part i to the end of the part before this one.
    lag = jnp.maximum((index - 1 - part) * steps, 0)[:, None]
    shares = jnp.where((part < index)[:, None], jnp.exp(-rate[None] * lag), 0)
    fading = jnp.exp(-rate[None] * jnp.arange(1, steps + 1)[:, None])
    highest = lax.Precision.HIGHEST
    if documents is None:
        inherited = jnp.einsum("pn,pbnh->bnh", shares, ends, precision=highest)
        return fading[None, :, :, None] * inherited[:, None]
    # A document is one run of numbers that ascend, so what ends in it is all it inherits.
    of_ends = lax.all_gather(documents[:, -1], axis)
    same = (of_ends[:, :, None] == documents[None]).astype(here.dtype)
    inherited = jnp.einsum("pn,pbt,pbnh->btnh", shares, same, ends, precision=highest)
    return fading[None, :, :, None] * inherited


def leaky_average(
    z: Float[Array, "B T N H"],
    rate: Float[Array, " N"],
    documents: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:
    r"""Average over the past, k_t = lambda k_{t-1} + (1 - lambda) z_t with lambda = exp(-rate).

    Starts from 0, at every document anew. Rate 0 gives 0.

    Examples:
      >>> leaky_average(jnp.ones((1, 2, 1, 1)), jnp.log(jnp.array([2.0])))[0, :, 0, 0].tolist()
      [0.5, 0.75]

    References:
      Zhang et al., `Memory Mosaics <https://arxiv.org/abs/2405.06394>`_, 2024
    """
    return per_head(-jnp.expm1(-rate), z) * decayed_sum(z, rate, documents)


class LeakyState(NamedTuple):
    """What the average remembers between steps: the decayed sums of the inputs and of ones."""

    total: Float[Array, "B N H"]
    weight: Float[Array, " N"]


class LeakyAverage(nnx.Module):
    r"""Hold one decay per head and average over time, lambda = exp(-|10 p|).

    `normalised` divides by the weights' sum, sum lambda^{t-i} z_i / sum lambda^{t-i}, instead of
    multiplying by 1 - lambda; `bare` does neither. They differ by a positive factor, which unit
    keys do not see. With a `layout` time is split over the mesh of `jax.set_mesh`.
    The parameters p start evenly spaced from 0.05 to 0.5.

    Examples:
      >>> import kreg.nn
      >>> x = jnp.ones((1, 3, 1, 1))
      >>> kreg.nn.LeakyAverage(1)(x)[0, :, 0, 0].tolist()
      [0.393, 0.632, 0.777]
      >>> kreg.nn.LeakyAverage(1, normalised=True)(x)[0, :, 0, 0].tolist()
      [1.0, 1.0, 1.0]
    """

    def __init__(
        self,
        num_heads: int,
        *,
        normalised: bool = False,
        bare: bool = False,
        layout: Layout | None = None,
    ) -> None:
        self.normalised, self.bare, self.layout = normalised, bare, layout
        self.decay = nnx.Param(jnp.linspace(0.05, 0.5, num_heads))

    def rate(self) -> Float[Array, " N"]:
        """-log lambda of each head."""
        return magnitude(10 * self.decay[...])

    def __call__(
        self, z: Float[Array, "B T N H"], documents: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T N H"]:
        """Average over the past of each position, within its document."""
        total = self._sum(z, documents)
        if self.bare:
            return total
        if not self.normalised:
            return per_head(-jnp.expm1(-self.rate()), z) * total
        ones = jnp.ones_like(z[:1, :, :, :1] if documents is None else z[..., :1])
        return total / self._sum(ones, documents)

    def _sum(self, z: Array, documents: Array | None) -> Array:
        if self.layout is None:
            return decayed_sum(z, self.rate(), documents)
        return split_decayed_sum(z, self.rate(), documents, self.layout)

    def start(self, batch: int, head_dim: int) -> LeakyState:
        """The state before the first step."""
        decay = self.decay[...]
        dtype = jnp.promote_types(decay.dtype, jnp.float32)
        shape = (batch, decay.shape[0], head_dim)
        return LeakyState(jnp.zeros(shape, dtype), jnp.zeros(decay.shape, dtype))

    def step(
        self, state: LeakyState, z: Float[Array, "B N H"]
    ) -> tuple[LeakyState, Float[Array, "B N H"]]:
        """Take in one position and return the average there, as the call on the whole sequence."""
        fading = jnp.exp(-self.rate()).astype(state.weight.dtype)
        total = per_head(fading, state.total) * state.total + z
        state = LeakyState(total, fading * state.weight + 1)
        if self.bare:
            average = total
        elif self.normalised:
            average = total / per_head(state.weight, total)
        else:
            average = per_head(-jnp.expm1(-self.rate()), total) * total
        return state, average.astype(z.dtype)
