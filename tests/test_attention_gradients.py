"""Derivatives: against the oracle, against differences, both modes, second order, alpha and h."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from attention_inputs import Shape, draw, rounded
from cells import FOUR, Cell, cells
from jax.test_util import check_grads
from nightly import NIGHTLY, nightly
from tolerances import TOLERANCES

import kreg

IMPLEMENTATIONS = ("reference", "xla")
SHAPE = Shape(B=2, T=17, S=33, N=4, K=2, H=4, V=3)
TINY = Shape(B=1, T=3, S=5, N=2, K=1, H=2, V=2)
HEADS = np.array([0.7, 0.9, 1.1, 1.3], np.float32).reshape(1, 4, 1, 1)
ALPHAS = (1.0001, 1.01, 1.1, 4 / 3, 1.5, 1.75, 2.0, 2.5)


def off_the_kinks(shape: Shape, cell: Cell, dtype="float32", gap=1e-4, **options):
    """Draw inputs whose scores keep away from the thresholds: derivatives jump or bend there."""
    for seed in range(200):
        arrays = draw(shape, seed, dtype)
        forward = oracle.attention(*arrays[:3], order=cell.order, rule=cell.rule, **options)
        if forward.rows.margin > gap:
            return arrays, forward
    raise AssertionError(f"{cell}: no seed below 200 keeps every score {gap} from its threshold")


@pytest.mark.parametrize("cell", cells("epanechnikov", "biweight", "gaussian"), ids=str)
@pytest.mark.core
def test_gradients_against_the_oracle(cell):
    check_against_oracle(cell, "xla", "float32")


@pytest.mark.parametrize("cell", FOUR, ids=str)
@pytest.mark.core
def test_gradients_of_the_reference_against_the_oracle(cell):
    check_against_oracle(cell, "reference", "float32")


@pytest.mark.parametrize("implementation", nightly(IMPLEMENTATIONS, but=["xla"]))
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
@pytest.mark.slow
def test_gradients_of_other_types(dtype, implementation):
    with jax.enable_x64(dtype == "float64"):
        check_against_oracle(Cell("biweight", "adaptive"), implementation, dtype)


@pytest.mark.parametrize("kernel", ["order1.5", "order40", "order0.7"])
def test_gradients_of_other_orders(kernel):
    check_against_oracle(Cell(kernel, "adaptive"), "xla", "float32")


def check_against_oracle(cell: Cell, implementation: str, dtype: str) -> None:
    """Compare the gradients of query, key, value, bias and h with the oracle's, entry by entry."""
    cell = Cell(cell.kernel_name, cell.rule_name, HEADS)
    rng = np.random.default_rng(11)
    bias = rounded(0.3 * rng.normal(size=(1, SHAPE.N, SHAPE.T, SHAPE.S)), dtype)
    options = {"bias": bias, "is_causal": True, "causal_offset": 5, "scale": 1.0}
    (*arrays, cotangent), forward = off_the_kinks(SHAPE, cell, dtype, **options)
    want = oracle.attention_vjp(forward, cotangent)
    want["bias"] = want.pop("scores").sum(0, keepdims=True)
    want["h"] = want["h"].sum((0, 2), keepdims=True)
    terms = want.pop("h_terms").sum((0, 2, 3)).max()

    @jax.jit
    def gradients(query, key, value, bias, h, cotangent):
        def attend(query, key, value, bias, h):
            same = Cell(cell.kernel_name, cell.rule_name, h, cell.k).arguments
            shared = {"is_causal": True, "causal_offset": 5, "scale": 1.0}
            return kreg.attention(
                query, key, value, bias, implementation=implementation, **shared, **same
            )

        return jax.vjp(attend, query, key, value, bias, h)[1](cotangent)

    inputs = [jnp.asarray(a, dtype) for a in (*arrays, bias)]
    h = jnp.asarray(HEADS, "float64" if dtype == "float64" else "float32")
    got = gradients(*inputs, h, jnp.asarray(cotangent, dtype))
    for name, g in zip(("query", "key", "value", "bias", "h"), got, strict=True):
        largest = np.abs(want[name]).max()
        if name == "h" and cell.rule_name == "nearest" and cell.order != oracle.INFINITE:
            largest = terms  # K_r(d / d_(k+1)) does not know h: its terms cancel to nothing
        # What rounding a score costs grows with dp/dz, which Fixed and Nearest leave free.
        score = forward.rows.largest_score * forward.rows.slope
        allowed = TOLERANCES[dtype].gradient(score, largest)
        g = np.asarray(g.astype("float64" if dtype == "float64" else "float32"), np.float64)
        error = np.abs(g - want[name]).max()
        assert error <= allowed, f"{name}: off by {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize(
    ("cell", "implementation"),
    [
        (Cell("biweight", "adaptive"), "xla"),
        (Cell("biweight", "adaptive"), "reference"),
        (Cell("epanechnikov", "anchored"), "reference"),
        (Cell("triweight", "fixed"), "xla"),
    ],
    ids=str,
)
@pytest.mark.nightly
def test_check_grads(cell, implementation):
    """Order 2, forward and reverse, in query, key, value, bias and h, off the kinks."""
    cell = Cell(cell.kernel_name, cell.rule_name, 0.9, k=2)
    mask = np.ones((1, 1, 3, 5), bool)
    mask[0, 0, 1, 2:], mask[0, 0, 2] = False, False
    with jax.enable_x64(True):
        bias = 0.2 * np.random.default_rng(1).normal(size=(1, 2, 3, 5))
        options = {"bias": bias, "mask": mask, "scale": 1.0}
        (*arrays, _), _ = off_the_kinks(TINY, cell, "float64", 2e-3, **options)

        @jax.jit
        def attend(query, key, value, bias, h):
            same = Cell(cell.kernel_name, cell.rule_name, h, cell.k).arguments
            return kreg.attention(
                query, key, value, bias, jnp.asarray(mask),
                scale=1.0, implementation=implementation, **same,
            )  # fmt: skip

        inputs = tuple(map(jnp.asarray, (*arrays, bias, 0.9)))
        check_grads(attend, inputs, order=2, modes=("fwd", "rev"), atol=1e-4, rtol=1e-4)


@pytest.mark.core
@pytest.mark.nightly
def test_check_grads_of_entmax():
    """One alpha a row, so that one compilation serves them all."""
    alphas = (1.01, 1.2, 1.5, 1.8, 2.0, 2.5)
    with jax.enable_x64(True):
        x = jnp.concatenate([spread_scores(alpha, rows=1) for alpha in alphas])
        inputs = (x, jnp.asarray(alphas)[:, None])
        entmax = jax.jit(kreg.entmax)
        check_grads(entmax, inputs, order=2, modes=("fwd", "rev"), atol=1e-4, rtol=1e-4)


@pytest.mark.core
@pytest.mark.parametrize(
    "name", nightly(["entmax15", "relumax", "normalized_relu"], but=["relumax"])
)
@pytest.mark.slow
def test_check_grads_of_named_maps(name):
    with jax.enable_x64(True):
        x = jnp.asarray([[0.3, -0.4, 0.95, 0.1, 2.0], [0.2, 0.5, 0.6, -0.3, 0.55]])
        map_ = jax.jit(getattr(kreg, name))
        check_grads(map_, (x,), order=2, modes=("fwd", "rev"), atol=1e-4, rtol=1e-4)


def spread_scores(alpha: float, rows: int = 3, width: int = 6):
    """Draw scores [rows, width] that keep 1e-2 from the thresholds of alpha-entmax."""
    for seed in range(200):
        x = np.random.default_rng(seed).normal(size=(rows, width))
        order = oracle.INFINITE if alpha == 1 else 1 / (alpha - 1)
        if oracle.rows(x, True, order, oracle.ADAPTIVE).margin > 1e-2:
            return jnp.asarray(x)
    raise AssertionError("no seed below 200 keeps away from the kinks")


@jax.jit
def forward_in_alpha(x, alpha):
    return jax.jvp(lambda a: kreg.entmax(x, a), (alpha,), (jnp.ones_like(alpha),))


@jax.jit
def backward_in_alpha(x, alpha, cotangent):
    return jax.grad(lambda a: jnp.sum(kreg.entmax(x, a) * cotangent))(alpha)


@pytest.mark.core
@pytest.mark.parametrize("alpha", (1.0, *ALPHAS))
def test_alpha_derivative_in_double(alpha):
    """Against the formula in extended precision, and against differences of the map itself."""
    with jax.enable_x64(True):
        x = spread_scores(alpha)
        _, got = forward_in_alpha(x, jnp.asarray(alpha))
        want = oracle.entmax_alpha_derivative(np.asarray(x), True, alpha)
        # The oracle's own cancellation near alpha = 1, in extended precision.
        own = np.finfo(np.longdouble).eps * 10 / (alpha - 1) ** 2 if alpha > 1 else 0
        np.testing.assert_allclose(got, want, atol=1e-9 + own)
        cotangent = np.random.default_rng(1).normal(size=x.shape)
        pulled = backward_in_alpha(x, jnp.asarray(alpha), cotangent)
        np.testing.assert_allclose(pulled, (want * cotangent).sum(), atol=1e-8 + 30 * own)
        if alpha > 1:
            e = min(1e-5, (alpha - 1) / 4)
            ahead, behind = (forward_in_alpha(x, jnp.asarray(alpha + s * e))[0] for s in (1, -1))
            np.testing.assert_allclose((ahead - behind) / (2 * e), want, atol=1e-6)


@pytest.mark.core
def test_alpha_derivative_at_one_is_the_closed_form():
    x = np.random.default_rng(0).normal(size=(4, 9)) * 2
    with jax.enable_x64(True):
        p = np.asarray(kreg.softmax(jnp.asarray(x)))
        square = p * np.log(p) ** 2
        want = -(square - p * square.sum(-1, keepdims=True)) / 2
        one = jnp.asarray(1.0)
        _, eager = jax.jvp(lambda a: kreg.entmax(jnp.asarray(x), a), (one,), (one,))
        for got in (eager, forward_in_alpha(jnp.asarray(x), one)[1]):
            np.testing.assert_allclose(got, want, atol=1e-12)
        cotangent = np.random.default_rng(1).normal(size=x.shape)
        got = backward_in_alpha(jnp.asarray(x), one, cotangent)
        np.testing.assert_allclose(got, (want * cotangent).sum(), atol=1e-12)
    _, single = forward_in_alpha(jnp.asarray(x, "float32"), jnp.float32(1))
    np.testing.assert_allclose(single, want, atol=1e-5 * np.abs(want).max())


@pytest.mark.core
@pytest.mark.parametrize("alpha", (1.0, *ALPHAS))
def test_alpha_derivative_in_single(alpha):
    """Near alpha = 1 the formula cancels like eps / (alpha - 1)^2: a series must take over."""
    alpha = np.float32(alpha)
    x = np.asarray(spread_scores(float(alpha)), np.float32)
    _, got = forward_in_alpha(jnp.asarray(x), jnp.asarray(alpha))
    want = oracle.entmax_alpha_derivative(x.astype(np.float64), True, float(alpha))
    allowed = TOLERANCES["float32"].gradient(np.abs(x).max(), np.abs(want).max())
    np.testing.assert_allclose(got, want, atol=allowed)


def test_alpha_derivative_is_exact_where_scores_are_minus_infinity():
    x = np.array([[0.3, -np.inf, -0.2, 0.7], [-np.inf] * 4])
    for alpha in (1.0, 1.001, 1.5, 2.0):
        with jax.enable_x64(True):
            _, got = forward_in_alpha(jnp.asarray(x), jnp.asarray(alpha))
        want = oracle.entmax_alpha_derivative(x[:1], x[:1] > -np.inf, alpha)
        np.testing.assert_allclose(got[:1], want, atol=1e-8)
        np.testing.assert_array_equal(got[1], 0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_alpha_and_h_of_attention_against_differences(alpha, implementation):
    with jax.enable_x64(True):
        order = 1 / (alpha - 1)
        for seed in range(200):
            *arrays, cotangent = draw(TINY, seed, "float64")
            rule = oracle.Rule("adaptive", 0.9)
            forward = oracle.attention(*arrays, order=order, rule=rule, scale=1.0)
            if forward.rows.margin > 1e-3:
                break
        attend = alpha_and_h(implementation)

        def loss(alpha, h):
            return jnp.vdot(attend(*map(jnp.asarray, arrays), alpha, h), jnp.asarray(cotangent))

        got = jax.grad(loss, (0, 1))(jnp.asarray(alpha), jnp.asarray(0.9))
        want = oracle.attention_vjp(forward, cotangent)["h"].sum()
        np.testing.assert_allclose(got[1], want, atol=1e-9)
        e = min(1e-5, (alpha - 1) / 4)
        slope = (loss(alpha + e, 0.9) - loss(alpha - e, 0.9)) / (2 * e)
        np.testing.assert_allclose(got[0], slope, atol=2e-6)
        slope = (loss(alpha, 0.9 + 1e-6) - loss(alpha, 0.9 - 1e-6)) / 2e-6
        np.testing.assert_allclose(got[1], slope, atol=2e-6)


@functools.cache
def alpha_and_h(implementation):
    """Jit attention with a traced alpha and h; two traces (value, derivative) serve every value."""

    @jax.jit
    def attend(query, key, value, alpha, h):
        kernel = kreg.rectified_polynomial(1 / (alpha - 1))
        options = {"scale": 1.0, "implementation": implementation}
        return kreg.attention(
            query, key, value, kernel=kernel, bandwidth=kreg.Adaptive(h), **options
        )

    return attend


@pytest.mark.core
def test_one_compilation_for_all_alpha():
    x = np.random.default_rng(0).normal(size=(4, 9)).astype(np.float32)

    traces = []

    @jax.jit
    def both(x, alpha):
        traces.append(alpha)
        p, pull = jax.vjp(kreg.entmax, x, alpha)
        return p, pull(jnp.ones_like(p))

    for alpha in (1.0, 1.0001, 1.2, 1.5, 2.0, 2.5):
        p, _ = both(x, jnp.float32(alpha))
        order = oracle.INFINITE if alpha == 1 else float(1 / (np.float64(np.float32(alpha)) - 1))
        want = oracle.rows(x, True, order, oracle.ADAPTIVE).p
        np.testing.assert_allclose(p, want, atol=TOLERANCES["float32"].values)
    assert len(traces) == 1


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_compilation_for_all_orders_and_bandwidths(implementation):
    *arrays, _ = draw(TINY)

    traces = []

    @jax.jit
    def attend(kernel, rules, *arrays):
        traces.append(kernel)
        options = {"kernel": kernel, "scale": 1.0, "implementation": implementation}
        return [kreg.attention(*arrays, bandwidth=rule, **options) for rule in rules]

    for order, h in ((1.0, 0.5), (2.0, 0.9), (3.7, 1.4), (50.0, 2.0)):
        rules = (kreg.Adaptive(jnp.float32(h)), kreg.Anchored(jnp.float32(h)))
        kernel = kreg.rectified_polynomial(jnp.float32(order))
        got = attend(kernel, rules, *(jnp.asarray(a, "float32") for a in arrays))
        for one, name in zip(got, ("adaptive", "anchored"), strict=True):
            rule = oracle.Rule(name, float(np.float32(h)))
            forward = oracle.attention(*arrays, order=order, rule=rule, scale=1.0)
            largest = np.abs(arrays[2]).max()
            allowed = TOLERANCES["float32"].output(forward.rows.largest_score, largest)
            # 1/r and r are rounded when traced: one more rounding of z / r, raised to r.
            np.testing.assert_allclose(one, forward.output, atol=2 * allowed)
    assert len(traces) == 1


@pytest.mark.core
@pytest.mark.parametrize("alpha", [0.999, 0.5, 0.0, -1.0])
def test_traced_alpha_below_one_is_nan(alpha):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5)), "float32")
    assert np.all(np.isnan(jax.jit(kreg.entmax)(x, jnp.float32(alpha))))
    with pytest.raises(ValueError, match="alpha"):
        kreg.entmax(x, alpha)


@pytest.mark.parametrize(
    "implementation", [pytest.param("reference", marks=pytest.mark.nightly), "xla"]
)
@pytest.mark.parametrize("cell", nightly(FOUR, but=[FOUR[0], FOUR[3]]), ids=str)
@pytest.mark.slow
def test_hessian_is_finite(cell, implementation):
    mask = np.ones((1, 1, 3, 5), bool)
    mask[0, 0, 1] = False
    *arrays, _ = (jnp.asarray(a, "float32") for a in draw(TINY))
    arrays[0] = arrays[0].at[0, 2].set(arrays[1][0, 2])  # a query on a key

    def loss(arrays, h):
        same = Cell(cell.kernel_name, cell.rule_name, h, 2).arguments
        options = {"scale": 1.0, "implementation": implementation, "mask": jnp.asarray(mask)}
        return jnp.sum(kreg.attention(*arrays, **options, **same) ** 2)

    hessian = jax.jit(jax.hessian(loss, (0, 1)))(arrays, jnp.float32(0.9))
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(hessian)]
    assert all(np.all(np.isfinite(leaf)) for leaf in leaves)
    assert any(np.any(leaf != 0) for leaf in leaves)


@pytest.mark.core
@pytest.mark.parametrize(
    "order", [0.7, 1.0, 1.5, 2.0, *(pytest.param(r, marks=NIGHTLY) for r in (3.5, 40.0))]
)
def test_gradients_are_finite_with_keys_at_the_threshold(order):
    """Nearest puts its threshold on a key: 1 + b d may round to either side of 0 there."""
    bias = jax.random.normal(jax.random.key(0), (1, 1, 64, 13))
    query, key = jnp.zeros((1, 64, 1, 2)), jnp.zeros((1, 13, 1, 2))
    value = jnp.arange(13.0).reshape(1, 13, 1, 1)
    options = {"kernel": kreg.rectified_polynomial(order), "bandwidth": kreg.Nearest(4, 0.8)}

    @jax.jit
    def gradient(bias):
        return jax.grad(lambda b: kreg.attention(query, key, value, b, scale=1.0, **options).sum())(
            bias
        )

    assert np.all(np.isfinite(gradient(bias)))


@pytest.mark.core
def test_hessian_of_maps_is_finite():
    x = jnp.array([0.3, 0.3, -1.0, 0.7, 2.0, -jnp.inf])
    for name in ("sparsemax", "entmax15", "relumax", "normalized_relu"):
        hessian = jax.jit(jax.hessian(lambda x, n=name: jnp.sum(getattr(kreg, n)(x) ** 3)))(x)
        assert np.all(np.isfinite(hessian)), name
    both = jax.jit(jax.hessian(lambda x, a: jnp.sum(kreg.entmax(x, a) ** 3), (0, 1)))
    for alpha in (1.0, 1.0001, 1.3, 2.0, 2.5):
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(both(x, alpha))), alpha


@pytest.mark.parametrize(
    ("cell", "implementation"),
    [(cell, "xla") for cell in FOUR] + [(FOUR[0], "reference"), (FOUR[3], "reference")],
    ids=str,
)
@pytest.mark.core
def test_rows_without_keys_have_zero_gradients(cell, implementation):
    *arrays, cotangent = (jnp.asarray(a, "float32") for a in draw(SHAPE))
    mask = np.ones((2, 1, 17, 33), bool)
    mask[0, :, 3], mask[1] = False, False

    def attend(*a):
        options = {"scale": 1.0, "implementation": implementation, "mask": jnp.asarray(mask)}
        return kreg.attention(*a, **options, **cell.arguments)

    @jax.jit
    def both(*a):
        output, pull = jax.vjp(attend, *a)
        return output, pull(cotangent), jax.jvp(attend, a, tuple(map(jnp.ones_like, a)))[1]

    output, gradients, tangent = both(*arrays)
    for row in (output, gradients[0], tangent):
        assert np.all(np.asarray(row)[0, 3] == 0) and np.all(np.asarray(row)[1] == 0)
        assert np.all(np.isfinite(row))
    assert all(np.all(np.asarray(g)[1] == 0) for g in gradients[1:])
