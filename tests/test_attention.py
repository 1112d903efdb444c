"""attention against the oracle: every argument, both implementations, ragged T, transforms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from attention_inputs import Shape, draw, rounded
from cells import FOUR, Cell, cells
from nightly import nightly
from tolerances import TOLERANCES

import kreg

IMPLEMENTATIONS = ("reference", "xla")
# Where the contract (test_contract.py) has the same of both.
MOSTLY_XLA = nightly(IMPLEMENTATIONS, but=["xla"])
SMALL = Shape(B=2, T=9, S=13, N=4, K=2, H=4, V=3)
BIWEIGHT = Cell("biweight", "adaptive", 1.0)


def call(arrays, cell: Cell, implementation, bias=None, mask=None, dtype="float32", **options):
    """Jit attention over arrays of `dtype`; options that are no arrays, and h, are concrete."""
    arrays = [jnp.asarray(a, dtype) for a in arrays]
    given = {n: jnp.asarray(v) for n, v in options.items() if isinstance(v, np.ndarray)}
    given["bias"] = None if bias is None else jnp.asarray(bias, dtype)
    given["mask"] = None if mask is None else jnp.asarray(mask)
    static = tuple((n, v) for n, v in options.items() if n not in given)
    make = compiled if isinstance(cell.h, np.ndarray) else compiled_once
    return make(cell, implementation, static)(*arrays, **given)


def compiled(cell: Cell, implementation, static):
    same = {"implementation": implementation, **cell.arguments, **dict(static)}
    return jax.jit(lambda *arrays, **given: kreg.attention(*arrays, **given, **same))


# Other values of the arrays are no other program.
compiled_once = functools.cache(compiled)


def agree(arrays, cell: Cell, implementation, dtype="float32", **options):
    """Assert the promise of design.md section 4; return the output as float64."""
    got = call(arrays, cell, implementation, dtype=dtype, **options)
    assert got.dtype == dtype
    want = oracle.attention(*arrays, order=cell.order, rule=cell.rule, **options)
    allowed = TOLERANCES[dtype].output(want.rows.largest_score, np.nanmax(np.abs(arrays[2])))
    got = np.asarray(got.astype("float64" if dtype == "float64" else "float32"), np.float64)
    np.testing.assert_allclose(got, want.output, atol=allowed, rtol=0)
    return got


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("cell", cells("box", "epanechnikov", "biweight", "gaussian"), ids=str)
@pytest.mark.core
def test_every_cell(cell, implementation):
    *arrays, _ = draw(SMALL)
    agree(arrays, cell, implementation, scale=1.0)


@pytest.mark.parametrize("implementation", MOSTLY_XLA)
@pytest.mark.parametrize("length", [63, 257, 300])
@pytest.mark.slow
def test_ragged_lengths(length, implementation):
    *arrays, _ = draw(Shape(B=1, T=length, S=length, N=2, K=1), spherical=False)
    agree(arrays, BIWEIGHT, implementation, is_causal=True)


@pytest.mark.parametrize("implementation", MOSTLY_XLA)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("cell", [BIWEIGHT, Cell("epanechnikov", "fixed", 1.3)], ids=str)
@pytest.mark.core
@pytest.mark.slow
def test_types(cell, dtype, implementation):
    *arrays, _ = draw(SMALL, dtype=dtype)
    with jax.enable_x64(dtype == "float64"):
        agree(arrays, cell, implementation, dtype, scale=1.0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("kernel", "spread"),
    [("biweight", 0.0), ("biweight", 1e-3), ("biweight", 0.1), ("epanechnikov", 1e-3)],
)
def test_long_flat_rows(kernel, spread, implementation):
    """Nearly equal scores over 65,536 keys: the sum must still be 1, and the mean a mean."""
    *arrays, _ = draw(Shape(B=1, T=2, S=65_536, N=1, K=1, H=2, V=1), spherical=False)
    arrays[0] *= spread
    arrays[0] = rounded(arrays[0], "float32")
    arrays[2] = 1 + 0.1 * np.tanh(arrays[2])  # a sum that is off shows in the output
    arrays[2] = rounded(arrays[2], "float32")
    agree(arrays, Cell(kernel, "adaptive", 1.0), implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("size", [30.0, 1e3, 1e6])
def test_large_scores(size, implementation):
    *arrays, _ = draw(SMALL, spherical=False)
    arrays[0] = rounded(arrays[0] * size, "float32")
    agree(arrays, BIWEIGHT, implementation)


B, T, S, N = SMALL.B, SMALL.T, SMALL.S, SMALL.N
BROADCASTS = [(B, N, T, S), (1, 1, T, S), (B, 1, T, S), (1, N, T, S), (B, 1, 1, S), (1, 1, 1, S)]
BROADCASTS += [(B, N, T, 1), (1, 1, 1, 1), (T, S)]


@pytest.mark.parametrize("implementation", MOSTLY_XLA)
@pytest.mark.parametrize("shape", BROADCASTS, ids=str)
@pytest.mark.slow
def test_mask_and_bias_broadcast(shape, implementation):
    rng = np.random.default_rng(0)
    *arrays, _ = draw(SMALL, spherical=False)
    mask = rng.random(shape) < 0.7
    bias = rounded(rng.normal(size=shape), "float32") if len(shape) == 4 else None
    agree(arrays, BIWEIGHT, implementation, bias=bias, mask=mask)


@pytest.mark.parametrize("implementation", MOSTLY_XLA)
@pytest.mark.parametrize("offset", [0, -1, 4, -3, np.array([2, -5], np.int32)], ids=str)
@pytest.mark.slow
def test_causal_offset(offset, implementation):
    *arrays, _ = draw(SMALL, spherical=False)
    got = agree(arrays, BIWEIGHT, implementation, is_causal=True, causal_offset=offset)
    first = np.broadcast_to(offset, (B,))
    for b in range(B):
        assert np.all(got[b, : max(0, -first[b])] == 0)
    assert np.any(got[:, -1] != 0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.core
def test_first_position_of_a_memory_is_zero(implementation):
    """Memory Mosaics: is_causal with offset -1 leaves the first query without a key."""
    *arrays, cotangent = (jnp.asarray(a, "float32") for a in draw(Shape(T=9, S=9)))

    def attend(*a):
        options = {"is_causal": True, "causal_offset": -1, "implementation": implementation}
        return kreg.attention(*a, **options)

    output, pull = jax.vjp(attend, *arrays)
    gradients = pull(cotangent)
    assert np.all(np.asarray(output)[:, 0] == 0) and np.all(np.asarray(output)[:, 1] != 0)
    assert np.all(np.asarray(gradients[0])[:, 0] == 0)
    assert all(np.all(np.isfinite(g)) for g in gradients)
    # The last key is visible to nobody: no gradient reaches it.
    assert all(np.all(np.asarray(g)[:, -1] == 0) for g in gradients[1:])


@pytest.mark.parametrize("implementation", MOSTLY_XLA)
@pytest.mark.slow
def test_lengths_only_mask(implementation):
    *arrays, _ = draw(SMALL, spherical=False)
    lengths = {
        "query_seq_lengths": np.array([5, 9], np.int32),
        "key_value_seq_lengths": np.array([13, 6], np.int32),
    }
    got = agree(arrays, BIWEIGHT, implementation, **lengths)
    assert np.all(got[0, 5:] == 0) and np.all(got[0, :5] != 0)
    agree(arrays, BIWEIGHT, implementation, is_causal=True, causal_offset=2, **lengths)
    none = {"key_value_seq_lengths": np.array([0, 13], np.int32)}
    assert np.all(agree(arrays, BIWEIGHT, implementation, **none)[0] == 0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (6, 2), (4, 1)])
def test_grouped_heads(heads, key_heads, implementation):
    *arrays, _ = draw(Shape(T=9, S=13, N=heads, K=key_heads, H=4, V=7), spherical=False)
    got = agree(arrays, BIWEIGHT, implementation, scale=0.7)
    assert got.shape == (2, 9, heads, 7)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rule", ["adaptive", "anchored", "fixed", "nearest"])
def test_one_bandwidth_a_head(rule, implementation):
    *arrays, _ = draw(SMALL)
    h = np.array([0.5, 0.8, 1.1, 1.4], np.float32).reshape(1, N, 1, 1)
    agree(
        arrays,
        Cell("gaussian" if rule == "nearest" else "biweight", rule, h),
        implementation,
        scale=1.0,
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(SMALL.B, 1, SMALL.T, 1)], ids=str)
def test_bandwidth_of_other_shapes(shape, implementation):
    *arrays, _ = draw(SMALL)
    h = np.random.default_rng(0).uniform(0.5, 1.5, shape).astype(np.float32)
    agree(arrays, Cell("biweight", "adaptive", h), implementation, scale=1.0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_default_scale_is_that_of_jax(implementation):
    *arrays, _ = draw(SMALL, spherical=False)
    arrays[2] = rounded(np.random.default_rng(9).normal(size=(B, S, SMALL.K, SMALL.H)), "float32")
    gaussian = Cell("gaussian", "adaptive", 1.0)
    got = call(arrays, gaussian, implementation, is_causal=True)
    same = jax.nn.dot_product_attention(
        *(jnp.asarray(a, "float32") for a in arrays), is_causal=True
    )
    np.testing.assert_allclose(got, same, atol=4e-6)


@pytest.mark.core
def test_defaults():
    *arrays, _ = (jnp.asarray(a, "float32") for a in draw(SMALL))
    named = {"kernel": kreg.biweight, "bandwidth": kreg.Adaptive(1.0), "scale": SMALL.H**-0.5}
    np.testing.assert_array_equal(kreg.attention(*arrays), kreg.attention(*arrays, **named))


def test_batch_may_be_absent():
    *arrays, _ = (jnp.asarray(a, "float32") for a in draw(SMALL))
    whole = kreg.attention(*arrays)
    np.testing.assert_allclose(kreg.attention(*(a[0] for a in arrays)), whole[0], atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_precision_is_accepted_and_highest_by_default(implementation):
    *arrays, _ = draw(SMALL)
    default = call(arrays, BIWEIGHT, implementation)
    highest = call(arrays, BIWEIGHT, implementation, precision=jax.lax.Precision.HIGHEST)
    np.testing.assert_array_equal(default, highest)
    call(arrays, BIWEIGHT, implementation, precision=jax.lax.Precision.DEFAULT)
    text = str(
        jax.make_jaxpr(lambda q, k, v: kreg.attention(q, k, v, implementation=implementation))(
            *(jnp.asarray(a, "float32") for a in arrays)
        )
    )
    products = [line for line in text.splitlines() if "precision=" in line]
    assert products and all("HIGHEST" in line for line in products)


@pytest.mark.parametrize(
    ("cell", "implementation"),  # the contract does the adaptive rule
    [(cell, "xla") for cell in FOUR[1:]] + [(FOUR[2], "reference")],
    ids=str,
)
@pytest.mark.core
def test_nothing_leaks_from_inadmissible_keys(cell, implementation):
    """NaN and inf at keys nobody may use, and in rows without keys: forward and backward."""
    query, key, value, cotangent = draw(SMALL)
    mask = np.random.default_rng(3).random((B, 1, T, S)) < 0.8
    mask[:, :, :, [0, 5, S - 1]] = False
    mask[1, :, 4] = False

    @jax.jit
    def both(*arrays):
        def attend(q, k, v):
            options = {"scale": 1.0, "implementation": implementation, **cell.arguments}
            return kreg.attention(q, k, v, mask=jnp.asarray(mask), **options)

        output, pull = jax.vjp(attend, *arrays)
        return output, pull(jnp.asarray(cotangent, "float32"))

    clean = both(*(jnp.asarray(a, "float32") for a in (query, key, value)))
    for bad in (np.nan, np.inf):
        dirty_key, dirty_value, dirty_query = key.copy(), value.copy(), query.copy()
        dirty_key[:, [0, S - 1]], dirty_value[:, [0, 5]], dirty_query[1, 4] = bad, bad, bad
        arrays = (jnp.asarray(a, "float32") for a in (dirty_query, dirty_key, dirty_value))
        for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(both(*arrays)), strict=True):
            np.testing.assert_array_equal(a, b)
    assert np.all(np.asarray(clean[0])[1, 4] == 0) and np.all(np.asarray(clean[1][0])[1, 4] == 0)
    for gradient in clean[1][1:]:
        assert np.all(np.asarray(gradient)[:, [0, 5, S - 1]] == 0)


@pytest.mark.parametrize("implementation", MOSTLY_XLA)
@pytest.mark.slow
def test_biases_of_minus_infinity_are_inadmissible(implementation):
    *arrays, _ = draw(SMALL, spherical=False)
    mask = np.random.default_rng(3).random((B, N, T, S)) < 0.6
    mask[0, 1, 2] = False
    bias = np.where(mask, 0.0, -np.inf)
    as_bias = agree(arrays, BIWEIGHT, implementation, bias=bias)
    as_mask = agree(arrays, BIWEIGHT, implementation, mask=mask)
    np.testing.assert_allclose(as_bias, as_mask, atol=1e-6)
    assert np.all(as_bias[0, 2, 1] == 0)
    q, k, v = (jnp.asarray(a, "float32") for a in arrays)

    def loss(q, k, v, bias):
        return jnp.sum(kreg.attention(q, k, v, bias, implementation=implementation) ** 2)

    gradients = jax.jit(jax.grad(loss, (0, 1, 2, 3)))(q, k, v, jnp.asarray(bias, "float32"))
    assert all(np.all(np.isfinite(g)) for g in gradients)
    assert np.all(np.asarray(gradients[3])[~mask] == 0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kernel", ["biweight", "gaussian"])
def test_a_row_does_not_feel_its_neighbours(kernel, implementation):
    """The bits of query 3 of batch 0 stay whatever the other queries and batches hold."""
    query, key, value, _ = (
        a.astype(np.float32) for a in draw(Shape(T=130, S=130), spherical=False)
    )
    attend = jax.jit(
        lambda *a: kreg.attention(
            *a,
            is_causal=True,
            implementation=implementation,
            **Cell(kernel, "adaptive", 1.0).arguments,
        )
    )
    alone = np.asarray(attend(query, key, value))[0, 3]
    for factor in (0.0, 1e-2, 100.0):
        others = [x.copy() for x in (query, key, value)]
        for x in others:
            x[1] *= np.float32(factor)
        others[0][0, :3] *= np.float32(factor)
        others[0][0, 4:] *= np.float32(factor)
        np.testing.assert_array_equal(np.asarray(attend(*others))[0, 3], alone)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", MOSTLY_XLA)
def test_vmap_scan_remat_jit(implementation):
    query, key, value, _ = (jnp.asarray(a, "float32") for a in draw(Shape(B=6, T=9, S=9)))

    def attend(q, k, v):
        return kreg.attention(q, k, v, is_causal=True, implementation=implementation)

    plain = attend(query, key, value)
    split = [a.reshape(3, 2, *a.shape[1:]) for a in (query, key, value)]
    expected = plain.reshape(3, 2, *plain.shape[1:])
    np.testing.assert_allclose(jax.vmap(attend)(*split), expected, atol=2e-6)
    one_sided = jax.vmap(attend, (0, None, None))(split[0], split[1][0], split[2][0])
    np.testing.assert_allclose(one_sided[0], expected[0], atol=2e-6)

    def body(carry, arrays):
        output = jax.checkpoint(attend)(*arrays)
        return carry + output.sum(), output

    _, scanned = jax.jit(lambda a: jax.lax.scan(body, 0.0, a))(tuple(split))
    np.testing.assert_allclose(scanned, expected, atol=2e-6)

    def loss(f, q):
        return jnp.sum(f(q, key, value) ** 2)

    gradient = jax.grad(lambda q: loss(attend, q))(query)
    rematerialised = jax.jit(jax.grad(lambda q: loss(jax.checkpoint(attend), q)))(query)
    np.testing.assert_allclose(rematerialised, gradient, atol=2e-5)
    through_scan = jax.grad(lambda a: jax.lax.scan(body, 0.0, a)[0])(tuple(split))
    direct = jax.grad(lambda a: attend(*a).sum())((query, key, value))
    for one, other in zip(through_scan, direct, strict=True):
        np.testing.assert_allclose(one.reshape(other.shape), other, atol=2e-5)


@pytest.mark.core
def test_implementations_agree_and_none_chooses_one():
    *arrays, _ = draw(Shape(T=130, S=130), spherical=False)
    outputs = [call(arrays, BIWEIGHT, i, is_causal=True) for i in (*IMPLEMENTATIONS, None)]
    for other in outputs[1:]:
        np.testing.assert_allclose(outputs[0], other, atol=4e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_stats_come_beside_the_same_output(implementation):
    *arrays, _ = draw(SMALL)
    output, stats = call(arrays, BIWEIGHT, implementation, return_stats=True)
    np.testing.assert_allclose(output, call(arrays, BIWEIGHT, implementation), atol=1e-6)
    assert stats.threshold.shape == stats.support.shape == stats.residual.shape == (B, T, N)
