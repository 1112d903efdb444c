r"""Attention block by block, with its own backward pass; on CPU the fastest path.

Queries are taken in blocks, heads in groups, so that a block's scores stay in cache. A block forms
its scores with exactly the keys that a static band (causality, window) leaves it; masks are applied
where keys are neither all visible nor all hidden. Forward: scores, thresholds, weights, average.
Backward: scores again, with the thresholds kept. How a row is weighed is the business of `rowwise`.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from kreg import chunked, reference
from kreg.bands import Block, blocks, fits, narrow, reach, span, spans
from kreg.bandwidth import Fixed
from kreg.derivatives import differentiable
from kreg.general import General
from kreg.kernels import Kernel
from kreg.masks import Mask
from kreg.places import (
    Local,
    Place,
    add,
    add_scale,
    add_scores,
    along,
    cut_heads,
    cut_rows,
    cut_scale,
    over_blocks,
    over_groups,
    product,
    put_heads,
    put_rows,
    queries_first,
    take_rows,
)
from kreg.problem import Problem
from kreg.rowwise import At, Powers, Rows
from kreg.stats import Stats
from kreg.threshold import THRESHOLD


class Inputs(NamedTuple):
    """What gradients flow to; scores are z = scale q.k + bias."""

    query: Float[Array, "B T N H"]
    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K V"]
    scale: Float[Array, "#B #T #N 1"]
    bias: Float[Array, "#B #N #T #S"] | None
    at: At  # [#B, #N, #T, 1]


def takes(problem: Problem) -> bool:
    """True where this path computes the problem."""
    return (
        problem.soft_cap is None
        and problem.null is None
        and (problem.bias is None or math.prod(jnp.shape(problem.rule.h)) == 1)
    )


def attend(problem: Problem) -> tuple[Float[Array, "B T N V"], Stats | None]:
    """Attends block by block."""
    problem = _without_dead(problem)
    dtype = problem.dtype
    squeeze = 1 / jnp.square(jnp.asarray(problem.rule.h, dtype))
    scale = problem.scale.astype(dtype) * jnp.swapaxes(squeeze, 1, 2)
    bias, mask = problem.bias, problem.mask
    if bias is not None:
        seen = bias != -jnp.inf
        bias, mask = jnp.where(seen, bias, 0).astype(dtype) * squeeze, mask & Mask(seen)
    at = At(
        squeeze - 0.5 if _is_cut_at(problem) else None,
        None if problem.kernel.is_static else jnp.asarray(problem.kernel.excess, dtype),
    )
    inputs = Inputs(problem.query, problem.key, problem.value, scale, bias, at)
    one = jnp.ones((), dtype)
    rule = jax.tree.map(lambda _: one.reshape(1, 1, 1, 1), problem.rule)
    rest = dataclasses.replace(_emptied(problem), mask=mask, rule=rule, scale=one)
    out, stats = _attend(inputs, rest)
    return out, None if stats is None else reference.certified(problem, stats)


def _without_dead(problem: Problem) -> Problem:
    """Zeroes queries and keys that take no part; blocks leave out those that the band says."""
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


def _method(problem: Problem) -> Powers | General:
    """How rows are weighed."""
    powers = Powers.of(problem.kernel, problem.rule)
    return General(problem.kernel, problem.rule) if powers is None else powers


def _is_cut_at(problem: Problem) -> bool:
    """True where the threshold is given."""
    return isinstance(problem.rule, Fixed) and not problem.kernel.is_gaussian


def _emptied(problem: Problem) -> Problem:
    """Takes out what `Inputs` carries; of an order that is an array only that it is one."""
    none: Any = None
    if not problem.kernel.is_static:
        problem = dataclasses.replace(problem, kernel=Kernel.tree_unflatten(None, (none,)))
    return dataclasses.replace(problem, query=none, key=none, value=none, bias=none)


def _filled(rest: Problem, inputs: Inputs) -> Problem:
    query, key, value, _, bias, _ = inputs
    return dataclasses.replace(rest, query=query, key=key, value=value, bias=bias)


def _plain(inputs: Inputs, rest: Problem) -> Float[Array, "B T N V"]:
    """Computes the same with the chunked path, whose every derivative JAX can take."""
    inputs = inputs._replace(query=inputs.query.astype(rest.scale.dtype) * inputs.scale)
    threshold, excess = inputs.at
    if excess is not None:
        rest = dataclasses.replace(rest, kernel=Kernel.tree_unflatten(None, (excess,)))
    if threshold is not None:  # by moving the scores, for the rule's own is 1/2
        bias = 0.5 - threshold
        inputs = inputs._replace(bias=bias if inputs.bias is None else inputs.bias + bias)
    return chunked.attend(dataclasses.replace(_filled(rest, inputs), with_stats=False))[0]


def _forward(inputs: Inputs, rest: Problem):
    problem = _filled(rest, inputs)
    batch, queries, heads, _ = inputs.query.shape
    groups, width = inputs.value.shape[2:]
    share = heads // groups
    method, dtype = _method(rest), rest.scale.dtype
    plan = blocks(problem)
    out = jnp.zeros((batch, queries, heads, width), inputs.value.dtype)
    shape = batch, groups, share, queries
    kept = jnp.zeros((len(Rows._fields), *shape), dtype)
    stats = _no_stats(shape) if rest.with_stats else None
    where = reach(problem, plan)
    searches = narrow(problem, plan) is not None

    def group(place: Place, carry):
        local = Local.cut(problem, inputs.scale, place)
        at = cut_rows(inputs.at, place, share)

        def average(block: Block, start, first, nothing):
            z = local.scores(block, start, first)
            cut = local.row_part(at, block, start)
            rows = method.solve(z, cut)
            p = method.weights(z, rows, cut)
            seen = span(p, first, problem.sizes["s"]) if searches else None
            p = local.dropped(p, block, start, first)
            value = along(local.value, 1, first, block.keys)
            o = _mix(p.reshape(p.shape[0], -1, p.shape[-1]), value, rest.precision)
            o = jnp.moveaxis(o.reshape(*p.shape[:3], -1), 2, 0)
            o = o.reshape(1, o.shape[0], -1, width).astype(out.dtype)
            found = None if stats is None else method.stats(z, rows, cut)
            return nothing, (o, rows, seen, found)

        def store(carry, found, block: Block, start, first):
            out, kept, live, stats = carry
            o, rows, seen, new = found
            out = lax.dynamic_update_slice(out, o, (place.entry, start, place.first * share, 0))
            kept = put_rows(kept, rows, place, start)
            if seen is not None:
                at_block = (0, place.entry, place.first, start // plan[0].rows)
                live = lax.dynamic_update_slice(live, seen[:, None, None, None], at_block)
            return out, kept, live, stats if new is None else put_rows(stats, new, place, start)

        return over_blocks(plan, where, place, average, store, carry, ())[0]

    carry = out, kept, spans(problem, plan), stats
    out, kept, live, stats = over_groups(problem, group, carry)
    return out, (*checkpoint_name((kept, live), THRESHOLD), stats)


def _backward(inputs: Inputs, rest: Problem, saved, dout: Float[Array, "B T N V"]) -> Inputs:
    problem = _filled(rest, inputs)
    kept, live, _ = saved
    method, dtype, precision = _method(rest), rest.scale.dtype, rest.precision
    share = inputs.query.shape[2] // inputs.key.shape[2]
    change = jax.tree.map(jnp.zeros_like, inputs)
    plan = blocks(problem)
    where, few = reach(problem, plan), narrow(problem, plan)

    def group(place: Place, carry: Inputs) -> Inputs:
        local = Local.cut(problem, inputs.scale, place)
        at = cut_rows(inputs.at, place, share)
        do = queries_first(cut_heads(dout, place, share), share).astype(dtype)
        across = lax.optimization_barrier([jnp.moveaxis(x, 3, 1) for x in (local.query, do)])
        # Transposed, so that every product reads both operands along rows.
        dk = jnp.zeros((*local.key.shape[:1], *local.key.shape[:0:-1]), dtype)
        dv = jnp.zeros((*local.value.shape[:1], *local.value.shape[:0:-1]), dtype)

        def pull(block: Block, start, first, sums):
            dk, dv = sums
            z = local.scores(block, start, first)
            key, value = (along(x, 1, first, block.keys) for x in (local.key, local.value))
            rows = take_rows(kept, place, start, block.rows)
            p, pull_rows = method.linear(z, rows, local.row_part(at, block, start))
            p = local.dropped(p, block, start, first)
            merged = p.shape[0], p.shape[1] * p.shape[2]
            g = along(do, 2, start, block.rows).reshape(*merged, -1)
            q_across, g_across = (
                along(x, 3, start, block.rows).reshape(merged[0], -1, merged[1]) for x in across
            )
            dp = product(g, value, 2, 2, precision).reshape(p.shape)
            dp = local.dropped(dp, block, start, first)
            dz, dat = pull_rows(dp)
            flat, p = dz.reshape(*merged, -1), p.reshape(*merged, -1)
            dq = product(flat, key, 2, 1, precision).reshape(*dz.shape[:3], -1)
            dk = add(dk, product(q_across, flat, 2, 1, precision), (0, 0, first))
            dv = add(dv, product(g_across, p, 2, 1, precision), (0, 0, first))
            return (dk, dv), (dq, None if inputs.bias is None else dz, dat)

        def store(carry, found, block: Block, start, first):
            dq, dbias, dats = carry
            part, dz, dat = found
            dq = lax.dynamic_update_slice_in_dim(dq, part, start, axis=2)
            if dz is not None:
                dbias = add_scores(dbias, dz, place, start, first, share)
            dats = jax.tree.map(
                lambda x, part: add_scores(x, part, place, start, 0, share), dats, dat
            )
            return dq, dbias, dats

        carry_in = jnp.zeros_like(local.query), carry.bias, carry.at

        def run(plan, where):
            return over_blocks(plan, where, place, pull, store, carry_in, (dk, dv))

        if few is None:
            found = run(plan, where)
        else:
            found = lax.cond(
                fits(few, live, place.entry, place.first),
                lambda: run(few, live),
                lambda: run(plan, where),
            )
        (dq, dbias, dats), (dk, dv) = found
        plain = queries_first(local.problem.query[0], share).astype(dtype)
        dscale = add_scale(carry.scale, dq * plain, place, share)
        dq = lax.optimization_barrier(dq * cut_scale(inputs.scale, place, share))
        dq = jnp.moveaxis(dq, 2, 0)
        return Inputs(
            put_heads(carry.query, dq.reshape(dq.shape[0], -1, dq.shape[-1]), place, share),
            put_heads(carry.key, jnp.moveaxis(dk, 2, 0), place, 1),
            put_heads(carry.value, jnp.moveaxis(dv, 2, 0), place, 1),
            dscale,
            dbias,
            dats,
        )

    return over_groups(problem, group, change)


_call = differentiable(_plain, _forward, _backward, one_by_one=True)


def _attend(inputs: Inputs, rest: Problem) -> tuple[Float[Array, "B T N V"], Stats | None]:
    out, (*_, stats) = _call(inputs, rest)
    if stats is None:
        return out, None
    threshold, support, residual = jnp.moveaxis(stats, -1, 2).reshape(3, *out.shape[:3])
    return out, Stats(threshold, support.astype(jnp.int32), residual)


def _mix(p, v, precision):
    """Averages the values; long rows in pieces, for a running sum loses 5e-6 over 65,536 keys."""
    piece = 2048
    if v.shape[1] <= 2 * piece:
        return product(p, v, 2, 1, precision)
    total = product(p[..., :piece], v[:, :piece], 2, 1, precision)
    for i in range(piece, v.shape[1], piece):
        total += product(p[..., i : i + piece], v[:, i : i + piece], 2, 1, precision)
    return total


def _no_stats(shape: tuple[int, ...]) -> Float[Array, "3 B K G T"]:
    """Stats of rows without keys, one array of the three; a count of keys is exact to 2^24."""
    return jnp.zeros((3, *shape), jnp.float32).at[0].set(jnp.inf)
