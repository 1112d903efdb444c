"""Which keys each query sees, as numbers of queries and of keys: what all kernels are told."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from kreg.masks import Mask


class Ranges(NamedTuple):
    """Query i sees keys from low[i] to before high[i] that, by their own numbers, see it too.

    segments: of queries. bounds: of every block of queries the first tile of keys and the end of
        those that any of its queries sees, first and end of those that all of them see whole.
    by_key: first query, end of queries and segment of every key.
    """

    low: Int[Array, "B T'"]
    high: Int[Array, "B T'"]
    segments: Int[Array, "B T'"]
    bounds: Int[Array, "B I 4"]
    by_key: Int[Array, "B 3 S'"]


def without_keys(mask: Mask, queries: int, keys: int) -> Bool[Array, "#B T"]:
    """Which queries see nothing by their own numbers."""
    low, high = _rows(mask, queries, keys, queries)
    return high <= low


def is_by_key(mask: Mask) -> bool:
    """Whether keys have numbers of their own that say which queries see them."""
    ranges = mask.query_start, mask.query_stop
    return bool(mask.segments) or any(x is not None and x.shape[1] > 1 for x in ranges)


def ranges(
    mask: Mask, batch: int, queries: int, keys: int, block: int, tile: int, columns: int
) -> Ranges:
    """Turns a mask into ranges, for blocks of queries and tiles of keys; columns: padded keys."""
    blocks = -(-queries // block)
    low, high = (_whole(x, batch) for x in _rows(mask, queries, keys, blocks * block))
    firsts, lasts = (x.reshape(batch, blocks, block) for x in (low, high))
    some = lasts > firsts
    first = jnp.min(jnp.where(some, firsts, keys), axis=-1) // tile
    stop = -(-jnp.max(jnp.where(some, lasts, 0), axis=-1) // tile)
    full = -(-jnp.max(firsts, axis=-1) // tile), jnp.min(lasts, axis=-1) // tile
    if is_by_key(mask):
        tiles = mask.tiles(queries, keys, block, tile)[:, 0]
        # What is not filled is never seen whole: its last keys, or queries, are not there.
        filled = (jnp.arange(blocks) < queries // block)[:, None]
        filled = filled & (jnp.arange(tiles.shape[-1]) < keys // tile)[None]
        whole = (tiles > 1) & filled[None]
        (first, stop), full = (_run(tiles > 0, True), _run(whole, False))
    bounds = jnp.stack(jnp.broadcast_arrays(jnp.minimum(first, stop), stop, *full), axis=-1)
    segments, by_key = _of_keys(mask, batch, queries, blocks * block, columns)
    return Ranges(low, high, segments, _whole(bounds, batch).astype(jnp.int32), by_key)


def _whole(x: Array, batch: int) -> Array:
    return jnp.broadcast_to(x, (batch, *x.shape[1:]))


def _rows(mask: Mask, queries: int, keys: int, rows: int) -> tuple[Array, Array]:
    """Finds low and high of every query, padded ones too; both 0 where there is no key."""
    i = jnp.arange(rows, dtype=jnp.int32)[None]
    low = jnp.zeros((1, rows), jnp.int32)
    high = jnp.where(i < queries, keys, low)

    def full(x):
        x = jnp.asarray(x, jnp.int32)
        x = x.reshape(-1, 1) if x.ndim < 2 else x
        return x if x.shape[1] == 1 else jnp.pad(x, ((0, 0), (0, rows - x.shape[1])))

    if mask.lower is not None:
        low = jnp.maximum(low, i + full(mask.lower))
    if mask.upper is not None:
        high = jnp.minimum(high, i + full(mask.upper) + 1)
    if mask.key_start is not None:
        low = jnp.maximum(low, full(mask.key_start))
    if mask.key_stop is not None:
        high = jnp.minimum(high, full(mask.key_stop))
    # These are by key, and of queries where they are the same for all keys.
    if mask.query_start is not None and mask.query_start.shape[1] == 1:
        high = jnp.where(i >= full(mask.query_start), high, 0)
    if mask.query_stop is not None and mask.query_stop.shape[1] == 1:
        high = jnp.where(i < full(mask.query_stop), high, 0)
    some = high > low
    return jnp.where(some, low, 0), jnp.where(some, high, 0)


def _run(tiles: Bool[Array, "#B I J"], widest: bool) -> tuple[Array, Array]:
    """First and end of the tiles that are True; where others lie between, of all or of none."""
    count, last = jnp.sum(tiles, axis=-1), tiles.shape[-1]
    first = jnp.argmax(tiles, axis=-1)
    stop = jnp.where(count > 0, last - jnp.argmax(tiles[..., ::-1], axis=-1), first)
    return first, stop if widest else jnp.where(stop - first == count, stop, first)


def _of_keys(mask: Mask, batch: int, queries: int, rows: int, columns: int) -> tuple[Array, Array]:
    """Segments of queries, and what keys say of queries."""

    def full(x, size):
        x = jnp.asarray(x, jnp.int32)
        x = jnp.broadcast_to(x, (batch, x.shape[-1]))
        if x.shape[1] == 1:
            return jnp.broadcast_to(x, (batch, size))
        return jnp.pad(x, ((0, 0), (0, size - x.shape[1])))

    pair = mask.segments[0] if mask.segments else ([[0]], [[0]])
    start = [[0]] if mask.query_start is None else mask.query_start
    stop = [[queries]] if mask.query_stop is None else mask.query_stop
    by_key = jnp.stack([full(x, columns) for x in (start, stop, pair[1])], axis=1)
    return full(pair[0], rows), by_key
