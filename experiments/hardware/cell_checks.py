"""Every kernel under every bandwidth rule in `attention`: outputs and gradients against the oracle.

Axes: B batch, T queries, S keys, N heads; a bandwidth h a head.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import kreg
from experiments.hardware.findings import Check, Finding, apart, largest
from experiments.hardware.from_tests import load

IMPLEMENTATIONS = ("reference", "xla")
HEADS = np.array([0.7, 0.9, 1.1, 1.3], np.float32).reshape(1, 4, 1, 1)
OPTIONS: dict[str, Any] = {"is_causal": True, "causal_offset": 5, "scale": 1.0}
# Distance of every score from its threshold, in z: derivatives jump or bend there, and those of
# orders below 1 have a pole, at which the rounding of the scores is magnified.
MARGIN, MARGIN_BELOW_ONE = 1e-4, 1e-3


def cell_checks(dtype: str) -> list[Check]:
    """List a check in a type for each cell and implementation."""
    return [
        Check(f"attention {cell} {name} {dtype}", _cell, (cell, name, dtype))
        for cell in load("cells").cells(h=HEADS)
        for name in IMPLEMENTATIONS
    ]


def _inputs(cell: Any, dtype: str) -> tuple[list[np.ndarray], np.ndarray, Any]:
    """Draw query, key, value and bias, a cotangent, and what the oracle makes of them."""
    oracle, inputs = load("oracle"), load("attention_inputs")
    shape = inputs.Shape(B=2, T=17, S=33, N=4, K=2, H=4, V=3)
    bias = 0.3 * np.random.default_rng(11).normal(size=(1, shape.N, shape.T, shape.S))
    bias = inputs.rounded(bias, dtype)
    for seed in range(200):
        *arrays, cotangent = inputs.draw(shape, seed, dtype)
        forward = oracle.attention(*arrays, bias, order=cell.order, rule=cell.rule, **OPTIONS)
        if forward.rows.margin > (MARGIN_BELOW_ONE if 0 < cell.order < 1 else MARGIN):
            return [*arrays, bias], cotangent, forward
    raise ValueError(f"cell: expected one with inputs off the kinks, got {cell}")


def _cell(cell: Any, implementation: str, dtype: str) -> Iterator[Finding]:
    arrays, cotangent, forward = _inputs(cell, dtype)
    with jax.enable_x64(dtype == "float64"):
        inputs = [jnp.asarray(a, dtype) for a in arrays]
        inputs.append(jnp.asarray(HEADS, "float64" if dtype == "float64" else "float32"))
        call = _both(cell, implementation)
        output, gradients = call(inputs, jnp.asarray(cotangent, dtype))
    name = f"attention {cell} {implementation} {dtype}"
    tolerance, score = load("tolerances").TOLERANCES[dtype], forward.rows.largest_score
    bound = tolerance.output(score, largest(arrays[2]))
    yield Finding(f"{name}: output", apart(output, forward.output), bound)
    want = load("oracle").attention_vjp(forward, cotangent)
    terms = _cancelling(cell, want["scores"], forward.scores)
    want["bias"] = want.pop("scores").sum(0, keepdims=True)
    want["h"] = want["h"].sum((0, 2), keepdims=True)
    for argument, got in zip(("query", "key", "value", "bias", "h"), gradients, strict=True):
        entry = max(largest(want[argument]), terms if argument == "h" else 0.0)
        bound = tolerance.gradient(score, entry * (_steep(cell) if argument == "h" else 1))
        error = apart(got, want[argument])
        yield Finding(f"{name}: gradient of {argument}", error, bound)


def _cancelling(cell: Any, d_scores: np.ndarray, scores: np.ndarray) -> float:
    """The size of the terms of h's gradient where they sum to zero: h does not matter there.

    The k nearest keys are the same at every bandwidth, and only the Gaussian weighs them by it.
    """
    if cell.rule_name != "nearest" or cell.kernel_name == "gaussian":
        return 0.0
    terms = np.abs(d_scores * np.where(np.isfinite(scores), scores, 0)).sum((0, 2, 3))
    return largest(2 * terms / HEADS.reshape(-1))


def _steep(cell: Any) -> float:
    """How much faster than the scores the weights move with a fixed threshold: the order's power.

    Rounding every score by half a bit moves the oracle's own gradient of h by three times the bound
    at order 40; up to order 3 the bound holds as it is.
    """
    return cell.order if cell.rule_name == "fixed" and 3 < cell.order < float("inf") else 1.0


def _both(cell: Any, implementation: str) -> Any:
    """Compile output and gradients, in query, key, value, bias and h, as one function."""
    make_rule = load("cells").RULES[cell.rule_name]

    def attend(query, key, value, bias, h):
        options = {**cell.arguments, **OPTIONS, "bandwidth": make_rule(h, cell.k)}
        return kreg.attention(query, key, value, bias, implementation=implementation, **options)

    def both(inputs, cotangent):
        output, pull = jax.vjp(attend, *inputs)
        return output, pull(cotangent)

    return jax.jit(both)
