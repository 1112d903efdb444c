"""The maps on scores: weights, sums, and the derivatives in scores and alpha."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import kreg
from experiments.hardware.findings import Check, Finding, apart, largest, wide, worst_row
from experiments.hardware.from_tests import load
from experiments.hardware.rows import long_rows, padded_rows

ALPHAS = (1.0, 1.0001, 1.1, 4 / 3, 1.5, 2.0, 2.5)
LONG_ALPHAS = (2.0, 1.5, 4 / 3, 2.5)


def map_checks(dtype: str, *, smoke: bool) -> list[Check]:
    """List the checks of every map in a type."""
    width, long = (33, 513) if smoke else (257, 65_536)
    checks = [Check(f"maps {n} {dtype}", _named_map, (n, width, dtype)) for n in _named()]
    checks.append(Check(f"maps entmax {dtype}", _entmax, (width, dtype)))
    checks.append(Check(f"maps entmax {dtype} rows of {long}", _long_rows, (long, dtype)))
    checks.append(Check(f"maps entmax {dtype} gradient", _gradient, (dtype,)))
    if dtype == "float32":
        checks.append(Check("maps entmax float32 derivative in alpha", _alpha_derivative))
    return checks


def _named() -> dict[str, tuple[Callable[..., jax.Array], float, Any]]:
    """The named maps, each with the order and the rule that it stands for."""
    oracle = load("oracle")
    return {
        "softmax": (kreg.softmax, oracle.INFINITE, oracle.ADAPTIVE),
        "sparsemax": (kreg.sparsemax, 1, oracle.ADAPTIVE),
        "entmax15": (kreg.entmax15, 2, oracle.ADAPTIVE),
        "relumax": (kreg.relumax, 1, oracle.Rule("anchored")),
        # t = 1/h^2 - 1/2 = 0.
        "normalized_relu": (kreg.normalized_relu, 1, oracle.Rule("fixed", 2**0.5)),
        "topk_softmax": (_top(kreg.topk_softmax), oracle.INFINITE, oracle.Rule("nearest", 1, 16)),
        "topk_uniform": (_top(kreg.topk_uniform), 0, oracle.Rule("nearest", 1, 16)),
    }


def _top(map_: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    return functools.partial(map_, k=16)


def _order(alpha: Any) -> float:
    """The order of the alpha that the computation sees, an integer where it is meant as one."""
    excess = float(alpha) - 1
    if excess == 0:
        return load("oracle").INFINITE
    return round(1 / excess) if abs(1 / excess - round(1 / excess)) < 1e-6 else 1 / excess


def _named_map(name: str, width: int, dtype: str) -> Iterator[Finding]:
    map_, order, rule = _named()[name]
    x, where = padded_rows(width, dtype)
    with jax.enable_x64(dtype == "float64"):
        p = jax.jit(map_)(jnp.asarray(x, dtype), where=jnp.asarray(where))
    yield from _weights(f"maps {name} {dtype}", p, x, where, order, rule, dtype)


def _entmax(width: int, dtype: str) -> Iterator[Finding]:
    """One compiled function serves every alpha."""
    x, where = padded_rows(width, dtype)
    entmax = jax.jit(lambda x, alpha, where: kreg.entmax(x, alpha, where=where))
    for alpha in ALPHAS:
        with jax.enable_x64(dtype == "float64"):
            traced = jnp.asarray(alpha, "float64" if dtype == "float64" else "float32")
            p = entmax(jnp.asarray(x, dtype), traced, jnp.asarray(where))
        name, rule = f"maps entmax:{alpha:.5g} {dtype}", load("oracle").ADAPTIVE
        yield from _weights(name, p, x, where, _order(traced), rule, dtype)


def _long_rows(width: int, dtype: str) -> Iterator[Finding]:
    x = long_rows(width, dtype)
    where = np.ones(x.shape, bool)
    entmax = jax.jit(kreg.entmax)
    for alpha in LONG_ALPHAS:
        with jax.enable_x64(dtype == "float64"):
            traced = jnp.asarray(alpha, "float64" if dtype == "float64" else "float32")
            p = entmax(jnp.asarray(x, dtype), traced)
        name, rule = f"maps entmax:{alpha:.5g} {dtype} rows of {width}", load("oracle").ADAPTIVE
        yield from _weights(name, p, x, where, _order(traced), rule, dtype)


def _weights(
    name: str, p: jax.Array, x: np.ndarray, where: np.ndarray, order: float, rule: Any, dtype: str
) -> Iterator[Finding]:
    """Both promises about weights, and that nothing falls on padding."""
    tolerance, values = load("tolerances").TOLERANCES[dtype], wide(p)
    want = load("oracle").rows(np.where(where, x, 0), where, order, rule)
    errors = np.abs(values - want.p).max(-1)
    yield worst_row(f"{name}: weights", errors, np.asarray(tolerance.values))
    bounds = np.array([tolerance.total(max(int(n), 1)) for n in want.support])
    yield worst_row(f"{name}: sums", np.abs(values.sum(-1) - where.any(-1)), bounds)
    if not where.all():
        yield Finding(f"{name}: weight on padding", largest(values[~where]), 0.0)


def _scores_off_the_kinks(order: float) -> np.ndarray:
    """Draw scores [3, 6] that keep 1e-2 from the thresholds, where derivatives jump or bend."""
    oracle = load("oracle")
    for seed in range(500):
        x = np.random.default_rng(seed).normal(size=(3, 6))
        x = load("attention_inputs").rounded(x, "bfloat16")
        if oracle.rows(x, True, order, oracle.ADAPTIVE).margin > 1e-2:
            return x
    raise ValueError(f"order: expected one with scores off the kinks, got {order}")


def _gradient(dtype: str) -> Iterator[Finding]:
    oracle, tolerance = load("oracle"), load("tolerances").TOLERANCES[dtype]
    pull = jax.jit(
        lambda x, alpha, cotangent: jax.vjp(lambda x: kreg.entmax(x, alpha), x)[1](cotangent)[0]
    )
    for alpha in ALPHAS:
        with jax.enable_x64(dtype == "float64"):
            traced = jnp.asarray(alpha, "float64" if dtype == "float64" else "float32")
            order = _order(traced)
            x = _scores_off_the_kinks(order)
            cotangent = load("attention_inputs").rounded(np.cos(np.arange(18.0)), dtype)
            cotangent = cotangent.reshape(x.shape)
            got = pull(jnp.asarray(x, dtype), traced, jnp.asarray(cotangent, dtype))
        rows = oracle.rows(x, True, order, oracle.ADAPTIVE)
        want, _ = oracle.rows_vjp(rows, cotangent, order, oracle.ADAPTIVE)
        bound = tolerance.gradient(largest(x), largest(want))
        yield Finding(f"maps entmax:{alpha:.5g} {dtype}: gradient", apart(got, want), bound)


def _alpha_derivative() -> Iterator[Finding]:
    oracle, tolerance = load("oracle"), load("tolerances").TOLERANCES["float32"]
    derivative = jax.jit(lambda x, alpha: jax.jacfwd(lambda a: kreg.entmax(x, a))(alpha))
    for alpha in ALPHAS:
        traced = np.float32(alpha)
        x = _scores_off_the_kinks(_order(traced))
        got = derivative(jnp.asarray(x, "float32"), jnp.asarray(traced))
        want = oracle.entmax_alpha_derivative(x, True, float(traced))
        bound = tolerance.gradient(largest(x), largest(want))
        yield Finding(f"maps entmax:{alpha:.5g} float32: dp/dalpha", apart(got, want), bound)
