"""An attention problem split into what gradients flow to and the rest.

Implementations with a backward pass of their own work on the two; `plain` is the same function
for all derivatives but theirs.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kreg import chunked
from kreg.bandwidth import Fixed
from kreg.kernels import Kernel
from kreg.masks import Mask
from kreg.problem import Problem
from kreg.rowwise import At


class Inputs(NamedTuple):
    """What gradients flow to; scores are z = scale q.k + bias."""

    query: Float[Array, "B T N H"]
    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K V"]
    scale: Float[Array, "#B #T #N 1"]
    bias: Float[Array, "#B #N #T #S"] | None
    at: At  # [#B, #N, #T, 1]


def separate(problem: Problem) -> tuple[Inputs, Problem]:
    """Splits a problem; bandwidths become part of scale and threshold, the rest has h = 1."""
    dtype = problem.dtype
    squeeze = 1 / jnp.square(jnp.asarray(problem.rule.h, dtype))
    scale = problem.scale.astype(dtype) * jnp.swapaxes(squeeze, 1, 2)
    bias, mask = problem.bias, problem.mask
    if bias is not None:
        seen = bias != -jnp.inf
        bias, mask = jnp.where(seen, bias, 0).astype(dtype) * squeeze, mask & Mask(seen)
    is_cut_at = isinstance(problem.rule, Fixed) and not problem.kernel.is_gaussian
    at = At(
        squeeze - 0.5 if is_cut_at else None,
        None if problem.kernel.is_static else jnp.asarray(problem.kernel.excess, dtype),
    )
    inputs = Inputs(problem.query, problem.key, problem.value, scale, bias, at)
    one = jnp.ones((), dtype)
    rule = jax.tree.map(lambda _: one.reshape(1, 1, 1, 1), problem.rule)
    return inputs, dataclasses.replace(_emptied(problem), mask=mask, rule=rule, scale=one)


def without_dead(problem: Problem) -> Problem:
    """Zeroes keys that take no part, and queries but for those to which a static band says so."""
    mask, keys = problem.mask, problem.sizes["s"]
    if not mask.is_static or problem.bias is not None:
        return chunked.alive(problem)
    queries = problem.sizes["t"]
    low = 0 if mask.lower is None else max(0, max(0, -(mask.upper or 0)) + mask.lower)
    high = keys if mask.upper is None else max(0, queries + mask.upper)
    if low == 0 and high >= keys:
        return problem
    columns = problem.columns[None, :, None, None]
    seen = (columns >= low) & (columns < high)
    return dataclasses.replace(
        problem, key=jnp.where(seen, problem.key, 0), value=jnp.where(seen, problem.value, 0)
    )


def joined(inputs: Inputs, rest: Problem) -> Problem:
    """Puts queries, keys, values and bias back."""
    query, key, value, _, bias, _ = inputs
    return dataclasses.replace(rest, query=query, key=key, value=value, bias=bias)


def plain(inputs: Inputs, rest: Problem) -> Float[Array, "B T N V"]:
    """Computes the same with the chunked path, whose every derivative JAX can take."""
    inputs = inputs._replace(query=inputs.query.astype(rest.scale.dtype) * inputs.scale)
    threshold, excess = inputs.at
    if excess is not None:
        rest = dataclasses.replace(rest, kernel=Kernel.tree_unflatten(None, (excess,)))
    if threshold is not None:  # by moving the scores, for the rule's own is 1/2
        bias = 0.5 - threshold
        inputs = inputs._replace(bias=bias if inputs.bias is None else inputs.bias + bias)
    return chunked.attend(dataclasses.replace(joined(inputs, rest), with_stats=False))[0]


def _emptied(problem: Problem) -> Problem:
    """Takes out what `Inputs` carries; of an order that is an array only that it is one."""
    none: Any = None
    if not problem.kernel.is_static:
        problem = dataclasses.replace(problem, kernel=Kernel.tree_unflatten(None, (none,)))
    return dataclasses.replace(problem, query=none, key=none, value=none, bias=none)
