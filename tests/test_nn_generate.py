"""Generation: the cache's logits equal the full pass, and what is drawn from them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nn_models import METHODS, config, logits, model, module, quick_jit, tokens
from test_nn_mosaic import VARIANTS

from kreg.nn import generate
from kreg.nn.mosaic import Block

CASES = [(m, {}) for m in METHODS] + [("biweight", VARIANTS[v]) for v in VARIANTS]
CASES += [("relumax", {"compat": "dense"}), ("top3_softmax", {"compat": "eft"})]
CASES += [("softmax", {"compat": "nano"})]
CASES += [(m, {"compat": "eft"}) for m in ("norm_relu", "relumax", "top3_uniform")]
NAMES = [f"{m}-{'-'.join(map(str, o.values()))}" for m, o in CASES]


@quick_jit
def both_ways(block, x):
    """A block's answer to whole sequences, and one position at a time."""

    def step(cache, inputs):
        return block.step(cache, *inputs)

    length = x.shape[1]
    start = block.start(x.shape[0], length + 2, x.dtype)
    _, steps = jax.lax.scan(step, start, (jnp.moveaxis(x, 1, 0), jnp.arange(length)))
    return block(x), jnp.moveaxis(steps, 0, 1)


QUICK = ("biweight-", "relumax-dense", "top3_softmax-eft", "norm_relu-eft")
NIGHTLY = ("softmax-", "epanechnikov-", "norm_relu-", "relumax-", "top3_softmax-", "relumax-eft")
NIGHTLY += ("triweight@fixed-", "top3_uniform-", "biweight-True-1", "top3_uniform-eft")
NIGHTLY += ("biweight-0", "biweight-2-2-True", "biweight-False-2-False")
NIGHTLY += ("softmax-nano", "biweight@nearest-")


def cases() -> list:
    """All blocks, of which most take their time in `make slow` and `make nightly`."""
    when = dict.fromkeys(QUICK, ()) | dict.fromkeys(NIGHTLY, pytest.mark.nightly)
    return [
        pytest.param(*case, id=name, marks=when.get(name, pytest.mark.slow))
        for case, name in zip(CASES, NAMES, strict=True)
    ]


@pytest.mark.parametrize(("method", "options"), cases())
def test_steps_equal_the_whole(method, options):
    block = module(Block, config(method, **options))
    x = jax.random.normal(jax.random.key(0), (2, 9, 8))
    whole, steps = both_ways(block, x)
    np.testing.assert_allclose(steps, whole, rtol=2e-5, atol=2e-5)


def test_step_logits_equal_the_full_pass():
    small, row = model(config()), tokens(2, 9)

    @quick_jit
    def by_steps(model, row):
        def step(cache, inputs):
            return model.step(cache, *inputs)

        start = model.start(2, 9)
        return jax.lax.scan(step, start, (row.T, jnp.arange(9)))[1]

    found = jnp.moveaxis(by_steps(small, row), 0, 1)
    np.testing.assert_allclose(found, logits(small, row), rtol=1e-5, atol=1e-5)


def test_greedy_takes_the_largest_logit():
    small, prompt = model(config()), tokens(2, 4)
    found = generate(small, prompt, 5)
    np.testing.assert_array_equal(found[:, :4], prompt)
    predicted = jnp.argmax(logits(small, found), axis=-1)
    np.testing.assert_array_equal(found[:, 4:], predicted[:, 3:-1])
    top = generate(small, prompt, 5, key=jax.random.key(0), top_k=1)
    np.testing.assert_array_equal(found, top)


def test_draws_follow_the_distribution():
    small, prompt = model(config()), tokens(1, 4)
    many = jnp.repeat(prompt, 4000, axis=0)
    drawn = generate(small, many, 1, key=jax.random.key(0), temperature=0.5, top_k=3)[:, -1]
    last = logits(small, prompt)[0, -1]
    kept = jnp.where(last >= jnp.sort(last)[-3], last, -jnp.inf)
    wanted = np.asarray(jax.nn.softmax(kept / 0.5))
    frequency = np.bincount(drawn, minlength=wanted.size) / 4000
    assert np.all(abs(frequency - wanted) <= 5 * np.sqrt(wanted * (1 - wanted) / 4000))


def test_a_stopped_sequence_repeats_the_stop():
    small, prompt = model(config()), tokens(2, 4)
    free = generate(small, prompt, 5)
    stop = int(free[0, 5])
    stopped = np.asarray(generate(small, prompt, 5, stop_token=stop))
    for row, plain in zip(stopped, np.asarray(free), strict=True):
        hits = np.flatnonzero(plain[4:] == stop)
        end = 4 + hits[0] if hits.size else len(plain)
        np.testing.assert_array_equal(row[:end], plain[:end])
        assert np.all(row[end:] == stop)
    # A stop token in the prompt stops nothing.
    asked = generate(small, prompt, 5, stop_token=int(prompt[0, 1]))
    np.testing.assert_array_equal(asked[:, :4], prompt)
    assert np.any(asked[0, 4:] != prompt[0, 1])


def test_nothing_new_is_the_prompt():
    np.testing.assert_array_equal(generate(model(config()), tokens(2, 4), 0), tokens(2, 4))


BAD = [
    ({"prompt": jnp.zeros((2, 0), jnp.int32)}, "prompt: expected"),
    ({"prompt": jnp.zeros(2, jnp.int32)}, "prompt: expected"),
    ({"max_new_tokens": -1}, "max_new_tokens: expected at least 0, got -1"),
    ({"temperature": 0.0}, "temperature: expected > 0"),
    ({"top_k": 0}, "top_k: expected 1 to vocab_size=11, got 0"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[next(iter(o)) for o, _ in BAD])
def test_bad_calls(options, message):
    good = {"prompt": tokens(2, 4), "max_new_tokens": 3}
    with pytest.raises(ValueError, match=message):
        generate(model(config()), **(good | options))


def test_the_dense_norm_relu_has_no_steps():
    small = model(config("norm_relu", compat="dense"))
    with pytest.raises(NotImplementedError, match="answers from future tokens"):
        generate(small, tokens(1, 4), 2)


def test_generation_runs_in_tree_mode():
    small, prompt = model(config()), tokens(2, 4)
    with nnx.set_graph_mode(False), nnx.set_graph_updates(False):
        assert generate(small, prompt, 5).shape == (2, 9)
