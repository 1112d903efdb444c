"""The leaky average against its recurrence, by chunks, by steps and by documents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nn_models import quick_jit

import kreg
from kreg.nn import LeakyAverage, leaky_average
from kreg.nn.compat import wkv
from kreg.nn.leaky import decayed_sum, magnitude

RATE = np.array([0.5, 0.01, 5.0])


def recurrence(z, rate, documents=None):
    """k_t = lambda k_{t-1} + (1 - lambda) z_t, one position after the other."""
    fading = np.exp(-rate)[:, None]
    k, states = 0 * z[:, 0], []
    for t in range(z.shape[1]):
        if documents is not None and t > 0:
            k = np.where((documents[:, t] == documents[:, t - 1])[:, None, None], k, 0)
        k = fading * k + (1 - fading) * z[:, t]
        states.append(k)
    return np.stack(states, axis=1)


def some_documents(batch, length):
    starts = np.random.default_rng(1).random((batch, length)) < 0.08
    return np.cumsum(starts, axis=1).astype(np.int32)


@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
@pytest.mark.parametrize("length", [1, 31, 32, 33, 150])
def test_equals_the_recurrence(length, packed):
    z = np.random.default_rng(0).normal(size=(2, length, 3, 2))
    documents = some_documents(2, length) if packed else None
    with jax.enable_x64(True):
        found = quick_jit(leaky_average)(z, RATE, documents)
    assert found.dtype == jnp.float64
    np.testing.assert_allclose(found, recurrence(z, RATE, documents), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
def test_gradients_equal_differences(packed):
    with jax.enable_x64(True):
        z, c, dz = np.random.default_rng(0).normal(size=(3, 2, 70, 3, 2))
        documents = some_documents(2, 70) if packed else None

        def objective(z, rate):
            return jnp.sum(jnp.asarray(c) * leaky_average(z, rate, documents))

        by_z, by_rate = quick_jit(jax.grad(objective, (0, 1)))(z, RATE)
        drate, step = np.array([0.3, 0.2, -0.7]), 1e-6
        ends = [
            np.sum(c * recurrence(z + s * dz, RATE + s * drate, documents)) for s in (step, -step)
        ]
        slope = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose(np.sum(by_z * dz) + np.sum(by_rate * drate), slope, rtol=1e-7)


@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
def test_second_derivatives_equal_differences(packed):
    """By the inputs and the rates, forward over reverse."""
    with jax.enable_x64(True):
        z, c, dz = np.random.default_rng(0).normal(size=(3, 1, 40, 3, 1))
        documents = some_documents(1, 40) if packed else None
        drate, step = np.array([0.3, 0.02, -0.7]), 1e-6

        def slopes(z, rate):
            return jax.grad(lambda *x: jnp.sum(c * decayed_sum(*x, documents)), (0, 1))(z, rate)

        found = quick_jit(lambda *x: jax.jvp(slopes, x, (dz, drate))[1])(z, RATE)
        ends = [quick_jit(slopes)(z + s * dz, RATE + s * drate) for s in (step, -step)]
        for bend, after, before in zip(found, *ends, strict=True):
            np.testing.assert_allclose(bend, (after - before) / (2 * step), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("options", [{}, {"normalised": True}, {"bare": True}], ids=str)
def test_steps_equal_the_whole(options):
    average = LeakyAverage(3, **options)
    z = jax.random.normal(jax.random.key(0), (2, 40, 3, 4))
    whole = quick_jit(lambda m, z: m(z))(average, z)

    @quick_jit
    def by_steps(average, z):
        step = jax.lax.scan(average.step, average.start(2, 4), jnp.moveaxis(z, 1, 0))
        return jnp.moveaxis(step[1], 0, 1)

    np.testing.assert_allclose(by_steps(average, z), whole, rtol=2e-5, atol=1e-6)


def test_a_document_gives_what_it_gives_alone():
    """Bits may differ, since the chunks lie elsewhere; values may not."""
    z = jax.random.normal(jax.random.key(0), (1, 90, 3, 4))
    documents = jnp.repeat(jnp.arange(3), jnp.array([50, 3, 37]), total_repeat_length=90)[None]
    packed = quick_jit(leaky_average)(z, jnp.asarray(RATE, jnp.float32), documents)
    for start, stop in ((0, 50), (50, 53), (53, 90)):
        alone = recurrence(np.asarray(z[:, start:stop], np.float64), RATE)
        np.testing.assert_allclose(packed[:, start:stop], alone, rtol=1e-5, atol=1e-6)


def test_needs_no_square_of_the_length():
    length = 4096
    jaxpr = jax.make_jaxpr(leaky_average)(jnp.ones((1, length, 1, 1)), jnp.ones(1))
    largest = max(v.aval.size for eqn in jaxpr.jaxpr.eqns for v in eqn.outvars)
    assert largest <= 64 * length


def test_low_precision_accumulates_in_float32():
    z = jax.random.uniform(jax.random.key(0), (1, 200, 3, 4), minval=0.5)
    rate = jnp.asarray(RATE, jnp.bfloat16)
    found = leaky_average(z.astype(jnp.bfloat16), rate)
    assert found.dtype == jnp.bfloat16
    exact = recurrence(np.asarray(z.astype(jnp.bfloat16), np.float64), np.asarray(rate, np.float64))
    np.testing.assert_allclose(found.astype(jnp.float32), exact, rtol=0.02)


def test_wkv_at_equal_decays_is_the_normalised_average():
    x = jax.random.normal(jax.random.key(0), (2, 9, 3, 4))
    average = LeakyAverage(3, normalised=True)
    rate = average.rate()
    np.testing.assert_allclose(wkv(x, rate, rate), average(x), rtol=1e-5, atol=1e-6)
    # With no bonus beyond the past's, position 1 averages its two inputs equally.
    np.testing.assert_allclose(wkv(x, rate, 0 * rate)[:, 1], (x[:, 0] + x[:, 1]) / 2, rtol=1e-5)


def test_rate_zero_sums_everything():
    ones = jnp.ones((1, 5, 1, 1))
    np.testing.assert_array_equal(decayed_sum(ones, jnp.zeros(1))[0, :, 0, 0], [1, 2, 3, 4, 5])
    assert jax.grad(magnitude)(0.0) == 0


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("normalised", [False, True])
def test_averages_go_on_from_device_to_device(packed, normalised):
    """Time over eight devices, documents of many parts and within one; values and gradients."""
    rng = np.random.default_rng(0)
    z = jnp.asarray(rng.normal(size=(2, 61, 3, 4)), jnp.float32)
    documents = jnp.asarray(np.sort(rng.integers(0, 4, (2, 61)))) if packed else None
    mesh = jax.make_mesh((8,), ("sequence",), axis_types=(jax.sharding.AxisType.Auto,))
    layout = kreg.sharding.Layout(sequence="sequence")

    def both(layout):
        average = LeakyAverage(3, normalised=normalised, layout=layout)
        graph, state = nnx.split(average)

        def loss(state, z):
            out = nnx.merge(graph, state)(z, documents)
            return jnp.sum(out**3), out

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(state, z)

    with jax.set_mesh(mesh):
        found = both(layout)
    want = both(None)
    # Gradients of the rates are sums of hundreds of terms of both signs.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=5e-5, rtol=5e-5), found, want)
