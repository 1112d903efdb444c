"""nadaraya_watson: any vectors, true distances, against brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from attention_inputs import rounded
from cells import Cell, cells
from jax.test_util import check_grads
from tolerances import TOLERANCES

import kreg

pytestmark = pytest.mark.core

EXACT = TOLERANCES["float64"].values


def draw(batch=(), queries=6, keys=11, width=3, seed=0):
    """Return queries, keys and values of no particular length."""
    rng = np.random.default_rng(seed)
    shapes = ((queries, width), (keys, width), (keys, 2))
    return tuple(rng.normal(size=(*batch, *shape)) for shape in shapes)


@pytest.mark.parametrize("cell", cells(h=1.1), ids=str)
def test_every_cell_is_brute_force(cell):
    arrays = draw((2,))
    mask = np.random.default_rng(1).random((2, 6, 11)) < 0.8
    mask[0, 2] = False
    want, _ = oracle.nadaraya_watson(*arrays, cell.order, cell.rule, mask)
    with jax.enable_x64(True):
        call = jax.jit(
            lambda *a: kreg.nadaraya_watson(*a, mask=jnp.asarray(mask), **cell.arguments)
        )
        got = call(*map(jnp.asarray, arrays))
    np.testing.assert_allclose(got, want, atol=EXACT)
    assert np.all(got[0, 2] == 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kernel", ["epanechnikov", "biweight", "gaussian"])
def test_types(kernel, dtype):
    cell = Cell(kernel, "adaptive", 1.0)
    arrays = [rounded(a, dtype) for a in draw()]
    want, _ = oracle.nadaraya_watson(*arrays, cell.order, cell.rule)
    got = kreg.nadaraya_watson(*(jnp.asarray(a, dtype) for a in arrays), **cell.arguments)
    assert got.dtype == dtype
    # d^2 = |q|^2 - 2 q.k + |k|^2 rounds terms of that size: they stand for max|z|.
    terms = sum((a**2).sum(-1).max() for a in arrays[:2])
    allowed = TOLERANCES[dtype].output(terms / 2, np.abs(arrays[2]).max())
    np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=allowed)


def test_leading_axes():
    queries, keys, values = draw((3, 2))
    cell = Cell("biweight", "adaptive", 1.0)
    arrays = [jnp.asarray(a, "float32") for a in (queries, keys, values)]
    got = kreg.nadaraya_watson(*arrays, **cell.arguments)
    assert got.shape == (3, 2, 6, 2)
    one = kreg.nadaraya_watson(*(a[1, 1] for a in arrays), **cell.arguments)
    np.testing.assert_allclose(got[1, 1], one, atol=2e-6)
    batched = jax.vmap(lambda *a: kreg.nadaraya_watson(*a, **cell.arguments))(*arrays)
    np.testing.assert_allclose(batched, got, atol=2e-6)


def test_default_bandwidth_is_adaptive_one():
    arrays = [jnp.asarray(a, "float32") for a in draw()]
    default = kreg.nadaraya_watson(*arrays, kernel=kreg.biweight)
    named = kreg.nadaraya_watson(*arrays, kernel=kreg.biweight, bandwidth=kreg.Adaptive(1.0))
    np.testing.assert_array_equal(default, named)


@pytest.mark.parametrize("rule", ["adaptive", "anchored", "fixed", "nearest"])
def test_a_query_on_a_key_is_differentiable(rule):
    """Only d^2 is ever formed: at d = 0 there is no square root to divide by."""
    queries, keys, values = draw()
    queries[:4] = keys[:4]
    cell = Cell("biweight", rule, 1.2)
    for order in (1, 2):

        def loss(q, k, v):
            return jnp.sum(kreg.nadaraya_watson(q, k, v, **cell.arguments) ** 2)

        function = jax.grad(loss, (0, 1, 2)) if order == 1 else jax.hessian(loss)
        arrays = (jnp.asarray(a, "float32") for a in (queries, keys, values))
        for leaf in jax.tree.leaves(jax.jit(function)(*arrays)):
            assert np.all(np.isfinite(leaf))


def test_translation_and_rotation_change_nothing():
    queries, keys, values = draw()
    rotation, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(3, 3)))
    with jax.enable_x64(True):
        for cell in cells("epanechnikov", "biweight", h=1.1):
            plain = kreg.nadaraya_watson(
                *map(jnp.asarray, (queries, keys, values)), **cell.arguments
            )
            moved = (queries @ rotation + 5, keys @ rotation + 5, values)
            again = kreg.nadaraya_watson(*map(jnp.asarray, moved), **cell.arguments)
            np.testing.assert_allclose(again, plain, atol=EXACT)


DIFFERENTIATED = [
    Cell("biweight", "adaptive", 1.1),
    Cell("epanechnikov", "anchored", 1.1),
    Cell("order1.5", "fixed", 1.1),
]


@pytest.mark.nightly
@pytest.mark.parametrize("cell", DIFFERENTIATED, ids=str)
def test_check_grads(cell):
    queries, keys, values = draw(queries=3, keys=6, seed=5)
    bandwidth2 = oracle.effective_bandwidth2(
        oracle.squared_distances(queries, keys), np.ones((3, 6), bool), cell.order, cell.rule
    )
    ratio = oracle.squared_distances(queries, keys) / bandwidth2
    if cell.order != oracle.INFINITE:
        assert np.min(np.abs(ratio - 1)[ratio != 1]) > 1e-3, "too near a kink: choose another seed"
    with jax.enable_x64(True):

        @jax.jit
        def call(q, k, v, h):
            arguments = Cell(cell.kernel_name, cell.rule_name, h).arguments
            return kreg.nadaraya_watson(q, k, v, **arguments)

        arrays = tuple(map(jnp.asarray, (queries, keys, values, 1.1)))
        check_grads(call, arrays, order=2, modes=("fwd", "rev"), atol=1e-4, rtol=1e-4)


def test_nothing_leaks_from_masked_keys():
    queries, keys, values = (np.asarray(a, np.float32) for a in draw())
    mask = np.ones((6, 11), bool)
    mask[:, [3, 7]] = False
    mask[4] = False

    @jax.jit
    def both(k, v):
        def loss(q, k, v):
            return kreg.nadaraya_watson(q, k, v, kernel=kreg.biweight, mask=jnp.asarray(mask))

        out, pull = jax.vjp(loss, jnp.asarray(queries), k, v)
        return out, pull(jnp.ones_like(out))

    clean = both(jnp.asarray(keys), jnp.asarray(values))
    for bad in (np.nan, np.inf):
        keys[[3, 7]], values[[3, 7]] = bad, bad
        dirty = both(jnp.asarray(keys), jnp.asarray(values))
        for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty), strict=True):
            np.testing.assert_array_equal(a, b)
    assert np.all(dirty[0][4] == 0) and np.all(dirty[1][0][4] == 0)
