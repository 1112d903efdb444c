"""The Fenchel-Young losses: the formula, the gradient p - y, both kinds of labels, any alpha."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from nightly import nightly

import kreg

pytestmark = pytest.mark.core

# name: (loss, its map)
LOSSES = {
    "sparsemax": (kreg.sparsemax_loss, kreg.sparsemax),
    "entmax15": (kreg.entmax15_loss, kreg.entmax15),
    "entmax1": (
        functools.partial(kreg.entmax_loss, alpha=1.0), functools.partial(kreg.entmax, alpha=1.0)
    ),
    "entmax1.3": (
        functools.partial(kreg.entmax_loss, alpha=1.3), functools.partial(kreg.entmax, alpha=1.3)
    ),
    "normmax": (kreg.normmax_loss, kreg.normmax),
    "normmax1.5": (
        functools.partial(kreg.normmax_loss, alpha=1.5), functools.partial(kreg.normmax, alpha=1.5)
    ),
}  # fmt: skip
OFTEN = ("sparsemax", "entmax1.3", "normmax")  # a closed form, and two that are solved for
ALPHA = {"sparsemax": 2, "entmax15": 1.5, "entmax1": 1, "entmax1.3": 1.3, "normmax": 2}
ALPHA["normmax1.5"] = 1.5


def draw(shape, seed=0, scale=1.5):
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def distributions(shape, seed=1):
    """Sparse distributions over the last axis."""
    return np.asarray(kreg.sparsemax(jnp.asarray(draw(shape, seed))))


@functools.partial(jax.jit, static_argnames="name")
def evaluate(name, x, y):
    """Return the losses, the gradient of their sum and the map."""
    loss, map_ = LOSSES[name]
    return loss(x, y), jax.grad(lambda x: loss(x, y).sum())(x), map_(x)


def entropy(name, p):
    """Evaluate H as it is written in the literature, in float64."""
    p, alpha = np.asarray(p, np.float64), ALPHA[name]
    if alpha == 1:
        return -np.sum(p * np.log(np.where(p > 0, p, 1)), axis=-1)
    total = np.sum(p**alpha, axis=-1)
    if name.startswith("normmax"):
        return 1 - total ** (1 / alpha)
    return (1 - total) / (alpha * (alpha - 1))


@pytest.mark.parametrize("name", LOSSES)
def test_loss_is_the_formula_and_its_gradient_p_minus_y(name):
    with jax.enable_x64(True):
        x, y = draw((20, 7)).astype(float), distributions((20, 7)).astype(float)
        y /= y.sum(-1, keepdims=True)
        loss, gradient, p = evaluate(name, x, y)
        want = np.sum((p - y) * x, axis=-1) + entropy(name, p) - entropy(name, y)
        np.testing.assert_allclose(loss, want, atol=1e-13)
        np.testing.assert_allclose(gradient, p - y, atol=1e-15)


@pytest.mark.parametrize("name", nightly(LOSSES, but=OFTEN))
@pytest.mark.slow
def test_integer_labels_are_one_hot_distributions(name):
    x, labels = draw((4, 5, 7)), np.random.default_rng(2).integers(0, 7, (4, 5))
    want = evaluate(name, x, np.eye(7, dtype=np.float32)[labels])
    for dtype in ("int8", "uint32"):
        for a, b in zip(evaluate(name, x, labels.astype(dtype)), want, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("name", nightly(LOSSES, but=OFTEN))
def test_loss_is_not_negative_and_zero_at_the_map_alone(name):
    x = draw((300, 9), scale=0.5)
    p = np.asarray(LOSSES[name][1](jnp.asarray(x)))
    at_map, _, _ = evaluate(name, x, p)
    assert np.all(at_map >= 0)
    np.testing.assert_allclose(at_map, 0, atol=2e-6)
    elsewhere, _, _ = evaluate(name, x, distributions(x.shape))
    assert np.all(elsewhere > 1e-4)
    labels = np.argmax(x, axis=-1)
    clear = np.where(np.arange(9) == labels[:, None], 20, x).astype(np.float32)
    np.testing.assert_allclose(evaluate(name, clear, labels)[0], 0, atol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1e6])
@pytest.mark.parametrize("name", nightly(LOSSES, but=OFTEN))
def test_a_shift_of_the_logits_costs_no_accuracy(name, offset):
    """Logits that are integers shift exactly, so the loss must keep all its digits."""
    x = np.random.default_rng(3).integers(-3, 3, (50, 6)).astype(np.float32)
    labels = np.random.default_rng(4).integers(0, 6, 50)
    with jax.enable_x64(True):
        want, _, _ = evaluate(name, x.astype(float), labels)
    got, _, _ = evaluate(name, x + np.float32(offset), labels)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_alpha_one_is_the_cross_entropy():
    x, labels = draw((30, 11), scale=5), np.random.default_rng(5).integers(0, 11, 30)
    log_p = jax.nn.log_softmax(x)
    want = -np.take_along_axis(np.asarray(log_p), labels[:, None], axis=-1)[:, 0]
    np.testing.assert_allclose(kreg.entmax_loss(x, labels, 1.0), want, rtol=1e-6, atol=1e-6)
    traced = jax.jit(kreg.entmax_loss)(x, labels, 1.0)
    np.testing.assert_allclose(traced, want, rtol=1e-6, atol=1e-6)
    y = distributions(x.shape)
    divergence = np.sum(y * (np.log(np.where(y > 0, y, 1)) - log_p), axis=-1)
    np.testing.assert_allclose(kreg.entmax_loss(x, y, 1.0), divergence, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("step", [1e-9, 1e-5, 1e-2])
def test_alpha_near_one_is_smooth(step):
    """The slope in alpha at 1 predicts the loss nearby: no jump, no lost digits."""
    with jax.enable_x64(True):
        x, labels = draw((6, 5)).astype(float), np.arange(6) % 5
        one, slope = jax.jvp(lambda a: kreg.entmax_loss(x, labels, a), (1.0,), (1.0,))
        near = kreg.entmax_loss(x, labels, jnp.asarray(1 + step))
        assert np.all(np.abs(slope) > 1e-3)
        np.testing.assert_allclose(near, one + step * slope, atol=10 * step**2 + 1e-14)


@pytest.mark.parametrize("name", nightly(OFTEN, but=["entmax1.3"]))
@pytest.mark.slow
def test_derivatives_in_logits(name):
    with jax.enable_x64(True):
        x, labels = jnp.asarray(draw((2, 5), scale=0.5), "float64"), jnp.array([1, 3])
        loss = jax.jit(lambda x: LOSSES[name][0](x, labels))
        check_grads(loss, (x,), 1, ["fwd"], atol=1e-5, rtol=1e-5)
        check_grads(loss, (x,), 2, ["rev"], atol=1e-5, rtol=1e-5)
        hessian = jax.jit(jax.hessian(lambda x: loss(x).sum()))(x)
        jacobian = jax.jit(jax.jacobian(LOSSES[name][1]))(x)
        np.testing.assert_allclose(hessian, jacobian, atol=1e-12)
        assert np.max(np.abs(hessian)) > 0.1


@pytest.mark.parametrize(
    ("loss", "alphas"),
    [
        pytest.param(kreg.entmax_loss, [1.01, 1.4, 1.9], id="entmax"),
        pytest.param(kreg.normmax_loss, [1.2, 1.7, 2.0], id="normmax"),
    ],
)
@pytest.mark.nightly
def test_derivatives_in_logits_labels_and_alpha(loss, alphas):
    """One alpha a row; labels vary inside the simplex, where alone the loss is defined."""
    with jax.enable_x64(True):
        x = jnp.asarray(draw((3, 4), scale=0.3), "float64")
        z = jnp.asarray(draw((3, 4), seed=7), "float64")
        alpha = jnp.asarray(alphas, "float64")[:, None]
        function = jax.jit(lambda x, z, alpha: loss(x, jax.nn.softmax(z), alpha))
        slopes = jax.grad(lambda *a: function(*a).sum(), (0, 1, 2))(x, z, alpha)
        assert all(np.all(np.abs(slope) > 1e-4) for slope in slopes)
        check_grads(function, (x, z, alpha), 2, ["rev"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_in_labels_at_zero_probability(name):
    """Moving weight onto a class that had none changes the loss as finite differences say."""
    if name == "entmax1":
        return  # the divergence's slope is infinite there
    with jax.enable_x64(True):
        x, y = jnp.array([0.5, 0.2, -1.0]), jnp.array([0.7, 0.3, 0.0])
        move = jnp.array([-1.0, 0.0, 1.0])
        loss = LOSSES[name][0]
        step = 1e-10
        finite = (loss(x, y + step * move) - loss(x, y)) / step
        slope = jnp.vdot(jax.grad(lambda y: loss(x, y))(y), move)
        # Near 0 the entropy is y - y^alpha: a difference quotient is off by step^(alpha - 1).
        allowed = 5 * step ** (ALPHA[name] - 1) + 1e-5
        np.testing.assert_allclose(slope, finite, atol=allowed)
        assert abs(slope) > 2 * allowed


@pytest.mark.parametrize("name", nightly(LOSSES, but=OFTEN))
@pytest.mark.slow
def test_excluded_classes(name):
    """Logits of -inf: no weight, no NaN; infinitely wrong where they are the label."""
    x = draw((3, 6))
    x[:, 2] = -np.inf
    x[2] = -np.inf
    labels = np.array([1, 2, 0])
    short = np.delete(x, 2, axis=1)
    loss, gradient, p = evaluate(name, x, labels)
    np.testing.assert_allclose(loss[0], evaluate(name, short, labels)[0][0], rtol=1e-6)
    np.testing.assert_array_equal(loss[1:], np.inf)
    np.testing.assert_allclose(gradient, p - np.eye(6)[labels], atol=1e-7)
    y = np.eye(6, dtype=np.float32)[labels]
    soft, soft_gradient, _ = evaluate(name, x, y)
    np.testing.assert_allclose(soft, loss, rtol=1e-6)
    np.testing.assert_allclose(soft_gradient, gradient, atol=1e-7)


def test_small_integer_types_index_few_of_many_classes():
    x = draw((2, 300))
    got = kreg.sparsemax_loss(x, np.array([3, 127], np.int8))
    np.testing.assert_array_equal(got, kreg.sparsemax_loss(x, np.array([3, 127])))


@pytest.mark.parametrize(("dtype", "least"), [("int8", -1), ("int32", -100), ("uint8", 255)])
def test_labels_out_of_range_give_nan_and_can_be_ignored(dtype, least):
    x, labels = draw((4, 5)), np.array([1, least, 5, 4]).astype(dtype)

    @jax.jit
    @jax.value_and_grad
    def kept(x):
        return jnp.where((labels >= 0) & (labels < 5), kreg.entmax15_loss(x, labels), 0).sum()

    loss = kreg.entmax15_loss(x, labels)
    np.testing.assert_array_equal(np.isnan(loss), [False, True, True, False])
    total, gradient = kept(x)
    np.testing.assert_allclose(total, loss[0] + loss[3], rtol=1e-6)
    want = kreg.entmax15(x) - np.eye(5)[[1, 0, 0, 4]]
    np.testing.assert_allclose(gradient, want * np.array([[1], [0], [0], [1]]), atol=1e-6)


@pytest.mark.parametrize("name", ["entmax1.3", "normmax"])
@pytest.mark.slow
def test_types(name):
    loss = LOSSES[name][0]
    labels, y = np.array([1, 3]), distributions((2, 5))
    for dtype in ("bfloat16", "float16"):
        x = jnp.asarray(draw((2, 5)), dtype)
        half = loss(x, labels)
        assert half.dtype == dtype and half.shape == (2,)
        single = loss(x.astype("float32"), labels)
        np.testing.assert_array_equal(
            half.astype("float32"), single.astype(dtype).astype("float32")
        )
        assert loss(x, y).dtype == jnp.float32
        assert loss(x, jnp.asarray(y, dtype)).dtype == dtype
        assert jax.grad(lambda x: loss(x, labels).sum())(x).dtype == dtype
    assert loss(np.array([[0, 1, 2]]), np.array([1])).dtype == jnp.float32


def test_one_compilation_serves_every_alpha_and_bad_ones_give_nan():
    x, labels = draw((3, 5)), np.array([0, 2, 4])
    for loss, alphas in (
        (kreg.entmax_loss, (1.0, 1.5, 2.5)), (kreg.normmax_loss, (1.1, 1.5, 3.0))
    ):  # fmt: skip
        traces = []

        @jax.jit
        def traced(x, alpha, loss=loss, traces=traces):
            traces.append(alpha)
            return loss(x, labels, alpha)

        for alpha in alphas:
            got = traced(x, alpha)
            np.testing.assert_allclose(got, loss(x, labels, alpha), rtol=1e-5, atol=1e-6)
        assert np.all(np.isnan(traced(x, 0.9)))
        assert len(traces) == 1


@pytest.mark.slow
def test_one_alpha_a_row_and_vmap():
    x, labels = draw((4, 5)), np.array([0, 2, 4, 1])
    alpha = np.array([[1.0], [1.3], [1.8], [2.0]], np.float32)
    got = kreg.entmax_loss(x, labels, alpha)
    want = [kreg.entmax_loss(*row, float(a[0])) for *row, a in zip(x, labels, alpha, strict=True)]
    np.testing.assert_allclose(got, np.stack(want), rtol=1e-5, atol=1e-6)
    mapped = jax.vmap(kreg.entmax_loss)(x, labels, alpha[:, 0])
    np.testing.assert_allclose(mapped, got, rtol=1e-5, atol=1e-6)


X, CLASSES = jnp.arange(6.0).reshape(2, 3), jnp.array([0, 2])


@pytest.mark.parametrize(
    ("argument", "given", "call"),
    [
        ("logits", "()", lambda: kreg.sparsemax_loss(1.0, 0)),
        ("logits", "(2, 0)", lambda: kreg.sparsemax_loss(jnp.ones((2, 0)), CLASSES)),
        ("labels", "(3,)", lambda: kreg.entmax15_loss(X, jnp.array([0, 1, 2]))),
        ("labels", "(2, 1)", lambda: kreg.entmax15_loss(X, CLASSES[:, None])),
        ("labels", "(2,)", lambda: kreg.entmax_loss(X, CLASSES * 1.0)),
        ("labels", "bool", lambda: kreg.normmax_loss(X, X > 0)),
        ("alpha", "0.9", lambda: kreg.entmax_loss(X, CLASSES, 0.9)),
        ("alpha", "0.9", lambda: kreg.entmax_loss(X, CLASSES, jnp.array([[1.5], [0.9]]))),
        ("alpha", "1", lambda: kreg.normmax_loss(X, CLASSES, 1)),
        ("alpha", "(3,)", lambda: kreg.entmax_loss(X, CLASSES, jnp.full(3, 1.5))),
        ("alpha", "(2, 3)", lambda: kreg.normmax_loss(X, CLASSES, jnp.full((2, 3), 1.5))),
    ],
)
def test_errors_name_the_argument(argument, given, call):
    with pytest.raises(ValueError, match=rf"(?s)^{argument}: expected .*{re.escape(given)}"):
        call()
