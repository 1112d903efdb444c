"""Dropout of weights by a counter: the mask depends on (key, batch, head, query, key index) alone.

Any implementation that knows the absolute indices of its tile draws the same mask.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, UInt32


def key_words(key: Array) -> UInt32[Array, " 2"]:
    """Reads two words from a JAX random key, typed or raw."""
    data = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    data = data.astype(jnp.uint32).ravel()
    return jnp.stack([data[0], data[-1]]) if data.size < 4 else data[:2] ^ data[2:4]


def keep_mask(
    words: UInt32[Array, " 2"],
    rate: float,
    pairs: UInt32[Array, "B N"],
    rows: Int[Array, " T"],
    columns: Int[Array, " S"],
) -> Bool[Array, "B N T S"]:
    """Draws which weights stay, each with probability 1 - rate."""
    column = columns.astype(jnp.uint32)[None, None, None, :]
    bits = _mix(_mix(row_states(words, pairs, rows)[..., None] ^ column) + words[1])
    return bits >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))


def row_states(
    words: UInt32[Array, " 2"], pairs: UInt32[Array, "B N"], rows: Int[Array, " T"]
) -> UInt32[Array, "B N T"]:
    """What the counter makes of key, batch entry, head and query."""
    row = rows.astype(jnp.uint32)[None, None, :]
    return _mix(_mix(words[0] ^ pairs[:, :, None]) ^ row)


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Mixes 32 bits so that each input bit flips half the output bits (Murmur3's finaliser)."""
    x = (x + jnp.uint32(0x9E3779B9)) ^ (x >> 16)
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
