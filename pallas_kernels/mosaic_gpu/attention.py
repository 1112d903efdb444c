"""Attention by these kernels: what they take, their derivatives, and what is said of rows."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kreg import chunked
from kreg.bandwidth import Adaptive, Anchored, Fixed
from kreg.canonical import canonical
from kreg.derivatives import differentiable
from kreg.implementations import device_kind, is_hopper
from kreg.inputs import Inputs, joined, plain, separate, without_dead
from kreg.kernels import gaussian
from kreg.masks import Mask
from kreg.problem import Problem
from kreg.rowwise import At
from kreg.stats import Stats
from pallas_kernels.mosaic_gpu import short
from pallas_kernels.mosaic_gpu.backward import backward
from pallas_kernels.mosaic_gpu.forward import FOUND, Found, forward
from pallas_kernels.mosaic_gpu.interpreter import effects, interpreted
from pallas_kernels.mosaic_gpu.operands import Draws, Ranges, by_row, pack, parts, unpack
from pallas_kernels.mosaic_gpu.plan import TILE, Plan
from pallas_kernels.mosaic_gpu.tiles import LOWEST

# By parts, for float32 takes three times the shared memory.
_WIDEST = {1: 256, 3: 128}
_PARTS = {jnp.dtype(jnp.bfloat16): 1, jnp.dtype(jnp.float16): 1, jnp.dtype(jnp.float32): 3}


def attend(problem: Problem) -> tuple[Float[Array, "B T N V"], Stats | None]:
    """Attends by the kernels for Hopper; NotImplementedError where they do not take the inputs."""
    _check(problem)
    problem = without_dead(problem)
    inputs, rest = separate(problem)
    out, found = _call(inputs, rest)
    return out, _stats(inputs, rest, found) if problem.with_stats else None


def live_tiles(*arguments, **options) -> Int[Array, "B N"]:
    """Counts the tiles of 64 x 64 that have weight, for the arguments of `kreg.attention`."""
    problem = canonical(*arguments, **options)
    _check(problem)
    _, found = _call(*separate(without_dead(problem)))
    return jnp.sum(lax.population_count(found.live), axis=(2, 3))


def declined(problem: Problem) -> str | None:
    """Says why the kernels do not take a problem, None where they do."""
    mask, order = problem.mask, problem.kernel.static_order
    widths = problem.query.shape[-1], problem.value.shape[-1]
    types = {jnp.dtype(x.dtype) for x in (problem.query, problem.key, problem.value)}
    parts = max(_PARTS.get(kind, 1) for kind in types)
    device = device_kind()
    reasons = {
        f"{device}, only for Hopper": device != "cpu" and not is_hopper(device),
        "an order that is an array": order is None,
        "an order below 1, or the Gaussian": order is not None and not 1 <= order < math.inf,
        f"{type(problem.rule).__name__}": type(problem.rule) not in (Adaptive, Anchored, Fixed),
        "a bias": problem.bias is not None,
        "a soft cap": problem.soft_cap is not None,
        "a null score": problem.null is not None,
        "a boolean mask": mask.array is not None,
        "two sets of segments": len(mask.segments) > 1,
        f"heads wider than {_WIDEST[parts]}": max(widths) > _WIDEST[parts],
        "float32 of width over 64 and more than 16,384 keys or queries": parts > 1
        and max(widths) > TILE
        and max(problem.sizes["t"], problem.sizes["s"]) > 16384,
        "types that differ, or are not bfloat16, float16 or float32": len(types) > 1
        or not types <= set(_PARTS),
    }
    found = [what for what, is_so in reasons.items() if is_so]
    return f"no kernel for {found[0]}" if found else None


def _check(problem: Problem) -> None:
    reason = declined(problem)
    if reason is not None:
        raise NotImplementedError(f"implementation='mosaic_gpu': {reason}")


def _plan(inputs: Inputs, rest: Problem) -> Plan:
    (batch, queries, heads, width), dtype = inputs.query.shape, jnp.dtype(inputs.query.dtype)
    keys, groups, value_width = inputs.value.shape[1:]
    count = _PARTS[dtype]
    return Plan(
        batch=batch,
        queries=queries,
        keys=keys,
        heads=heads,
        key_heads=groups,
        width=-(-width // TILE) * TILE,
        value_width=-(-value_width // TILE) * TILE,
        order=float(rest.kernel.static_order or 1),
        rule=type(rest.rule),
        dtype=dtype if count == 1 else jnp.dtype(jnp.bfloat16),
        out_dtype=dtype,
        parts=count,
        interpreted=interpreted(),
        by_key=_is_by_key(rest.mask),
        dropout_rate=0.0 if rest.dropout_key is None else rest.dropout_rate,
        with_support=rest.with_stats,
    )


def _is_by_key(mask: Mask) -> bool:
    ranges = mask.query_start, mask.query_stop
    return bool(mask.segments) or any(x is not None and x.shape[1] > 1 for x in ranges)


def _forward(inputs: Inputs, rest: Problem):
    plan = _plan(inputs, rest)
    ranges = Ranges.of(rest.mask, plan)
    steep = by_row(plan, _rows(inputs.scale) / plan.order)
    cut = by_row(plan, _cut(inputs.at) / plan.order)
    query = _seen(inputs.query, ranges)
    query, key, value = (parts(plan, x) for x in (query, inputs.key, inputs.value))
    run = forward if short.declined(plan) else short.forward
    found = run(plan, query, key, value, pack(plan, steep, cut), ranges, Draws.of(rest, plan))
    width = inputs.value.shape[-1]
    out = found.out[:, : plan.queries, :, :width]
    if plan.rule is Fixed:
        empty = _without_weight(plan, found, ranges)
        out = lax.cond(
            jnp.any(empty),
            lambda: jnp.where(empty, _uniform(inputs.value, inputs, rest), out),
            lambda: out,
        )
    return out, found


def _rows(scale: Float[Array, "#B #T #N 1"]) -> Float[Array, "#B #N #T"]:
    return jnp.swapaxes(scale[..., 0], 1, 2).astype(jnp.float32)


def _cut(at: At) -> Float[Array, "#B #N #T"]:
    return jnp.zeros((1, 1, 1)) if at.threshold is None else at.threshold[..., 0]


def _seen(query: Float[Array, "B T N H"], ranges: Ranges) -> Float[Array, "B T N H"]:
    """Queries without keys become 0: what they hold must not reach the gradients of keys."""
    empty = ranges.empty[:, : query.shape[1], None, None]
    return jnp.where(empty, 0, query)


def _without_weight(plan: Plan, found: Found, ranges: Ranges) -> Array:
    """Which queries see keys but give none of them weight, [B, T, N, 1]."""
    total = unpack(plan, found.rows)[FOUND.index("total")]
    empty = (total <= 0) & ~ranges.empty[:, None]
    return jnp.swapaxes(empty, 1, 2)[:, : plan.queries, :, None]


def _uniform(value, inputs: Inputs, rest: Problem) -> Float[Array, "B T N V"]:
    """Averages of all keys that a query sees: what equal scores give."""
    query = jnp.zeros_like(inputs.query)
    same = joined(inputs._replace(query=query, value=value), rest)
    same = dataclasses.replace(same, kernel=gaussian, rule=Adaptive(rest.rule.h), with_stats=False)
    return chunked.attend(same)[0]


def _stats(inputs: Inputs, rest: Problem, found: Found) -> Stats:
    plan = _plan(inputs, rest)
    cut, total, _, seen, support = unpack(plan, found.rows)[..., : plan.queries]
    alive = seen > 0 if plan.rule is Fixed else cut > LOWEST
    threshold = jnp.where(alive, cut * plan.order, jnp.inf)
    support = jnp.where(alive & (total <= 0), seen, support).astype(jnp.int32)
    residual = jnp.zeros_like(cut)
    if plan.rule is Adaptive:
        residual = jnp.where(alive, _residual(plan, inputs, total), 0)
    return Stats(*(jnp.swapaxes(x, 1, 2) for x in (threshold, support, residual)))


def _residual(plan: Plan, inputs: Inputs, total: Float[Array, "B N T"]) -> Array:
    """Bounds |t - t*| by r |g - 1|, and rounding by the lengths of queries and keys."""

    def lengths(x):
        return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1))

    longest = jnp.repeat(jnp.max(lengths(inputs.key), axis=1), plan.share, axis=-1)[..., None]
    size = jnp.abs(_rows(inputs.scale)) * jnp.swapaxes(lengths(inputs.query), 1, 2) * longest
    norm = total ** (1 / plan.order)
    rounding = jnp.finfo(jnp.float32).eps * (16 * (1 + size) + 4 * plan.order)
    return jnp.abs(norm - 1) * plan.order + rounding


def _backward(inputs: Inputs, rest: Problem, found: Found, dout) -> Inputs:
    plan = _plan(inputs, rest)
    ranges = Ranges.of(rest.mask, plan)
    width, value_width = inputs.query.shape[-1], inputs.value.shape[-1]
    steep = by_row(plan, _rows(inputs.scale) / plan.order)
    cut, total, slope, best, _ = unpack(plan, found.rows)
    mean, away = _means(plan, found, total, slope, dout)
    scale = jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1), 0)
    query = _seen(inputs.query, ranges)
    operands = (parts(plan, x) for x in (query, inputs.key, inputs.value, dout))
    query, key, value, back = operands
    rows = pack(plan, steep, cut, scale, mean, away, best)
    draws = Draws.of(rest, plan)
    dquery, dkey, dvalue, sums = backward(
        plan, query, key, value, back, rows, found.live, ranges, draws
    )
    dkey, dvalue = dkey[:, : plan.keys, :, :width], dvalue[:, : plan.keys, :, :value_width]
    # Scores are z = scale q.k, and q.k = y / steep.
    dscale = jnp.where(steep != 0, sums[0] / jnp.where(steep != 0, steep, 1), 0)
    dscale, dcut = (x[..., : plan.queries] for x in (dscale, -sums[1]))
    if plan.rule is Fixed:
        empty = _without_weight(plan, found, ranges)
        dvalue = lax.cond(
            jnp.any(empty),
            lambda: dvalue + _uniform_back(inputs, rest, empty, dout),
            lambda: dvalue,
        )
    at = inputs.at
    return Inputs(
        dquery[:, : plan.queries, :, :width],
        dkey,
        dvalue,
        _summed(jnp.swapaxes(dscale, 1, 2)[..., None], inputs.scale),
        None,
        at if at.threshold is None else At(_summed(dcut[..., None], at.threshold)),
    )


def _means(plan: Plan, found: Found, total, slope, dout) -> tuple[Array, Array]:
    """Finds of every row the mean of what flows back, and what flows to a given threshold."""

    def means(x):
        x = x[:, : plan.queries, :, : dout.shape[-1]]
        dot = jnp.sum(x.astype(jnp.float32) * dout, axis=-1)
        pad = total.shape[-1] - plan.queries
        return jnp.pad(jnp.swapaxes(dot, 1, 2), ((0, 0), (0, 0), (0, pad)))

    if plan.rule is Adaptive:
        return means(found.lower), jnp.zeros_like(total)
    mean = means(found.out)
    safe = jnp.where(total > 0, total, 1)
    return mean, jnp.where(total > 0, slope * (means(found.lower) - mean) / safe, 0)


def _uniform_back(inputs: Inputs, rest: Problem, empty, dout) -> Array:
    """What flows to the values from queries that weigh all their keys equally."""
    dout = jnp.where(empty, dout, 0)
    return jax.vjp(lambda value: _uniform(value, inputs, rest), inputs.value)[1](dout)[0]


def _summed(x: Array, like: Array) -> Array:
    """Sums a gradient over the axes along which there is one number for all."""
    axes = tuple(i for i, size in enumerate(like.shape) if size == 1 and x.shape[i] > 1)
    return jnp.sum(x, axis=axes, keepdims=True).astype(like.dtype)


_call = differentiable(plain, _forward, _backward, effects=effects)
