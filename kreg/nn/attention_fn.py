"""The attention of stock Flax layers, for `attention_fn` of nnx and linen.

Axes: B any number of batch dimensions, T queries, S keys, N heads, K key heads, H key width,
V value width.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax.nnx.nn.dtypes import promote_dtype as default_promote_dtype
from flax.typing import Dtype, PromoteDtypeFn
from jax.typing import ArrayLike
from jaxtyping import Array, Float

import kreg
from kreg.bandwidth import Rule, check_bandwidth
from kreg.kernels import check_kernel
from kreg.nn.features import unit

_OWN_PRODUCTS = "kreg has its own matrix products, and would leave it unused"
_UNSUPPORTED = {
    "module": "kreg forms no matrix of weights that could be sown; call with sow_weights=False",
    "input_positions": "queries and keys are not rotated here; rotate them in a wrapper",
    "einsum_dot_general": _OWN_PRODUCTS,
    "qk_attn_weights_einsum": _OWN_PRODUCTS,
    "attn_weights_value_einsum": _OWN_PRODUCTS,
}


def attention_fn(
    kernel: kreg.Kernel = kreg.biweight,
    bandwidth: Rule = kreg.Adaptive(),  # noqa: B008 - immutable
    *,
    scale: float | None = None,
    cosine: bool = False,
    logits_soft_cap: float | None = None,
    implementation: str | None = None,
) -> "AttentionFn":
    r"""Make a drop-in for Flax's `attention_fn` that weighs by $p_j \propto [z_j - t]_+^r$.

    It serves `nnx.MultiHeadAttention` and `linen.MultiHeadDotProductAttention` (and what derives
    from it) with their masks, caches, grouped heads, dropout and types. What differs from Flax's
    own attention: a query without keys gives 0, not the mean of the values; dropout is drawn for
    each weight, so that `broadcast_dropout=True` does not share it over batch and heads; precision
    None is HIGHEST for float32; weights are computed in float32 or wider.

    One result can serve all layers. Layers whose results were made from different rule objects
    count as different to `jax.jit` and `jax.tree.map`, even where the numbers are equal. To learn
    h, make the function where h is at hand: in the `__call__` of a linen module around the layer,
    or of an nnx module that is itself given as `attention_fn`.

    Args:
      kernel: `kreg.biweight` and its relatives; `kreg.gaussian` is Flax's own softmax.
      bandwidth: an array h has the shape [#B, #N, #T, 1], such as [1, N, 1, 1] for one a head,
        however many batch dimensions the layer has; they are folded into the first.
      scale: 1/sqrt(H) where None. `Fixed` needs a number: 1 with `cosine`.
      cosine: divide queries and keys by their lengths first, as `Fixed` supposes.
      logits_soft_cap: scores become cap tanh(score / cap).
      implementation: handed to `kreg.attention`.

    Raises:
      ValueError: the kernel or the rule is none, or they do not go together.

    Examples:
      >>> from flax import nnx
      >>> layer = nnx.MultiHeadAttention(
      ...     num_heads=4, in_features=8, attention_fn=attention_fn(kreg.biweight), decode=False,
      ...     rngs=nnx.Rngs(0),
      ... )
      >>> layer(jnp.ones((2, 5, 8)), is_causal=True).shape
      (2, 5, 8)
      >>> from flax import linen
      >>> layer = linen.MultiHeadAttention(num_heads=4, attention_fn=attention_fn(kreg.biweight))
      >>> variables = layer.init(jax.random.key(0), jnp.ones((2, 5, 8)))
      >>> layer.apply(variables, jnp.ones((2, 5, 8)), mask=jnp.ones((5, 5))).shape
      (2, 5, 8)
    """
    check_kernel(kernel)
    check_bandwidth(bandwidth, kernel, 4)
    return AttentionFn(kernel, bandwidth, scale, cosine, logits_soft_cap, implementation)


@dataclasses.dataclass(frozen=True)
class AttentionFn:
    """What `attention_fn` returns; no pytree, so that a layer holds it as it holds a function.

    Maps queries [*B, T, N, H], keys [*B, S, K, H] and values [*B, S, K, V] to [*B, T, N, V].
    Two are equal if kernel, rule object and numbers are.

    Examples:
      >>> function = attention_fn(kreg.biweight)
      >>> x = jnp.ones((2, 5, 4, 8))
      >>> function(x, x, x, is_causal=True).shape
      (2, 5, 4, 8)
      >>> function == attention_fn(kreg.gaussian)
      False
    """

    kernel: kreg.Kernel
    bandwidth: Rule
    scale: float | None
    cosine: bool
    logits_soft_cap: float | None
    implementation: str | None

    # linen hands over only what the signature names, so that an option missing here would be
    # dropped without a word.
    def __call__(
        self,
        query: Float[Array, "*B T N H"],
        key: Float[Array, "*B S K H"],
        value: Float[Array, "*B S K V"],
        bias: Float[Array, "..."] | None = None,
        mask: ArrayLike | kreg.Mask | None = None,
        *,
        broadcast_dropout: bool = True,
        dropout_rng: Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Dtype | None = None,
        precision: jax.lax.PrecisionLike = None,
        module: Any = None,
        promote_dtype: PromoteDtypeFn = default_promote_dtype,
        is_causal: bool = False,
        input_positions: Any = None,
        force_fp32_for_softmax: bool = False,
        einsum_dot_general: Any = None,
        qk_attn_weights_einsum: Any = None,
        attn_weights_value_einsum: Any = None,
    ) -> Float[Array, "*B T N V"]:
        """Attend as `kreg.attention` does, over any batch dimensions.

        Args:
          query: queries.
          key: keys.
          value: values.
          bias: added to the scores; broadcasts to [*B, N, T, S].
          mask: boolean or number, of the same shapes; nonzero takes part. Or a `kreg.Mask`, where
            no cache adds its own; its B is all batch dimensions in one.
          broadcast_dropout: without effect, dropout is drawn for each weight.
          dropout_rng: needed for dropout.
          dropout_rate: probability with which a weight is dropped, unless `deterministic`.
          deterministic: no dropout.
          dtype: of the computation and the answer; None is the type that all inputs promote to.
          precision: of both matrix products.
          module: None; weights are not sown.
          promote_dtype: how the inputs become `dtype`.
          is_causal: key j is visible to query i when j <= i.
          input_positions: None; nothing is rotated.
          force_fp32_for_softmax: without effect, weights are never narrower.
          einsum_dot_general: None.
          qk_attn_weights_einsum: None.
          attn_weights_value_einsum: None.

        Raises:
          ValueError: shapes, types or values that do not fit, or dropout without `dropout_rng`.
          NotImplementedError: an argument whose effect is not to be had, named.
        """
        del broadcast_dropout, force_fp32_for_softmax
        _refuse(
            module=module,
            input_positions=input_positions,
            einsum_dot_general=einsum_dot_general,
            qk_attn_weights_einsum=qk_attn_weights_einsum,
            attn_weights_value_einsum=attn_weights_value_einsum,
        )
        rate = 0.0 if deterministic else dropout_rate
        if rate > 0 and dropout_rng is None:
            raise ValueError(
                f"dropout_rng: expected a random key with dropout_rate={rate} and "
                "deterministic=False, got None"
            )
        query, key, value = promote_dtype((query, key, value), dtype=dtype)
        batch = _batch(query, key, value)
        if self.cosine:
            query, key = unit(query), unit(key)
        query, key, value = (
            x.reshape(math.prod(batch), *x.shape[-3:]) for x in (query, key, value)
        )
        out = kreg.attention(
            query,
            key,
            value,
            _folded("bias", bias, batch),
            _mask(mask, batch),
            kernel=self.kernel,
            bandwidth=self.bandwidth,
            scale=self.scale,
            is_causal=is_causal,
            logits_soft_cap=self.logits_soft_cap,
            dropout_rate=rate,
            dropout_key=dropout_rng,
            precision=precision,
            implementation=self.implementation,
        )
        return out.reshape(*batch, *out.shape[1:])


def _refuse(**given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise NotImplementedError(f"{name}: expected None; {_UNSUPPORTED[name]}")


def _batch(query: Array, key: Array, value: Array) -> tuple[int, ...]:
    """The batch dimensions that the three share."""
    batch = query.shape[:-3]
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim < 3 or x.shape[:-3] != batch:
            raise ValueError(
                f"{name}: expected batch dimensions {batch} as the query's, then length, heads "
                f"and width, got shape {x.shape}"
            )
    return batch


def _mask(mask: ArrayLike | kreg.Mask | None, batch: tuple[int, ...]) -> Array | kreg.Mask | None:
    if mask is None or isinstance(mask, kreg.Mask):
        return mask
    return _folded("mask", jnp.asarray(mask) != 0, batch)


def _folded(name: str, x: ArrayLike | None, batch: tuple[int, ...]) -> Array | None:
    """Fold the batch dimensions of a bias or mask into one; where all are 1, it stays 1."""
    if x is None:
        return None
    x = jnp.asarray(x)
    full = x.reshape((1,) * (len(batch) + 3 - x.ndim) + x.shape)
    own = full.shape[:-3]
    if len(own) != len(batch) or any(a not in (1, b) for a, b in zip(own, batch, strict=True)):
        raise ValueError(
            f"{name}: expected a shape that broadcasts to [*B, N, T, S] with B = {batch}, "
            f"got {x.shape}"
        )
    if any(size != 1 for size in own):
        full = jnp.broadcast_to(full, (*batch, *full.shape[-3:]))
    return full.reshape(math.prod(full.shape[:-3]), *full.shape[-3:])
