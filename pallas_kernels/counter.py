"""The counter of `kreg.dropout` in numbers with a sign, which is what kernels have."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array


def stays(queries: Array, keys: Array, word: Array, rate: float) -> Array:
    """Says which weights stay.

    queries: what the counter makes of key, batch entry, head and query; keys: numbers of keys;
    word: the second of the dropout's key.
    """
    bits = _mixed(_mixed(queries ^ keys) + word)
    # Compared as numbers without sign.
    limit = min(round(rate * 2**32), 2**32 - 1)
    return (bits ^ _signed(2**31)) >= _signed(limit ^ 2**31)


def _mixed(x: Array) -> Array:
    def right(x, count):
        return lax.shift_right_logical(x, jnp.full_like(x, count))

    x = (x + _signed(0x9E3779B9)) ^ right(x, 16)
    x = (x ^ right(x, 16)) * _signed(0x85EBCA6B)
    x = (x ^ right(x, 13)) * _signed(0xC2B2AE35)
    return x ^ right(x, 16)


def _signed(word: int) -> Array:
    return jnp.asarray(word - 2**32 if word >= 2**31 else word, jnp.int32)
