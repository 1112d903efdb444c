"""From the arguments of `attention` to a `Problem`: every check of shapes, types and values."""

from typing import TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from kreg.bandwidth import Adaptive, Fixed, Rule, check_bandwidth
from kreg.dropout import key_words
from kreg.kernels import Kernel, biweight, check_kernel
from kreg.problem import Problem

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
    dropout_rate=0.0,
    dropout_key=None,
    precision=None,
) -> Problem:
    """Checks the arguments of `attention` and gives them their full shapes."""
    query, key, value = _arrays(query, key, value)
    batch, queries, heads, width = query.shape
    grid = (batch, heads, queries, key.shape[1])
    check_kernel(kernel)
    check_bandwidth(bandwidth, kernel, 4)
    if scale is None and isinstance(bandwidth, Fixed):
        raise ValueError(
            "scale: expected a number (1 for unit queries and keys) with kreg.Fixed, whose "
            "bandwidth is a distance, got None"
        )
    if not is_causal and isinstance(causal_offset, (int, np.integer)) and causal_offset != 0:
        raise ValueError(f"causal_offset: expected 0 without is_causal, got {causal_offset}")
    segments = _segments(segment_ids, batch, queries, key.shape[1])
    wide = jnp.promote_types(jnp.result_type(query, key, value), jnp.float32)
    return Problem(
        query=query,
        key=key,
        value=value,
        bias=_on_grid("bias", bias, grid, jnp.floating),
        mask=_on_grid("mask", mask, grid, jnp.bool_),
        kernel=_with_rank(kernel, grid, "kernel", wide),
        rule=_with_rank(bandwidth, grid, "bandwidth", wide),
        rows=jnp.arange(queries),
        offset=_offset(causal_offset, batch),
        query_lengths=_lengths("query_seq_lengths", query_seq_lengths, batch),
        key_lengths=_lengths("key_value_seq_lengths", key_value_seq_lengths, batch),
        query_segments=segments[0],
        key_segments=segments[1],
        dropout_key=_dropout(dropout_rate, dropout_key),
        scale=jnp.asarray(width**-0.5 if scale is None else scale, wide),
        is_causal=bool(is_causal),
        window=_window(local_window_size),
        soft_cap=None if logits_soft_cap is None else float(logits_soft_cap),
        dropout_rate=float(dropout_rate),
        precision=jax.lax.Precision.HIGHEST if precision is None else precision,
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


def _on_grid(name: str, x, grid: tuple[int, ...], kind) -> Array | None:
    """Gives a bias or mask rank 4; each axis is the grid's or 1."""
    if x is None:
        return None
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, kind):
        raise ValueError(f"{name}: expected {kind.__name__.rstrip('_')}, got {x.dtype}")
    full = x.reshape((1,) * (4 - x.ndim) + x.shape) if x.ndim < 4 else x
    if full.ndim != 4 or any(a not in (1, b) for a, b in zip(full.shape, grid, strict=True)):
        raise ValueError(
            f"{name}: expected a shape that broadcasts to [B, N, T, S] = {list(grid)}, "
            f"got {x.shape}"
        )
    return full


def _with_rank(tree, grid: tuple[int, ...], name: str, dtype):
    """Gives the arrays of a kernel or rule the scores' rank, one value a row at most."""

    def leaf(x):
        x = jnp.asarray(x, dtype)
        x = x.reshape((1,) * 4) if x.ndim == 0 else x
        rows = (*grid[:3], 1)
        if x.ndim != 4 or any(a not in (1, b) for a, b in zip(x.shape, rows, strict=True)):
            raise ValueError(
                f"{name}: expected a number or an array that broadcasts to [B, N, T, 1] = "
                f"{list(rows)}, got shape {x.shape}"
            )
        return x

    return jax.tree.map(leaf, tree)


def _offset(offset, batch: int) -> Int[Array, " #B"]:
    offset = jnp.asarray(offset)
    if not jnp.issubdtype(offset.dtype, jnp.integer) or offset.shape not in ((), (batch,)):
        raise ValueError(
            f"causal_offset: expected an integer or integers of shape [B={batch}], "
            f"got {offset.dtype} of shape {offset.shape}"
        )
    return offset.reshape(-1)


def _lengths(name: str, lengths, batch: int) -> Int[Array, " B"] | None:
    if lengths is None:
        return None
    lengths = jnp.asarray(lengths)
    if not jnp.issubdtype(lengths.dtype, jnp.integer) or lengths.shape != (batch,):
        raise ValueError(
            f"{name}: expected integers of shape [B={batch}], "
            f"got {lengths.dtype} of shape {lengths.shape}"
        )
    return lengths


def _segments(segment_ids, batch: int, queries: int, keys: int):
    if segment_ids is None:
        return None, None
    pair = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
    of_queries, of_keys = (jnp.asarray(x) for x in pair)
    of_queries, of_keys = (x[None] if x.ndim == 1 else x for x in (of_queries, of_keys))
    if of_queries.shape != (batch, queries) or of_keys.shape != (batch, keys):
        raise ValueError(
            f"segment_ids: expected [B, T] = {[batch, queries]} (T == S), or a pair of it and "
            f"[B, S] = {[batch, keys]}, got shapes {of_queries.shape} and {of_keys.shape}"
        )
    return of_queries, of_keys


def _window(size) -> tuple[int, int] | None:
    if size is None:
        return None
    pair = (size, size) if isinstance(size, (int, np.integer)) else tuple(size)
    if len(pair) != 2 or any(not isinstance(x, (int, np.integer)) or x < 0 for x in pair):
        raise ValueError(
            f"local_window_size: expected an integer >= 0 or a pair (before, after), got {size!r}"
        )
    return int(pair[0]), int(pair[1])


def _dropout(rate: float, key) -> Array | None:
    if not 0 <= rate < 1:
        raise ValueError(f"dropout_rate: expected 0 <= rate < 1, got {rate}")
    if rate > 0 and key is None:
        raise ValueError(f"dropout_key: expected a random key with dropout_rate={rate}, got None")
    return key_words(key) if rate > 0 else None
