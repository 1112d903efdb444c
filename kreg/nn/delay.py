"""Sequences moved in time, within their documents. Axes: B batch, T time."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped


def delay(
    x: Shaped[Array, "B T *rest"], steps: int, documents: Int[Array, "B T"] | None = None
) -> Shaped[Array, "B T *rest"]:
    """Return x_{t - steps}, 0 outside the sequence and outside t's document; steps < 0 looks ahead.

    Examples:
      >>> delay(jnp.array([[1, 2, 3]]), 1).tolist(), delay(jnp.array([[1, 2, 3]]), -2).tolist()
      ([[0, 1, 2]], [[3, 0, 0]])
    """
    if steps == 0:
        return x
    moved = _move(x, steps)
    if documents is None:
        return moved
    same = _move(documents + 1, steps) == documents + 1
    return jnp.where(same.reshape(same.shape + (1,) * (x.ndim - 2)), moved, 0)


def _move(x: Shaped[Array, "B T *rest"], steps: int) -> Shaped[Array, "B T *rest"]:
    length = x.shape[1]
    kept = max(length - abs(steps), 0)
    before, after = (length - kept, 0) if steps > 0 else (0, length - kept)
    start = 0 if steps > 0 else length - kept
    widths = [(0, 0), (before, after)] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(jax.lax.slice_in_dim(x, start, start + kept, axis=1), widths)
