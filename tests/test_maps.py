"""The maps on scores: each named map is its cell of the table, over any axis, with any mask."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cells import Cell, cells
from tolerances import TOLERANCES

import kreg

pytestmark = pytest.mark.core

SINGLE = TOLERANCES["float32"]
K = 3

# name: (map, order, rule of the oracle)
MAPS = {
    "softmax": (kreg.softmax, oracle.INFINITE, oracle.ADAPTIVE),
    "sparsemax": (kreg.sparsemax, 1, oracle.ADAPTIVE),
    "entmax15": (kreg.entmax15, 2, oracle.ADAPTIVE),
    "entmax_default": (kreg.entmax, 2, oracle.ADAPTIVE),
    "entmax1": (lambda x, **o: kreg.entmax(x, 1.0, **o), oracle.INFINITE, oracle.ADAPTIVE),
    "entmax1.25": (lambda x, **o: kreg.entmax(x, 1.25, **o), 4, oracle.ADAPTIVE),
    "entmax1.7": (lambda x, **o: kreg.entmax(x, 1.7, **o), 1 / 0.7, oracle.ADAPTIVE),
    "entmax3": (lambda x, **o: kreg.entmax(x, 3.0, **o), 0.5, oracle.ADAPTIVE),
    "relumax": (kreg.relumax, 1, oracle.Rule("anchored")),
    # Fixed(h) of h^2 = 2 puts its threshold 1 - h^2 / 2 on the score at 0.
    "normalized_relu": (kreg.normalized_relu, 1, oracle.Rule("fixed", 2**0.5)),
    "topk_softmax": (
        lambda x, **o: kreg.topk_softmax(x, K, **o), oracle.INFINITE, oracle.Rule("nearest", 1, K)
    ),
    "topk_uniform": (
        lambda x, **o: kreg.topk_uniform(x, K, **o), 0, oracle.Rule("nearest", 1, K)
    ),
}  # fmt: skip


def expected(name, x, where=True):
    """The oracle's weights over the last axis."""
    _, order, rule = MAPS[name]
    return oracle.rows(np.asarray(x, np.float64), where, order, rule).p


def draw(shape, seed=0, scale=1.5):
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def weights_of_cell(cell: Cell, x):
    """Read the weights off attention: the scores are the bias, the values the identity."""
    rows, width = x.shape
    query, key = jnp.zeros((1, rows, 1, 2)), jnp.zeros((1, width, 1, 2))
    value = jnp.eye(width)[None, :, None, :]
    bias = jnp.asarray(x)[None, None]
    return kreg.attention(query, key, value, bias, scale=1.0, **cell.arguments)[0, :, 0]


@pytest.mark.parametrize("name", MAPS)
def test_map_is_the_formula(name):
    x = draw((6, 11))
    _, order, rule = MAPS[name]
    want = oracle.rows(x, True, order, rule)
    # Orders below 1 (alpha > 2) are steep near the threshold: rounding z - t costs eps times that.
    allowed = SINGLE.values + (SINGLE.epsilon * want.slope if order < 1 else 0)
    np.testing.assert_allclose(MAPS[name][0](x), want.p, atol=allowed)


@pytest.mark.parametrize(
    ("name", "axis"),
    [(name, 0) for name in MAPS]
    + [(name, -2) for name in ("entmax1.25", "relumax", "topk_softmax")],
)
def test_axis_and_where(name, axis):
    x = draw((5, 4, 6))
    where = np.random.default_rng(1).random(x.shape) < 0.7
    got = MAPS[name][0](jnp.asarray(x), axis=axis, where=jnp.asarray(where))
    moved = np.moveaxis(x, axis, -1), np.moveaxis(where, axis, -1)
    want = np.moveaxis(expected(name, *moved), -1, axis)
    np.testing.assert_allclose(got, want, atol=SINGLE.values)
    assert np.all(np.asarray(got)[~where] == 0)


@functools.partial(jax.jit, static_argnames="name")
def both(name, x, where):
    """A map's weights and their gradient for a cotangent; three tests share the program."""
    p, pull = jax.vjp(lambda x: MAPS[name][0](x, where=where), x)
    return p, pull(jnp.broadcast_to(jnp.arange(7.0), p.shape))[0]


@pytest.mark.parametrize("name", MAPS)
def test_rows_without_true_give_zero(name):
    x = draw((3, 7))
    where = np.array([[False], [True], [False]]) & np.ones((3, 7), bool)
    got, gradient = map(np.asarray, both(name, x, where))
    assert np.all(got[[0, 2]] == 0)
    assert got[1].sum() == pytest.approx(1, abs=1e-6)
    assert np.all(gradient[[0, 2]] == 0) and np.all(np.isfinite(gradient))


@pytest.mark.parametrize("name", MAPS)
def test_nothing_leaks_from_masked_entries(name):
    x = draw((3, 7))
    where = np.ones((3, 7), bool)
    where[:, [1, 4]] = False
    where[2] = False
    clean = both(name, x, where)
    for bad in (np.nan, np.inf, -np.inf, 3e38):
        dirty = both(name, np.where(where, x, np.float32(bad)), where)
        for a, b in zip(clean, dirty, strict=True):
            np.testing.assert_array_equal(a, b)
            assert np.all(np.isfinite(b))
    np.testing.assert_allclose(clean[0], expected(name, x, where), atol=SINGLE.values)


@pytest.mark.parametrize("name", MAPS)
def test_scores_of_minus_infinity_are_inadmissible(name):
    x = draw((3, 7))
    x[0, 2], x[1, 1:], x[2] = -np.inf, -np.inf, -np.inf
    p, gradient = both(name, x, np.ones(x.shape, bool))
    np.testing.assert_allclose(p, expected(name, x), atol=SINGLE.values)
    assert np.all(np.isfinite(gradient))
    assert np.all(np.asarray(gradient)[np.isneginf(x)] == 0)


@pytest.mark.parametrize("cell", cells(), ids=str)
def test_every_cell_is_the_one_formula(cell):
    x = np.tanh(draw((6, 11)))
    want = oracle.rows(x, True, cell.order, cell.rule)
    allowed = SINGLE.output(want.largest_score * want.slope)
    np.testing.assert_allclose(weights_of_cell(cell, x), want.p, atol=allowed)


@pytest.mark.parametrize(
    ("map_", "cell"),
    [
        (kreg.softmax, Cell("gaussian", "adaptive", 1.0)),
        (kreg.softmax, Cell("gaussian", "anchored", 1.0)),
        (kreg.softmax, Cell("gaussian", "fixed", 1.0)),
        (kreg.sparsemax, Cell("epanechnikov", "adaptive", 1.0)),
        (kreg.entmax15, Cell("biweight", "adaptive", 1.0)),
        (lambda x: kreg.entmax(x, 4 / 3), Cell("triweight", "adaptive", 1.0)),
        (lambda x: kreg.entmax(x, 1 + 1 / 1.5), Cell("order1.5", "adaptive", 1.0)),
        (kreg.relumax, Cell("epanechnikov", "anchored", 1.0)),
        (lambda x: kreg.normalized_relu(x, 0.5), Cell("epanechnikov", "fixed", 1.0)),
        (lambda x: kreg.topk_softmax(x, 4), Cell("gaussian", "nearest", 1.0)),
        (lambda x: kreg.topk_uniform(x, 4), Cell("box", "nearest", 1.0)),
    ],
    ids=lambda v: str(v) if isinstance(v, Cell) else "",
)
def test_named_maps_are_their_cells(map_, cell):
    x = np.tanh(draw((6, 11), seed=3))
    np.testing.assert_allclose(map_(jnp.asarray(x)), weights_of_cell(cell, x), atol=4e-6)


def test_ties_are_all_included():
    x = jnp.array([3.0, 2.0, 2.0, 1.0, 2.0])
    np.testing.assert_allclose(kreg.topk_uniform(x, 2), [0.25, 0.25, 0.25, 0, 0.25], atol=1e-7)
    e = np.exp([0, -1, -1, -np.inf, -1])
    np.testing.assert_allclose(kreg.topk_softmax(x, 2), e / e.sum(), atol=1e-6)
    order = jnp.array([2, 4, 0, 3, 1])
    for map_ in (kreg.topk_uniform, kreg.topk_softmax):
        np.testing.assert_allclose(map_(x, 2)[order], map_(x[order], 2), atol=1e-7)


@pytest.mark.parametrize("k", [1, 4, 5, 9])
def test_top_k_of_few_keys(k):
    """Fewer keys than k: every admissible key counts."""
    x, where = draw((3, 5)), np.array([1, 1, 1, 1, 0], bool)
    for map_, order in ((kreg.topk_softmax, oracle.INFINITE), (kreg.topk_uniform, 0)):
        want = oracle.rows(x, where, order, oracle.Rule("nearest", 1.0, k)).p
        got = map_(jnp.asarray(x), k, where=jnp.asarray(where))
        np.testing.assert_allclose(got, want, atol=SINGLE.values)


def test_polynomial_nearest_falls_back_to_uniform():
    """The k + 1 best tie, so [z - z_(k+1)]_+ vanishes; or there are no k + 1 keys at all."""
    cell = Cell("biweight", "nearest", 1.0, k=2)
    tied = weights_of_cell(cell, np.array([[1.0, 1.0, 1.0, 0.0]], np.float32))
    np.testing.assert_allclose(tied, [[1 / 3, 1 / 3, 1 / 3, 0]], atol=1e-6)
    few = weights_of_cell(cell, np.array([[1.0, 0.5], [0.0, -np.inf]], np.float32))
    np.testing.assert_allclose(few, [[0.5, 0.5], [1, 0]], atol=1e-6)


def test_normalized_relu_falls_back_to_uniform():
    x = jnp.array([[0.2, 0.5, -0.1, 9.0], [0.5, -1.0, 0.0, jnp.nan]])
    where = jnp.array([True, True, True, False])
    got = kreg.normalized_relu(x, 0.4, where=where)
    np.testing.assert_allclose(got, [[0, 1, 0, 0], [1, 0, 0, 0]], atol=1e-6)
    got = kreg.normalized_relu(x, 0.6, where=where)
    np.testing.assert_allclose(got, [[1 / 3] * 3 + [0]] * 2, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 3, 1), (4, 3, 1)])
def test_alpha_is_an_array_with_size_one_along_the_axis(shape):
    x = draw((4, 3, 8))
    alpha = np.random.default_rng(2).uniform(1.05, 2.4, shape).astype(np.float32)
    got = kreg.entmax(jnp.asarray(x), jnp.asarray(alpha))
    for i, j in np.ndindex(4, 3):
        order = 1 / (np.float64(np.broadcast_to(alpha, (4, 3, 1))[i, j, 0]) - 1)
        want = oracle.rows(x[i, j], True, order, oracle.ADAPTIVE).p
        np.testing.assert_allclose(got[i, j], want, atol=SINGLE.values)


def test_alpha_array_over_another_axis():
    x, alpha = draw((8, 3)), np.array([[1.2, 1.5, 2.0]], np.float32)
    got = kreg.entmax(jnp.asarray(x), jnp.asarray(alpha), axis=0)
    for j in range(3):
        order = 1 / (np.float64(alpha[0, j]) - 1)
        want = oracle.rows(x[:, j], True, order, oracle.ADAPTIVE).p
        np.testing.assert_allclose(got[:, j], want, atol=SINGLE.values)


@pytest.mark.parametrize("name", MAPS)
def test_a_row_does_not_feel_its_neighbours(name):
    """Converged rows are frozen: the bits of row 0 stay whatever the others hold."""
    map_ = jax.jit(MAPS[name][0])
    x = draw((5, 33))
    alone = np.asarray(map_(jnp.asarray(x)))[0]
    for scale in (0.0, 1e-3, 1e3):
        other = x.copy()
        other[1:] *= np.float32(scale)
        np.testing.assert_array_equal(np.asarray(map_(jnp.asarray(other)))[0], alone)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("sparsemax", (1300, 1024)),
        ("entmax15", (3, 431, 1024)),
        ("entmax1.25", (1300, 1024)),
    ],
)
def test_many_rows_give_what_few_of_them_give(name, shape):
    map_ = MAPS[name][0]
    spread = jnp.broadcast_to(jnp.linspace(0.1, 4, shape[-2])[:, None], shape)
    x = jax.random.normal(jax.random.key(1), shape) * spread
    np.testing.assert_array_equal(map_(x)[..., -300:, :], map_(x[..., -300:, :]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("name", ["softmax", "entmax15", "relumax", "topk_softmax", "entmax1.7"])
def test_types_are_kept(name, dtype):
    """Traced, and not compiled: types hang on nothing else."""
    with jax.enable_x64(dtype == "float64"):
        x = jnp.asarray(draw((2, 5)), dtype)
        slope = jax.grad(lambda x: MAPS[name][0](x)[0, 0].astype("float32"))
        for function in (MAPS[name][0], slope):
            assert jax.eval_shape(function, x).dtype == x.dtype


@pytest.mark.parametrize("name", ["softmax", "entmax1.7", "relumax", "topk_uniform"])
def test_vmap_and_jit_change_nothing(name):
    x = jnp.asarray(draw((4, 6, 9)))
    map_ = MAPS[name][0]
    np.testing.assert_allclose(jax.jit(jax.vmap(jax.vmap(map_)))(x), map_(x), atol=1e-6)


@pytest.mark.parametrize("gap", [100.0, 7.0, 0.3])
def test_keys_exactly_at_the_threshold_get_nothing(gap):
    """One score above a long row of scores equal to t: p is exactly one-hot."""
    x = np.full((1, 4096), -0.7, np.float32)
    x[0, 7] += np.float32(gap)
    got = jax.jit(kreg.normalized_relu)(jnp.asarray(x), jnp.float32(-0.7))
    np.testing.assert_array_equal(got, np.arange(4096)[None] == 7)
