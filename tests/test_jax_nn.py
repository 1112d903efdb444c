"""With the Gaussian kernel kreg.attention is jax.nn.dot_product_attention, but for empty rows."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nightly import NIGHTLY

import kreg

B, T, S, N, H = 2, 17, 23, 4, 8
RNG = np.random.default_rng(0)
CHOICES = {
    "bias": [None, RNG.normal(size=(1, N, T, S)).astype("float32")],
    "mask": [None, RNG.random((B, 1, T, S)) < 0.6],
    "is_causal": [False, True],
    "lengths": [False, True],
    "local_window_size": [None, 3, (5, 2)],
    "heads": [N, 2],
}


def every_pair() -> list[tuple[int, ...]]:
    """Numbers of choices, chosen one by one until any two values have met."""

    def pairs(numbers):
        return set(itertools.combinations(enumerate(numbers), 2))

    everything = list(itertools.product(*(range(len(c)) for c in CHOICES.values())))
    left, found = set().union(*map(pairs, everything)), []
    while left:
        found.append(max(everything, key=lambda numbers: len(left & pairs(numbers))))
        left -= pairs(found[-1])
    return found


def arrays(heads: int):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(B, T, N, H), (B, S, heads, H), (B, S, heads, H), (B, T, N, H)]
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def named(numbers) -> dict:
    chosen = {name: c[i] for (name, c), i in zip(CHOICES.items(), numbers, strict=True)}
    options = {name: x for name, x in chosen.items() if x is not None}
    if options.pop("lengths"):
        options["query_seq_lengths"] = jnp.array([17, 9])
        options["key_value_seq_lengths"] = jnp.array([11, 23])
    return {name: jnp.asarray(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}


@functools.partial(jax.jit, static_argnums=0)
def values_and_gradients(attend, inputs, cotangent):
    """Of rows with keys: those without are 0 here and a mean there, and stay out."""
    out, pull, some = jax.vjp(attend, *inputs, has_aux=True)
    return (jnp.where(some, out, 0), pull(jnp.where(some, cotangent, 0))), some


@pytest.mark.parametrize(
    "numbers",
    [
        pytest.param(n, marks=[] if i % 4 == 1 else NIGHTLY if i else pytest.mark.core)
        for i, n in enumerate(every_pair())
    ],
    ids=str,
)
def test_gaussian_is_softmax_attention(numbers):
    options = named(numbers)
    *inputs, cotangent = arrays(options.pop("heads"))

    def ours(implementation, q, k, v):
        same = {"kernel": kreg.gaussian, "implementation": implementation, "return_stats": True}
        out, stats = kreg.attention(q, k, v, **same, **options)
        return out, (stats.support > 0)[..., None]

    first, some = values_and_gradients(functools.partial(ours, "reference"), inputs, cotangent)
    second, _ = values_and_gradients(functools.partial(ours, "xla"), inputs, cotangent)

    def theirs(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, **options), some

    want, _ = values_and_gradients(theirs, inputs, cotangent)
    for got in (first, second):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=3e-6), got, want)
