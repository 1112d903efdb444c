"""From the arguments of `attention` to a `Problem`: every check of shapes, types and values."""

from typing import TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Int

from kreg.bandwidth import Adaptive, Fixed, Rule, check_bandwidth
from kreg.dropout import key_words
from kreg.kernels import Kernel, biweight, check_kernel
from kreg.masks import Mask
from kreg.problem import Problem
from kreg.shapes import broadcasts_to

type Segments = Int[Array, "B T"] | tuple[Int[Array, "B T"], Int[Array, "B S"]]


class Options(TypedDict, total=False):
    """The options of `attention` by keyword, but for `return_stats`; it says what they mean."""

    kernel: Kernel
    bandwidth: Rule
    scale: float | None
    is_causal: bool
    causal_offset: int | Int[Array, " B"]
    query_seq_lengths: Int[Array, " B"] | None
    key_value_seq_lengths: Int[Array, " B"] | None
    segment_ids: Segments | None
    local_window_size: int | tuple[int, int] | None
    logits_soft_cap: float | None
    null_score: ArrayLike | None
    dropout_rate: float
    dropout_key: Array | None
    precision: jax.lax.PrecisionLike
    implementation: str | None


def canonical(
    query,
    key,
    value,
    bias=None,
    mask=None,
    *,
    kernel: Kernel = biweight,
    bandwidth: Rule = Adaptive(),  # noqa: B008 - immutable
    scale=None,
    is_causal=False,
    causal_offset=0,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    segment_ids=None,
    local_window_size=None,
    logits_soft_cap=None,
    null_score=None,
    dropout_rate=0.0,
    dropout_key=None,
    precision=None,
    return_stats=True,
) -> Problem:
    """Checks the arguments of `attention` and gives them their full shapes."""
    query, key, value = _arrays(query, key, value)
    batch, queries, heads, width = query.shape
    keys = key.shape[1]
    grid = (batch, heads, queries, keys)
    check_kernel(kernel)
    check_bandwidth(bandwidth, kernel, 4)
    if scale is None and isinstance(bandwidth, Fixed):
        raise ValueError(
            "scale: expected a number (1 for unit queries and keys) with kreg.Fixed, whose "
            "bandwidth is a distance, got None"
        )
    wide = jnp.promote_types(jnp.result_type(query, key, value), jnp.float32)
    _check_per_batch("causal_offset", causal_offset, batch)
    _check_per_batch("query_seq_lengths", query_seq_lengths, batch)
    _check_per_batch("key_value_seq_lengths", key_value_seq_lengths, batch)
    ranges = Mask(
        segment_ids=segment_ids,
        is_causal=bool(is_causal),
        causal_offset=causal_offset,
        local_window_size=local_window_size,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
    )
    given = mask if isinstance(mask, Mask) else Mask(mask)
    given.check(*grid)
    ranges.check(*grid)
    return Problem(
        query=query,
        key=key,
        value=value,
        bias=_on_grid("bias", bias, grid),
        null=_per_row(null_score, grid, "null_score", wide),
        mask=given & ranges,
        kernel=_per_row(kernel, grid, "kernel", wide),
        rule=_per_row(bandwidth, grid, "bandwidth", wide),
        rows=jnp.arange(queries),
        columns=jnp.arange(keys),
        pairs=jnp.arange(batch * heads, dtype=jnp.uint32).reshape(batch, heads),
        dropout_key=_dropout(dropout_rate, dropout_key),
        scale=jnp.asarray(width**-0.5 if scale is None else scale, wide),
        soft_cap=None if logits_soft_cap is None else float(logits_soft_cap),
        dropout_rate=float(dropout_rate),
        precision=jax.lax.Precision.HIGHEST if precision is None else precision,
        with_stats=return_stats,
    )


def _arrays(query, key, value) -> tuple[Array, Array, Array]:
    query, key, value = jnp.asarray(query), jnp.asarray(key), jnp.asarray(value)
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name}: expected a floating type, got {x.dtype}")
        if x.ndim not in (3, 4) or x.ndim != query.ndim:
            raise ValueError(
                f"{name}: expected [B, T, N, H] or [T, N, H] as the query's, got shape {x.shape}"
            )
    if query.ndim == 3:
        query, key, value = query[None], key[None], value[None]
    batch, _, heads, width = query.shape
    if key.shape[0] != batch or key.shape[3] != width or not key.shape[2] or heads % key.shape[2]:
        raise ValueError(
            f"key: expected [B={batch}, S, K, H={width}] with K dividing N={heads}, "
            f"got shape {key.shape}"
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(f"value: expected {key.shape[:3]} and a width, got shape {value.shape}")
    if not key.shape[1]:
        raise ValueError(f"key: expected at least one key, got shape {key.shape}")
    return query, key, value


def _on_grid(name: str, x, grid: tuple[int, ...]) -> Array | None:
    """Gives a bias rank 4; each axis is the grid's or 1."""
    if x is None:
        return None
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name}: expected floating, got {x.dtype}")
    full = x.reshape((1,) * (4 - x.ndim) + x.shape) if x.ndim < 4 else x
    if not broadcasts_to(full.shape, grid):
        raise ValueError(
            f"{name}: expected a shape that broadcasts to [B, N, T, S] = {list(grid)}, "
            f"got {x.shape}"
        )
    return full


def _per_row(tree, grid: tuple[int, ...], name: str, dtype):
    """Gives the arrays of a kernel, a rule or a null score rank 4, one value a row at most."""

    def leaf(x):
        x = jnp.asarray(x, dtype)
        x = x.reshape((1,) * 4) if x.ndim == 0 else x
        rows = (*grid[:3], 1)
        if x.ndim != 4 or not broadcasts_to(x.shape, rows):
            raise ValueError(
                f"{name}: expected a number or an array that broadcasts to [B, N, T, 1] = "
                f"{list(rows)}, got shape {x.shape}"
            )
        return x

    return jax.tree.map(leaf, tree)


def _check_per_batch(name: str, x, batch: int) -> None:
    """Raises ValueError where integers are not one, or one a batch entry."""
    if x is None or isinstance(x, (int, np.integer)):
        return
    x = jnp.asarray(x)
    shapes = ((), (batch,)) if name == "causal_offset" else ((batch,),)
    if not jnp.issubdtype(x.dtype, jnp.integer) or x.shape not in shapes:
        raise ValueError(
            f"{name}: expected an integer or integers of shape [B={batch}], "
            f"got {x.dtype} of shape {x.shape}"
        )


def _dropout(rate: float, key) -> Array | None:
    if not 0 <= rate < 1:
        raise ValueError(f"dropout_rate: expected 0 <= rate < 1, got {rate}")
    if rate > 0 and key is None:
        raise ValueError(f"dropout_key: expected a random key with dropout_rate={rate}, got None")
    return key_words(key) if rate > 0 else None
