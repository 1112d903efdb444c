"""One rule for derivatives: a plain function, a fast one and its backward pass, joined."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from kreg.derivatives import differentiable

calls: list[str] = []


def plain(x, factor):
    return jnp.sin(x["a"]) @ x["b"] * factor


def forward(x, factor):
    s = jnp.sin(x["a"])
    return s @ x["b"] * factor, (jnp.cos(x["a"]), s)


def backward(x, factor, kept, dy):
    calls.append("backward")
    cosine, sine = kept
    dy = dy * factor
    return {"a": dy @ x["b"].T * cosine, "b": sine.T @ dy}


joined = differentiable(plain, forward, backward)


def fast(a, b):
    return joined({"a": a, "b": b}, jnp.int32(3))[0]


def slow(a, b):
    return plain({"a": a, "b": b}, 3)


def gradient(f):
    return jax.grad(lambda a, b: jnp.sum(f(a, b) ** 2), argnums=(0, 1))


def mapped(f):
    return jax.vmap(f, in_axes=(2, None), out_axes=1)


def scanned(f):
    def total(a, b):
        def step(carry, x):
            return carry + jnp.sum(f(a * x, b)), None

        return jax.lax.scan(jax.checkpoint(step), 0.0, jnp.arange(3.0))[0]

    return jax.grad(total, argnums=(0, 1))


def sharded(f):
    axes = (jax.sharding.AxisType.Auto,)
    mesh, spec = jax.make_mesh((1,), ("x",), axis_types=axes), jax.sharding.PartitionSpec
    over = jax.shard_map(f, mesh=mesh, in_specs=(spec("x"), spec()), out_specs=spec("x"))
    return gradient(over)


TRANSFORMS = {
    "gradient": gradient,
    "jitted gradient": lambda f: jax.jit(gradient(f)),
    "forward": lambda f: lambda a, b: jax.jvp(f, (a, b), (b.T, a.T)),
    # Jitted, since one program is compiled sooner than each of its operations.
    "gradient of gradient": lambda f: jax.jit(jax.jacrev(gradient(f))),
    "forward over reverse": lambda f: jax.jit(jax.hessian(lambda a, b: jnp.sum(f(a, b) ** 3))),
    "reverse over forward": lambda f: jax.jit(jax.jacrev(jax.jacfwd(f))),
    "scan of remat": lambda f: jax.jit(scanned(f)),
    "shard_map": lambda f: jax.jit(sharded(f)),
}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def inputs():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(2, 3))), jnp.asarray(rng.normal(size=(3, 2)))


@pytest.mark.core
@pytest.mark.parametrize("name", TRANSFORMS)
def test_derivatives_are_the_plain_ones(name):
    a, b = inputs()
    calls.clear()
    got, want = (TRANSFORMS[name](f)(a, b) for f in (fast, slow))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), got, want)
    assert bool(calls) == (name not in ("forward", "reverse over forward"))


@pytest.mark.core
@pytest.mark.parametrize("name", ["gradient", "forward over reverse"])
def test_vmap(name):
    a, b = inputs()
    many = jnp.stack([a, 2 * a, 3 * a], axis=2)
    got, want = (
        jax.jit(jax.vmap(TRANSFORMS[name](f), in_axes=(2, None)))(many, b) for f in (fast, slow)
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), got, want)


@pytest.mark.core
def test_gradient_of_vmap():
    a, b = inputs()
    many = jnp.stack([a, 2 * a, 3 * a], axis=2)
    got, want = (jax.jit(gradient(mapped(f)))(many, b) for f in (fast, slow))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), got, want)


def test_check_grads():
    check_grads(jax.jit(fast), inputs(), order=2, modes=("fwd", "rev"))
