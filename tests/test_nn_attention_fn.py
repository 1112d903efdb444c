"""Stock Flax layers with kreg's attention, against kreg.attention on what the layers project."""

import functools
import inspect
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from nn_models import nearest

import kreg
from experiments import flax_transformer
from kreg.nn import attention_fn

B, T, N, C = 2, 6, 4, 16
SPREAD = nnx.initializers.normal(0.3)
H_PER_HEAD = np.array([0.6, 0.8, 1.0, 1.5], np.float32).reshape(1, N, 1, 1)

CELLS = {
    "biweight": {"kernel": kreg.biweight},
    "softmax": {"kernel": kreg.gaussian},
    "relumax": {"kernel": kreg.epanechnikov, "bandwidth": kreg.Anchored(0.8)},
    "nearest": {"kernel": kreg.triweight, "bandwidth": nearest()},
    "h_per_head": {"kernel": kreg.biweight, "bandwidth": kreg.Adaptive(H_PER_HEAD)},
    "scaled": {"kernel": kreg.epanechnikov, "scale": 0.9, "logits_soft_cap": 2.0},
}


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def coins(seed, *shape):
    return np.random.default_rng(seed).random(shape) < 0.6


def nnx_layer(attention, **options):
    options = {"decode": False, "kernel_init": SPREAD, "bias_init": SPREAD} | options
    return nnx.MultiHeadAttention(N, C, attention_fn=attention, rngs=nnx.Rngs(0), **options)


def linen_layer(attention, kind=linen.MultiHeadDotProductAttention, **options):
    options = {"kernel_init": SPREAD, "bias_init": SPREAD} | options
    return kind(N, attention_fn=attention, **options)


def nnx_pair(attention, **options):
    """A function of parameters and inputs, and parameters by the names of both libraries."""
    layer = nnx_layer(attention, **options)
    graph, params, rest = nnx.split(layer, nnx.Param, ...)

    def apply(params, x, **options):
        return nnx.merge(graph, nnx.State(params), rest)(x, **options)

    return apply, nnx.to_pure_dict(params)


def linen_pair(attention, **options):
    layer = linen_layer(attention, **options)
    return lambda params, x, **options: layer.apply(
        {"params": params}, x, **options
    ), linen_params()


@functools.cache
def linen_params():
    """They do not depend on the attention."""
    layer = linen_layer(linen.dot_product_attention)
    return jax.jit(layer.init)(jax.random.key(0), jnp.zeros((1, T, C)))["params"]


PAIRS = {"nnx": nnx_pair, "linen": linen_pair}


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Compiles in half the time, what Flax runs outside jit too; each program runs once or so."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@functools.partial(
    jax.jit, static_argnames=("scale", "logits_soft_cap", "is_causal", "dropout_rate")
)
def by_hand(params, x, mask=None, **options):
    """What a layer is: projections, kreg.attention, a projection."""

    def project(name):
        kernel, bias = params[name]["kernel"], params[name]["bias"]
        return jnp.einsum("btc,cnh->btnh", x, kernel) + bias[None, None]

    out = kreg.attention(*map(project, ("query", "key", "value")), mask=mask, **options)
    kernel, bias = params["out"]["kernel"], params["out"]["bias"]
    return jnp.einsum("btnh,nhc->btc", out, kernel) + bias[None, None]


def some_mask():
    """Boolean, [B, 1, T, T]; query 2 of the second sequence sees no key."""
    mask = coins(9, B, 1, T, T)
    mask[..., 0], mask[1, 0, 2] = True, False
    return mask


@pytest.mark.parametrize(
    ("library", "cell"),
    [("linen", "biweight"), ("linen", "h_per_head")] + [("nnx", c) for c in CELLS],
)
def test_layers_equal_attention_by_hand(library, cell):
    apply, params = PAIRS[library](attention_fn(**CELLS[cell]))
    x, mask = normal(1, B, T, C), some_mask()
    found = jax.jit(apply)(params, x, mask=mask)
    expected = by_hand(params, x, mask, **CELLS[cell])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    # A query without keys: the output projection of 0.
    np.testing.assert_array_equal(found[1, 2], params["out"]["bias"])


@pytest.mark.parametrize("library", PAIRS)
def test_float_masks_admit_where_they_are_not_zero(library):
    apply, params = PAIRS[library](attention_fn())
    x, mask = normal(1, B, T, C), some_mask()
    apply = jax.jit(apply)
    expected = apply(params, x, mask=mask)
    for values in (1.0, -0.5, np.arange(1.0, T + 1, dtype=np.float32)):
        np.testing.assert_array_equal(apply(params, x, mask=np.where(mask, values, 0)), expected)
    np.testing.assert_array_equal(apply(params, x, mask=mask.astype(jnp.int32)), expected)
    assert np.abs(apply(params, x) - expected).max() > 0.01


@pytest.mark.parametrize("library", PAIRS)
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "causal_and_mask"])
def test_causality(library, masked):
    apply, params = PAIRS[library](attention_fn())
    x, mask = normal(1, B, T, C), some_mask() if masked else None
    if library == "nnx":
        options = {"is_causal": True, "mask": mask}
    else:
        causal = linen.make_causal_mask(x[..., 0])
        assert causal.dtype == jnp.float32
        options = {"mask": linen.combine_masks(causal, mask)}
    found = jax.jit(functools.partial(apply, **options))(params, x)
    expected = by_hand(params, x, mask, is_causal=True)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_structured_mask_reaches_attention():
    apply, params = nnx_pair(attention_fn())
    x, mask = normal(1, B, T, C), kreg.Mask(is_causal=True, local_window_size=2)
    found = jax.jit(functools.partial(apply, mask=mask))(params, x)
    step = np.arange(T)[:, None] - np.arange(T)
    expected = by_hand(params, x, ((step >= 0) & (step <= 2))[None, None])
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("kind", [linen.MultiHeadAttention, linen.SelfAttention])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_other_names_of_the_linen_layer(kind):
    layer, x, params = linen_layer(attention_fn(), kind), normal(1, B, T, C), linen_params()
    found = jax.jit(layer.apply)({"params": params}, x, mask=some_mask())
    np.testing.assert_allclose(found, by_hand(params, x, some_mask()), atol=1e-5)


GRIDS = {  # batch dimensions; shapes of the mask, of the bias
    "none": ((), (N, T, 5), (T, 5)),
    "one": ((3,), (3, 1, 1, 5), (1, N, T, 1)),
    "two": ((2, 3), (2, 1, N, 1, 5), (3, N, T, 5)),
    "shared": ((2, 3), (T, 5), (1, 1, N, T, 5)),
    "three": ((2, 1, 3), (2, 1, 1, 1, T, 5), (1, 1, 1, 5)),
}


@pytest.mark.parametrize("grid", GRIDS)
def test_any_batch_dimensions(grid):
    """Folding them equals attending for each batch entry, with mask, bias and an h per head."""
    batch, masks, biases = GRIDS[grid]
    query, key = normal(1, *batch, T, N, 8), normal(2, *batch, 5, 2, 8)
    value, bias = normal(3, *batch, 5, 2, 3), normal(5, *biases)
    mask = coins(4, *masks)
    cell = {"kernel": kreg.biweight, "bandwidth": kreg.Anchored(H_PER_HEAD)}
    fn = jax.jit(functools.partial(attention_fn(**cell), is_causal=True))
    found = fn(query, key, value, bias, mask.astype(jnp.float32))
    assert found.shape == (*batch, T, N, 3)
    bias, mask = (np.broadcast_to(x, (*batch, N, T, 5)) for x in (bias, mask))
    one = jax.jit(functools.partial(kreg.attention, **cell, is_causal=True))
    for i in np.ndindex(batch):
        expected = one(*(x[i] for x in (query, key, value, bias, mask)))
        np.testing.assert_allclose(found[i], expected, atol=1e-6)


@pytest.mark.parametrize("library", PAIRS)
def test_gaussian_is_the_default_attention_of_flax(library):
    """Outputs and the gradients of all parameters."""
    x, mask = 2 * normal(1, 2, 3, T, C), coins(7, 2, 3, 1, T, T) | np.eye(T, dtype=bool)
    own = {"nnx": nnx.dot_product_attention, "linen": linen.dot_product_attention}[library]

    def answer(attention):
        apply, params = PAIRS[library](attention)

        def loss(params):
            y = apply(params, x, mask=mask)
            return jnp.mean(jnp.square(y)), y

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    found, expected = answer(attention_fn(kreg.gaussian)), answer(own)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, expected
    )


def test_gaussian_with_bias_and_grouped_heads_is_that_of_flax():
    shapes = ((T, N, 8), (5, 2, 8), (5, 2, 8), (N, T, 5))
    arrays = [normal(i, 2, 3, *shape) for i, shape in enumerate(shapes)]
    own, theirs = attention_fn(kreg.gaussian), nnx.dot_product_attention
    np.testing.assert_allclose(jax.jit(own)(*arrays), jax.jit(theirs)(*arrays), atol=1e-5)
    found, expected = (
        jax.jit(functools.partial(apply, is_causal=True))(params, normal(1, B, T, C))
        for apply, params in (nnx_pair(fn, num_kv_heads=2) for fn in (own, theirs))
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)


def nnx_decode(attention, x, mask):
    """One position after the other, with NaN in the slots of the cache not yet written."""
    layer = nnx_layer(attention)
    layer.init_cache(x.shape)
    for cache in (layer.cached_key, layer.cached_value):
        cache[...] = jnp.full(cache.shape, jnp.nan)
    graph, cache, rest = nnx.split(layer, nnx.Cache, ...)

    def step(cache, token):
        layer = nnx.merge(graph, cache, rest)
        # is_causal is the layer's to ignore here: it would leave the first key alone.
        out = layer(token[:, None], decode=True, is_causal=True, mask=mask)
        return nnx.state(layer, nnx.Cache), out[:, 0]

    return jax.jit(jax.lax.scan, static_argnums=0)(step, cache, jnp.swapaxes(x, 0, 1))[1]


def linen_decode(attention, x, mask):
    layer = linen_layer(attention, decode=True)
    empty = jax.eval_shape(layer.init, jax.random.key(0), x)["cache"]

    def unwritten(leaf):
        return jnp.full(leaf.shape, jnp.nan if leaf.ndim else 0, leaf.dtype)

    def step(cache, token):
        state = {"params": linen_params(), "cache": cache}
        out, state = layer.apply(state, token[:, None], mask=mask, mutable=["cache"])
        return state["cache"], out[:, 0]

    cache = jax.tree.map(unwritten, empty)
    return jax.jit(jax.lax.scan, static_argnums=0)(step, cache, jnp.swapaxes(x, 0, 1))[1]


@pytest.mark.parametrize("library", PAIRS)
@pytest.mark.parametrize("kind", [None, jnp.bool_, jnp.float32], ids=["no_mask", "bool", "float"])
def test_a_cache_step_by_step_equals_the_causal_pass(library, kind):
    """With padding on the left as the mask: the first queries of the second sequence see no key."""
    attention, x = attention_fn(**CELLS["h_per_head"]), normal(1, B, T, C)
    padding = jnp.arange(T)[None] >= jnp.array([[0], [2]])
    mask = None if kind is None else padding[:, None, None]
    options = {} if kind is None else {"mask": mask.astype(kind)}
    decode = {"nnx": nnx_decode, "linen": linen_decode}[library]
    found = decode(attention, x, options.get("mask"))
    _, params = PAIRS[library](attention)
    expected = by_hand(params, x, mask, is_causal=True, **CELLS["h_per_head"])
    np.testing.assert_allclose(np.swapaxes(found, 0, 1), expected, atol=1e-5)


@pytest.mark.parametrize("library", PAIRS)
def test_dropout_is_that_of_attention(library):
    apply, params = PAIRS[library](attention_fn(), dropout_rate=0.5)
    apply = jax.jit(apply, static_argnames="deterministic")
    x, keys = normal(1, B, T, C), jax.random.split(jax.random.key(5))

    def drop(key):
        if library == "linen":
            return apply(params, x, dropout_rng=key, deterministic=False)
        return apply(params, x, rngs=nnx.Rngs(dropout=key), deterministic=False)

    def drawn(key):  # what the layer hands to its attention
        return nnx.Rngs(dropout=key).dropout() if library == "nnx" else key

    once, again, other = drop(keys[0]), drop(keys[0]), drop(keys[1])
    np.testing.assert_array_equal(once, again)
    assert np.abs(once - other).max() > 0.1
    expected = by_hand(params, x, dropout_rate=0.5, dropout_key=drawn(keys[0]))
    np.testing.assert_allclose(once, expected, atol=1e-5)
    calm = apply(params, x, deterministic=True)
    np.testing.assert_allclose(calm, by_hand(params, x), atol=1e-5)


def test_dropout_preserves_the_mean_and_is_never_shared():
    static = ("broadcast_dropout", "dropout_rate")
    drop = jax.jit(attention_fn(**CELLS["relumax"]), static_argnames=static)
    drop = functools.partial(drop, dropout_rng=jax.random.key(3), dropout_rate=0.4)
    query, key, ones = normal(1, 8, 32, N, 8), normal(2, 8, 32, N, 8), np.ones((8, 32, N, 1))
    own, shared = (drop(query, key, ones, broadcast_dropout=b) for b in (False, True))
    np.testing.assert_array_equal(own, shared)
    # 1024 rows whose sums of kept weights have a deviation of 0.3 or so.
    assert abs(float(jnp.mean(own)) - 1) < 0.04
    assert float(jnp.std(own)) > 0.1
    # Equal sequences lose different weights.
    alike = drop(*(np.tile(x[:1], (8, 1, 1, 1)) for x in (query, key)), ones)
    assert float(jnp.max(jnp.std(alike, axis=0))) > 0.1


def test_types_are_promoted_as_flax_does():
    wide, narrow = normal(1, B, T, N, 8), jnp.asarray(normal(2, B, T, N, 8), jnp.bfloat16)
    fn = attention_fn(**CELLS["relumax"])
    assert fn(narrow, narrow, narrow).dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        fn(narrow, wide, narrow), fn(*(x.astype(jnp.float32) for x in (narrow, wide, narrow)))
    )
    found = fn(wide, wide, narrow, dtype=jnp.bfloat16)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        found, fn(*(x.astype(jnp.bfloat16) for x in (wide, wide, narrow)))
    )
    halved = fn(wide, wide, wide, promote_dtype=lambda args, dtype: tuple(x / 2 for x in args))
    np.testing.assert_array_equal(halved, fn(wide / 2, wide / 2, wide / 2))


@pytest.mark.parametrize("library", PAIRS)
def test_a_layer_computes_in_its_type(library):
    apply, params = PAIRS[library](attention_fn(), dtype=jnp.bfloat16)
    x = normal(1, B, T, C)
    found = jax.jit(apply)(params, x)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), by_hand(params, x), rtol=0.1, atol=0.1)


def test_precision_reaches_the_products():
    x = normal(1, B, T, N, 8)

    def program(precision):
        call = functools.partial(attention_fn(implementation="reference"), precision=precision)
        return jax.jit(call).lower(x, x, x).as_text()

    assert "HIGHEST" in program(None) and "HIGHEST" not in program("default")


def test_cosine_ignores_lengths_and_serves_the_fixed_rule():
    rule = {"kernel": kreg.epanechnikov, "bandwidth": kreg.Fixed(0.9), "scale": 1.0}
    query, key, value = normal(1, B, T, N, 8), normal(2, B, T, N, 8), normal(3, B, T, N, 8)
    units = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (query, key))
    found = attention_fn(**rule, cosine=True)(3 * query, 0.2 * key, value)
    np.testing.assert_allclose(found, kreg.attention(*units, value, **rule), atol=1e-5)


@pytest.mark.parametrize("library", PAIRS)
def test_h_can_be_learned(library):
    """The gradient of an h per head, held by the user's own module around a stock layer."""

    class Learned(nnx.Module):
        def __init__(self):
            self.h = nnx.Param(jnp.asarray(H_PER_HEAD))

        def __call__(self, *arrays, **options):
            return attention_fn(bandwidth=kreg.Adaptive(self.h[...]))(*arrays, **options)

    class Layer(linen.Module):
        @linen.compact
        def __call__(self, x):
            h = self.param("h", lambda _: jnp.asarray(H_PER_HEAD))
            return linen_layer(attention_fn(bandwidth=kreg.Adaptive(h)), name="layer")(x)

    x = normal(1, B, T, C)
    if library == "nnx":
        apply, params = nnx_pair(Learned())
        params = {"layer": params, "h": params.pop("attention_fn")["h"]}

        def loss(params):
            own = params["layer"] | {"attention_fn": {"h": params["h"]}}
            return jnp.mean(jnp.square(apply(own, x)))
    else:
        params = {"layer": linen_params(), "h": jnp.asarray(H_PER_HEAD)}

        def loss(params):
            return jnp.mean(jnp.square(Layer().apply({"params": params}, x)))

    def expected(params):
        rule = kreg.Adaptive(params["h"])
        return jnp.mean(jnp.square(by_hand(params["layer"], x, bandwidth=rule)))

    found, wanted = (jax.jit(jax.grad(f))(params)["h"] for f in (loss, expected))
    assert np.all(np.abs(wanted) > 1e-4)
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("graph", [True, False], ids=["graph", "tree"])
def test_graph_mode_and_tree_mode(graph):
    """jit, grad and layers stacked by vmap, as nnx users write them."""
    x, rngs, relumax = normal(1, B, T, C), nnx.Rngs(0), CELLS["relumax"]
    attention, hand = attention_fn(**relumax), functools.partial(by_hand, **relumax)
    with nnx.set_graph_mode(graph), nnx.set_graph_updates(graph):
        layer = nnx_layer(attention)
        params = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
        found = nnx.jit(lambda layer, x: layer(x, is_causal=True))(layer, x)
        expected = hand(params, x, is_causal=True)
        np.testing.assert_allclose(found, expected, atol=1e-5)
        gradient = nnx.grad(lambda layer: jnp.mean(jnp.square(layer(x))))(layer)
        wanted = jax.grad(lambda params: jnp.mean(jnp.square(hand(params, x))))(params)
        same = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5)
        jax.tree.map(same, nnx.to_pure_dict(nnx.state(gradient)), wanted)

        def make(rngs):
            options = {"attention_fn": attention, "decode": False, "kernel_init": SPREAD}
            return nnx.MultiHeadAttention(N, C, **options, rngs=rngs)

        stack = nnx.vmap(make)(rngs.split(2))
        twice = jax.jit(lambda s, x: jax.lax.scan(lambda x, one: (one(x), None), x, s)[0])(stack, x)
        numbers = nnx.to_pure_dict(nnx.state(stack, nnx.Param))
        by_layer = [jax.tree.map(lambda p, i=i: p[i], numbers) for i in range(2)]
        np.testing.assert_allclose(
            twice, hand(by_layer[1], hand(by_layer[0], x)), rtol=1e-4, atol=1e-4
        )


def test_layers_made_alike_are_alike_to_jax():
    """Two models can be averaged leaf by leaf, and compile once."""
    first, second = (nnx_layer(attention_fn(kreg.biweight)) for _ in range(2))
    mean = jax.tree.map(lambda a, b: (a + b) / 2, nnx.split(first), nnx.split(second))
    x = normal(1, B, T, C)
    np.testing.assert_allclose(nnx.merge(*mean)(x), first(x), atol=1e-6)
    assert attention_fn(kreg.biweight) != attention_fn(kreg.triweight)
    assert "order=2" in repr(attention_fn(kreg.biweight))


def test_names_every_argument_of_both_libraries():
    """linen drops what is not named, silently; nnx fails on it."""
    parameters = inspect.signature(attention_fn()).parameters
    own = [inspect.signature(m.dot_product_attention).parameters for m in (nnx, linen)]
    assert {*own[0], *own[1], "input_positions"} == set(parameters)
    assert list(parameters)[:5] == list(own[0])[:5] == list(own[1])[:5]
    for name, ours in parameters.items():
        for theirs in own:
            if name in theirs and name != "promote_dtype":
                assert ours.default == theirs[name].default, name


def raises(error, match):
    return pytest.raises(error, match=match)


@pytest.mark.parametrize(
    "name",
    [
        "input_positions",
        "einsum_dot_general",
        "qk_attn_weights_einsum",
        "attn_weights_value_einsum",
        "module",
    ],
)
def test_refuses_by_name_what_it_would_ignore(name):
    x = normal(1, B, T, N, 8)
    assert attention_fn()(x, x, x, **{name: None}).shape == x.shape
    with raises(NotImplementedError, f"^{name}: expected None"):
        attention_fn()(x, x, x, **{name: jnp.einsum})


def test_refuses_what_the_layers_ask_of_it():
    x = normal(1, B, T, C)
    with raises(NotImplementedError, r"^module: .*sown.*sow_weights=False"):
        nnx_layer(attention_fn())(x, sow_weights=True)
    with raises(NotImplementedError, "^input_positions: "):
        nnx_layer(attention_fn())(x, input_positions=jnp.arange(T)[None])
    with raises(NotImplementedError, r"^module: .*sown.*sow_weights=False"):
        linen_layer(attention_fn()).init(jax.random.key(0), x, sow_weights=True)
    factories = {
        name: lambda: jnp.einsum
        for name in ("qk_attn_weights_einsum_cls", "attn_weights_value_einsum_cls")
    }
    with raises(NotImplementedError, "^qk_attn_weights_einsum: "):
        linen_layer(attention_fn(), **factories).init(jax.random.key(0), x)
    layer = linen_layer(attention_fn(), force_fp32_for_softmax=True)
    assert layer.init_with_output(jax.random.key(0), x)[0].shape == x.shape


def test_errors_name_the_argument():
    x = normal(1, 2, 3, T, N, 8)
    fn = attention_fn()
    with raises(ValueError, r"^mask: expected .*\(2, 3\), got \(3, 2, 1, 6, 6\)"):
        fn(x, x, x, mask=jnp.ones((3, 2, 1, T, T)))
    with raises(ValueError, r"^mask: .*got \(1, 2, 3, 1, 1, 6\)"):
        fn(x, x, x, mask=jnp.ones((1, 2, 3, 1, 1, T)))
    with raises(ValueError, r"^bias: expected .*\(2, 3\), got \(2, 4, 6, 6\)"):
        fn(x, x, x, jnp.ones((2, N, T, T)))
    with raises(ValueError, "^mask: "):
        fn(x, x, x, mask=jnp.ones((T, T + 1)))
    with raises(ValueError, r"^key: expected batch dimensions \(2, 3\)"):
        fn(x, x.reshape(6, T, N, 8), x)
    with raises(ValueError, r"^value: expected batch dimensions \(2, 3\)"):
        fn(x, x, x.swapaxes(0, 1))
    with raises(ValueError, r"^query: .*got shape \(6, 8\)"):
        fn(x[0, 0, :, 0], x, x)
    with raises(ValueError, r"^dropout_rng: .*dropout_rate=0\.1.*got None"):
        fn(x, x, x, dropout_rate=0.1)
    with raises(ValueError, "^dropout_rate: "):
        fn(x, x, x, dropout_rate=1.0, dropout_rng=jax.random.key(0))
    with raises(ValueError, "^implementation: "):
        attention_fn(implementation="fastest")(x, x, x)
    with raises(ValueError, "^scale: .*Fixed"):
        attention_fn(bandwidth=kreg.Fixed(1.0))(x, x, x)


def test_errors_come_when_the_layer_is_made():
    with raises(ValueError, "^bandwidth: expected a rule"):
        attention_fn(kreg.biweight, kreg.Adaptive)
    with raises(ValueError, "^kernel: "):
        attention_fn("biweight")
    with raises(ValueError, "^bandwidth: .*box"):
        attention_fn(kreg.box)


@pytest.mark.nightly
@pytest.mark.parametrize("library", ["nnx", "linen"])
def test_a_small_transformer_learns(library):
    build, _ = flax_transformer.LIBRARIES[library]
    before, after = flax_transformer.train(*build(attention_fn(kreg.biweight)), steps=50)
    # Guessing costs ln 16 = 2.8, knowing the symbols' places alone no less.
    assert before > 2.5 and after < 1.0


def test_the_example_explains_itself(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["flax_transformer", "--help"])
    with raises(SystemExit, "0"):
        flax_transformer.main()
    text = capsys.readouterr().out
    assert "attention_fn=" in text and "--methods" in text and "biweight" in text
    monkeypatch.setattr(sys, "argv", ["flax_transformer", "--methods", "hardmax"])
    with raises(SystemExit, "2"):
        flax_transformer.main()
    assert "unknown name 'hardmax'" in capsys.readouterr().err
