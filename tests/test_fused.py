"""Blocks with their own backward pass, beside the dense definition; what masks let them skip."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kreg
from kreg import fused
from kreg.bands import blocks, reach
from kreg.canonical import canonical

B, T, N, K, H = 2, 1100, 2, 1, 8
RNG = np.random.default_rng(0)
SEGMENTS = jnp.asarray(np.sort(RNG.integers(0, 9, (B, T))))
TILES = np.kron(RNG.random((B, N, 11, 11)) < 0.3, np.ones((100, 100))) > 0
MASKS = {
    "packed": kreg.Mask(segment_ids=SEGMENTS),
    "packed, causal": kreg.Mask(segment_ids=SEGMENTS, is_causal=True),
    "lengths": kreg.Mask(
        query_seq_lengths=jnp.array([1100, 40]), key_value_seq_lengths=jnp.array([300, 1100])
    ),
    "prefix": kreg.Mask(key_stop=jnp.arange(T) // 2),
    "tiles": kreg.Mask(TILES),
    "nothing": kreg.Mask(key_stop=0),
    "offset a batch": kreg.Mask(is_causal=True, causal_offset=jnp.array([-400, 200])),
}


def arrays():
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(B, T, N, H), (B, T, K, H), (B, T, K, 6), (B, T, N, 6)]
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


@functools.partial(jax.jit, static_argnames="implementation")
def attend(mask, implementation):
    *inputs, cotangent = arrays()

    def call(*inputs):
        return kreg.attention(*inputs, mask=mask, implementation=implementation)

    out, pull = jax.vjp(call, *inputs)
    return out, *pull(cotangent)


QUICK = ("packed, causal",)


def names() -> list:
    """All masks, of which most take their time in `make slow`."""
    return [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in MASKS]


@pytest.mark.parametrize("name", names())
def test_masks_that_are_known_when_running(name):
    """Far more keys than a block needs: each looks for its own."""
    assert blocks(problem(MASKS[name]))[0].widths
    got, want = (attend(MASKS[name], i) for i in ("xla", "reference"))
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5 * max(1, np.abs(y).max()))


def problem(mask):
    query, key, value, _ = arrays()
    found = canonical(query, key, value, mask=mask)
    assert fused.takes(found)
    return found


@pytest.mark.parametrize("name", MASKS)
def test_blocks_find_all_of_their_keys(name):
    given = problem(MASKS[name])
    plan = blocks(given)
    low, need = (np.broadcast_to(x, (B, np.shape(x)[1])) for x in reach(given, plan))
    where = np.broadcast_to(given.mask.dense(T, T), (B, N, T, T)).any(1)
    for b, i in np.ndindex(*low.shape):
        seen = where[b, i * plan[0].rows : (i + 1) * plan[0].rows].any(0)
        seen[low[b, i] : low[b, i] + need[b, i]] = False
        assert not seen.any(), (b, i)


def test_packed_documents_are_skipped_for_real():
    given = problem(kreg.Mask(segment_ids=jnp.arange(T) * 8 // T))
    plan = blocks(given)
    _, need = reach(given, plan)
    widths = np.asarray(plan[0].widths)
    met = widths[np.searchsorted(widths, np.asarray(need))]
    assert met.mean() <= 0.5 * T


@pytest.mark.parametrize(
    "kernel",
    [
        kreg.biweight,
        pytest.param(kreg.epanechnikov, marks=pytest.mark.slow),
        pytest.param(kreg.gaussian, marks=pytest.mark.slow),
    ],
)
def test_second_derivatives_and_forward_mode(kernel):
    """The fast path has a first backward pass only; everything else is the plain path's."""
    shape = (1, 9, 2, 3)
    q, k, v, t = jax.random.normal(jax.random.key(1), (4, *shape))

    def loss(implementation, q, k, v):
        options = {"kernel": kernel, "implementation": implementation, "is_causal": True}
        return jnp.sum(jnp.sin(kreg.attention(q, k, v, **options)))

    def products(implementation):
        f = functools.partial(loss, implementation)
        forward = jax.jvp(f, (q, k, v), (t, t, t))[1]
        mixed = jax.jvp(jax.grad(f, argnums=(0, 1, 2)), (q, k, v), (t, t, t))[1]
        reverse = jax.grad(lambda q: jnp.vdot(jax.grad(f)(q, k, v), t))(q)
        return forward, mixed, reverse

    got, want = (
        jax.jit(products, static_argnums=0)("xla"),
        jax.jit(products, static_argnums=0)("reference"),
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=3e-5, rtol=3e-5), got, want)


def test_one_compilation_for_all_values_of_h_and_of_masks():
    traced = []

    @jax.jit
    def run(h, lengths):
        traced.append(1)
        query, key, value, _ = arrays()
        rule = kreg.Adaptive(h)
        return kreg.attention(query, key, value, bandwidth=rule, key_value_seq_lengths=lengths)

    for h, length in ((0.5, 3), (1.0, 900)):
        run(jnp.full((1, N, 1, 1), h), jnp.full(B, length))
    assert len(traced) == 1
