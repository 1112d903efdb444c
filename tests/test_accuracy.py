"""The accuracy promise, against the oracle, on rows chosen to break threshold solvers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from attention_inputs import rounded
from nightly import NIGHTLY
from tolerances import TOLERANCES

import kreg

pytestmark = pytest.mark.core

HALF = ("bfloat16", "float16")  # computed in single
DTYPES = ("float32", *HALF, "float64")
ALPHAS = (1.0001, 1.1, 4 / 3, 1.5, 2.0, 2.5)
LONG = 65_536


def adversarial_rows(width: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Return scores [R, width], with NaN and inf in the padding, and their mask."""
    rng = np.random.default_rng(width)
    large = 3e4 if dtype == "float16" else 1e6
    normal = rng.normal(size=width)
    one_hot = (np.arange(width) == width // 3).astype(float)
    half = np.arange(width) % 2
    rows = [np.zeros(width), np.full(width, large), np.full(width, -large), 100 * one_hot]
    rows += [half * level for level in (0.01, 1.0, 2.0)] + [one_hot * gap for gap in (1, 2, 3)]
    rows += [np.linspace(0, 1, width), np.linspace(50, -50, width)]
    rows += [normal * spread for spread in (1e-3, 1e-2, 0.05, 0.1, 0.2, 1.0, 10.0, 100.0, 1e3)]
    rows += [normal + large, normal * large / 4]
    x = rounded(np.stack(rows), dtype)
    where = np.ones(x.shape, bool)
    return x, where


def padded_rows(dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows of 257 with padding: one key, no key, a few keys; NaN, inf and -inf in the rest."""
    x, where = adversarial_rows(257, dtype)
    extra = rounded(np.random.default_rng(5).normal(size=(5, 257)), dtype)
    keep = np.arange(257) % 7 == np.array([0, 1, 2, 3, 4])[:, None]
    keep[0], keep[1] = np.arange(257) == 100, False
    extra[~keep] = np.resize([np.nan, np.inf, -np.inf, 65504.0], (~keep).sum())
    return np.concatenate([x, extra]), np.concatenate([where, keep])


def check(p, x: np.ndarray, where: np.ndarray, order: float, rule: oracle.Rule, dtype: str):
    """Assert both promises: every weight, and the sum of each row."""
    tolerance = TOLERANCES[dtype]
    assert p.dtype == dtype
    p = np.asarray(p.astype("float64" if dtype == "float64" else "float32"), np.float64)
    want = oracle.rows(np.where(where, x, 0), where, order, rule)
    assert np.all(np.isfinite(p)) and np.all(p >= 0)
    error = np.abs(p - want.p).max(-1)
    assert np.all(error <= tolerance.values), (
        f"rows {np.argsort(-error)[:5]}: {np.sort(error)[-5:]}"
    )
    total = np.abs(p.sum(-1) - where.any(-1))
    allowed = [tolerance.total(max(n, 1)) for n in want.support]
    assert np.all(total <= allowed), f"sums off by {total[total > allowed]}"
    assert np.all(p[~where] == 0)


@functools.partial(jax.jit, static_argnames="dtype")
def entmax(x, alpha, where, dtype):
    """Serve every alpha and type by one function; `dtype` only separates the caches."""
    return kreg.entmax(x, alpha, where=where)


CLOSED = {
    "softmax": (kreg.softmax, oracle.INFINITE, oracle.ADAPTIVE),
    "sparsemax": (kreg.sparsemax, 1, oracle.ADAPTIVE),
    "entmax15": (kreg.entmax15, 2, oracle.ADAPTIVE),
    "relumax": (kreg.relumax, 1, oracle.Rule("anchored")),
    "normalized_relu": (kreg.normalized_relu, 1, oracle.Rule("fixed", 2**0.5)),
    "topk_softmax": (
        functools.partial(kreg.topk_softmax, k=16), oracle.INFINITE, oracle.Rule("nearest", 1, 16)
    ),
    "topk_uniform": (functools.partial(kreg.topk_uniform, k=16), 0, oracle.Rule("nearest", 1, 16)),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CLOSED)
def test_named_maps(name, dtype):
    map_, order, rule = CLOSED[name]
    x, where = padded_rows(dtype)
    if name == "normalized_relu":
        rule = oracle.Rule("fixed", 2**0.5)
    with jax.enable_x64(dtype == "float64"):
        p = jax.jit(map_)(jnp.asarray(x, dtype), where=jnp.asarray(where))
        check(p, x, where, order, rule, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_entmax(alpha, dtype):
    x, where = padded_rows(dtype)
    with jax.enable_x64(dtype == "float64"):
        # The alpha that the computation sees, so that its rounding is not counted as an error.
        alpha = jnp.asarray(alpha, "float64" if dtype == "float64" else "float32")
        p = entmax(jnp.asarray(x, dtype), alpha, jnp.asarray(where), dtype)
        check(p, x, where, 1 / (np.longdouble(alpha) - 1), oracle.ADAPTIVE, dtype)


@pytest.mark.parametrize(
    ("alpha", "dtype"),
    [
        pytest.param(alpha, dtype, marks=NIGHTLY if dtype in HALF else ())
        for alpha in (2.0, 1.5, 4 / 3, 2.5)
        for dtype in DTYPES
    ],
)
@pytest.mark.slow
def test_long_rows(alpha, dtype):
    """Flat and nearly flat rows, where fixed iteration counts leave sums off by 0.1 to 13."""
    x, where = adversarial_rows(LONG, dtype)
    chosen = [0, 1, 3, 4, 6, 10, 11, 12, 14, 16, 17, 19]
    x, where = x[chosen], where[chosen]
    with jax.enable_x64(dtype == "float64"):
        alpha = jnp.asarray(alpha, "float64" if dtype == "float64" else "float32")
        p = entmax(jnp.asarray(x, dtype), alpha, jnp.asarray(where), dtype)
        order = float(1 / (np.longdouble(alpha) - 1))
        order = round(order) if abs(order - round(order)) < 1e-6 else order
        check(p, x, where, order, oracle.ADAPTIVE, dtype)


@pytest.mark.parametrize("width", [1, 2, 3, 31, 4099])
def test_odd_lengths(width):
    x, where = adversarial_rows(width, "float32")
    for map_, order in ((kreg.sparsemax, 1), (kreg.entmax15, 2)):
        p = jax.jit(map_)(jnp.asarray(x, "float32"))
        check(p, x, where, order, oracle.ADAPTIVE, "float32")


@pytest.mark.parametrize("order", [0.4, 2 / 3, 1, 1.5, 2, 3, 7, 40, 1e4])
def test_the_oracle_solves_its_equation(order):
    """Put its threshold into the equation it should solve, and difference its weights."""
    x = adversarial_rows(101, "float64")[0].astype(np.longdouble)
    t = oracle.entmax_threshold(x, order)
    slack = 16 * np.finfo(np.longdouble).eps * (order + np.abs(x).max(-1, keepdims=True))
    left, right = (
        (np.maximum((x - s) / order, 0) ** np.longdouble(order)).sum(-1)
        for s in (t - slack, t + slack)
    )
    assert np.all(left >= 1) and np.all(right <= 1)
    x = np.random.default_rng(0).normal(size=(5, 9))
    cotangent = np.random.default_rng(1).normal(size=(5, 9))
    for name in ("adaptive", "anchored", "fixed", "nearest"):
        rule = oracle.Rule(name, 1.3, 4)
        rows = oracle.rows(x, True, order, rule)
        d_z, _ = oracle.rows_vjp(rows, cotangent, order, rule)
        step = 1e-6 * np.random.default_rng(2).normal(size=x.shape)
        ahead, behind = (oracle.rows(x + s * step, True, order, rule).p for s in (1, -1))
        slope = ((ahead - behind) * cotangent).sum(-1) / 2
        np.testing.assert_allclose((d_z / 1.3**2 * step).sum(-1), slope, atol=1e-5 * 1e-6 * 40)
