"""A stock Flax transformer whose attention is switched by one argument, in nnx and in linen.

`python -m experiments.flax_transformer` trains a small causal language model to say a random word
twice: w1 ... w8 | w1 ... w8. It does so once with Flax's own softmax attention and once with each
of --methods, from the same initial parameters, and prints the loss on the second word before and
after (guessing costs ln 16 = 2.77). The models below are what a Flax user writes anyway; the line
`attention_fn=` is all that kreg adds. It takes half a minute on two CPU cores.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen, nnx
from jaxtyping import Array, Float, Int

import kreg.nn
from experiments.methods import KNOWN, method

SYMBOLS, WORD, WIDTH, HEADS, LAYERS = 16, 8, 32, 4, 2
LENGTH = 2 * WORD + 1

type Apply = Callable[[Any, Int[Array, "B T"]], Float[Array, "B T V"]]


class NnxTransformer(nnx.Module):
    """Pre-norm causal transformer in nnx; the mask is the layer's own `is_causal`."""

    def __init__(self, attention_fn: Callable, *, rngs: nnx.Rngs):
        norm = functools.partial(nnx.LayerNorm, WIDTH, rngs=rngs)
        self.embed = nnx.Embed(SYMBOLS + 1, WIDTH, rngs=rngs)
        self.place = nnx.Embed(LENGTH, WIDTH, rngs=rngs)
        self.norms = nnx.List([norm() for _ in range(2 * LAYERS + 1)])
        self.attention = nnx.List(
            nnx.MultiHeadAttention(HEADS, WIDTH, attention_fn=attention_fn, decode=False, rngs=rngs)
            for _ in range(LAYERS)
        )
        self.widen = nnx.List(nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs) for _ in range(LAYERS))
        self.narrow = nnx.List(nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs) for _ in range(LAYERS))

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        x = self.embed(tokens) + self.place(jnp.arange(tokens.shape[1])[None])
        for i in range(LAYERS):
            x = x + self.attention[i](self.norms[2 * i](x), is_causal=True)
            x = x + self.narrow[i](nnx.gelu(self.widen[i](self.norms[2 * i + 1](x))))
        return self.embed.attend(self.norms[-1](x))


class LinenTransformer(linen.Module):
    """The same in linen; the mask is linen's, an array of floats 0 and 1."""

    attention_fn: Callable

    @linen.compact
    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        embed = linen.Embed(SYMBOLS + 1, WIDTH)
        x = embed(tokens) + linen.Embed(LENGTH, WIDTH)(jnp.arange(tokens.shape[1])[None])
        mask = linen.make_causal_mask(tokens)
        for _ in range(LAYERS):
            # Any: by linen's own annotation the layer returns None.
            attend: Any = linen.MultiHeadDotProductAttention(HEADS, attention_fn=self.attention_fn)
            x = x + attend(linen.LayerNorm()(x), mask=mask)
            y = linen.gelu(linen.Dense(4 * WIDTH)(linen.LayerNorm()(x)))
            x = x + linen.Dense(WIDTH)(y)
        return embed.attend(linen.LayerNorm()(x))


def from_nnx(attention_fn: Callable) -> tuple[Apply, Any]:
    """Return the nnx model as a function of its parameters, and the parameters."""
    graph, params = nnx.split(NnxTransformer(attention_fn, rngs=nnx.Rngs(0)))
    return lambda params, tokens: nnx.merge(graph, params)(tokens), params


def from_linen(attention_fn: Callable) -> tuple[Apply, Any]:
    """Return the linen model as a function of its parameters, and the parameters."""
    model: Any = LinenTransformer(attention_fn)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, LENGTH), jnp.int32))
    return model.apply, params


LIBRARIES = {
    "nnx": (from_nnx, nnx.dot_product_attention),
    "linen": (from_linen, linen.dot_product_attention),
}


def words_twice(key: Array, batch: int = 64) -> Int[Array, "B T"]:
    """Draw words, each followed by a separator and by itself."""
    word = jax.random.randint(key, (batch, WORD), 0, SYMBOLS)
    return jnp.concatenate([word, jnp.full((batch, 1), SYMBOLS), word], axis=1)


def train(apply: Apply, params: Any, steps: int) -> tuple[float, float]:
    """Train with Adam; return the loss on the second words before and after."""
    tx = optax.adam(3e-3)

    def loss(params, tokens):
        logits = apply(params, tokens)[:, WORD:-1]
        labels = tokens[:, WORD + 1 :]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(params, state, key):
        gradients = jax.grad(loss)(params, words_twice(key))
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    evaluate = jax.jit(loss)
    fresh = words_twice(jax.random.key(1))
    before, state = float(evaluate(params, fresh)), tx.init(params)
    for key in jax.random.split(jax.random.key(0), steps):
        params, state = step(params, state, key)
    return before, float(evaluate(params, fresh))


def main() -> None:
    """Train every model and print a line for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    methods = ["softmax", "biweight"]
    parser.add_argument("--methods", nargs="+", default=methods, metavar="M", help=KNOWN)
    parser.add_argument(
        "--steps", type=int, default=200, help="of Adam, 64 words each (%(default)s)"
    )
    options = parser.parse_args()
    try:
        chosen = {name: method(name) for name in options.methods}
    except ValueError as error:
        parser.error(str(error))
    print(f"{'library':8} {'attention':20} {'before':>7} {'after':>7}")
    for library, (build, own) in LIBRARIES.items():
        attentions: dict[str, Callable] = {"Flax's own": own}
        for name, (kernel, bandwidth) in chosen.items():
            rule = bandwidth(1.0)
            # A fixed bandwidth is a distance between unit vectors, whose score is their cosine.
            cosine = isinstance(rule, kreg.Fixed)
            attentions[name] = kreg.nn.attention_fn(
                kernel, rule, cosine=cosine, scale=1.0 if cosine else None
            )
        for name, attention_fn in attentions.items():
            before, after = train(*build(attention_fn), options.steps)
            print(f"{library:8} {name:20} {before:7.3f} {after:7.3f}", flush=True)


if __name__ == "__main__":
    main()
