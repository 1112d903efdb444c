"""The eight propositions: each named attention is the regression it is said to be, and back.

Queries and keys have unit length unless a test says otherwise; s = q.k, d^2 = 2 - 2 s. Everything
is in float64, so that an identity holds to 1e-10 (design.md, section 4), not to float32's rounding.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from attention_inputs import unit
from cells import Cell, cells
from nightly import nightly
from tolerances import TOLERANCES

import kreg

pytestmark = pytest.mark.core

EXACT = TOLERANCES["float64"].values
T, S, D, V = 7, 13, 5, 3
H = 0.6


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def vectors(seed: int = 0):
    """Return unit queries [T, D] and keys [S, D], and values [S, V]."""
    rng = np.random.default_rng(seed)
    draws = (rng.normal(size=shape) for shape in ((T, D), (S, D), (S, V)))
    queries, keys, values = draws
    return unit(queries), unit(keys), values


def attend(queries, keys, values, cell: Cell, **options):
    """Call attention on single-head [T, D] inputs with scale 1."""
    one = (x[None, :, None, :] for x in map(jnp.asarray, (queries, keys, values)))
    return kreg.attention(*one, scale=1.0, **cell.arguments, **options)


def regress(queries, keys, values, cell: Cell, **options):
    arrays = map(jnp.asarray, (queries, keys, values))
    return kreg.nadaraya_watson(*arrays, **cell.arguments, **options)


@functools.cache
def both_columns(kernel: str, rule: str):
    """The output of both, for any width: one program for a cell."""

    @jax.jit
    def run(queries, keys, values, h):
        cell = Cell(kernel, rule, h)
        return attend(queries, keys, values, cell)[0, :, 0], regress(queries, keys, values, cell)

    return run


@pytest.mark.parametrize("h", nightly([0.35, 0.8, 2.5], but=[0.35, 0.8]))
@pytest.mark.parametrize("cell", cells(), ids=str)
def test_attention_is_the_regression(cell, h):
    """Both columns of the table are one function of the angles, and both are the brute force."""
    cell = Cell(cell.kernel_name, cell.rule_name, h)
    want, _ = oracle.nadaraya_watson(*vectors(), cell.order, cell.rule)
    for got in both_columns(cell.kernel_name, cell.rule_name)(*vectors(), h):
        np.testing.assert_allclose(got, want, atol=EXACT)


@pytest.mark.parametrize(
    "cell",
    [
        *cells("biweight"),
        *(pytest.param(c, marks=pytest.mark.nightly) for c in cells("epanechnikov", "gaussian")),
        *(pytest.param(c, marks=pytest.mark.nightly) for c in cells("order1.5")),
    ],
    ids=str,
)
@pytest.mark.slow
def test_gradients_agree_through_the_normalisation(cell):
    queries, keys, values = vectors(1)
    cotangent = np.random.default_rng(2).normal(size=(T, V))
    rng = np.random.default_rng(3)
    lengths = rng.uniform(0.5, 2, (T, 1)), rng.uniform(0.5, 2, (S, 1))

    def normalise(x):
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

    def loss(call):
        def of(q, k, v):
            return jnp.sum(call(normalise(q), normalise(k), v, cell).reshape(T, V) * cotangent)

        arguments = (queries * lengths[0], keys * lengths[1], values)
        return jax.jit(jax.grad(of, (0, 1, 2)))(*map(jnp.asarray, arguments))

    for one, other in zip(loss(attend), loss(regress), strict=True):
        assert np.abs(other).max() > 1e-3 or cell.rule_name == "fixed"
        np.testing.assert_allclose(one, other, atol=EXACT)


def test_1_gaussian_is_softmax():
    queries, keys, values = vectors()
    scores = queries @ keys.T
    softmax = np.asarray(kreg.softmax(jnp.asarray(scores / H**2)))
    for rule in ("adaptive", "anchored", "fixed"):
        got = regress(queries, keys, values, Cell("gaussian", rule, H))
        np.testing.assert_allclose(got, softmax @ values, atol=EXACT)
    # Without unit keys |k|^2 does not cancel: the two differ.
    long = keys * np.linspace(0.5, 1.5, S)[:, None]
    got = regress(queries, long, values, Cell("gaussian", "adaptive", H))
    other = np.asarray(kreg.softmax(jnp.asarray(queries @ long.T / H**2))) @ values
    assert np.abs(got - other).max() > 1e-2
    of_distance = kreg.softmax(jnp.asarray(-oracle.squared_distances(queries, long) / (2 * H**2)))
    np.testing.assert_allclose(got, of_distance @ values, atol=EXACT)


@pytest.mark.parametrize("h", [0.5, 1.2, 2.5])
def test_2_normalised_relu_is_fixed_epanechnikov(h):
    queries, keys, values = vectors()
    scores = queries @ keys.T
    gamma, b = h**2 / 2, 1 - 2 / h**2
    np.testing.assert_allclose(
        1 - oracle.squared_distances(queries, keys) / h**2, scores / gamma + b, atol=1e-12
    )
    got = regress(queries, keys, values, Cell("epanechnikov", "fixed", h))
    weights = kreg.normalized_relu(jnp.asarray(scores / gamma + b))
    np.testing.assert_allclose(got, weights @ values, atol=EXACT)
    same = kreg.normalized_relu(jnp.asarray(scores), 1 - h**2 / 2)
    np.testing.assert_allclose(weights, same, atol=EXACT)
    empty = scores.max(-1) <= 1 - h**2 / 2
    np.testing.assert_allclose(weights[empty], 1 / S, atol=EXACT)
    assert (h != 0.5 or empty.any()) and (h != 2.5 or np.all(weights > 0))


@pytest.mark.parametrize(
    "kernel", ["epanechnikov", "biweight", "triweight", "order1.5", "order0.7"]
)
def test_3_and_4_entmax_is_adaptive(kernel):
    """h(q)^2 = 2 (1 - r tau / theta), and it prescribes the unnormalised sum of the kernel."""
    cell = Cell(kernel, "adaptive", H)
    order, theta = cell.order, 1 / H**2
    queries, keys, values = vectors()
    weights = np.asarray(kreg.entmax(jnp.asarray(theta * queries @ keys.T), 1 + 1 / order))
    np.testing.assert_allclose(regress(queries, keys, values, cell), weights @ values, atol=EXACT)
    _, stats = attend(queries, keys, values, cell, return_stats=True)
    t = oracle.entmax_threshold(theta * queries @ keys.T, order)
    assert np.abs(np.asarray(stats.threshold)[0, :, 0] - t[:, 0]).max() < 1e-6
    h2 = (2 * (1 - t / theta)).astype(np.float64)
    kernel_values = oracle.profile(order, oracle.squared_distances(queries, keys) / h2)
    total = kernel_values.sum(-1, keepdims=True)
    np.testing.assert_allclose(kernel_values / total, weights, atol=EXACT)
    np.testing.assert_allclose(total, (2 * order / (theta * h2)) ** order, rtol=1e-9)


@pytest.mark.parametrize("kernel", ["epanechnikov", "biweight", "triweight"])
def test_4_general_keys(kernel):
    """entmax(-d^2 / (2 sigma^2)) is K_r at h^2 = -2 r sigma^2 tau for vectors of any length."""
    cell = Cell(kernel, "adaptive", 0.9)
    rng = np.random.default_rng(4)
    queries, keys, values = (rng.normal(size=s) for s in ((T, D), (S, D), (S, V)))
    d2 = oracle.squared_distances(queries, keys)
    weights = kreg.entmax(jnp.asarray(-d2 / (2 * 0.9**2)), cell.arguments["kernel"].alpha)
    np.testing.assert_allclose(regress(queries, keys, values, cell), weights @ values, atol=EXACT)
    tau = oracle.entmax_threshold(-d2 / (2 * 0.9**2), cell.order) / cell.order
    assert np.all(tau < 0)
    h2 = (-2 * cell.order * 0.9**2 * tau).astype(np.float64)
    kernel_values = oracle.profile(cell.order, d2 / h2)
    total = kernel_values.sum(-1, keepdims=True)
    np.testing.assert_allclose(kernel_values / total, weights, atol=EXACT)


def test_5_relumax_is_anchored_epanechnikov():
    queries, keys, values = vectors()
    scores = queries @ keys.T
    weights = np.asarray(kreg.relumax(jnp.asarray(scores / H**2)))
    explicit = np.maximum((scores - scores.max(-1, keepdims=True)) / H**2 + 1, 0)
    explicit = explicit / explicit.sum(-1, keepdims=True)
    np.testing.assert_allclose(weights, explicit, atol=EXACT)
    got = regress(queries, keys, values, Cell("epanechnikov", "anchored", H))
    np.testing.assert_allclose(got, weights @ values, atol=EXACT)
    d2 = oracle.squared_distances(queries, keys)
    own = d2.min(-1, keepdims=True) + 2 * H**2
    kernel_values = oracle.profile(1, d2 / own)
    total = kernel_values.sum(-1, keepdims=True)
    np.testing.assert_allclose(weights, kernel_values / total, atol=EXACT)
    np.testing.assert_array_equal(weights > 0, scores > scores.max(-1, keepdims=True) - H**2)
    sparse = np.asarray(kreg.sparsemax(jnp.asarray(scores / H**2)))
    assert np.all((weights > 0) | (sparse == 0)), "support(sparsemax) lies in support(relumax)"


@pytest.mark.parametrize("order", [100.0, 1e4])
def test_6_gaussian_limit(order):
    """(1 - x/r)^r = e^-x (1 - x^2 / (2 r) + ...): the gap tends to max x^2 e^-x / (2 r)."""
    error = 2 * np.exp(-2) / order
    kernel = kreg.rectified_polynomial(order)
    d = jnp.linspace(-4, 4, 801)
    profile = kernel(d / (0.8 * (2 * order) ** 0.5))
    gap = np.abs(profile - kreg.gaussian(d / 0.8)).max()
    assert 0.95 * error < gap < 1.05 * error
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 9)))
    entmax, softmax = kreg.entmax(x, 1 + 1 / order), kreg.softmax(x)
    assert 1e-3 / order < np.abs(entmax - softmax).max() < 1 / order
    for rule in (kreg.Adaptive(0.8), kreg.Anchored(0.8)):
        near = kreg.nadaraya_watson(*vectors(), kernel=kernel, bandwidth=rule)
        limit = kreg.nadaraya_watson(*vectors(), kernel=kreg.gaussian, bandwidth=rule)
        assert np.abs(near - limit).max() < 10 / order


@pytest.mark.parametrize("order", [0.7, 1.0, 2.0, 3.0, 12.5])
def test_7_deformed_exponential(order):
    """K_r(u) = exp_q(-u^2 / (alpha - 1)), q = 2 - alpha; exp_q(x) = [1 + (1-q) x]_+^(1/(1-q))."""
    alpha = 1 + 1 / order
    q = 2 - alpha
    u = np.linspace(-1.6, 1.6, 65)
    deformed = np.maximum(1 + (1 - q) * -(u**2) / (alpha - 1), 0) ** (1 / (1 - q))
    got = kreg.rectified_polynomial(order)(jnp.asarray(u))
    np.testing.assert_allclose(got, deformed, atol=1e-9)


@pytest.mark.parametrize("alpha", [1.2, 1.5, 2.0])
def test_7_entmax_maximises_the_tsallis_entropy(alpha):
    """p.z + H_alpha(p) is larger at entmax than at 200 other distributions, near and far."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=9)
    best = np.asarray(kreg.entmax(jnp.asarray(z), alpha))

    def objective(p):
        return p @ z + (p - p**alpha).sum(-1) / (alpha * (alpha - 1))

    others = rng.dirichlet(np.ones(9), 100)
    near = best + 0.01 * (others - best)
    assert np.all(objective(np.concatenate([others, near])) < objective(best))


@pytest.mark.parametrize("k", [1, 4, S])
def test_8_top_k_is_nearest_neighbours(k):
    queries, keys, values = vectors()
    scores, d2 = queries @ keys.T, oracle.squared_distances(queries, keys)
    nearest = np.argsort(d2, axis=-1)[:, :k]
    mean = values[nearest].mean(1)
    got = regress(queries, keys, values, Cell("box", "nearest", 1.0, k))
    np.testing.assert_allclose(got, mean, atol=EXACT)
    uniform = kreg.topk_uniform(jnp.asarray(scores), k)
    np.testing.assert_allclose(uniform @ values, mean, atol=EXACT)
    weights = np.exp(-np.take_along_axis(d2, nearest, -1) / (2 * H**2))
    truncated = np.einsum("tk,tkv->tv", weights / weights.sum(-1, keepdims=True), values[nearest])
    got = regress(queries, keys, values, Cell("gaussian", "nearest", H, k))
    np.testing.assert_allclose(got, truncated, atol=EXACT)
    softmax = kreg.topk_softmax(jnp.asarray(scores / H**2), k)
    np.testing.assert_allclose(softmax @ values, truncated, atol=EXACT)


@pytest.mark.parametrize("cell", cells("epanechnikov", "biweight", "order0.7"), ids=str)
def test_effective_bandwidth_from_the_threshold(cell):
    """h(q)^2 = 2 (1 - h^2 t), under every rule: what Stats report is a bandwidth."""
    cell = Cell(cell.kernel_name, cell.rule_name, 0.9)
    queries, keys, values = vectors()
    output, stats = attend(queries, keys, values, cell, return_stats=True)
    h2 = 2 * (1 - 0.81 * np.asarray(stats.threshold, np.float64)[0, :, 0])
    d2 = oracle.squared_distances(queries, keys)
    where = np.ones_like(d2, bool)
    want = oracle.effective_bandwidth2(d2, where, cell.order, cell.rule)[:, 0]
    np.testing.assert_allclose(h2, want, atol=1e-6)  # Stats are float32
    kernel_values = oracle.profile(cell.order, d2 / want[:, None])
    total = kernel_values.sum(-1, keepdims=True)
    live = total[:, 0] > 0  # empty rows of Fixed fall back to the mean
    regression = (kernel_values @ values)[live] / total[live]
    np.testing.assert_allclose(np.asarray(output)[0, live, 0], regression, atol=EXACT)
    assert live.sum() >= T // 2
