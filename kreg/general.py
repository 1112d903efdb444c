r"""Weights of rows of scores, and their derivative, for every kernel and rule.

For orders that are arrays, below 1 or great, for the box and the nearest keys: the formula
as `weights` has it, differentiated by JAX, with the thresholds that the forward pass found.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kreg.bandwidth import Adaptive, Cut, Rule, from_relative_gap
from kreg.bandwidth import Rows as Depths
from kreg.kernels import Kernel
from kreg.rowwise import At, Rows
from kreg.split import WHOLE, Split
from kreg.stats import Stats
from kreg.threshold import known_gap, relative_gap
from kreg.weights import weigh, weigh_depths


class General(NamedTuple):
    """A kernel, of which an order that is an array is given with the rows, and a rule at h = 1."""

    kernel: Kernel
    rule: Rule

    def solve(self, z: Float[Array, "*rows n"], at: At) -> Rows:
        """Finds the gap of every row, where something is to be solved."""
        rows = Depths.of(z)
        gap = jnp.ones_like(rows.best)
        if isinstance(self.rule, Adaptive):
            kernel = self._kernel(at)
            excess = jnp.asarray(kernel.excess, z.dtype)
            gap = relative_gap(kernel.static_order, rows.depth, excess)
        return Rows(rows.best[..., 0], gap[..., 0], jnp.ones_like(gap[..., 0]))

    def weigh(self, z: Float[Array, "*rows n"], at: At) -> tuple[Rows, Array]:
        """Finds the gap of every row, and evaluates p."""
        rows = self.solve(z, at)
        return rows, self.weights(z, rows, at)

    def weights(self, z: Float[Array, "*rows n"], rows: Rows, at: At) -> Array:
        """Evaluates p."""
        kernel, rule = self._kernel(at), self.rule
        if isinstance(rule, Adaptive):
            rule = _Known(rows.gap[..., None])
        fixed = jnp.asarray(0 if at.threshold is None else at.threshold, z.dtype)
        return weigh_depths(Depths.of(z), kernel, rule, fixed)[0]

    def linear(
        self, z: Float[Array, "*rows n"], rows: Rows, at: At
    ) -> tuple[Array, Callable[[Array], tuple[Array, At]]]:
        """Evaluates p, and makes the function from dp to dz and the gradients of `at`; s is 1."""
        shape = (*rows.gap.shape, 1)
        at = jax.tree.map(lambda x: jnp.broadcast_to(x, shape), at)
        return jax.vjp(lambda z, at: self.weights(z, rows, at), z, at)

    def stats(self, z: Float[Array, "*rows n"], rows: Rows, at: At) -> Stats:
        """Threshold, support and certificate of every row."""
        fixed = 0 if at.threshold is None else at.threshold
        return weigh(z, None, self._kernel(at), self.rule, fixed)[1]

    def _kernel(self, at: At) -> Kernel:
        if self.kernel.is_static:
            return self.kernel
        return Kernel.tree_unflatten(None, (at.excess,))


class _Known(Rule):
    """`Adaptive`, where the relative gaps have been found before; they move with the scores."""

    def __init__(self, gap: Array):
        self.h = gap

    def cut(self, rows: Depths, kernel: Kernel, fixed: Array, split: Split = WHOLE) -> Cut:
        excess = jnp.asarray(kernel.excess, rows.depth.dtype)
        gap = known_gap(kernel.static_order, rows.depth, excess, jnp.asarray(self.h))
        return from_relative_gap(gap, excess, rows)
