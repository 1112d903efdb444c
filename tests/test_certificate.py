"""Stats: the threshold, the support and the certified bound that come with an attention."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from attention_inputs import Shape, draw
from cells import FOUR, Cell, cells
from nightly import NIGHTLY
from test_accuracy import adversarial_rows

import kreg

pytestmark = pytest.mark.core

IMPLEMENTATIONS = ("reference", "xla")
SOLVED = ("epanechnikov", "biweight", "triweight", "order1.5", "order0.7", "order40")


def stats_of_scores(x, cell: Cell, implementation: str, mask=None):
    """Return Stats [R] of rows of given scores [R, S] (a bias over zero queries: no rounding)."""
    rows, width = x.shape
    query = jnp.zeros((1, rows, 1, 2), x.dtype)
    key, value = (jnp.zeros((1, width, 1, d), x.dtype) for d in (2, 1))
    mask = None if mask is None else jnp.asarray(mask)[None, None]
    options = {"scale": 1.0, "return_stats": True, "implementation": implementation}
    call = jax.jit(
        lambda x: kreg.attention(query, key, value, x, mask, **options, **cell.arguments)
    )
    _, stats = call(x[None, None])
    assert stats.threshold.shape == stats.support.shape == stats.residual.shape == (1, rows, 1)
    return jax.tree.map(lambda a: np.asarray(a)[0, :, 0], stats)


BOUNDED = [*((k, "float32") for k in SOLVED), ("biweight", "bfloat16"), ("biweight", "float64")]
QUICK = [("biweight", "float32"), ("order0.7", "float32")]


@pytest.mark.parametrize(
    ("kernel", "dtype", "implementation"),
    [(*case, "xla") for case in BOUNDED]
    + [
        pytest.param(*case, "reference", marks=() if case in QUICK else NIGHTLY) for case in BOUNDED
    ],
)
def test_residual_bounds_the_error_of_the_threshold(kernel, dtype, implementation):
    x, where = adversarial_rows(257, dtype)
    where[-3:] = np.arange(257) % 5 == 0
    cell = Cell(kernel, "adaptive", h=1.0)
    with jax.enable_x64(dtype == "float64"):
        stats = stats_of_scores(jnp.asarray(x, dtype), cell, implementation, where)
    want = oracle.rows(x, where, cell.order, cell.rule)
    scale = 1 + np.abs(np.where(where, x, 0)).max(-1)
    error = np.abs(stats.threshold - want.t[:, 0])
    assert stats.threshold.dtype == np.float32 and stats.support.dtype == np.int32
    assert np.all(error <= stats.residual), f"rows {np.flatnonzero(error > stats.residual)}"
    # A bound that says nothing would be none: it must be near the rounding of float32 scores.
    assert np.all(stats.residual <= 1e-4 * cell.order**0.5 * scale)
    near = 8 * np.finfo(np.float32).eps * scale[:, None] + error[:, None]
    gap = np.where(where, x - want.t, -np.inf)
    assert np.all(stats.support >= (gap > near).sum(-1))
    assert np.all(stats.support <= (gap > -near).sum(-1))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kernel", ["epanechnikov", "biweight"])
def test_thresholds_of_queries_and_keys(kernel, implementation):
    """z = s / h^2 with a head-wise h; the threshold is in those units."""
    query, key, value, _ = draw(Shape(T=65, S=129), spherical=False)
    h = np.array([0.5, 1.0, 1.5, 2.0]).reshape(1, 4, 1, 1)
    cell = Cell(kernel, "adaptive", h=h)
    want = oracle.attention(query, key, value, order=cell.order, rule=cell.rule)
    arrays = (jnp.asarray(a, "float32") for a in (query, key, value))
    rule = kreg.Adaptive(jnp.asarray(h, "float32"))
    kernel = cell.arguments["kernel"]
    options = {"return_stats": True, "implementation": implementation}
    _, stats = kreg.attention(*arrays, kernel=kernel, bandwidth=rule, **options)
    error = np.abs(np.asarray(stats.threshold).swapaxes(1, 2) - want.rows.t[..., 0])
    assert np.all(error <= np.asarray(stats.residual).swapaxes(1, 2))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "cell", [c for c in cells("box", "biweight") if c.rule_name != "adaptive"], ids=str
)
def test_closed_thresholds(cell, implementation):
    x = np.tanh(np.random.default_rng(0).normal(size=(9, 33))).astype(np.float32)
    stats = stats_of_scores(jnp.asarray(x), cell, implementation)
    want = oracle.rows(x, True, cell.order, cell.rule)
    np.testing.assert_allclose(stats.threshold, want.t[:, 0], atol=2e-6)
    np.testing.assert_array_equal(stats.support, want.support)
    np.testing.assert_array_equal(stats.residual, 0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rule", ["adaptive", "anchored", "fixed"])
def test_gaussian_threshold_is_minus_infinity(rule, implementation):
    where = np.arange(8) < np.array([[8], [3], [0]])
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8)), "float32")
    stats = stats_of_scores(x, Cell("gaussian", rule), implementation, where)
    np.testing.assert_array_equal(stats.threshold, [-np.inf, -np.inf, np.inf])
    np.testing.assert_array_equal(stats.support, [8, 3, 0])
    np.testing.assert_array_equal(stats.residual, 0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("cell", FOUR[:3], ids=str)
def test_row_without_keys(cell, implementation):
    where = np.arange(8) < np.array([[8], [0]])
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8)) / 4, "float32")
    stats = stats_of_scores(x, cell, implementation, where)
    assert stats.threshold[1] == np.inf and stats.support[1] == 0 and stats.residual[1] == 0
    assert np.isfinite(stats.threshold[0]) and stats.support[0] > 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_empty_fixed_row_counts_its_admissible_keys(implementation):
    where = np.arange(8) < np.array([[5], [8]])
    x = jnp.asarray([[0.1] * 8, [0.1] * 7 + [0.9]], "float32")
    stats = stats_of_scores(x, Cell("biweight", "fixed", h=0.8), implementation, where)
    np.testing.assert_array_equal(stats.support, [5, 1])


def test_no_gradient_through_stats():
    query, key, value, _ = (jnp.asarray(a, "float32") for a in draw(Shape(T=9, S=9)))

    def read(query, h):
        options = {"bandwidth": kreg.Adaptive(h), "return_stats": True}
        _, stats = kreg.attention(query, key, value, **options)
        return stats.threshold.sum() + stats.residual.sum()

    for gradient in jax.grad(read, (0, 1))(query, jnp.array(0.7)):
        np.testing.assert_array_equal(gradient, 0)
