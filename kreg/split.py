"""Where the keys of a row are: all of them here, or split over an axis of a mesh.

What is found of a row is found by reductions over its keys. Under `jax.shard_map` with keys that
are split, each reduction is one over the keys here and one over the axis, of a few numbers a row.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int


@dataclass(frozen=True)
class Split:
    """The axis of the mesh that keys are split over; None where all are here."""

    axis: str | None = None

    def sums(self, *terms: Array) -> list[Array]:
        """Sums arrays over the keys, their last axis; together, in one message."""
        return self.joined(*(jnp.sum(x, axis=-1, keepdims=True) for x in terms))

    def joined(self, *parts: Array) -> list[Array]:
        """Adds what was summed over the keys here, arrays of one shape and type."""
        if self.axis is None:
            return list(parts)
        if len(parts) == 1:
            return [lax.psum(parts[0], self.axis)]
        together = lax.psum(jnp.stack(parts), self.axis)
        return [together[i] for i in range(len(parts))]

    def max(self, x: Float[Array, "*rows n"], **options) -> Float[Array, "*rows 1"]:
        """Finds the greatest over the keys; it is a constant for differentiation where split."""
        best = jnp.max(x, axis=-1, keepdims=True, **options)
        return best if self.axis is None else lax.pmax(lax.stop_gradient(best), self.axis)

    def min(self, x: Float[Array, "*rows n"], **options) -> Float[Array, "*rows 1"]:
        """Finds the least over the keys."""
        return -self.max(-x, **{k: -v if k == "initial" else v for k, v in options.items()})

    def any(self, x: Bool[Array, "*rows n"]) -> Bool[Array, "*rows 1"]:
        """Tells whether some key has it."""
        found = jnp.any(x, axis=-1, keepdims=True)
        if self.axis is None:
            return found
        return lax.pmax(found.astype(jnp.int32), self.axis) > 0

    def count(self, x: Bool[Array, "*rows n"]) -> Int[Array, "*rows 1"]:
        """Counts the keys that have it."""
        (found,) = self.joined(jnp.sum(x, axis=-1, keepdims=True, dtype=jnp.int32))
        return found

    def at_best(self, x: Float[Array, "*rows n"]) -> Bool[Array, "*rows n"]:
        """Marks the first of a row's greatest, by index: scores formed again may differ in bits."""
        keys = lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
        alone = keys == jnp.argmax(x, axis=-1, keepdims=True)
        if self.axis is None:
            return alone
        best = lax.optimization_barrier(jnp.max(lax.stop_gradient(x), axis=-1, keepdims=True))
        here = lax.axis_index(self.axis)
        holders = jnp.where(best == lax.pmax(best, self.axis), here, lax.axis_size(self.axis))
        return alone & (lax.pmin(holders, self.axis) == here)

    @property
    def is_first(self) -> bool | Bool[Array, ""]:
        """True where the first keys of a row are."""
        return True if self.axis is None else lax.axis_index(self.axis) == 0

    def keys(self, here: int) -> int:
        """How many keys a row has, of which so many are here."""
        return here if self.axis is None else here * lax.axis_size(self.axis)


WHOLE = Split()
