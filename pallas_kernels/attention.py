"""Attention by kernels, whatever they run on: derivatives, and what is said of rows."""

import dataclasses
import math
from collections.abc import Callable, Set
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from kreg import chunked
from kreg.bandwidth import Adaptive, Anchored, Fixed
from kreg.derivatives import differentiable
from kreg.inputs import Inputs, joined, plain, separate, without_dead
from kreg.kernels import gaussian
from kreg.problem import Problem
from kreg.rowwise import At
from kreg.stats import Stats
from pallas_kernels import split
from pallas_kernels.ranges import without_keys
from pallas_kernels.solver import LOWEST


def not_taken(problem: Problem) -> dict[str, bool]:
    """Names what no kernels take, and whether a problem has it."""
    mask, order = problem.mask, problem.kernel.static_order
    return {
        "an order that is an array": order is None,
        "an order below 1, or the Gaussian": order is not None and not 1 <= order < math.inf,
        f"{type(problem.rule).__name__}": type(problem.rule) not in (Adaptive, Anchored, Fixed),
        "dropout where keys are split over a mesh": problem.split.axis is not None
        and problem.dropout_key is not None,
        "a bias": problem.bias is not None,
        "a soft cap": problem.soft_cap is not None,
        "a null score": problem.null is not None,
        "a boolean mask": mask.array is not None,
        "two sets of segments": len(mask.segments) > 1,
        "more than 16,777,216 keys, whose numbers are float32": problem.sizes["s"] > 2**24,
    }


def reason(cases: dict[str, bool]) -> str | None:
    """Says the first of the cases that is so, None where none is."""
    found = [what for what, is_so in cases.items() if is_so]
    return f"no kernel for {found[0]}" if found else None


class Rows(NamedTuple):
    """What is found of every query: its threshold in units of y = z / r, and sums at it.

    total, slope: of the powers r and r - 1. best: under `Anchored` the best key, under `Fixed` how
    many are seen, if that is asked. support: keys with weight, if that is asked.
    """

    cut: Float[Array, "B N T"]
    total: Float[Array, "B N T"]
    slope: Float[Array, "B N T"]
    best: Float[Array, "B N T"]
    support: Float[Array, "B N T"]


class Found(NamedTuple):
    """Output and what the backward pass needs.

    out: sum of the powers r times values, over the sum of the powers. lower: the same with powers
    r - 1. live: which tiles have weight, bits; work: how many were looked at, the first pass first;
    both as the kernels have them.
    """

    out: Float[Array, "B T N V"]
    lower: Float[Array, "B T N V"]
    rows: Rows
    live: Any
    work: Any


class Pulled(NamedTuple):
    """What the backward pass is given of every query; p = scale x^r, u = scale x^(r - 1).

    steep: y = steep q.k. mean: of what flows back, under u. away, best: how much flows on to which
    key, under `Anchored`.
    """

    steep: Float[Array, "B N T"]
    cut: Float[Array, "B N T"]
    scale: Float[Array, "B N T"]
    mean: Float[Array, "B N T"]
    away: Float[Array, "B N T"]
    best: Float[Array, "B N T"]


@dataclasses.dataclass(frozen=True)
class Attention:
    """Kernels for one kind of device.

    Args:
        declined: says why they do not take a problem, None where they do.
        plan: from inputs and the rest of a problem to sizes and options, with `order` and `rule`.
        forward: (plan, inputs, rest, steep, cut) -> Found; both numbers of rows.
        backward: (plan, inputs, rest, pulled, live, dout) -> gradients of query, key and value, and
            two sums of every row: with dz what flows back to its scores, those of dz y and, under
            `Fixed`, of dz.
        effects: JAX's effects of the kernels.
    """

    name: str
    declined: Callable[[Problem], str | None]
    plan: Callable[[Inputs, Problem], Any]
    forward: Callable[..., Found]
    backward: Callable[..., tuple[Array, Array, Array, Float[Array, "2 B N T"]]]
    effects: Callable[[], Set] = frozenset

    def attend(self, problem: Problem) -> tuple[Float[Array, "B T N V"], Stats | None]:
        """Attends; NotImplementedError where the kernels do not take the inputs."""
        inputs, rest = self._separate(problem)
        out, found = self._call(inputs, rest)
        return out, self._stats(inputs, rest, found) if problem.with_stats else None

    def found(self, problem: Problem) -> Found:
        """What the forward kernel finds."""
        return self._call(*self._separate(problem))[1]

    def live_share(self, problem: Problem) -> Float[Array, ""]:
        """Share of the tiles that have weight, of those that are looked at to find them."""
        found = self.found(problem)
        return jnp.sum(lax.population_count(found.live)) / jnp.sum(found.work[..., 0])

    def _separate(self, problem: Problem) -> tuple[Inputs, Problem]:
        why = self.declined(problem)
        if why is not None:
            raise NotImplementedError(f"implementation={self.name!r}: {why}")
        return separate(without_dead(problem))

    def _call(self, inputs: Inputs, rest: Problem) -> tuple[Array, Found]:
        functions = self._forward, self._backward
        return differentiable(plain, *functions, effects=self.effects)(inputs, rest)

    def _forward(self, inputs: Inputs, rest: Problem):
        plan, empty = self.plan(inputs, rest), _without_keys(inputs, rest)
        steep, cut = _of_rows(inputs, _rows(inputs.scale)), _of_rows(inputs, _cut(inputs.at))
        seen = _seen(inputs, empty)
        arguments = plan, seen, rest, steep / plan.order, cut / plan.order
        if rest.split.axis is None:
            found = self.forward(*arguments)
        else:
            found = split.found(self.forward, *arguments)
        out = found.out
        if plan.rule is Fixed:
            alone = _without_weight(found, empty, rest)
            out = lax.cond(
                jnp.any(alone),
                lambda: jnp.where(alone, _uniform(inputs.value, inputs, rest), out),
                lambda: out,
            )
        return out, found

    def _stats(self, inputs: Inputs, rest: Problem, found: Found) -> Stats:
        plan = self.plan(inputs, rest)
        order, rule = plan.order, plan.rule
        cut, total, _, seen, support = found.rows
        alive = seen > 0 if rule is Fixed else cut > LOWEST
        threshold = jnp.where(alive, cut * order, jnp.inf)
        support = jnp.where(alive & (total <= 0), seen, support).astype(jnp.int32)
        residual = jnp.zeros_like(cut)
        if rule is Adaptive:
            residual = jnp.where(alive, _residual(order, inputs, rest, total), 0)
        return Stats(*(jnp.swapaxes(x, 1, 2) for x in (threshold, support, residual)))

    def _backward(self, inputs: Inputs, rest: Problem, found: Found, dout) -> Inputs:
        plan, empty = self.plan(inputs, rest), _without_keys(inputs, rest)
        # Of a result that all devices have, JAX hands each its share of what flows back.
        (dout,) = rest.split.joined(dout)
        steep = _of_rows(inputs, _rows(inputs.scale)) / plan.order
        cut, total, _, best, _ = found.rows
        scale = jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1), 0)
        pulled = Pulled(steep, cut, scale, *_means(plan.rule, found, dout, rest), best)
        dquery, dkey, dvalue, sums = self.backward(
            plan, _seen(inputs, empty), rest, pulled, found.live, dout
        )
        # Scores are z = scale q.k, and q.k = y / steep.
        dscale = jnp.where(steep != 0, sums[0] / jnp.where(steep != 0, steep, 1), 0)
        if plan.rule is Fixed:
            alone = _without_weight(found, empty, rest)
            dvalue = lax.cond(
                jnp.any(alone),
                lambda: dvalue + _uniform_back(inputs, rest, alone, dout / rest.split.keys(1)),
                lambda: dvalue,
            )
        at = inputs.at
        if at.threshold is not None:
            at = At(_summed(-sums[1][..., None], at.threshold))
        dscale = _summed(jnp.swapaxes(dscale, 1, 2)[..., None], inputs.scale)
        return Inputs(dquery, dkey, dvalue, dscale, None, at)


def _rows(scale: Float[Array, "#B #T #N 1"]) -> Float[Array, "#B #N #T"]:
    return jnp.swapaxes(scale[..., 0], 1, 2).astype(jnp.float32)


def _cut(at: At) -> Float[Array, "#B #N #T"]:
    return jnp.zeros((1, 1, 1)) if at.threshold is None else at.threshold[..., 0]


def _of_rows(inputs: Inputs, x: Float[Array, "#B #N #T"]) -> Float[Array, "B N T"]:
    batch, queries, heads, _ = inputs.query.shape
    return jnp.broadcast_to(x, (batch, heads, queries))


def _without_keys(inputs: Inputs, rest: Problem) -> Bool[Array, "#B T"]:
    return without_keys(rest.mask, inputs.query.shape[1], inputs.key.shape[1])


def _seen(inputs: Inputs, empty: Bool[Array, "#B T"]) -> Inputs:
    """Queries without keys become 0: what they hold must not reach the gradients of keys."""
    return inputs._replace(query=jnp.where(empty[..., None, None], 0, inputs.query))


def _without_weight(
    found: Found, empty: Bool[Array, "#B T"], rest: Problem
) -> Bool[Array, "B T N 1"]:
    """Which queries see keys but give none of them weight."""
    empty = ~rest.split.any(~empty[..., None])[..., 0]
    return jnp.swapaxes((found.rows.total <= 0) & ~empty[:, None], 1, 2)[..., None]


def _uniform(value, inputs: Inputs, rest: Problem) -> Float[Array, "B T N V"]:
    """Averages of all keys that a query sees: what equal scores give."""
    query = jnp.zeros_like(inputs.query)
    same = joined(inputs._replace(query=query, value=value), rest)
    same = dataclasses.replace(same, kernel=gaussian, rule=Adaptive(rest.rule.h), with_stats=False)
    return chunked.attend(same)[0]


def _uniform_back(inputs: Inputs, rest: Problem, alone, dout) -> Array:
    """What flows to the values from queries that weigh all their keys equally."""
    dout = jnp.where(alone, dout, 0)
    return jax.vjp(lambda value: _uniform(value, inputs, rest), inputs.value)[1](dout)[0]


def _residual(order: float, inputs: Inputs, rest: Problem, total: Float[Array, "B N T"]) -> Array:
    """Bounds |t - t*| by r |g - 1|, and rounding by the lengths of queries and keys."""

    def lengths(x):
        return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1))

    share = inputs.query.shape[2] // inputs.key.shape[2]
    longest = rest.split.max(jnp.swapaxes(lengths(inputs.key), 1, 2))
    longest = jnp.repeat(longest, share, axis=1)
    size = jnp.abs(_rows(inputs.scale)) * jnp.swapaxes(lengths(inputs.query), 1, 2) * longest
    norm = total ** (1 / order)
    rounding = jnp.finfo(jnp.float32).eps * (16 * (1 + size) + 4 * order)
    return jnp.abs(norm - 1) * order + rounding


def _means(rule: type, found: Found, dout, rest: Problem) -> tuple[Array, Array]:
    """Finds of every row the mean of what flows back, and what flows to a given threshold."""

    def means(x):
        return jnp.swapaxes(jnp.sum(x.astype(jnp.float32) * dout, axis=-1), 1, 2)

    _, total, slope, *_ = found.rows
    (lower,) = rest.split.joined(means(found.lower))
    if rule is Adaptive:
        return lower, jnp.zeros_like(total)
    mean = means(found.out)
    safe = jnp.where(total > 0, total, 1)
    return mean, jnp.where(total > 0, slope * (lower - mean) / safe, 0)


def _summed(x: Array, like: Array) -> Array:
    """Sums a gradient over the axes along which there is one number for all."""
    axes = tuple(i for i, size in enumerate(like.shape) if size == 1 and x.shape[i] > 1)
    return jnp.sum(x, axis=axes, keepdims=True).astype(like.dtype)
