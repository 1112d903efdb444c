"""The model's promises: causality, documents, dropout, modes, precision, bad input."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nightly import nightly
from nn_models import METHODS, VOCAB, config, logits, model, module, quick_jit, tokens

import kreg
from kreg.nn import ContextualMemory, MemoryMosaic, MosaicConfig, to_torch
from kreg.nn.delay import delay
from kreg.nn.features import Projection, document_index, unit
from kreg.nn.mosaic import Block

VARIANTS = {
    "wide": {"key_kernel": 3, "value_kernel": 3, "low_rank_values": False, "use_bias": True},
    "far": {"value_shift": 2, "key_kernel": 2, "low_rank_keys": True},
    "near": {"value_shift": 0},
    "post": {"pre_norm": False, "memory_count": 2, "tie_weights": False},
    "contextual": {"contextual_only": True, "num_layers": 1},
}


CASES = [(m, {}) for m in METHODS] + [("biweight", VARIANTS[v]) for v in VARIANTS]
CASES += [("norm_relu", {"compat": "dense"}), ("relumax", {"compat": "eft"})]
NAMES = [*METHODS, *VARIANTS, "dense", "eft"]


NIGHTLY = ("softmax", "epanechnikov", "norm_relu", "top3_softmax", "top3_uniform", "post")
NIGHTLY += ("triweight@fixed", "wide", "near", "contextual", "relumax", "far")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options"),
    [
        pytest.param(*case, id=name, marks=pytest.mark.nightly if name in NIGHTLY else ())
        for case, name in zip(CASES, NAMES, strict=True)
    ],
)
def test_blocks_know_neither_the_future_nor_other_documents(method, options):
    block = module(Block, config(method, **options))
    x, other = jax.random.normal(jax.random.key(0), (2, 1, 12, 8))
    whole = block(x)
    changed = block(x.at[:, 7:].set(other[:, 7:]))
    np.testing.assert_allclose(changed[:, :7], whole[:, :7], rtol=1e-6, atol=1e-6)
    assert np.all(np.any(changed[:, 7:] != whole[:, 7:], axis=-1))

    lengths, start = (5, 1, 6), 0
    documents = jnp.repeat(jnp.arange(3), jnp.array(lengths), total_repeat_length=12)[None]
    packed = block(x, documents)
    for length in lengths:
        alone = jnp.roll(x, -start, axis=1).at[:, length:].set(other[:, length:])
        # What follows a document is unlike what followed it in the pack, and must not matter.
        alone = block(alone)[:, :length]
        found = packed[:, start : start + length]
        np.testing.assert_allclose(found, alone, rtol=1e-5, atol=1e-5)
        start += length


def test_the_dense_norm_relu_reads_the_future_when_wide():
    """What compat reproduces, fault included: 2 beta^2 < 1 lets keys to come take part."""
    block = nnx.clone(module(Block, config("norm_relu", compat="dense", contextual_only=True)))
    block.contextual.kernel_beta = nnx.Param(jnp.full(2, -0.1))
    x, other = jax.random.normal(jax.random.key(0), (2, 1, 12, 8))
    assert np.any(block(x)[:, 5] != block(x.at[:, 9:].set(other[:, 9:]))[:, 5])


def test_a_packed_document_gives_the_logits_it_gives_alone():
    """Ids may come back: what counts are runs."""
    small, row = model(config()), tokens(1, 12)
    segments = jnp.array([[3] * 5 + [1] + [3] * 6])
    packed = logits(small, row, segments)
    one = jnp.zeros_like(segments)
    for start, stop in ((0, 5), (5, 6), (6, 12)):
        alone = logits(small, jnp.roll(row, -start, axis=1), one)[:, : stop - start]
        np.testing.assert_allclose(packed[:, start:stop], alone, rtol=1e-5, atol=1e-5)


def test_dropout_needs_a_key():
    small, row = model(config(attention_dropout=0.5, hidden_dropout=0.5)), tokens(2, 12)
    keys = jax.random.split(jax.random.key(0))
    plain, first, second = (logits(small, row, None, k) for k in (None, *keys))
    np.testing.assert_array_equal(first, logits(small, row, None, keys[0]))
    assert np.any(first != plain) and np.any(first != second)


@pytest.mark.parametrize(("method", "compat"), [("biweight", None), ("norm_relu", "dense")])
def test_dropped_weights_keep_their_mean(method, compat):
    made = config(method, num_layers=1, attention_dropout=0.4, compat=compat)
    memory = module(ContextualMemory, made)
    x = jax.random.normal(jax.random.key(0), (1, 6, 8))
    keys, values = memory.keys(x), memory.values(x)

    @quick_jit
    def answers(memory, seeds):
        def one(k):
            return memory.regress(keys, values, dropout_key=k)

        return jax.vmap(one)(seeds), memory.regress(keys, values)

    dropped, whole = answers(memory, jax.random.split(jax.random.key(1), 2000))
    error = dropped.std(axis=0) / 2000**0.5
    assert np.any(dropped[0] != whole)
    assert np.all(abs(dropped.mean(axis=0) - whole) <= 5 * error + 1e-6)


def test_the_eft_file_drops_no_weights():
    made = config("softmax", attention_dropout=0.5, compat="eft", contextual_only=True)
    made = dataclasses.replace(made, hidden_dropout=0.0)
    row = tokens(2, 12)
    np.testing.assert_array_equal(
        logits(model(made), row), logits(model(made), row, None, jax.random.key(0))
    )


def loss(model, row):
    return jnp.mean(jnp.square(model(row)))


@pytest.mark.nightly
def test_remat_and_tree_mode_change_nothing():
    row = tokens(2, 12)
    with jax.enable_x64(True):
        wide = functools.partial(jax.tree.map, lambda x: x.astype(jnp.float64))
        plain, again = wide(model(config("softmax"))), wide(model(config("softmax", remat=True)))
        golden = to_torch(quick_jit(jax.grad(loss))(plain, row))
        found = {"remat": to_torch(quick_jit(jax.grad(loss))(again, row))}
        with nnx.set_graph_mode(False), nnx.set_graph_updates(False):
            graph, parameters = nnx.split(plain, nnx.Param)
            in_tree_mode = quick_jit(jax.grad(lambda p, row: loss(nnx.merge(graph, p), row)))
            merged = nnx.merge(graph, in_tree_mode(parameters, row))
            found["tree mode"] = to_torch(merged)
        for what, gradients in found.items():
            for name, array in gradients.items():
                np.testing.assert_allclose(array, golden[name], rtol=1e-9, atol=1e-12, err_msg=what)


def test_a_model_is_made_in_tree_mode():
    made = config("softmax", num_layers=3)
    with nnx.set_graph_mode(False), nnx.set_graph_updates(False):
        small = quick_jit(lambda: MemoryMosaic(made, rngs=nnx.Rngs(0)))()
        assert logits(small, tokens(1, 4)).shape == (1, 4, VOCAB)
    kernels = small.blocks.contextual.out.kernel[...]
    assert kernels.shape == (3, 8, 8) and np.any(kernels[0] != kernels[1])


def with_beta(memory, beta):
    changed = nnx.clone(memory)
    changed.kernel_beta = nnx.Param(beta)
    return changed


@pytest.mark.parametrize(
    "method",
    nightly(METHODS, but=("biweight", "norm_relu")),
)
@pytest.mark.slow
def test_every_head_learns_its_bandwidth(method):
    """The gradient reaches beta, and is the slope; Nearest asks the Gaussian alone for h."""
    with jax.enable_x64(True):
        memory = module(ContextualMemory, config(method))
        numbers = np.random.default_rng(0)
        keys, values, c = numbers.normal(size=(3, 1, 9, 2, 4))
        c, keys = jnp.asarray(c), unit(jnp.asarray(keys))

        def objective(memory):
            return jnp.sum(c * memory.regress(keys, jnp.asarray(values)))

        beta, step = jnp.array([-0.05, -0.02]), 1e-6
        by_beta = jax.grad(objective)(with_beta(memory, beta)).kernel_beta[...]
        for head in range(2):
            ends = [objective(with_beta(memory, beta.at[head].add(s))) for s in (step, -step)]
            slope = (ends[0] - ends[1]) / (2 * step)
            np.testing.assert_allclose(by_beta[head], slope, rtol=1e-6, atol=1e-8)
        independent = method in ("top3_uniform", "biweight@nearest")
        assert np.all(abs(by_beta) < 1e-12) if independent else np.all(abs(by_beta) > 1e-6)


def test_bfloat16_parameters_give_float32_logits():
    small, row = model(config("softmax")), tokens(2, 12)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), small)
    # Vectors are often kept wide; the stream has the embedding's type all the same.
    mixed = nnx.clone(half)
    mixed.blocks.contextual_norm.scale = small.blocks.contextual_norm.scale
    mixed.blocks.contextual.kernel_beta = small.blocks.contextual.kernel_beta
    for narrow in (half, mixed):
        found = logits(narrow, row)
        assert found.dtype == jnp.float32
        exact = logits(small, row)
        # Eight bits of mantissa, through two layers: the error's size against the logits'.
        assert jnp.linalg.norm(found - exact) <= 0.05 * jnp.linalg.norm(exact)


def test_skipped_tokens_have_no_logits():
    row = tokens(2, 12)
    whole, cut = logits(model(config()), row), logits(model(config(skip_tokens=5)), row)
    np.testing.assert_allclose(cut, whole[:, 5:], rtol=1e-6, atol=1e-6)


def test_the_first_positions_have_no_past():
    memory = module(ContextualMemory, config(value_shift=2))
    x = jax.random.normal(jax.random.key(0), (1, 5, 8))
    answer = memory(x)
    np.testing.assert_array_equal(answer[:, :2], 0)
    assert np.all(np.any(answer[:, 2:] != 0, axis=-1))


def test_zero_input_has_finite_gradients():
    """The released norms are 0 / 0 there."""
    memory = module(ContextualMemory, config())
    gradient = jax.grad(lambda m, x: jnp.sum(m(x)))(memory, jnp.zeros((1, 5, 8)))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(gradient))
    np.testing.assert_array_equal(unit(jnp.zeros(3)), 0)


def test_documents_are_runs():
    ids = jnp.array([[2, 2, 0, 2, 2]])
    np.testing.assert_array_equal(document_index(ids), [[0, 0, 1, 2, 2]])
    x = jnp.arange(1, 6)[None]
    np.testing.assert_array_equal(delay(x, 1, document_index(ids)), [[0, 1, 0, 0, 4]])
    np.testing.assert_array_equal(delay(x, -1, document_index(ids)), [[2, 0, 0, 5, 0]])
    np.testing.assert_array_equal(delay(x, 9), 0 * x)


def test_a_low_rank_value_mixes_next_and_current():
    projection = Projection(config(), taps=2, low_rank=True, ahead=1, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 3, 8))
    w = (x @ projection.kernel[...]).reshape(1, 3, 2, 4)
    mix = projection.mix[...][None, :, None]
    found = projection(x)
    np.testing.assert_allclose(found[:, 1], (1 - mix) * w[:, 2] + mix * w[:, 1], rtol=1e-5)
    np.testing.assert_allclose(found[:, 2], mix * w[:, 2], rtol=1e-5)


def test_a_config_is_static():
    assert hash(config()) == hash(config()) and config() == config()
    assert config("top3_softmax") == config("top3_softmax")
    other = dataclasses.replace(
        config("top3_softmax"), bandwidth=functools.partial(kreg.Nearest, 4)
    )
    assert other != config("top3_softmax")


BAD = [
    ({"num_heads": 3}, "embed_dim: expected a multiple of heads=3, got 8"),
    ({"memory_size": 0}, "memory_size: expected at least 1, got 0"),
    ({"value_shift": -1}, "value_shift: expected at least 0"),
    ({"hidden_dropout": 1.0}, "hidden_dropout: expected a rate"),
    ({"value_kernel": 3}, "value_kernel: low-rank features mix 2 positions, got 3"),
    ({"compat": "both"}, r"compat: expected one of \(None, 'dense', 'eft', 'nano'\)"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[next(iter(o)) for o, _ in BAD])
def test_bad_configs(options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_bad_calls():
    with pytest.raises(ValueError, match="segment_ids: expected the tokens' shape"):
        model(config())(tokens(2, 12), segment_ids=jnp.zeros((2, 11), jnp.int32))
    odd = MosaicConfig(VOCAB, 1, 2, 8, 3, bandwidth=kreg.Anchored, compat="dense")
    with pytest.raises(ValueError, match="compat: expected a method of the released files"):
        model(odd)(tokens(1, 4))
