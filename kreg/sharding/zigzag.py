"""Which queries a device takes under causality: an early and a late part, so that all are alike.

Of 2 P parts of the queries, P devices hold two neighbours each; device i takes parts i and
2 P - 1 - i, the last of which see most keys and the first fewest. Parts go to where they are
worked on, and results come back.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from kreg.problem import Problem


def dealt(problem: Problem, axis: str) -> tuple[Problem, Problem]:
    """Exchanges the halves of a device's queries for its early and its late part."""
    half = problem.sizes["t"] // 2
    halves = problem.part(t=(0, half)), problem.part(t=(half, half))
    leaves, tree = jax.tree.flatten(problem)
    names = jax.tree.leaves(problem.axes())
    both = [jax.tree.leaves(x) for x in halves]
    for i, (x, name) in enumerate(zip(leaves, names, strict=True)):
        at = name.find("t")
        if at >= 0 and x.shape[at] == 2 * half:
            both[0][i], both[1][i] = _deal(both[0][i], both[1][i], axis)
    early, late = (jax.tree.unflatten(tree, x) for x in both)
    return early, late


def returned(early, late, axis: str):
    """Brings results of the two parts, arrays [B, T/2, ...], back to where queries came from."""
    return jax.tree.map(lambda a, b: jnp.concatenate(_collect(a, b, axis), axis=1), early, late)


def _owners(axis: str) -> tuple[list[int], list[int]]:
    """Which device works on the first and which on the second half of each device's queries."""
    size = lax.axis_size(axis)

    def owner(part: int) -> int:
        return part if part < size else 2 * size - 1 - part

    return [owner(2 * i) for i in range(size)], [owner(2 * i + 1) for i in range(size)]


def _deal(first: Array, second: Array, axis: str) -> tuple[Array, Array]:
    firsts, seconds = _owners(axis)
    first = lax.ppermute(first, axis, list(enumerate(firsts)))
    second = lax.ppermute(second, axis, list(enumerate(seconds)))
    return _ordered(first, second, axis)


def _collect(early: Array, late: Array, axis: str) -> tuple[Array, Array]:
    firsts, seconds = _owners(axis)
    first, second = _ordered(early, late, axis)
    back = [(owner, i) for i, owner in enumerate(firsts)]
    first = lax.ppermute(first, axis, back)
    second = lax.ppermute(second, axis, [(owner, i) for i, owner in enumerate(seconds)])
    return first, second


def _ordered(a: Array, b: Array, axis: str) -> tuple[Array, Array]:
    """Parts of even number come from first halves: an even device's early part is one of these."""
    is_even = lax.axis_index(axis) % 2 == 0
    return jnp.where(is_even, a, b), jnp.where(is_even, b, a)
