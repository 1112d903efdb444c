"""Learning rates of the three experiments, as functions of the number of updates done."""

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float


def warmup_cosine(
    peak: float | Array, *, warmup_steps: int, decay_steps: int, floor: float
) -> optax.Schedule:
    """Rise as peak t / warmup from 0, then fall along a cosine to the floor at decay_steps.

    Step 0 has rate 0: the optimizer's moments move, the parameters do not. The floor holds after
    decay_steps. Used by language modelling and length generalisation.

    Examples:
        >>> rate = warmup_cosine(1e-3, warmup_steps=10, decay_steps=100, floor=1e-5)
        >>> [round(float(rate(t)), 6) for t in (0, 5, 10, 100, 1000)]
        [0.0, 0.0005, 0.001, 1e-05, 1e-05]
    """
    if not 0 <= warmup_steps < decay_steps:
        raise ValueError(
            "warmup_steps: expected 0 <= warmup_steps < decay_steps, "
            f"got {warmup_steps=}, {decay_steps=}"
        )

    def rate(count: ArrayLike) -> Float[Array, ""]:
        count = _real(count)
        fraction = jnp.clip((count - warmup_steps) / (decay_steps - warmup_steps), 0.0, 1.0)
        cosine = floor + 0.5 * (1.0 + jnp.cos(jnp.pi * fraction)) * (peak - floor)
        return jnp.where(count < warmup_steps, peak * count / max(warmup_steps, 1), cosine)

    return rate


def regbench(peak: float | Array, *, total_steps: int) -> optax.Schedule:
    """Rise from 1e-6 over the first tenth, then follow the cosine of the whole run to peak / 10.

    The cosine counts from step 0 and not from the end of the warm-up, so the rate falls to
    0.978 peak at once where the warm-up ends; this is what the benchmark's code does.

    Examples:
        >>> rate = regbench(5e-4, total_steps=1000)
        >>> [round(float(rate(t)), 9) for t in (0, 50, 100, 1000, 2000)]
        [1e-06, 0.0002505, 0.000488988, 5e-05, 5e-05]
    """
    if total_steps < 1:
        raise ValueError(f"total_steps: expected at least 1, got {total_steps}")
    start, warmup_steps = 1e-6, total_steps / 10

    def rate(count: ArrayLike) -> Float[Array, ""]:
        count = _real(count)
        fraction = jnp.minimum(count / total_steps, 1.0)
        cosine = 0.1 * peak + 0.45 * peak * (1.0 + jnp.cos(jnp.pi * fraction))
        warm = start + count * (peak - start) / warmup_steps
        return jnp.where(count < warmup_steps, warm, cosine)

    return rate


def language_modelling(peak: float | Array = 5e-3) -> optax.Schedule:
    """Give the rate of the language models: 2,000 steps up, 1e-4 from step 80,000 on."""
    return warmup_cosine(peak, warmup_steps=2_000, decay_steps=80_000, floor=1e-4)


def length_generalisation(peak: float | Array = 1e-3) -> optax.Schedule:
    """Give the rate of the length tasks: 40,000 steps up, 5e-5 from step 156,250 on."""
    return warmup_cosine(peak, warmup_steps=40_000, decay_steps=156_250, floor=5e-5)


def _real(count: ArrayLike) -> Float[Array, ""]:
    """The count in the default floating-point type: an int32 would give float32 under x64, too."""
    return jnp.asarray(count, jnp.result_type(float))
