"""Continue token sequences, one step of an incremental cache at a time."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from kreg.nn.mosaic import MemoryMosaic
from kreg.nn.transformer import Transformer


def generate(
    model: MemoryMosaic | Transformer,
    prompt: Int[Array, "B T"],
    max_new_tokens: int,
    *,
    key: Array | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    stop_token: int | None = None,
) -> Int[Array, "B T+new"]:
    r"""Continue a prompt by `max_new_tokens` tokens, with the logits that the full pass gives.

    Draws from softmax(logits / temperature); without a key, takes the largest logit (the smallest
    token among equals). One compiled scan over positions reads the prompt and writes on.

    Args:
      model: a Memory Mosaic or a Transformer.
      prompt: tokens, at least one per sequence.
      max_new_tokens: how many to append.
      key: source of the draws; None is greedy.
      temperature: > 0.
      top_k: draw from the k largest logits only (more in case of ties).
      stop_token: a sequence that produced it repeats it to the end.

    Raises:
      ValueError: an empty prompt, a negative count, a temperature or top_k out of range, or more
        positions than a Transformer has learned.
      NotImplementedError: the dense file's norm_relu, whose answers depend on future tokens.

    Examples:
      >>> import kreg.nn
      >>> from flax import nnx
      >>> config = kreg.nn.MosaicConfig(7, num_layers=1, num_heads=2, embed_dim=8, memory_size=3)
      >>> model = kreg.nn.MemoryMosaic(config, rngs=nnx.Rngs(0))
      >>> generate(model, jnp.array([[1, 2]]), 3).shape
      (1, 5)
    """
    vocab_size = model.config.vocab_size
    if prompt.ndim != 2 or prompt.shape[1] < 1:
        raise ValueError(f"prompt: expected [B, T] with T >= 1, got {prompt.shape}")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens: expected at least 0, got {max_new_tokens}")
    if not temperature > 0:
        raise ValueError(f"temperature: expected > 0 (greedy is key=None), got {temperature}")
    if top_k is not None and not 1 <= top_k <= vocab_size:
        raise ValueError(f"top_k: expected 1 to vocab_size={vocab_size}, got {top_k}")
    if max_new_tokens == 0:
        return prompt
    options = {"new": max_new_tokens, "top_k": top_k, "stop_token": stop_token}
    return _continue(model, prompt, key, temperature, **options)


@functools.partial(jax.jit, static_argnames=("new", "top_k", "stop_token"))
def _continue(model, prompt, key, temperature, *, new, top_k, stop_token):
    """Read and write positions 0 .. T + new - 2; position t decides token t + 1."""
    batch, given = prompt.shape
    length = given + new
    tokens = jnp.pad(prompt, ((0, 0), (0, new)))

    def advance(carry, position):
        cache, tokens, stopped = carry
        cache, logits = model.step(cache, tokens[:, position], position)
        drawn = _draw(logits, key, position, temperature, top_k).astype(tokens.dtype)
        if stop_token is not None:
            drawn = jnp.where(stopped, stop_token, drawn)
            stopped = stopped | ((drawn == stop_token) & (position + 1 >= given))
        token = jnp.where(position + 1 < given, tokens[:, position + 1], drawn)
        return (cache, tokens.at[:, position + 1].set(token), stopped), None

    start = (model.start(batch, length - 1), tokens, jnp.zeros(batch, bool))
    (_, tokens, _), _ = jax.lax.scan(advance, start, jnp.arange(length - 1))
    return tokens


def _draw(logits, key, position, temperature, top_k):
    if key is None:
        return jnp.argmax(logits, axis=-1)
    if top_k is not None:
        least = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return jax.random.categorical(jax.random.fold_in(key, position), logits / temperature, axis=-1)
