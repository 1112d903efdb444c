"""Bad arguments: one ValueError that names the argument, what was wanted and what was given."""

import re

import jax
import jax.numpy as jnp
import pytest

import kreg

pytestmark = pytest.mark.core

X = jnp.arange(6.0).reshape(2, 3)
Q, K, V = jnp.ones((2, 5, 4, 8)), jnp.ones((2, 7, 2, 8)), jnp.ones((2, 7, 2, 3))
EPANECHNIKOV = {"kernel": kreg.epanechnikov}


def ones(*shape):
    return jnp.ones(shape)


# (the argument that the message must name, what was given, the call)
MAPS = [
    ("alpha", "0.9", lambda: kreg.entmax(X, 0.9)),
    ("alpha", "0.5", lambda: kreg.entmax(X, jnp.array(0.5))),
    ("alpha", "(3,)", lambda: kreg.entmax(X, jnp.full(3, 1.5))),
    ("alpha", "(2, 3)", lambda: kreg.entmax(X, jnp.full((2, 3), 1.5))),
    ("k", "0", lambda: kreg.topk_softmax(X, 0)),
    ("k", "-1", lambda: kreg.topk_uniform(X, -1)),
    ("axis", "2", lambda: kreg.sparsemax(X, axis=2)),
    ("where", "(2, 4)", lambda: kreg.sparsemax(X, where=ones(2, 4) > 0)),
    ("where", "float32", lambda: kreg.softmax(X, where=ones(2, 3))),
]
ATTENTION = [
    ("query", "(5, 8)", lambda: kreg.attention(ones(5, 8), K, V)),
    ("key", "(2, 7, 2, 9)", lambda: kreg.attention(Q, ones(2, 7, 2, 9), V)),
    ("key", "(3, 7, 2, 8)", lambda: kreg.attention(Q, ones(3, 7, 2, 8), V)),
    ("key", "3", lambda: kreg.attention(Q, ones(2, 7, 3, 8), ones(2, 7, 3, 3))),
    ("value", "(2, 6, 2, 3)", lambda: kreg.attention(Q, K, ones(2, 6, 2, 3))),
    ("value", "(2, 7, 4, 3)", lambda: kreg.attention(Q, K, ones(2, 7, 4, 3))),
    ("bias", "(2, 4, 5, 6)", lambda: kreg.attention(Q, K, V, ones(2, 4, 5, 6))),
    ("bias", "(2, 3, 5, 7)", lambda: kreg.attention(Q, K, V, ones(2, 3, 5, 7))),
    ("mask", "(2, 4, 6, 7)", lambda: kreg.attention(Q, K, V, None, ones(2, 4, 6, 7) > 0)),
    ("mask", "float32", lambda: kreg.attention(Q, K, V, None, ones(2, 4, 5, 7))),
    ("mask", "int32", lambda: kreg.attention(Q, K, V, None, jnp.ones((5, 7), jnp.int32))),
    ("h", "0", lambda: kreg.attention(Q, K, V, bandwidth=kreg.Adaptive(0.0))),
    ("h", "-1", lambda: kreg.attention(Q, K, V, bandwidth=kreg.Anchored(-1.0))),
    ("h", "-0.5", lambda: kreg.attention(Q, K, V, bandwidth=kreg.Fixed(-0.5), scale=1.0)),
    ("h", "0", lambda: kreg.attention(Q, K, V, bandwidth=kreg.Adaptive(jnp.zeros((1, 4, 1, 1))))),
    (
        "bandwidth",
        "(1, 3, 1, 1)",
        lambda: kreg.attention(Q, K, V, bandwidth=kreg.Adaptive(ones(1, 3, 1, 1))),
    ),
    ("k", "0", lambda: kreg.attention(Q, K, V, bandwidth=kreg.Nearest(0))),
    ("k", "2.5", lambda: kreg.attention(Q, K, V, bandwidth=kreg.Nearest(2.5))),
    ("kernel", "-1", lambda: kreg.attention(Q, K, V, kernel=kreg.rectified_polynomial(-1.0))),
    ("bandwidth", "Adaptive", lambda: kreg.attention(Q, K, V, kernel=kreg.box)),
    (
        "bandwidth",
        "Anchored",
        lambda: kreg.attention(Q, K, V, kernel=kreg.box, bandwidth=kreg.Anchored()),
    ),
    ("scale", "None", lambda: kreg.attention(Q, K, V, bandwidth=kreg.Fixed(1.0))),
    ("causal_offset", "-1", lambda: kreg.attention(Q, K, V, causal_offset=-1)),
    (
        "causal_offset",
        "(3,)",
        lambda: kreg.attention(Q, K, V, is_causal=True, causal_offset=jnp.zeros(3, jnp.int32)),
    ),
    (
        "query_seq_lengths",
        "(3,)",
        lambda: kreg.attention(Q, K, V, query_seq_lengths=jnp.ones(3, int)),
    ),
    (
        "key_value_seq_lengths",
        "float32",
        lambda: kreg.attention(Q, K, V, key_value_seq_lengths=ones(2)),
    ),
    ("dropout_rate", "1.5", lambda: kreg.attention(Q, K, V, dropout_rate=1.5)),
    ("dropout_rate", "-0.1", lambda: kreg.attention(Q, K, V, dropout_rate=-0.1)),
    ("dropout_key", "None", lambda: kreg.attention(Q, K, V, dropout_rate=0.1)),
    ("implementation", "cudnn", lambda: kreg.attention(Q, K, V, implementation="cudnn")),
]
REGRESSION = [
    (
        "keys",
        "(7, 4)",
        lambda: kreg.nadaraya_watson(ones(5, 3), ones(7, 4), ones(7, 2), **EPANECHNIKOV),
    ),
    (
        "values",
        "(6, 2)",
        lambda: kreg.nadaraya_watson(ones(5, 3), ones(7, 3), ones(6, 2), **EPANECHNIKOV),
    ),
    (
        "mask",
        "(5, 6)",
        lambda: kreg.nadaraya_watson(
            ones(5, 3), ones(7, 3), ones(7, 2), mask=ones(5, 6) > 0, **EPANECHNIKOV
        ),
    ),
    (
        "mask",
        "float32",
        lambda: kreg.nadaraya_watson(
            ones(5, 3), ones(7, 3), ones(7, 2), mask=ones(5, 7), **EPANECHNIKOV
        ),
    ),
    (
        "h",
        "0",
        lambda: kreg.nadaraya_watson(
            ones(5, 3), ones(7, 3), ones(7, 2), bandwidth=kreg.Fixed(0.0), **EPANECHNIKOV
        ),
    ),
    (
        "bandwidth",
        "Adaptive",
        lambda: kreg.nadaraya_watson(ones(5, 3), ones(7, 3), ones(7, 2), kernel=kreg.box),
    ),
]


@pytest.mark.parametrize(
    ("argument", "given", "call"),
    MAPS + ATTENTION + REGRESSION,
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_one_clear_error(argument, given, call):
    with pytest.raises(ValueError) as raised:
        call()
    message = str(raised.value)
    assert re.search(rf"\b{argument}\b", message), f"does not name the argument: {message}"
    assert given in message, f"does not say what was given: {message}"


def test_traced_values_raise_nothing():
    """Values that are not known yet cannot be judged: h <= 0 under jit is not an error."""

    @jax.jit
    def attend(h):
        return kreg.attention(Q, K, V, bandwidth=kreg.Adaptive(h))

    assert attend(1.0).shape == (2, 5, 4, 3)
    attend(-1.0)


def test_zero_offset_without_causality_is_fine():
    kreg.attention(Q, K, V, causal_offset=0)
