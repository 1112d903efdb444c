"""Attention by these kernels: what they take, and how operands go in and out."""

import jax.numpy as jnp
from jaxtyping import Array

from kreg.bandwidth import Fixed
from kreg.implementations import device_kind, is_hopper
from kreg.inputs import Inputs
from kreg.problem import Problem
from pallas_kernels.attention import Attention, Found, Pulled, Rows, not_taken, reason
from pallas_kernels.interpreter import effects, interpreted
from pallas_kernels.mosaic_gpu import short
from pallas_kernels.mosaic_gpu.backward import backward
from pallas_kernels.mosaic_gpu.forward import forward
from pallas_kernels.mosaic_gpu.operands import Draws, Limits, pack, parts, unpack
from pallas_kernels.mosaic_gpu.plan import TILE, Plan
from pallas_kernels.ranges import is_by_key

# By parts, for float32 takes three times the shared memory.
_WIDEST = {1: 256, 3: 128}
_PARTS = {jnp.dtype(jnp.bfloat16): 1, jnp.dtype(jnp.float16): 1, jnp.dtype(jnp.float32): 3}


def declined(problem: Problem) -> str | None:
    """Says why the kernels do not take a problem, None where they do."""
    widths = problem.query.shape[-1], problem.value.shape[-1]
    types = {jnp.dtype(x.dtype) for x in (problem.query, problem.key, problem.value)}
    parts = max(_PARTS.get(kind, 1) for kind in types)
    device = device_kind()
    cases = {
        f"{device}, only for Hopper": device != "cpu" and not is_hopper(device),
        **not_taken(problem),
        f"heads wider than {_WIDEST[parts]}": max(widths) > _WIDEST[parts],
        "float32 of width over 64 and more than 16,384 keys or queries": parts > 1
        and max(widths) > TILE
        and max(problem.sizes["t"], problem.sizes["s"]) > 16384,
        "types that differ, or are not bfloat16, float16 or float32": len(types) > 1
        or not types <= set(_PARTS),
        "float16 under Fixed, whose powers above 1 may all be less than its least number": (
            jnp.dtype(jnp.float16) in types
            and isinstance(problem.rule, Fixed)
            and problem.kernel.static_order != 1
        ),
    }
    return reason(cases)


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
        by_key=is_by_key(rest.mask),
        dropout_rate=0.0 if rest.dropout_key is None else rest.dropout_rate,
        with_support=rest.with_stats,
    )


def _forward(plan: Plan, inputs: Inputs, rest: Problem, steep: Array, cut: Array) -> Found:
    query, key, value = (parts(plan, x) for x in inputs[:3])
    run = forward if short.declined(plan) else short.forward
    rows, limits = pack(plan, steep, cut), Limits.of(rest.mask, plan)
    found = run(plan, query, key, value, rows, limits, Draws.of(rest, plan))
    out, lower = (
        x[:, : plan.queries, :, : inputs.value.shape[-1]] for x in (found.out, found.lower)
    )
    return Found(out, lower, Rows(*unpack(plan, found.rows)), found.live, found.work)


def _backward(plan: Plan, inputs: Inputs, rest: Problem, pulled: Pulled, live: Array, dout: Array):
    query, key, value, back = (parts(plan, x) for x in (*inputs[:3], dout))
    rows, limits = pack(plan, *pulled), Limits.of(rest.mask, plan)
    dquery, dkey, dvalue, sums = backward(
        plan, query, key, value, back, rows, live, limits, Draws.of(rest, plan)
    )
    widths = inputs.query.shape[-1], inputs.value.shape[-1]
    return (
        dquery[:, : plan.queries, :, : widths[0]],
        dkey[:, : plan.keys, :, : widths[0]],
        dvalue[:, : plan.keys, :, : widths[1]],
        sums,
    )


ATTENTION = Attention("mosaic_gpu", declined, _plan, _forward, _backward, effects)
