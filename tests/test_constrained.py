"""normmax and budget: against solutions by other means in float64, and what every map keeps."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from nightly import nightly
from tolerances import TOLERANCES

import kreg

pytestmark = pytest.mark.core

SINGLE = TOLERANCES["float32"]
ALPHAS = (1.1, 4 / 3, 1.5, 2.0, 3.0)
BUDGETS = (0.3, 1.0, 2.0, 3.7, 40.0)
MAPS = {
    "normmax": functools.partial(kreg.normmax, alpha=2.0),
    "normmax1.5": functools.partial(kreg.normmax, alpha=1.5),
    "normmax1.7": functools.partial(kreg.normmax, alpha=1.7),
    "budget": functools.partial(kreg.budget, budget=1.7),
}

normmax = jax.jit(lambda x, alpha, where=None: kreg.normmax(x, alpha, where=where))
budget = jax.jit(lambda x, budget, where=None: kreg.budget(x, budget, where=where))


def norm_weights(x, alpha: float) -> np.ndarray:
    """Bisect tau for one row, in float64."""
    depth, r = np.asarray(x, np.float64) - np.max(x), 1 / (alpha - 1)
    low, high = 0.0, 1.0
    for _ in range(100):
        gap = (low + high) / 2
        enough = np.sum(np.maximum(depth + gap, 0) ** (r + 1)) >= 1
        low, high = (low, gap) if enough else (gap, high)
    p = np.maximum(depth + high, 0) ** r
    return p / p.sum()


def budget_weights(x, total: float) -> np.ndarray:
    """Walk the sorted breakpoints of one row's sum of capped weights, in float64."""
    x = np.asarray(x, np.float64)
    if total >= x.size:
        return np.ones(x.size)
    taus = np.sort(np.concatenate([x, x - 1]))[::-1]
    sums = np.array([np.clip(x - tau, 0, 1).sum() for tau in taus])
    after = np.argmax(sums >= total)
    share = (total - sums[after - 1]) / (sums[after] - sums[after - 1])
    return np.clip(x - (taus[after - 1] + share * (taus[after] - taus[after - 1])), 0, 1)


def draw(shape, seed=0, scale=1.5):
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def hard_rows(width: int) -> np.ndarray:
    """Rows that are flat, tied, one-hot, far from 0, or wide."""
    rng = np.random.default_rng(width)
    normal, hot = rng.normal(size=width), (np.arange(width) == width // 3) * 1.0
    rows = [np.zeros(width), np.full(width, 1e6), 100 * hot, hot, 0.5 * (np.arange(width) % 2)]
    rows += [np.linspace(0, 1, width), np.linspace(50, -50, width), normal + 1e5]
    rows += [normal * spread for spread in (1e-3, 0.1, 1.0, 10.0, 1e3, 1e6)]
    return np.stack(rows).astype(np.float32)


@pytest.mark.parametrize("width", nightly([1, 2, 257, 4096], but=[1, 257]))
def test_weights_are_the_solution(width):
    x = hard_rows(width)
    for alpha in ALPHAS:
        want = np.stack([norm_weights(row, alpha) for row in x])
        for got in (normmax(x, alpha), kreg.normmax(x, alpha)):
            np.testing.assert_allclose(got, want, atol=SINGLE.values, err_msg=f"alpha {alpha}")
    if width <= 257:
        for total in BUDGETS:
            want = np.stack([budget_weights(row, total) for row in x])
            np.testing.assert_allclose(budget(x, total), want, atol=SINGLE.values)


def test_rows_sum_to_one_or_to_the_budget():
    x = hard_rows(4096)
    for alpha in ALPHAS:
        np.testing.assert_allclose(normmax(x, alpha).sum(-1), 1, atol=SINGLE.total(4096))
    for total in BUDGETS:
        sums = np.asarray(budget(x, total), np.float64).sum(-1)
        np.testing.assert_allclose(sums, total, rtol=SINGLE.total(4096))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_normmax_maximises_its_objective(alpha):
    x = draw((8,), scale=0.4).astype(np.float64)

    def objective(p):
        return p @ x - np.sum(p**alpha, axis=-1) ** (1 / alpha)

    with jax.enable_x64(True):
        p = np.asarray(kreg.normmax(x, alpha))
    others = np.random.default_rng(1).dirichlet(np.full(8, 0.5), 2000)
    others = np.concatenate([others, p + 1e-3 * (others - p)])
    assert np.all(objective(others) < objective(p))


@pytest.mark.parametrize("total", [1.0, 2.5])
def test_budget_is_the_nearest_feasible_point(total):
    x = draw((8,)).astype(np.float64)
    with jax.enable_x64(True):
        p = np.asarray(kreg.budget(x, total))
    others = total * np.random.default_rng(1).dirichlet(np.full(8, 3.0), 2000)
    others = others[np.all(others <= 1, axis=1)]
    assert len(others) > 500
    others = np.concatenate([others, p + 1e-3 * (others - p)])
    assert np.all(np.sum((others - x) ** 2, axis=-1) > np.sum((p - x) ** 2))


def test_a_budget_of_one_is_sparsemax():
    x = hard_rows(257)
    np.testing.assert_allclose(budget(x, 1.0), kreg.sparsemax(x), atol=SINGLE.values)


def test_a_budget_that_all_keys_fit_gives_ones():
    x, where = draw((2, 5)), np.array([1, 1, 0, 1, 0], bool)
    for total in (3.0, 3.5, np.inf):
        p, gradient = jax.vjp(lambda x, b: kreg.budget(x, b, where=where), x, jnp.float32(total))
        np.testing.assert_array_equal(p, np.broadcast_to(where * 1.0, x.shape))
        if total > 3:
            assert all(np.all(g == 0) for g in gradient(jnp.asarray(draw((2, 5)))))


def test_ones_far_above_the_rest_have_no_gradient():
    """Tied keys that are all chosen stay at 1 whichever of them moves."""
    x = jnp.array([[3.0, 3.0, 3.0, 1.5, 0.0], [9.0, 3.0, 2.5, 0.0, -1.0]])
    jacobian = jax.jacobian(lambda x: kreg.budget(x, 3.0))(x)
    np.testing.assert_array_equal(kreg.budget(x, 3.0), [[1, 1, 1, 0, 0]] * 2)
    assert np.all(np.asarray(jacobian) == 0)
    # Many that almost tie: their sum rounds to the budget before all of them are at 1.
    x = np.concatenate([np.full(900, 5.0), np.linspace(0, 1e-6, 100), np.full(24, -3.0)])
    p, gradient = jax.vjp(lambda x: kreg.budget(x, 1000.0), x.astype(np.float32))
    np.testing.assert_array_equal(p, x >= 0)
    assert np.all(gradient(jnp.sin(jnp.arange(1024.0)))[0] == 0)


@pytest.mark.parametrize("modes", ["fwd", "rev"])
@pytest.mark.nightly
def test_derivatives_of_normmax(modes):
    with jax.enable_x64(True):
        # The second row has no key near its threshold, where r < 1 is steep.
        x = jnp.asarray(draw((2, 6), seed=3, scale=0.3), "float64") * jnp.array([[1.0], [0.3]])
        check_grads(normmax, (x, jnp.array([[1.4], [2.6]])), 2, modes, atol=1e-5, rtol=1e-5)
        check_grads(jax.jit(kreg.normmax), (x,), 2, modes, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("modes", ["fwd", "rev"])
def test_derivatives_of_budget(modes):
    with jax.enable_x64(True):
        x = jnp.asarray(draw((3, 6), seed=4), "float64")
        total = jnp.array([[0.7], [1.9], [3.3]])
        p = np.asarray(budget(x, total))
        assert all(np.any(kind) for kind in (p == 0, p == 1, (p > 0) & (p < 1)))
        check_grads(budget, (x, total), 2, modes, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.slow
def test_static_and_traced_alpha_agree(alpha):
    with jax.enable_x64(True):
        x = jnp.asarray(draw((4, 9), scale=0.5), "float64")

        def both(map_):
            p, pull = jax.vjp(map_, x)
            return p, pull(jnp.cos(jnp.arange(36.0).reshape(4, 9)))[0]

        static = both(lambda x: kreg.normmax(x, alpha))
        for one, other in zip(static, both(lambda x: normmax(x, alpha)), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-12)


@pytest.mark.parametrize("axis", [0, -2])
def test_axis_where_and_one_value_a_row(axis):
    x = draw((5, 4, 6), scale=0.5)
    where = np.random.default_rng(1).random(x.shape) < 0.7
    shape = [5, 4, 6]
    shape[axis] = 1
    values = np.random.default_rng(2).uniform(1.2, 1.9, shape).astype(np.float32)
    moved = [np.moveaxis(a, axis, -1) for a in (x, where, values)]
    for map_, solve in ((kreg.normmax, norm_weights), (kreg.budget, budget_weights)):
        got = np.asarray(map_(jnp.asarray(x), jnp.asarray(values), axis=axis, where=where))
        assert np.all(got[~where] == 0)
        got = np.moveaxis(got, axis, -1)
        for row in np.ndindex(got.shape[:-1]):
            keep = moved[1][row]
            want = solve(moved[0][row][keep], float(moved[2][row][0])) if keep.any() else []
            np.testing.assert_allclose(got[row][keep], want, atol=SINGLE.values)


@pytest.mark.parametrize("name", MAPS)
def test_nothing_leaks_from_masked_entries_and_empty_rows_are_zero(name):
    x = draw((3, 7), scale=0.5)
    where = np.ones((3, 7), bool)
    where[:, [1, 4]] = False
    where[2] = False

    @jax.jit
    def both(x, where):
        p, pull = jax.vjp(lambda x: MAPS[name](x, where=where), x)
        return p, pull(jnp.broadcast_to(jnp.arange(7.0), p.shape))[0]

    clean = both(x, where)
    assert all(np.all(np.asarray(a)[~where] == 0) for a in clean)
    assert all(np.all(np.any(np.asarray(a)[:2] != 0, axis=-1)) for a in clean)
    for bad in (np.nan, np.inf, -np.inf, 3e38):
        for a, b in zip(clean, both(np.where(where, x, np.float32(bad)), where), strict=True):
            np.testing.assert_array_equal(a, b)
    # Scores of -inf need no mask.
    for a, b in zip(clean, both(np.where(where, x, -np.inf), where | True), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", MAPS)
def test_nan_at_an_admissible_entry_shows(name):
    assert np.any(np.isnan(MAPS[name](jnp.array([1.0, jnp.nan, 0.5, 0.0]))))


@pytest.mark.parametrize("name", MAPS)
def test_a_row_does_not_feel_its_neighbours(name):
    map_ = jax.jit(MAPS[name])
    x = draw((5, 33))
    alone = np.asarray(map_(x))[0]
    for scale in (0.0, 1e-3, 1e3):
        other = x.copy()
        other[1:] *= np.float32(scale)
        np.testing.assert_array_equal(np.asarray(map_(other))[0], alone)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("name", ["normmax", "budget"])
def test_types_are_kept_and_half_types_computed_in_single(name, dtype):
    with jax.enable_x64(dtype == "float64"):
        x = jnp.asarray(draw((2, 5)), dtype)
        p = MAPS[name](x)
        assert p.dtype == x.dtype
        assert jax.grad(lambda x: MAPS[name](x)[0, 0].astype("float32"))(x).dtype == x.dtype
        if dtype.endswith("16"):
            single = MAPS[name](x.astype("float32")).astype(dtype)
            np.testing.assert_array_equal(p.astype("float32"), single.astype("float32"))


@pytest.mark.parametrize("name", ["normmax", "budget"])
def test_vmap_changes_nothing(name):
    x = jnp.asarray(draw((4, 6, 9)))
    values = jnp.linspace(1.2, 1.9, 4)
    map_ = getattr(kreg, name)
    got = jax.jit(jax.vmap(lambda x, value: jax.vmap(lambda x: map_(x, value))(x)))(x, values)
    np.testing.assert_allclose(got, map_(x, values[:, None, None]), atol=1e-6)


@pytest.mark.parametrize("name", ["normmax", "budget"])
def test_traced_values_compile_once_and_bad_ones_give_nan(name):
    x, map_ = draw((2, 5)), getattr(kreg, name)
    traces = []

    @jax.jit
    def traced(x, value):
        traces.append(value)
        return map_(x, value)

    for value in (1.2, 1.5, 2.0):
        np.testing.assert_allclose(traced(x, value), map_(x, value), atol=SINGLE.values)
    assert np.all(np.isnan(traced(x, 1.0 if name == "normmax" else 0.0)))
    assert np.all(np.isnan(traced(x, jnp.nan)))
    assert len(traces) == 1


X = jnp.arange(6.0).reshape(2, 3)


@pytest.mark.parametrize(
    ("argument", "given", "call"),
    [
        ("alpha", "1.0", lambda: kreg.normmax(X, 1.0)),
        ("alpha", "0.5", lambda: kreg.normmax(X, jnp.array(0.5))),
        ("alpha", "nan", lambda: kreg.normmax(X, float("nan"))),
        ("alpha", "(3,)", lambda: kreg.normmax(X, jnp.full(3, 1.5))),
        ("alpha", "(1, 3)", lambda: kreg.normmax(X, jnp.full((1, 3), 1.5))),
        ("budget", "0", lambda: kreg.budget(X, 0)),
        ("budget", "-1", lambda: kreg.budget(X, jnp.array([[1.0], [-1.0]]))),
        ("budget", "(3, 1)", lambda: kreg.budget(X, jnp.ones((3, 1)))),
        ("axis", "2", lambda: kreg.normmax(X, axis=2)),
        ("axis", "-3", lambda: kreg.budget(X, jnp.ones((2, 1)), axis=-3)),
        ("where", "(2, 4)", lambda: kreg.budget(X, where=jnp.ones((2, 4)) > 0)),
        ("where", "float32", lambda: kreg.normmax(X, where=jnp.ones((2, 3)))),
        ("x", "(0, 3)", lambda: kreg.budget(jnp.ones((0, 3)), axis=0)),
        ("x", "()", lambda: kreg.normmax(1.0)),
    ],
)
def test_errors_name_the_argument(argument, given, call):
    with pytest.raises(ValueError, match=rf"(?s)^{argument}: expected .*{re.escape(given)}"):
        call()
