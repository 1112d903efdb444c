r"""Attention block by block, with its own backward pass; on CPU the fastest path.

Queries are taken in blocks, heads in groups, so that a block's scores stay in cache. A block forms
its scores with exactly the keys that a static band (causality, window) leaves it; masks are applied
where keys are neither all visible nor all hidden. Forward: scores, thresholds, weights, average.
Backward: scores again, with the thresholds kept. How a row is weighed is the business of `rowwise`.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from kreg import reference
from kreg.bands import Block, blocks, fits, narrow, reach, span, spans
from kreg.derivatives import differentiable
from kreg.general import General
from kreg.inputs import Inputs, joined, plain, separate, without_dead
from kreg.places import (
    Local,
    Place,
    add,
    add_scale,
    add_scores,
    along,
    cut_heads,
    cut_rows,
    in_order,
    over_blocks,
    over_groups,
    product,
    put_heads,
    put_rows,
    take_rows,
)
from kreg.problem import Problem
from kreg.rowwise import Powers, Rows
from kreg.stats import Stats
from kreg.threshold import THRESHOLD


def takes(problem: Problem) -> bool:
    """True where this path computes the problem."""
    return (
        problem.split.axis is None
        and problem.soft_cap is None
        and problem.null is None
        and (problem.bias is None or math.prod(jnp.shape(problem.rule.h)) == 1)
    )


def attend(problem: Problem) -> tuple[Float[Array, "B T N V"], Stats | None]:
    """Attends block by block."""
    problem = without_dead(problem)
    inputs, rest = separate(problem)
    out, stats = _attend(inputs, rest)
    return out, None if stats is None else reference.certified(problem, stats)


def _method(problem: Problem) -> Powers | General:
    """How rows are weighed."""
    powers = Powers.of(problem.kernel, problem.rule)
    return General(problem.kernel, problem.rule) if powers is None else powers


def _forward(inputs: Inputs, rest: Problem):
    problem = joined(inputs, rest)
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
            query, scale = local.queries(block, start)
            z = local.scores(in_order(query * scale), block, start, first)
            cut = local.row_part(at, block, start)
            rows, p = method.weigh(z, cut)
            seen = span(p, first, problem.sizes["s"]) if searches else None
            p = local.dropped(p, block, start, first)
            value = along(local.value, 1, first, block.keys)
            o = _mix(p.reshape(p.shape[0], -1, p.shape[-1]), value, rest.precision)
            o = o.reshape(*p.shape[:3], -1) * rows.scale[..., None]
            found = None if stats is None else method.stats(z, rows, cut)
            return nothing, (o, rows, seen, found)

        def store(carry, found, block: Block, start, first):
            out, kept, live, stats = carry
            o, rows, seen, new = found
            out = put_heads(out, o, place, start)
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
    problem = joined(inputs, rest)
    kept, live, _ = saved
    method, dtype, precision = _method(rest), rest.scale.dtype, rest.precision
    share = inputs.query.shape[2] // inputs.key.shape[2]
    change = jax.tree.map(jnp.zeros_like, inputs)
    plan = blocks(problem)
    where, few = reach(problem, plan), narrow(problem, plan)

    def group(place: Place, carry: Inputs) -> Inputs:
        local = Local.cut(problem, inputs.scale, place)
        at = cut_rows(inputs.at, place, share)
        do = cut_heads(dout, place, share)
        # Transposed, so that every product reads both operands along rows.
        dk = jnp.zeros((*local.key.shape[:1], *local.key.shape[:0:-1]), dtype)
        dv = jnp.zeros((*local.value.shape[:1], *local.value.shape[:0:-1]), dtype)

        def pull(block: Block, start, first, sums):
            dk, dv = sums
            rows = take_rows(kept, place, start, block.rows)
            plain, scale = local.queries(block, start)
            query = in_order(plain * scale)
            g = in_order(local.rows(do, block, start) * rows.scale[..., None])
            query, g = lax.optimization_barrier((query, g))
            z = local.scores(query, block, start, first)
            key, value = (along(x, 1, first, block.keys) for x in (local.key, local.value))
            p, pull_rows = method.linear(z, rows, local.row_part(at, block, start))
            p = local.dropped(p, block, start, first)
            merged = p.shape[0], p.shape[1] * p.shape[2]
            query, g = (x.reshape(*merged, -1) for x in (query, g))
            q_across, g_across = lax.optimization_barrier(
                [in_order(jnp.swapaxes(x, 1, 2)) for x in (query, g)]
            )
            dp = product(g, value, 2, 2, precision).reshape(p.shape)
            dp = local.dropped(dp, block, start, first)
            dz, dat = pull_rows(dp)
            flat, p = dz.reshape(*merged, -1), p.reshape(*merged, -1)
            dq = product(flat, key, 2, 1, precision).reshape(plain.shape)
            dq, dscale = dq * scale, jnp.sum(dq * plain, axis=-1)
            dk = add(dk, product(q_across, flat, 2, 1, precision), (0, 0, first))
            dv = add(dv, product(g_across, p, 2, 1, precision), (0, 0, first))
            return (dk, dv), (dq, dscale, None if inputs.bias is None else dz, dat)

        def store(carry: Inputs, found, block: Block, start, first):
            dq, dscale, dz, dat = found
            return carry._replace(
                query=put_heads(carry.query, dq, place, start),
                scale=add_scale(carry.scale, dscale, place, start),
                bias=dz if dz is None else add_scores(carry.bias, dz, place, start, first, share),
                at=jax.tree.map(
                    lambda x, part: add_scores(x, part, place, start, 0, share), carry.at, dat
                ),
            )

        def run(plan, where):
            return over_blocks(plan, where, place, pull, store, carry, (dk, dv))

        if few is None:
            found = run(plan, where)
        else:
            found = lax.cond(
                fits(few, live, place.entry, place.first),
                lambda: run(few, live),
                lambda: run(plan, where),
            )
        carry, (dk, dv) = found
        dk, dv = (jnp.swapaxes(x, 1, 2)[:, None] for x in (dk, dv))
        return carry._replace(
            key=put_heads(carry.key, dk, place, 0), value=put_heads(carry.value, dv, place, 0)
        )

    return over_groups(problem, group, change)


_call = differentiable(plain, _forward, _backward, one_by_one=True)


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
