"""What the maps and losses ask of their arguments, and the form in which they compute."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import core
from jaxtyping import Array, Bool, Float

from kreg.shapes import broadcasts_to


def as_scores(name: str, x, axis: int) -> Float[Array, "..."]:
    """Makes an array of floats with at least one entry along `axis`."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        x = x.astype(jnp.result_type(float))
    if x.ndim == 0:
        raise ValueError(f"{name}: expected at least one axis, got shape {x.shape}")
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis: expected an axis of {name} with shape {x.shape}, got {axis}")
    if x.shape[axis] == 0:
        raise ValueError(f"{name}: expected an entry along axis {axis}, got shape {x.shape}")
    return x


def along_last(
    x: Float[Array, "..."], axis: int, where
) -> tuple[Float[Array, "*rows n"], Bool[Array, "*rows n"]]:
    """Moves `axis` last; returns scores in float32 or wider, 0 where inadmissible, and the mask."""
    admissible = x > -jnp.inf
    if where is not None:
        where = jnp.asarray(where)
        if where.dtype != bool:
            raise ValueError(f"where: expected a boolean mask, got {where.dtype}")
        if not broadcasts_to(where.shape, x.shape):
            raise ValueError(
                f"where: expected a shape that broadcasts to {x.shape}, got {where.shape}"
            )
        admissible &= jnp.broadcast_to(where, x.shape)
    else:
        # NaN is not > -inf, and at an admissible entry it is the caller's.
        admissible |= jnp.isnan(x)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    wide, admissible = jnp.moveaxis(wide, axis, -1), jnp.moveaxis(admissible, axis, -1)
    return jnp.where(admissible, wide, 0), admissible


def per_row(name: str, value, x: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    """Makes an array of one value for all rows or one a row, with `axis` moved last."""
    value = jnp.asarray(value, jnp.promote_types(x.dtype, jnp.float32))
    if value.ndim == 0:
        return value
    shape = value.shape
    if len(shape) != x.ndim or shape[axis] != 1 or not broadcasts_to(shape, x.shape):
        raise ValueError(
            f"{name}: expected a number or an array of x's rank that broadcasts to {x.shape} with "
            f"size 1 along axis {axis}, got shape {shape}"
        )
    return jnp.moveaxis(value, axis, -1)


def check_values(name: str, value, holds: Callable[[np.ndarray], np.ndarray], wanted: str) -> None:
    """Raises ValueError where a value is concrete and `holds` is not true of all of it."""
    if not isinstance(value, core.Tracer) and not np.all(holds(np.asarray(value, np.float64))):
        raise ValueError(f"{name}: expected {wanted}, got {value}")


def is_number(value) -> bool:
    """True for a Python or NumPy number, which stays static where a function is traced."""
    return isinstance(value, (int, float, np.generic))
