"""Dropout on weights: a mask that counts (key, b, n, i, j), one in every implementation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_inputs import Shape, draw

import kreg

IMPLEMENTATIONS = ("reference", "xla")
SHAPE = Shape(B=2, T=40, S=33, N=4, K=2, H=4, V=33)
RATE = 0.3


def weights(implementation, rate=RATE, seed=0, shape=SHAPE, key_heads=None):
    """Read the (dropped) weights [B, T, N, S]: the values are the identity."""
    query, key, *_ = (jnp.asarray(a, "float32") for a in draw(SHAPE, spherical=False))
    query, key = query[:, : shape.T], key[:, : shape.S]
    identity = jnp.broadcast_to(jnp.eye(shape.S)[:, None, :], (shape.B, shape.S, shape.K, shape.S))
    return np.asarray(attend(query, key, identity, jax.random.key(seed), rate, implementation))


@functools.partial(jax.jit, static_argnames=("rate", "implementation"))
def attend(query, key, value, dropout_key, rate, implementation):
    options = {"dropout_rate": rate, "dropout_key": dropout_key, "kernel": kreg.gaussian}
    return kreg.attention(query, key, value, implementation=implementation, **options)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_weights_are_dropped_or_scaled(implementation):
    whole, dropped = weights(implementation, 0.0), weights(implementation)
    kept = dropped != 0
    np.testing.assert_allclose(dropped[kept], whole[kept] / (1 - RATE), rtol=1e-5)
    count = kept.size
    assert abs(kept.mean() - (1 - RATE)) < 5 * (RATE * (1 - RATE) / count) ** 0.5
    for axis in range(4):  # no batch, query, head or key is favoured, none repeats its neighbour
        others = tuple(a for a in range(4) if a != axis)
        spread = 6 * (RATE * (1 - RATE) * kept.shape[axis] / count) ** 0.5
        assert np.all(np.abs(kept.mean(others) - (1 - RATE)) < spread)
        first, second = np.moveaxis(kept, axis, 0)[:2]
        assert 0.2 < (first != second).mean() < 0.7


def test_the_same_mask_in_every_implementation():
    np.testing.assert_allclose(weights("reference"), weights("xla"), atol=2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_key_decides(implementation):
    np.testing.assert_array_equal(weights(implementation), weights(implementation))
    changed = (weights(implementation) != 0) != (weights(implementation, seed=1) != 0)
    assert abs(changed.mean() - 2 * RATE * (1 - RATE)) < 0.03


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_mask_depends_on_positions_not_on_lengths(implementation):
    whole = weights(implementation) != 0
    fewer = weights(implementation, shape=Shape(B=2, T=17, S=21, N=4, K=2, H=4, V=21)) != 0
    np.testing.assert_array_equal(fewer, whole[:, :17, :, :21])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_mean_is_preserved(implementation):
    query, key, value, _ = (jnp.asarray(a, "float32") for a in draw(SHAPE))

    @jax.jit
    def attend(dropout_key):
        options = {"dropout_rate": RATE, "dropout_key": dropout_key}
        return kreg.attention(query, key, value, implementation=implementation, **options)

    samples = np.stack([attend(k) for k in jax.random.split(jax.random.key(2), 100)])
    expected = jax.jit(functools.partial(kreg.attention, implementation=implementation))(
        query, key, value
    )
    error = np.abs(samples.mean(0) - expected) / (samples.std(0) / 100**0.5 + 1e-6)
    assert error.max() < 6  # standard errors, over 10,560 entries


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_go_through_the_same_mask(implementation):
    *arrays, cotangent = (jnp.asarray(a, "float32") for a in draw(SHAPE))
    tangent = [jax.random.normal(jax.random.key(i), a.shape) for i, a in enumerate(arrays)]

    @jax.jit
    def both(arrays, tangent, cotangent):
        def dropped(*a):
            return attend(*a, jax.random.key(0), RATE, implementation)

        out, pull = jax.vjp(dropped, *arrays)
        return out, pull(cotangent), jax.jvp(dropped, arrays, tangent)[1]

    out, gradients, push = both(tuple(arrays), tuple(tangent), cotangent)
    paired = sum(jnp.vdot(g, t) for g, t in zip(gradients, tangent, strict=True))
    np.testing.assert_allclose(jnp.vdot(cotangent, push), paired, rtol=1e-3)
    # The value's gradient is linear: the weights themselves, dropped as in the forward pass.
    linear = jnp.vdot(gradients[2], arrays[2])
    np.testing.assert_allclose(linear, jnp.vdot(cotangent, out), rtol=1e-3)


def test_rate_zero_needs_no_key_and_changes_nothing():
    query, key, value, _ = (jnp.asarray(a, "float32") for a in draw(SHAPE))
    np.testing.assert_array_equal(
        kreg.attention(query, key, value, dropout_rate=0.0), kreg.attention(query, key, value)
    )
