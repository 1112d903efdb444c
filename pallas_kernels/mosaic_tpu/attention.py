"""Attention by these kernels: what they take, and how the work is cut."""

import jax.numpy as jnp
from jaxtyping import Array

from kreg.implementations import device_kind
from kreg.inputs import Inputs
from kreg.problem import Problem
from pallas_kernels.attention import Attention, Found, Pulled, Rows, not_taken, reason
from pallas_kernels.interpreter import effects
from pallas_kernels.mosaic_tpu.backward import backward
from pallas_kernels.mosaic_tpu.forward import forward
from pallas_kernels.mosaic_tpu.operands import Seen, pack, turned, turned_back
from pallas_kernels.mosaic_tpu.plan import Plan
from pallas_kernels.mosaic_tpu.sizes import SCALAR_BYTES, is_known, row_multiple, sizes_of
from pallas_kernels.ranges import is_by_key, ranges

_WIDEST = 256
_TYPES = {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)}


def declined(problem: Problem) -> str | None:
    """Says why the kernels do not take a problem, None where they do."""
    widths = problem.query.shape[-1], problem.value.shape[-1]
    types = {jnp.dtype(x.dtype) for x in (problem.query, problem.key, problem.value)}
    device, sizes = device_kind(), problem.sizes
    share = sizes["n"] // sizes["k"]
    scalars = sizes_of(device).scalar_bytes(sizes["t"], share)
    cases = {
        f"{device}, only for TPUs from v4 to v7x": not is_known(device),
        **not_taken(problem),
        f"heads wider than {_WIDEST}": max(widths) > _WIDEST,
        "types that differ, or are not bfloat16 or float32": len(types) > 1 or not types <= _TYPES,
        f"lists of tiles of {sizes['t']} queries, {share} heads to a key head": scalars
        > SCALAR_BYTES,
    }
    return reason(cases)


def _plan(inputs: Inputs, rest: Problem) -> Plan:
    (batch, queries, heads, width), dtype = inputs.query.shape, jnp.dtype(inputs.query.dtype)
    keys, groups, value_width = inputs.value.shape[1:]
    rows = row_multiple(dtype)
    return Plan(
        batch=batch,
        queries=queries,
        keys=keys,
        heads=heads,
        key_heads=groups,
        width=-(-width // rows) * rows,
        value_width=-(-value_width // rows) * rows,
        order=float(rest.kernel.static_order or 1),
        rule=type(rest.rule),
        dtype=dtype,
        by_key=is_by_key(rest.mask),
        dropout_rate=0.0 if rest.dropout_key is None else rest.dropout_rate,
        with_support=rest.with_stats,
        sizes=sizes_of(device_kind()),
    )


def _operands(plan: Plan, inputs: Inputs, rest: Problem) -> tuple[Array, Array, Array, Seen]:
    sizes = plan.sizes
    found = ranges(
        rest.mask, plan.batch, plan.queries, plan.keys, sizes.block, sizes.piece, plan.columns
    )
    return (
        turned(inputs.query, plan.width, plan.rows),
        turned(inputs.key, plan.width, plan.columns),
        turned(inputs.value, plan.value_width, plan.columns),
        Seen.of(found, rest, plan),
    )


def _forward(plan: Plan, inputs: Inputs, rest: Problem, steep: Array, cut: Array) -> Found:
    query, key, value, seen = _operands(plan, inputs, rest)
    found = forward(plan, query, key, value, pack(plan, steep, cut), seen)
    out, lower = (
        turned_back(x, inputs.value.shape[-1], plan.queries) for x in (found.out, found.lower)
    )
    rows = Rows(*jnp.moveaxis(found.rows[..., : plan.queries], 2, 0))
    return Found(out, lower, rows, found.live, found.work)


def _backward(plan: Plan, inputs: Inputs, rest: Problem, pulled: Pulled, live: Array, dout: Array):
    query, key, value, seen = _operands(plan, inputs, rest)
    back = turned(dout, plan.value_width, plan.rows)
    dquery, dkey, dvalue, sums = backward(
        plan, query, key, value, back, pack(plan, *pulled), seen, live
    )
    widths = inputs.query.shape[-1], inputs.value.shape[-1]
    return (
        turned_back(dquery, widths[0], plan.queries),
        turned_back(dkey, widths[0], plan.keys),
        turned_back(dvalue, widths[1], plan.keys),
        jnp.moveaxis(sums[..., : plan.queries], 2, 0),
    )


ATTENTION = Attention("mosaic_tpu", declined, _plan, _forward, _backward, effects)
