r"""Bandwidth rules: how wide the kernel is around each query, or where its scores are cut.

A rule answers one question, the gap: how far below the row's best score the threshold lies.
Weights are proportional to [1 + d / gap]_+^r for depths d = z - max z.

h is always a leaf of the pytree: a number, or an array of the scores' rank such as [1, N, 1, 1].
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from kreg.deformed import Scale, relative_scale
from kreg.kernels import Kernel
from kreg.nearest import ranked
from kreg.split import WHOLE, Split
from kreg.threshold import relative_gap


class Rows(NamedTuple):
    """Scores as a rule sees them: z = best + depth."""

    depth: Float[Array, "*rows n"]  # <= 0; hugely negative where inadmissible
    where: Bool[Array, "*#rows n"]
    best: Float[Array, "*rows 1"]  # a constant for differentiation: weights do not depend on it

    @classmethod
    def of(
        cls,
        scores: Float[Array, "*rows n"],
        where: Bool[Array, "*#rows n"] | None = None,
        split: Split = WHOLE,
    ) -> "Rows":
        """Measures scores from the row's best; those of -inf are inadmissible where None."""
        if where is None:
            # NaN is not > -inf, and at an admissible entry it is the caller's.
            where = (scores > -jnp.inf) | jnp.isnan(scores)
        scores = jnp.where(where, scores, 0)
        floor = -(jnp.finfo(scores.dtype).max ** 0.5)
        best = split.max(scores, where=where, initial=-jnp.inf)
        # Scores of +inf are the caller's; a row without keys has best -inf here.
        best = jax.lax.stop_gradient(jnp.where(best == -jnp.inf, 0, best))
        depth = jnp.where(where, jnp.maximum(scores - best, floor), floor)
        return cls(depth, where, best)


class Cut(NamedTuple):
    """A rule's answer for each row."""

    scale: Scale
    threshold: Float[Array, "*rows 1"]  # t, in units of z
    keep: Bool[Array, "*rows n"] | None = None  # keys that may have weight, where not all may
    uniform: Bool[Array, "*rows 1"] | None = None  # rows that weigh those keys equally


class Rule:
    """What the four rules share: a bandwidth h, a leaf."""

    h: ArrayLike

    def tree_flatten(self) -> tuple[tuple[ArrayLike], int | None]:
        return (self.h,), None

    @classmethod
    def tree_unflatten(cls, static: int | None, children: tuple[ArrayLike]) -> "Rule":
        # Not by __init__: leaves may be anything while JAX transforms a tree.
        rule = object.__new__(cls)
        (rule.h,) = children
        return rule

    def __repr__(self) -> str:
        return f"{type(self).__name__}(h={self.h})"

    # By value where h is a number, so that layers made alike count as alike.
    def _value(self) -> tuple:
        h = self.h if isinstance(self.h, (int, float)) else id(self.h)
        return type(self), h, self.tree_flatten()[1]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rule) and self._value() == other._value()

    def __hash__(self) -> int:
        return hash(self._value())

    def cut(self, rows: Rows, kernel: Kernel, fixed: Array, split: Split = WHOLE) -> Cut:
        """Finds where the rows are cut; `fixed` is the threshold that `Fixed` stands for."""
        raise NotImplementedError


@jax.tree_util.register_pytree_node_class
class Adaptive(Rule):
    r"""Widens the kernel until its unnormalised sum is a given number: alpha-entmax.

    The threshold t solves $\sum_j [(z_j - t)/r]_+^r = 1$ for z = s/h^2: sparsemax with
    Epanechnikov, 3/2-entmax with biweight, softmax with the Gaussian. Never empty.

    Args:
        h: bandwidth at which scores are measured; one over the square root of the temperature.

    Examples:
        >>> import kreg
        >>> kreg.Adaptive()
        Adaptive(h=1.0)
    """

    def __init__(self, h: ArrayLike = 1.0):
        self.h = h

    def cut(self, rows: Rows, kernel: Kernel, fixed: Array, split: Split = WHOLE) -> Cut:
        dtype = rows.depth.dtype
        excess = jnp.asarray(kernel.excess, dtype)
        order = kernel.order if kernel.is_static else None
        return from_relative_gap(relative_gap(order, rows.depth, excess, split), excess, rows)


@jax.tree_util.register_pytree_node_class
class Anchored(Rule):
    r"""Anchors the kernel on the best key: t = max z - r, or H^2 = d_min^2 + 2 r h^2.

    ReLUmax with Epanechnikov, softmax with the Gaussian. Never empty, and nothing is solved.

    Examples:
        >>> import kreg
        >>> kreg.Anchored(0.5)
        Anchored(h=0.5)
    """

    def __init__(self, h: ArrayLike = 1.0):
        self.h = h

    def cut(self, rows: Rows, kernel: Kernel, fixed: Array, split: Split = WHOLE) -> Cut:
        excess = jnp.asarray(kernel.excess, rows.depth.dtype)
        # By index, for the gradient: scores formed again in the backward pass may differ in the
        # last bit, and a comparison with the maximum would then find no key at all.
        at_best = split.at_best(rows.depth) & rows.where
        (best,) = split.sums(jnp.where(at_best, rows.depth, 0))
        return from_relative_gap(1 - excess * best, excess, rows)


@jax.tree_util.register_pytree_node_class
class Fixed(Rule):
    r"""Uses one bandwidth for all queries: K_r(d / h); normalised ReLU with Epanechnikov.

    In `attention` (unit queries and keys, scale 1) t = 1/h^2 - 1/2; in `nadaraya_watson` the
    distance is the true one. A row with no key within h falls back to equal weights on its
    admissible keys.

    Examples:
        >>> import kreg
        >>> kreg.Fixed(0.8)
        Fixed(h=0.8)
    """

    def __init__(self, h: ArrayLike):
        self.h = h

    def cut(self, rows: Rows, kernel: Kernel, fixed: Array, split: Split = WHOLE) -> Cut:
        gap = rows.best - fixed
        if kernel.is_static and kernel.order == 0:
            keep = (gap < 0) | (rows.depth >= -gap)
            return Cut(Scale(gap, gap, gap), rows.best - gap, keep)
        return _from_gap(gap, kernel, rows, gap <= 0)


@jax.tree_util.register_pytree_node_class
class Nearest(Rule):
    r"""Cuts at the k nearest keys: kNN regression with the box, top-k softmax with the Gaussian.

    Box and Gaussian keep all z >= z_(k), ties included; other kernels have t = z_(k+1), the
    distance of the next key as bandwidth, with equal weights on the k nearest where that leaves
    nothing (ties) or where there are at most k admissible keys.

    Args:
        k: number of neighbours, static.
        h: bandwidth at which scores are measured; matters to the Gaussian alone.

    Examples:
        >>> import kreg
        >>> kreg.Nearest(8)
        Nearest(k=8, h=1.0)
    """

    k: int

    def __init__(self, k: int, h: ArrayLike = 1.0):
        self.k, self.h = k, h

    def tree_flatten(self) -> tuple[tuple[ArrayLike], int | None]:
        return (self.h,), self.k

    @classmethod
    def tree_unflatten(cls, static: int | None, children: tuple[ArrayLike]) -> "Rule":
        rule = object.__new__(cls)
        (rule.h,) = children
        if static is not None:
            rule.k = static
        return rule

    def __repr__(self) -> str:
        return f"Nearest(k={self.k}, h={self.h})"

    def cut(self, rows: Rows, kernel: Kernel, fixed: Array, split: Split = WHOLE) -> Cut:
        # One copy of the scores: ties with the k-th must hold to the last bit.
        depth = jax.lax.optimization_barrier(rows.depth)
        at, after = ranked(depth, self.k, split)
        keep = rows.where & (depth >= at)
        few = split.count(rows.where) <= self.k
        if kernel.is_static and kernel.order in (0, float("inf")):
            return Cut(Scale(-at, at, at), jnp.where(few, -jnp.inf, rows.best + at), keep)
        gap = -after
        cut = _from_gap(gap, kernel, rows, few | (gap <= 0))
        return cut._replace(keep=keep, threshold=jnp.where(few, -jnp.inf, cut.threshold))


def check_bandwidth(rule: Rule, kernel: Kernel, rank: int) -> None:
    """Raises ValueError where the rule, its concrete h or its k do not fit."""
    if not isinstance(rule, Rule):
        raise ValueError(f"bandwidth: expected a rule such as kreg.Adaptive(), got {rule!r}")
    if kernel.is_static and kernel.order == 0 and isinstance(rule, (Adaptive, Anchored)):
        raise ValueError(
            f"bandwidth: expected Fixed or Nearest with the box kernel, got {rule!r}; its weights "
            "are equal inside the bandwidth, so no threshold can normalise them"
        )
    if isinstance(rule, Nearest) and not (isinstance(rule.k, (int, np.integer)) and rule.k >= 1):
        raise ValueError(f"bandwidth: expected Nearest(k) with an integer k >= 1, got k={rule.k!r}")
    shape = jnp.shape(rule.h)
    if shape and (len(shape) != rank or shape[-1] != 1):
        raise ValueError(
            f"bandwidth: expected h as a number or an array of the scores' rank {rank} with size 1 "
            f"along the keys, such as [1, N, 1, 1], got shape {shape}"
        )
    if not isinstance(rule.h, jax.core.Tracer) and not np.all(np.asarray(rule.h, np.float64) > 0):
        raise ValueError(f"bandwidth: expected h > 0, got {rule.h}")


def from_relative_gap(rho: Array, excess: Array, rows: Rows) -> Cut:
    """Cuts at t = best - r rho."""
    scale = relative_scale(rho, excess)
    return Cut(scale, rows.best - scale.gap)


def _from_gap(gap: Array, kernel: Kernel, rows: Rows, uniform: Bool[Array, "*rows 1"]) -> Cut:
    excess = jnp.asarray(kernel.excess, gap.dtype)
    limit = excess == 0
    threshold = jnp.where(limit, -jnp.inf, rows.best - gap)
    gap = jnp.where(uniform, 1, gap)
    reach = jnp.where(limit, 0, 1 / gap)
    steepness = jnp.where(limit, 1, reach / jnp.where(limit, 1, excess))
    scale = Scale(jnp.where(limit, jnp.inf, gap), reach, steepness)
    return Cut(scale, threshold, None, uniform & ~limit)
