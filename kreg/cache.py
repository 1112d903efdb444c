"""What is found of many rows, a block of them at a time: on CPU all passes find it in cache."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

# A block of rows takes about this many bytes.
_BLOCK_BYTES = 2 * 2**20


def in_cache[Found](
    find: Callable[[Float[Array, "*rows n"]], Found], z: Float[Array, "*rows n"]
) -> Found:
    """Calls a function that finds a few numbers of every row, each by itself.

    Args:
        find: what it returns is a tree of arrays [*rows].
        z: the rows.
    """
    shape, count = z.shape[:-1], math.prod(z.shape[:-1])
    size = max(1, _BLOCK_BYTES // (z.shape[-1] * z.dtype.itemsize))
    if jax.default_backend() != "cpu" or count < 2 * size:
        return find(z)
    z = z.reshape(count, -1)

    def block(i, found):
        # The last one is a full block too: it may do some rows of the one before again.
        start = jnp.minimum(i * size, count - size)
        # Cut once, not for every pass.
        new = find(lax.optimization_barrier(lax.dynamic_slice_in_dim(z, start, size)))
        return jax.tree.map(
            lambda x, part: lax.dynamic_update_slice_in_dim(x, part, start, 0), found, new
        )

    wanted = jax.eval_shape(find, z)
    found = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), wanted)
    found = lax.fori_loop(0, -(-count // size), block, found)
    return jax.tree.map(lambda x: x.reshape(shape), found)
