"""Where the released files of Memory Mosaics differ from the theory, and from each other.

The theory is `THEORY`. "dense" and "eft" name the two files of the sparse methods; they disagree
in the constants of norms and clamps and in what three of the methods compute. A method is a pair of
kernel and bandwidth rule, and only these pairs exist there: any kernel with Adaptive, the Gaussian
with any rule, Epanechnikov with Fixed or Anchored, box with Nearest. "nano" names nanoMosaics,
which has constants of its own and one method, softmax; here any method may be read with them.

Axes: B batch, T queries, S keys, N heads, H key width, V value width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

import kreg
from kreg.nn.leaky import decayed_sum, per_head

LARGEST_EXPONENT = 5.0
_LARGEST_NANO_EXPONENT = math.log(65535)


def clamped(x: Float[Array, "*S"], bound: float) -> Float[Array, "*S"]:
    """Return min(x, bound), but let the full gradient pass at the bound itself."""
    return jnp.where(x > bound, jnp.asarray(bound, x.dtype), x)


def inverse_bandwidth(
    kernel_beta: Float[Array, " N"], largest: float = LARGEST_EXPONENT
) -> Float[Array, " N"]:
    """Return beta = exp(min(10 p, largest))."""
    wide = kernel_beta.astype(jnp.promote_types(kernel_beta.dtype, jnp.float32))
    return jnp.exp(clamped(10 * wide, largest))


def _free_scale(value_beta: Float[Array, " N"]) -> Float[Array, " N"]:
    return jnp.exp(10 * value_beta)


def _clamped_exponent(value_beta: Float[Array, " N"]) -> Float[Array, " N"]:
    return jnp.exp(clamped(10 * value_beta, LARGEST_EXPONENT))


def _clamped_scale(value_beta: Float[Array, " N"]) -> Float[Array, " N"]:
    return clamped(jnp.exp(10 * value_beta), LARGEST_EXPONENT)


@dataclass(frozen=True)
class Method:
    """What a contextual memory asks of `kreg.attention`: a rule, and how late keys become visible.

    `ahead` marks the one method that is no attention of keys in the past, `dense_norm_relu`.
    """

    rule: Any
    delay: int
    ahead: bool = False


@dataclass(frozen=True)
class Variant:
    """The constants of one version of the model and its reading of a kernel and a rule."""

    method: Callable[..., Method]
    epsilon: float = 0.0  # beside the lengths of contextual keys and of values
    memory_epsilon: float = 0.0  # beside the lengths of persistent memories' keys
    largest_exponent: float = LARGEST_EXPONENT
    largest_memory_exponent: float = LARGEST_EXPONENT
    divides_logits: bool = True
    normalised_average: bool = False
    bare_average: bool = False
    value_scale: Callable[[Array], Array] = _free_scale
    memory_scale: Callable[[Array], Array] = _free_scale
    drops_weights: bool = True


def _theory(
    kernel: kreg.Kernel, factory: Callable[[Array], Any], beta: Array, shift: int
) -> Method:
    return Method(factory(1 / beta), shift)


def _dense(kernel: kreg.Kernel, factory: Callable[[Array], Any], beta: Array, shift: int) -> Method:
    """Read a method as the dense file: Anchored counts beta twice, Fixed is a map of its own."""
    rule = factory(1 / beta)
    _refuse_unknown(kernel, rule)
    if kernel != kreg.gaussian and isinstance(rule, kreg.Anchored):
        return Method(factory(1 / beta**2), shift)
    return Method(rule, shift, ahead=kernel != kreg.gaussian and isinstance(rule, kreg.Fixed))


def _eft(kernel: kreg.Kernel, factory: Callable[[Array], Any], beta: Array, shift: int) -> Method:
    """Read a method as the eft file: three of them mask twice, Fixed knows no bandwidth."""
    rule = factory(1 / beta)
    _refuse_unknown(kernel, rule)
    if kernel == kreg.gaussian or isinstance(rule, kreg.Adaptive):
        return Method(rule, shift)
    # Threshold 0 on the cosine: 1 - h^2 / 2 = 0.
    return Method(kreg.Fixed(2**0.5) if isinstance(rule, kreg.Fixed) else rule, 2 * shift)


def _refuse_unknown(kernel: kreg.Kernel, rule: Any) -> None:
    polynomial = kreg.box if isinstance(rule, kreg.Nearest) else kreg.epanechnikov
    if isinstance(rule, kreg.Adaptive) or kernel in (kreg.gaussian, polynomial):
        return
    name = type(rule).__name__
    raise ValueError(f"compat: expected a method of the released files, got {kernel!r} with {name}")


THEORY = Variant(method=_theory)
_VARIANTS = {
    None: THEORY,
    "dense": Variant(method=_dense),
    "eft": Variant(
        method=_eft,
        epsilon=1e-6,
        normalised_average=True,
        value_scale=_clamped_exponent,
        memory_scale=_clamped_scale,
        drops_weights=False,
    ),
    # The persistent memory of nano takes the square of beta as its scale, and clamps the square.
    "nano": Variant(
        method=_theory,
        epsilon=1e-10,
        memory_epsilon=1e-10,
        largest_exponent=_LARGEST_NANO_EXPONENT,
        largest_memory_exponent=_LARGEST_NANO_EXPONENT / 2,
        divides_logits=False,
        bare_average=True,
    ),
}


def variant(compat: str | None) -> Variant:
    """Return the version of the model that a configuration names.

    Examples:
      >>> variant(None) is THEORY, variant("eft").drops_weights
      (True, False)
    """
    return _VARIANTS[compat]


def dense_norm_relu(
    key: Float[Array, "B T N H"],
    value: Float[Array, "B T N V"],
    beta: Float[Array, " N"],
    visible: Bool[Array, "*B T T"],
    *,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
) -> Float[Array, "B T N V"]:
    r"""Weigh values as the dense file's norm_relu: relu(2 beta^4 cos + 1 - 2 beta^2), normalised.

    Reproduced for comparison only. Keys that are not visible enter with cosine 0 and not with
    weight 0, so that a wide kernel (2 beta^2 < 1) answers from the future. A row whose weights are
    all 0 is uniform over its visible keys; a row without such keys is 0.
    """
    dtype = jnp.promote_types(key.dtype, jnp.float32)
    highest = jax.lax.Precision.HIGHEST
    square = (beta.astype(dtype) ** 2)[None, :, None, None]
    cosine = jnp.einsum("btnh,bsnh->bnts", key.astype(dtype), key.astype(dtype), precision=highest)
    score = 2 * square * jnp.where(visible, square * cosine, 0) + 1 - 2 * square
    weight = jax.nn.relu(score)
    total = jnp.sum(weight, axis=-1, keepdims=True)
    keys = jnp.sum(visible, axis=-1, keepdims=True, dtype=dtype)
    uniform = visible / jnp.maximum(keys, 1)
    weight = jnp.where(total == 0, uniform, weight / jnp.where(total > 1e-6, total, 1e-6))
    weight = jnp.where(keys > 0, weight, 0)
    if dropout_key is not None and dropout_rate > 0:
        kept = jax.random.bernoulli(dropout_key, 1 - dropout_rate, weight.shape)
        weight = jnp.where(kept, weight / (1 - dropout_rate), 0)
    mixed = jnp.einsum("bnts,bsnv->btnv", weight, value.astype(dtype), precision=highest)
    return mixed.astype(value.dtype)


def wkv(
    x: Float[Array, "B T N H"], rate: Float[Array, " N"], bonus: Float[Array, " N"]
) -> Float[Array, "B T N H"]:
    r"""Average as the eft file's CUDA kernel, y_t = (P_t + e^bonus x_t) / (Q_t + e^bonus).

    P_t = sum_{i<t} exp(-rate (t - 1 - i)) x_i and Q_t is the same sum of ones; `bonus` >= 0. At
    bonus = rate this is the decayed sum divided by its weights, what `LeakyAverage` does with
    `normalised=True`.

    Examples:
      >>> wkv(jnp.array([1.0, 4.0])[None, :, None, None], jnp.ones(1), jnp.zeros(1))[0, :, 0, 0]
      Array([1. , 2.5], dtype=float32)
    """

    def earlier(z):
        return jnp.pad(decayed_sum(z, rate)[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0)))

    fading = per_head(jnp.exp(-bonus), x)
    ones = jnp.ones_like(x[:1, :, :, :1])
    return (fading * earlier(x) + x) / (fading * earlier(ones) + 1)
