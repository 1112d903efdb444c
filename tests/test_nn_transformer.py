"""The Transformer's promises: causality, documents, positions, scales, steps, training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from nightly import NIGHTLY
from nn_models import METHODS, VOCAB, logits, module, quick_jit, tokens

from kreg.nn import Transformer, TransformerConfig, from_torch, generate, to_torch
from kreg.nn.self_attention import SelfAttention, length_scale, places

MODELS = {
    "learned": ("softmax", {"max_length": 12}),
    "nape": ("biweight", {"alibi_heads": 1, "length_scaled": True}),
    "fixed": ("triweight@fixed", {"cosine": True, "learned_bandwidth": True}),
    "nearest": ("biweight@nearest", {"alibi_heads": 2, "tie_weights": False}),
}
WHEN = {"fixed": pytest.mark.slow, "nearest": NIGHTLY}
SOME_SLOW = [pytest.param(m, marks=WHEN.get(m, ())) for m in MODELS]


def config(method: str = "biweight", **options) -> TransformerConfig:
    """Two layers, two heads of width 4."""
    kernel, bandwidth = METHODS[method]
    sizes = {"num_layers": 2, "num_heads": 2, "embed_dim": 8} | options
    return TransformerConfig(VOCAB, **sizes, kernel=kernel, bandwidth=bandwidth)


def model(name: str) -> Transformer:
    method, options = MODELS[name]
    return module(Transformer, config(method, **options))


@pytest.mark.parametrize("name", SOME_SLOW)
def test_neither_the_future_nor_other_documents_are_seen(name):
    small, row = model(name), tokens(1, 12)
    whole = logits(small, row)
    changed = logits(small, row.at[:, 7:].set((row[:, 7:] + 1) % VOCAB))
    np.testing.assert_allclose(changed[:, :7], whole[:, :7], rtol=1e-5, atol=1e-5)
    assert np.all(np.any(changed[:, 7:] != whole[:, 7:], axis=-1))

    lengths, start = (5, 1, 6), 0
    # The last document has the first one's id: runs count, not ids.
    ids = jnp.repeat(jnp.array([3, 1, 3]), jnp.array(lengths), total_repeat_length=12)[None]
    packed = logits(small, row, ids)
    for length in lengths:
        alone = logits(small, jnp.roll(row, -start, axis=1))[:, :length]
        found = packed[:, start : start + length]
        np.testing.assert_allclose(found, alone, rtol=1e-4, atol=1e-4)
        start += length
    assert np.any(abs(packed[:, 5:] - whole[:, 5:]) > 1e-3)


@pytest.mark.parametrize("name", SOME_SLOW)
def test_steps_equal_the_whole(name):
    """The cache's logits are the full pass's to rounding, the generated tokens exactly."""
    small, prompt = model(name), tokens(2, 4)
    found = generate(small, prompt, 9 if small.config.max_length else 8)
    np.testing.assert_array_equal(found[:, :4], prompt)
    read = found[:, :-1]
    whole = logits(small, read)
    np.testing.assert_array_equal(found[:, 4:], jnp.argmax(whole, axis=-1)[:, 3:])

    @quick_jit
    def by_steps(model, row):
        def step(cache, inputs):
            return model.step(cache, *inputs)

        start = model.start(2, row.shape[1])
        return jax.lax.scan(step, start, (row.T, jnp.arange(row.shape[1])))[1]

    steps = jnp.moveaxis(by_steps(small, read), 0, 1)
    np.testing.assert_allclose(steps, whole, rtol=2e-5, atol=2e-5)


def test_padding_is_not_attended_to():
    small, row = model("nape"), tokens(2, 8)
    run = quick_jit(lambda m, t, n: m(t, key_value_seq_lengths=n))
    lengths = jnp.array([5, 8])
    padded, other = run(small, row, lengths), run(small, row.at[:, 5].add(1) % VOCAB, lengths)
    np.testing.assert_array_equal(padded[0, 6:], other[0, 6:])
    assert np.all(np.any(padded[1, 6:] != other[1, 6:], axis=-1))
    np.testing.assert_allclose(padded[0, :5], logits(small, row)[0, :5], rtol=1e-5, atol=1e-5)


def test_attention_is_what_it_says():
    """Linear biases and length scales, one score matrix a head, in NumPy."""
    made = config("softmax", num_heads=4, alibi_heads=2, length_scaled=True, learned_bandwidth=True)
    attention = module(SelfAttention, made)
    x = np.random.default_rng(0).normal(size=(1, 7, 8)).astype(np.float32)
    found = attention(jnp.asarray(x), places(7))
    flat = nnx.to_flat_state(nnx.state(attention))
    state = {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in flat}
    heads = x[0] @ state["query_key_value.kernel"] + state["query_key_value.bias"]
    query, key, value = np.moveaxis(heads.reshape(7, 3, 4, 2), 1, 0)
    lag = np.arange(7)[:, None] - np.arange(7)
    answers = []
    for n in range(4):
        score = query[:, n] @ key[:, n].T / 2**0.5
        if n < 2:
            score = score - lag / (n + 1)
        else:
            log = np.log(np.arange(1, 8))[:, None]
            power = np.where(log > 0, np.maximum(log, 0.1) ** state["length_power"][n], 0)
            score = score * (1 + np.logaddexp(0, state["length_weight"][n]) * power)
        score = np.where(lag >= 0, score / np.exp(2 * state["log_bandwidth"][n]), -np.inf)
        weight = np.exp(score - score.max(axis=1, keepdims=True))
        answers.append(weight / weight.sum(axis=1, keepdims=True) @ value[:, n])
    wanted = np.stack(answers, axis=1).reshape(7, 8) @ state["out.kernel"] + state["out.bias"]
    np.testing.assert_allclose(found[0], wanted, rtol=2e-5, atol=2e-5)


def test_length_scales_at_the_first_key():
    """One key: the scale is 1 and its derivatives are finite, whatever the power."""
    position, weight = jnp.arange(3)[None], jnp.zeros(2)

    def total(power):
        return jnp.sum(length_scale(position, weight, power))

    power = jnp.array([-1.0, 0.0])
    found = length_scale(position, weight, power)[0, :, :, 0]
    np.testing.assert_allclose(found[:, 0], 1)
    np.testing.assert_allclose(found[1], [1, 1 + np.log(2), 1 + np.log(2)], rtol=1e-6)
    assert np.all(np.isfinite(jax.grad(total)(power)))


def test_what_is_learned_has_gradients():
    made = config(alibi_heads=1, length_scaled=True, learned_bandwidth=True)
    small, row = module(Transformer, made), tokens(2, 12)
    loss = quick_jit(jax.grad(lambda m, t: jnp.sum(m(t)[..., 0] ** 2)))
    attention = loss(small, row).blocks.attention
    assert np.all(attention.log_bandwidth[...] != 0)
    for learned in (attention.length_weight, attention.length_power):
        # The first head has a linear bias and no scale.
        assert np.all(learned[...][:, 0] == 0) and np.all(learned[...][:, 1] != 0)


def test_biases_and_scales_take_linear_memory():
    """Of a gradient through attention with NAPE and length scales, both at once."""
    made = config(alibi_heads=1, length_scaled=True, learned_bandwidth=True, implementation="xla")
    attention = module(SelfAttention, made)

    def temporary_bytes(length):
        gradient = jax.grad(lambda m, x: jnp.sum(m(x, places(length)) ** 2))
        shape = jax.ShapeDtypeStruct((1, length, 8), jnp.float32)
        compiled = jax.jit(gradient).lower(attention, shape).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = map(temporary_bytes, (2048, 8192))
    # Four times the length and some padding of buffers; a square would be 16 times.
    assert large <= 5 * small, f"{small} -> {large} bytes"


def test_dropout_needs_a_key_and_reaches_every_layer():
    made = config(max_length=12, num_layers=1)
    rates = ("attention_dropout", "hidden_dropout", "embedding_dropout")
    row, key = tokens(1, 12), jax.random.key(0)
    for rate in rates:
        others = {name: 0.0 for name in rates} | {rate: 0.5}
        small = module(Transformer, config(max_length=12, num_layers=1, **others))
        plain, dropped = logits(small, row), logits(small, row, None, key)
        assert np.any(plain != dropped), rate
        np.testing.assert_array_equal(dropped, logits(small, row, None, key))
    still = module(Transformer, config(max_length=12, num_layers=1, **dict.fromkeys(rates, 0.0)))
    np.testing.assert_array_equal(logits(still, row, None, key), logits(still, row))
    assert made.attention_dropout == 0.05


def test_initial_values_are_gpt_2s():
    made = TransformerConfig(200, 2, 4, 64, max_length=100)
    state = to_torch(quick_jit(lambda: Transformer(made, rngs=nnx.Rngs(0)))())
    for name, array in state.items():
        spread = 0.02 * (0.5 if name.endswith("c_proj.weight") else 1)
        if array.ndim == 2:
            assert abs(array.std() / spread - 1) < 5 / np.sqrt(2 * array.size), name
        else:
            np.testing.assert_array_equal(array, 1 if "ln_" in name and "weight" in name else 0)
    layers = [state[f"transformer.h.{i}.attn.c_attn.weight"] for i in range(2)]
    assert np.any(layers[0] != layers[1])
    assert sum(a.size for a in state.values()) == 200 * 64 + 100 * 64 + 2 * 49984 + 128


@pytest.mark.parametrize("name", MODELS)
def test_round_trips_are_exact(name):
    small = model(name)
    state = to_torch(small)
    assert sum(a.size for a in state.values()) == sum(x.size for x in jax.tree.leaves(small))
    rebuilt = to_torch(from_torch(small.config, state))
    assert state.keys() == rebuilt.keys()
    for key, array in state.items():
        np.testing.assert_array_equal(rebuilt[key], array)


def test_a_tied_head_is_no_parameter_of_its_own():
    small = model("learned")
    state = to_torch(small)
    twice = state | {"lm_head.weight": state["transformer.wte.weight"]}
    assert to_torch(from_torch(small.config, twice)).keys() == state.keys()
    with pytest.raises(ValueError, match=r"unknown=\['lm_head.bias'\]"):
        from_torch(small.config, state | {"lm_head.bias": np.zeros(VOCAB)})


@pytest.mark.parametrize("method", ["softmax", "biweight"])
@pytest.mark.nightly
def test_training_lowers_the_loss(method):
    """The second half of a copied word becomes easier than a guess among the symbols."""
    made = config(method, max_length=8, embed_dim=16, num_heads=2, learned_bandwidth=True)
    small = quick_jit(lambda: Transformer(made, rngs=nnx.Rngs(0)))()
    tx = optax.adam(1e-2)

    words = jax.random.randint(jax.random.key(1), (64, 4), 0, VOCAB)
    row = jnp.concatenate([words, words], axis=1)

    def loss_of(model):
        losses = optax.softmax_cross_entropy_with_integer_labels(model(row[:, :-1]), row[:, 1:])
        return jnp.mean(losses[:, 3:])

    @quick_jit
    def train(model):
        def step(carry, _):
            model, state = carry
            loss, gradient = jax.value_and_grad(loss_of)(model)
            updates, state = tx.update(gradient, state)
            return (optax.apply_updates(model, updates), state), loss

        return jax.lax.scan(step, (model, tx.init(model)), None, length=150)[1]

    losses = train(small)
    assert losses[0] > 0.95 * np.log(VOCAB)
    assert losses[-1] < 0.5 * np.log(VOCAB), losses[-1]


@pytest.mark.nightly
def test_recomputing_changes_nothing():
    row = tokens(1, 12)
    grads = [
        quick_jit(jax.grad(lambda m, t: jnp.sum(m(t) ** 2)))(
            module(Transformer, config(remat=remat)), row
        )
        for remat in (False, True)
    ]
    for one, other in zip(*map(jax.tree.leaves, grads), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_positions_beyond_the_table_are_no_positions():
    small = model("learned")
    with pytest.raises(ValueError, match="tokens: expected at most max_length=12 positions, got"):
        small(tokens(1, 13))
    with pytest.raises(ValueError, match="length: expected at most max_length=12 positions, got"):
        generate(small, tokens(1, 9), 5)
    row = tokens(1, 14)
    found = logits(small, row, jnp.zeros((1, 14), jnp.int32))
    assert np.all(np.isnan(found[:, 12:]))
    assert np.all(np.isfinite(logits(small, row, jnp.array([[0] * 5 + [1] * 9]))))
    with pytest.raises(ValueError, match="segment_ids: expected the tokens' shape"):
        small(tokens(1, 12), segment_ids=jnp.zeros((1, 11), jnp.int32))


BAD = [
    ({"max_length": 0}, "max_length: expected at least 1, got 0"),
    ({"hidden_dim": 0}, "hidden_dim: expected at least 1, got 0"),
    ({"alibi_heads": 3}, "alibi_heads: expected at most num_heads=2, got 3"),
    ({"embed_dim": 9}, "embed_dim: expected a multiple of heads=2, got 9"),
    ({"embedding_dropout": 1.0}, r"embedding_dropout: expected a rate in \[0, 1\), got 1.0"),
    ({"initial_bandwidth": 0.0}, "initial_bandwidth: expected > 0, got 0.0"),
    ({"method": "norm_relu"}, "cosine: expected True with Fixed"),
    ({"method": "norm_relu", "cosine": True, "alibi_heads": 1}, "alibi_heads: expected 0"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_configurations(options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_bfloat16_gives_wide_logits():
    small = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model("nape"))
    found = logits(small, tokens(1, 12))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, logits(model("nape"), tokens(1, 12)), atol=0.15)
