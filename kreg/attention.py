r"""Attention as regression: `jax.nn.dot_product_attention` with a kernel and a bandwidth rule."""

from typing import Literal, Unpack, overload

import jax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from kreg import implementations
from kreg.bandwidth import Adaptive, Rule
from kreg.canonical import Options, Segments, canonical
from kreg.kernels import Kernel, biweight
from kreg.masks import Mask
from kreg.stats import Stats


# Options names every keyword; that it admits no others cannot be said before Python 3.15.
@overload
def attention(  # pyrefly: ignore[inconsistent-overload]
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K V"],
    bias: Float[Array, "..."] | None = None,
    mask: Bool[Array, "..."] | Mask | None = None,
    *,
    return_stats: Literal[True],
    **options: Unpack[Options],
) -> tuple[Float[Array, "*B T N V"], Stats]: ...


@overload
def attention(  # pyrefly: ignore[inconsistent-overload]
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K V"],
    bias: Float[Array, "..."] | None = None,
    mask: Bool[Array, "..."] | Mask | None = None,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[Options],
) -> Float[Array, "*B T N V"]: ...


def attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K V"],
    bias: Float[Array, "..."] | None = None,
    mask: Bool[Array, "..."] | Mask | None = None,
    *,
    kernel: Kernel = biweight,
    bandwidth: Rule = Adaptive(),  # noqa: B008 - immutable
    scale: float | None = None,
    is_causal: bool = False,
    causal_offset: int | Int[Array, " B"] = 0,
    query_seq_lengths: Int[Array, " B"] | None = None,
    key_value_seq_lengths: Int[Array, " B"] | None = None,
    segment_ids: Segments | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    logits_soft_cap: float | None = None,
    null_score: Float[ArrayLike, "..."] | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
    precision: jax.lax.PrecisionLike = None,
    implementation: str | None = None,
    return_stats: bool = False,
) -> Float[Array, "*B T N V"] | tuple[Float[Array, "*B T N V"], Stats]:
    r"""Averages values with weights $p_j \propto [z_j - t]_+^r$, $z = (scale\, q k + bias)/h^2$.

    The kernel gives the order r, the bandwidth rule h and the threshold t. Names, order and layout
    are those of `jax.nn.dot_product_attention`; B may be absent, N a multiple of K (grouped heads).

    Args:
        query: queries.
        key: keys, of the queries' width.
        value: values, of any width.
        bias: added to scale q.k; [B, N, T, S], any axis may be 1 or, from the left, absent. A bias
            of -inf excludes.
        mask: boolean of the same shapes, where True takes part, or a `kreg.Mask`.
        kernel: `kreg.biweight` and its relatives; an array order has the scores' rank.
        bandwidth: `Adaptive`, `Fixed`, `Anchored` or `Nearest`; an array h has the scores' rank,
            such as [1, N, 1, 1]. `Fixed` reads scores as cosines: give unit vectors and scale=1.
        scale: 1/sqrt(H) where None.
        is_causal: key j is visible to query i when j <= i + causal_offset.
        causal_offset: number, or one a batch entry; S - T aligns the last query with the last key.
        query_seq_lengths: queries from this index on give 0.
        key_value_seq_lengths: keys from this index on are invisible.
        segment_ids: queries see keys of their own segment; one array when T == S, or a pair.
        local_window_size: how far before and after i + causal_offset a query sees.
        logits_soft_cap: scores become cap tanh(score / cap).
        null_score: score, after scale, bias and cap, of one more key whose value is 0 and that
            every query sees: a row may attend to nothing. A number, or an array such as
            [1, N, 1, 1]. The weights of the true keys then sum to at most 1.
        dropout_rate: probability with which a weight is dropped; needs a `dropout_key`.
        dropout_key: JAX random key; the mask does not depend on the implementation.
        precision: of both matrix products; None is HIGHEST for float32.
        implementation: "reference", "xla", "mosaic_gpu", "mosaic_tpu"; None chooses.
        return_stats: also return threshold, support and residual, each [B, T, N].

    Returns:
        The estimate at each query, in the values' type; 0 for a query without admissible keys,
        whose gradients are 0 too. With `return_stats` a pair of it and `Stats`.

    Raises:
        ValueError: an argument of the wrong shape, type or value, named.
        NotImplementedError: the named implementation does not take these inputs.

    Examples:
        >>> import jax.numpy as jnp
        >>> import kreg
        >>> q = k = v = jnp.eye(3)[None, :, None, :]
        >>> kreg.attention(q, k, v, kernel=kreg.epanechnikov, scale=1.0)[0, 0, 0].tolist()
        [1.0, 0.0, 0.0]

    References:
        Santos et al., `Sparse Attention as Compact Kernel Regression
        <https://arxiv.org/abs/2601.22766>`_, 2026.
    """
    implementations.check(implementation)
    problem = canonical(
        query,
        key,
        value,
        bias,
        mask,
        kernel=kernel,
        bandwidth=bandwidth,
        scale=scale,
        is_causal=is_causal,
        causal_offset=causal_offset,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        segment_ids=segment_ids,
        local_window_size=local_window_size,
        logits_soft_cap=logits_soft_cap,
        null_score=null_score,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        precision=precision,
        return_stats=return_stats,
    )
    out, stats = implementations.run(problem, implementation)
    if query.ndim == 3:
        out, stats = out[0], jax.tree.map(lambda x: x[0], stats)
    return out if stats is None else (out, jax.lax.stop_gradient(stats))


def explain_implementation(*args, implementation: str | None = None, **kwargs) -> str:
    """Says which implementation `attention` takes for the same arguments, and why.

    Examples:
        >>> import jax.numpy as jnp
        >>> import kreg
        >>> q = jnp.zeros((1, 8, 2, 4))
        >>> kreg.explain_implementation(q, q, q)
        'reference: dense is fastest: the scores take 0.0 MiB, the limit is 2'
    """
    implementations.check(implementation)
    if implementation is not None:
        return f"{implementation}: named by the caller"
    return ": ".join(implementations.choose(canonical(*args, **kwargs)))
