"""The contract: what every implementation of attention promises, on drawn masks and values.

Structures (shape, kernel, rule, static options) over twelve shapes are compiled once each;
Hypothesis draws what goes into them: masks of every kind at once, adversarial scores, biases. The
oracle is float64 NumPy with a sort and does not know how kreg looks for thresholds. KREG_CASES: how
many cases at least, spread evenly over the structures.
"""

import functools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from attention_inputs import Shape, draw, rounded
from cells import Cell
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nightly import NIGHTLY
from tolerances import TOLERANCES

import kreg

IMPLEMENTATIONS = ("reference", "xla")
CASES = int(os.environ.get("KREG_CASES", "200"))


@dataclass(frozen=True)
class Structure:
    """What is static: one compilation for each."""

    shape: Shape
    kernel: str = "biweight"
    rule: str = "adaptive"
    dtype: str = "float32"
    options: dict[str, Any] = field(default_factory=dict)
    traced_order: bool = False

    @property
    def cell(self) -> Cell:
        return self.cell_at(1.0)

    def cell_at(self, h) -> Cell:
        return Cell(self.kernel, self.rule, h, k=5)

    def arguments(self, h) -> dict[str, Any]:
        """The kernel and the rule, and scale 1 for scores that are cosines."""
        arguments = self.cell_at(h).arguments
        if self.traced_order:
            order = h * self.cell.order  # h is an array of ones
            arguments["kernel"] = kreg.Kernel(jax.lax.stop_gradient(order))
        return arguments | ({"scale": 1.0} if self.rule == "fixed" else {})

    def band(self) -> np.ndarray:
        """Which keys the static options leave, [T, S]."""
        i, j = np.arange(self.shape.T)[:, None], np.arange(self.shape.S)[None]
        offset = self.options.get("causal_offset", 0)
        where = (j <= i + offset) | (not self.options.get("is_causal"))
        before, after = self.options.get("local_window_size", (10**6, 10**6))
        return where & (j >= i + offset - before) & (j <= i + offset + after)


CAUSAL = {"is_causal": True}
STRUCTURES = [
    Structure(Shape(T=63, S=129)),
    Structure(Shape(T=150, S=150, N=2, K=2), options=CAUSAL),
    Structure(Shape(T=65, S=65, K=1), "epanechnikov", options=CAUSAL | {"causal_offset": -1}),
    Structure(Shape(T=33, S=64, K=4), "gaussian", options=CAUSAL | {"causal_offset": 31}),
    Structure(
        Shape(B=1, T=300, S=300, N=2, K=1), "triweight", options={"local_window_size": (9, 4)}
    ),
    Structure(Shape(T=5, S=257), "order1.5"),
    Structure(Shape(T=63, S=65), "epanechnikov", "anchored"),
    Structure(Shape(T=40, S=70), "biweight", "nearest"),
    Structure(Shape(T=31, S=31), "order40", options=CAUSAL),
    Structure(Shape(T=63, S=63), "biweight", dtype="bfloat16", options=CAUSAL),
    Structure(Shape(T=1, S=1, N=1, K=1)),
    Structure(Shape(T=70, S=3, N=4, K=1), "epanechnikov"),
    Structure(Shape(T=63, S=129), "biweight", "fixed"),
    Structure(Shape(T=65, S=65, K=1), "epanechnikov", "fixed", options=CAUSAL),
    Structure(Shape(T=31, S=31), "triweight", options=CAUSAL, traced_order=True),
    Structure(Shape(T=33, S=64, K=4), "biweight", "anchored", options=CAUSAL, traced_order=True),
]
assert len({s.shape for s in STRUCTURES}) <= 12
NAMES = [f"{s.shape}-{s.cell}" for s in STRUCTURES]


@dataclass(frozen=True)
class Case:
    """Arrays for one structure, and which keys each query may see by all that is given."""

    arrays: tuple[np.ndarray, ...]  # query, key, value, cotangent
    bias: np.ndarray
    mask: dict[str, Any]
    where: np.ndarray

    def kreg_mask(self) -> kreg.Mask:
        return kreg.Mask(**jax.tree.map(jnp.asarray, self.mask))


def build(s: Structure, seed: int, spread: float, density: float, parts: int, ties: bool) -> Case:
    """Draw a case; `parts` says bit by bit which masks are more than neutral."""
    rng = np.random.default_rng(seed)
    shape = s.shape
    query, key, value, cotangent = draw(shape, seed, s.dtype, spherical=s.rule == "fixed")
    query = query if s.rule == "fixed" else rounded(query * spread, s.dtype)
    if ties:  # few distinct keys: many equal scores, some at the threshold
        key = key[:, rng.integers(0, min(3, shape.S), shape.S)]
    bias = np.zeros((1, shape.N, shape.T, shape.S))
    if parts & 1:
        bias = rng.normal(size=bias.shape)
        bias[rng.random(bias.shape) < 0.1] = -np.inf
    bias = rounded(bias, s.dtype)
    on = [bool(parts & 2**i) for i in range(1, 6)]
    array = rng.random((shape.B, shape.N, shape.T, shape.S)) < (density if on[0] else 2)
    start, stop = np.sort(rng.integers(0, shape.S + 1, (2, shape.B, shape.T)), axis=0)
    first, last = np.sort(rng.integers(0, shape.T + 1, (2, shape.B, shape.S)), axis=0)
    segments = (
        np.sort(rng.integers(0, 4, (shape.B, shape.T))),
        np.sort(rng.integers(0, 4, (shape.B, shape.S))),
    )
    lengths = rng.integers(0, shape.T + 1, shape.B), rng.integers(0, shape.S + 1, shape.B)
    mask = {
        "array": array,
        "key_start": start if on[1] else 0 * start,
        "key_stop": stop if on[1] else 0 * stop + shape.S,
        "query_start": first if on[2] else 0 * first,
        "query_stop": last if on[2] else 0 * last + shape.T,
        "segment_ids": segments if on[3] else tuple(0 * x for x in segments),
        "query_seq_lengths": lengths[0] if on[4] else 0 * lengths[0] + shape.T,
        "key_value_seq_lengths": lengths[1] if on[4] else 0 * lengths[1] + shape.S,
    }
    where = visible(shape, mask) & s.band() & (bias > -np.inf)
    # What nobody sees, and who sees nothing, may hold anything.
    grouped = where.reshape(shape.B, shape.K, -1, shape.T, shape.S)
    unseen = np.swapaxes(~grouped.any((2, 3)), 1, 2)[..., None]
    blind = np.swapaxes(~where.any(-1), 1, 2)[..., None]
    key, value = np.where(unseen, np.nan, key), np.where(unseen, np.inf, value)
    query = np.where(blind, np.nan, query)
    return Case((query, key, value, cotangent), bias, mask, where)


def visible(shape: Shape, mask: dict[str, Any]) -> np.ndarray:
    """Say in NumPy what `kreg.Mask` says, [B, N, T, S]."""
    i, j = np.arange(shape.T)[None, None, :, None], np.arange(shape.S)[None, None, None, :]
    where = mask["array"].copy()
    where &= (j >= mask["key_start"][:, None, :, None]) & (j < mask["key_stop"][:, None, :, None])
    where &= i >= mask["query_start"][:, None, None, :]
    where &= i < mask["query_stop"][:, None, None, :]
    of_queries, of_keys = mask["segment_ids"]
    where &= of_queries[:, None, :, None] == of_keys[:, None, None, :]
    where &= i < mask["query_seq_lengths"][:, None, None, None]
    return where & (j < mask["key_value_seq_lengths"][:, None, None, None])


@functools.cache
def compiled(number: int, implementation: str | Callable):
    """Output, stats and the gradients of query, key, value, bias and h; by name, or by an op."""
    s = STRUCTURES[number]
    op = implementation
    if isinstance(op, str):
        op = functools.partial(kreg.attention, implementation=op)

    @jax.jit
    def run(query, key, value, cotangent, bias, mask, h):
        def attend(query, key, value, bias, h):
            return op(
                query, key, value, bias, mask, return_stats=True, **s.arguments(h), **s.options
            )

        out, pull, stats = jax.vjp(attend, query, key, value, bias, h, has_aux=True)
        return (
            out,
            stats,
            dict(zip(("query", "key", "value", "bias", "h"), pull(cotangent), strict=True)),
        )

    return run


def computed(number: int, implementation: str | Callable, case: Case):
    dtype = STRUCTURES[number].dtype
    arrays = [jnp.asarray(x, "float32").astype(dtype) for x in (*case.arrays, case.bias)]
    h = jnp.full((1, 1, 1, 1), 1.0)
    return jax.tree.map(
        lambda x: np.asarray(x.astype("float32") if x.dtype == dtype else x),
        compiled(number, implementation)(*arrays, case.kreg_mask(), h),
    )


# At night half of them, such as traced and large orders: what they prove others nearly do.
WHEN = dict.fromkeys((3, 5, 8, 11, 12, 13, 14, 15), NIGHTLY)
AT_ONCE = len(STRUCTURES) - (0 if "KREG_CASES" in os.environ else len(WHEN))


@pytest.mark.parametrize(
    "number",
    [pytest.param(i, marks=WHEN.get(i, ())) for i in range(len(STRUCTURES))],
    ids=lambda i: NAMES[i],
)
@given(
    seed=st.integers(0, 2**31),
    spread=st.sampled_from([0.0, 1e-3, 0.3, 1.0, 4.0, 30.0, 300.0]),
    density=st.sampled_from([0.0, 0.02, 0.5, 0.98]),
    parts=st.integers(0, 63),
    ties=st.booleans(),
)
@settings(
    max_examples=math.ceil(CASES / AT_ONCE), deadline=None,
    derandomize="KREG_CASES" not in os.environ, suppress_health_check=list(HealthCheck),
    database=None, print_blob=True,
)  # fmt: skip
def test_every_implementation_keeps_the_contract(number, seed, spread, density, parts, ties):
    keeps_the_contract(IMPLEMENTATIONS, number, seed, spread, density, parts, ties)


def keeps_the_contract(implementations, number, seed, spread, density, parts, ties):
    """Compare with the oracle on a drawn case."""
    s = STRUCTURES[number]
    case = build(s, seed, spread, density, parts, ties)
    clean = [np.where(np.isfinite(x), x, 0) for x in case.arrays]
    bias = np.where(np.isfinite(case.bias), case.bias, 0)
    scale = 1.0 if s.rule == "fixed" else None
    want = oracle.attention(
        *clean[:3], bias, case.where, order=s.cell.order, rule=s.cell.rule, scale=scale
    )
    if s.rule == "nearest" and ties:
        return  # keys as far as the k-th may round to either side of it
    for implementation in implementations:
        out, stats, gradients = computed(number, implementation, case)
        check_output(s, case, clean[2], want, out)
        check_stats(s, want, stats)
        # Of keys that are equally best any one may stand for the maximum.
        if not (ties and s.rule == "anchored"):
            check_gradients(s, case, clean[3], want, gradients)


def check_output(s: Structure, case: Case, value, want, out, roundings: int = 1) -> None:
    """roundings: how often what becomes of a value is rounded to its type."""
    tolerance = TOLERANCES[s.dtype]
    cut_at_a_score = s.rule in ("nearest", "fixed")
    steep = want.rows.slope if cut_at_a_score else 1.0
    score = tolerance.score * want.rows.largest_score
    largest = np.abs(value).max()
    # Nearest and Fixed cut at a score: where rounding changes which keys are inside, a whole weight
    # may move.
    if cut_at_a_score and margin(want) < 16 * score + 1e-6:
        return
    allowed = roundings * tolerance.values * largest + 4 * score * steep * largest
    error = np.abs(out - want.output).max()
    assert error <= allowed, f"output off by {error:.2e}, allowed {allowed:.2e}"
    dead = ~case.where.any(-1)
    assert np.all(np.swapaxes(out, 1, 2)[dead] == 0), "a row without keys is not 0"


def check_stats(s: Structure, want, stats) -> None:
    threshold, support, residual = (np.swapaxes(x, 1, 2) for x in stats)
    rows = want.rows
    dead = ~rows.where.any(-1)
    assert np.all(threshold[dead] == np.inf) and np.all(support[dead] == 0)
    assert np.all(residual[dead] == 0)
    if s.rule != "adaptive" or s.kernel == "gaussian":
        return
    error = np.abs(threshold[~dead] - rows.t[..., 0][~dead])
    assert np.all(error <= residual[~dead]), f"t off by {error.max():.2e}"
    query, key, _ = want.inputs["wide"]
    lengths = [np.swapaxes(np.linalg.norm(x, axis=-1), 1, 2) for x in (query, key)]
    products = want.inputs["scale"] * lengths[0] * lengths[1].max(-1, keepdims=True)
    scale = (1 + np.abs(np.where(rows.where, rows.z, 0)).max(-1) + products)[~dead]
    assert np.all(residual[~dead] <= 1e-4 * s.cell.order**0.5 * scale), "the bound says nothing"
    slack = residual[..., None] + 8 * np.finfo("float32").eps * rows.largest_score
    with np.errstate(invalid="ignore"):
        gap = np.where(rows.where, rows.z - rows.t, -np.inf)
    assert np.all(support >= (gap > slack).sum(-1)) and np.all(support <= (gap > -slack).sum(-1))


def margin(want) -> float:
    with np.errstate(invalid="ignore"):
        return want.rows.margin


def gradient_terms(want, cotangent) -> dict[str, float]:
    """Bound the terms that each gradient is a sum of: the gradient formula with absolute values."""
    query, key, value = (np.abs(x) for x in want.inputs["wide"])
    rows, scale, cotangent = want.rows, want.inputs["scale"], np.abs(cotangent)
    heads = want.inputs["kv_heads"]
    d_p = np.einsum("btnv,bsnv->bnts", cotangent, value)
    total = np.maximum(rows.u.sum(-1, keepdims=True), 1e-300)
    d_s = rows.u * (d_p + (rows.u * d_p).sum(-1, keepdims=True) / total)
    share = query.shape[2] // heads
    return {
        "query": scale * np.einsum("bnts,bsnh->btnh", d_s, key).max(initial=0),
        "key": scale * share * np.einsum("bnts,btnh->bsnh", d_s, query).max(initial=0),
        "value": share * np.einsum("bnts,btnv->bsnv", rows.p, cotangent).max(initial=0),
        "bias": d_s.sum(0).max(initial=0),
        "h": 2 * (d_s * np.where(rows.where, np.abs(rows.z), 0)).sum(),
    }


def check_gradients(s: Structure, case: Case, cotangent, want, gradients) -> None:
    """Compare entry by entry, unless a score is so near its threshold that rounding decides."""
    for name, g in gradients.items():
        assert np.all(np.isfinite(g)), f"{name}: not finite"
    tolerance = TOLERANCES[s.dtype]
    near = 64 * tolerance.score * (1 + want.rows.largest_score)
    if s.rule not in ("adaptive", "anchored") or (s.kernel != "gaussian" and margin(want) < near):
        return
    exact = oracle.attention_vjp(want, cotangent)
    exact["bias"] = exact.pop("scores").sum(0, keepdims=True)
    terms, h = (like(exact.pop(what), gradients["h"]) for what in ("h_terms", "h"))
    sizes = gradient_terms(want, cotangent)
    for name, g in exact.items():
        if name not in gradients:  # no bias was given
            continue
        allowed = tolerance.gradient(want.rows.largest_score, np.abs(g).max(initial=0))
        # Equal keys have gradient 0 as a difference of terms that are not.
        allowed += 16 * tolerance.epsilon * sizes[name]
        # Orders below 2 are steep at the threshold: u = x^(r-1) has no bounded slope there.
        allowed *= 30 if s.kernel == "order1.5" else 1
        error = np.abs(gradients[name] - g).max(initial=0)
        assert error <= allowed, f"{name}: off by {error:.2e}, allowed {allowed:.2e}"
    allowed = tolerance.gradient(want.rows.largest_score, terms.max(initial=0))
    allowed += 16 * tolerance.epsilon * sizes["h"]
    assert np.abs(gradients["h"] - h).max() <= allowed, "h"


def like(x: np.ndarray, h: np.ndarray) -> np.ndarray:
    """Sum over the axes along which there is one h for all."""
    axes = tuple(i for i, size in enumerate(h.shape) if size == 1)
    return x.sum(axes, keepdims=True)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("number", [0, 1, 2, 4], ids=lambda i: NAMES[i])
def test_a_row_does_not_know_its_neighbours(number, implementation):
    """Two runs agree bit by bit, and so does a batch entry whose neighbours hold other contents."""
    s = STRUCTURES[number]
    case = build(s, 0, 1.0, 0.5, 63, False)
    other = build(s, 1, 30.0, 0.5, 63, True)
    first = computed(number, implementation, case)[0]
    np.testing.assert_array_equal(first, computed(number, implementation, case)[0])
    if s.shape.B == 1:
        return

    def second_entry_from(one, two):
        return jax.tree.map(
            lambda a, b: np.stack([a[0], b[1]]) if np.shape(a)[0] == 2 else a, one, two
        )

    mixed = Case(
        second_entry_from(case.arrays, other.arrays), case.bias,
        second_entry_from(case.mask, other.mask), case.where,
    )  # fmt: skip
    np.testing.assert_array_equal(computed(number, implementation, mixed)[0][0], first[0])


@pytest.mark.parametrize(
    ("number", "implementation"), [(1, "xla"), (3, "reference")], ids=["xla", "reference"]
)
def test_vmap_over_some_arguments(number, implementation):
    """Mapped queries, biases and mask ranges beside shared keys; outputs and gradients."""
    s = STRUCTURES[number]
    cases = [build(s, seed, 1.0, 0.5, 0, False) for seed in (0, 1)]
    _, key, value, cotangent = (jnp.asarray(x, "float32") for x in cases[0].arrays)
    queries = jnp.stack([jnp.asarray(c.arrays[0], "float32") for c in cases], axis=1)
    stops = jnp.array([s.shape.S, s.shape.S // 2])

    def gradients(query, key, stop):
        def loss(query, key):
            mask = kreg.Mask(key_stop=stop)
            options = {"implementation": implementation, **s.arguments(1.0), **s.options}
            return jnp.vdot(kreg.attention(query, key, value, mask=mask, **options), cotangent)

        return jax.value_and_grad(loss, argnums=(0, 1))(query, key)

    both = jax.jit(jax.vmap(gradients, in_axes=(1, None, 0)))(queries, key, stops)
    for i in range(2):
        one = jax.jit(gradients)(queries[:, i], key, stops[i])
        jax.tree.map(
            lambda x, y, i=i: np.testing.assert_allclose(x[i], y, atol=2e-5, rtol=2e-5), both, one
        )
