"""Blocks with their own backward pass, beside the dense definition; what masks let them skip."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nightly import NIGHTLY

import kreg
from kreg import bands, fused
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


WHEN = {"packed, causal": pytest.mark.slow}


def names() -> list:
    return [pytest.param(n, marks=WHEN.get(n, NIGHTLY)) for n in MASKS]


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
    low, need = (np.broadcast_to(x[:, 0], (B, x.shape[-1])) for x in reach(given, plan))
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
        pytest.param(kreg.epanechnikov, marks=NIGHTLY),
        pytest.param(kreg.gaussian, marks=NIGHTLY),
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


def test_spans_hold_every_key_with_weight():
    """Exhaustively: all places of one or two keys with weight, wherever the block's keys begin."""
    keys, width = 700, 300
    found = jax.jit(jax.vmap(lambda p, first: bands.span(p, first, keys)))
    pairs = np.stack(np.triu_indices(width), axis=1)
    for first in (0, 1, 127, 128, 400):
        p = np.zeros((len(pairs), 1, 1, 2, width), np.float32)
        p[np.arange(len(pairs)), 0, 0, 0, pairs[:, 0]] = 1e-30
        p[np.arange(len(pairs)), 0, 0, 1, pairs[:, 1]] = 1
        low, need = np.asarray(found(p, np.full(len(pairs), first))).T
        assert np.all(low <= first + pairs.min(1)) and np.all(first + pairs.max(1) < low + need)
        assert np.all(low % 128 == 0) and np.all(low + need <= keys)
        assert np.all(need <= pairs.max(1) - pairs.min(1) + 256)
    assert np.all(np.asarray(found(0 * p[:1], np.array([5]))) == 0)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.nightly
def test_backward_passes_leave_out_keys_without_weight(causal):
    """Scores that favour near keys: one head's blocks need a quarter of the keys, one's all."""
    queries, keys = 600, 8200
    angles = jnp.outer(jnp.arange(keys) / keys, jnp.linspace(4, 120, 8))
    near = 3 * jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)[None, :, None]
    far = jax.random.normal(jax.random.key(0), (1, queries, 1, 16))
    key = jnp.concatenate([near, near], axis=2)
    inputs = jnp.concatenate([near[:, :queries], far], axis=2), key, key[..., :5]
    cotangent = jax.random.normal(jax.random.key(1), (1, queries, 2, 5))
    offset = {"is_causal": True, "causal_offset": keys - queries} if causal else {}

    def run(implementation):
        def call(*inputs):
            return kreg.attention(*inputs, scale=1.0, implementation=implementation, **offset)

        out, pull = jax.vjp(call, *inputs)
        return out, *pull(cotangent)

    got, want = (jax.jit(run, static_argnums=0)(i) for i in ("xla", "reference"))
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, atol=3e-5 * max(1, np.abs(y).max()))
    # What the choice rests on, worked out from the weights.
    given = canonical(*inputs, scale=1.0, **offset)
    plan = bands.narrow(given, blocks(given))
    where = np.tril(np.ones((queries, keys), bool), keys - queries) if causal else None
    weights = kreg.entmax15(jnp.einsum("btnh,bsnh->nts", *inputs[:2]), where=where)
    fits = [reached(w, plan[0].rows) <= plan[0].widths[-1] for w in np.asarray(weights)]
    assert fits == [True, False]


def reached(weights, rows):
    """The most keys, in whole tiles of 128, that a block of queries reaches over."""
    seen = [np.flatnonzero(w.any(0)) // 128 for w in np.split(weights, range(rows, 600, rows))]
    return max(128 * (x[-1] + 1 - x[0]) for x in seen)
