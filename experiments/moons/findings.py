"""When, and by which heads, a model predicts the held-out system.

Axes: W windows, T points, N heads, M moons.
"""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from experiments.moons.model import MoonsModel
from experiments.moons.orbits import HELD_OUT, MOONS, common_period, spacing


@jax.jit
def _measured(
    model: MoonsModel, x: Float[Array, "W T 6"]
) -> tuple[Float[Array, "W T N 6"], Float[Array, ""]]:
    return model.contributions(x), jnp.mean(model.support(x))


def findings(model: MoonsModel, windows: Float[Array, "W T+1 6"]) -> dict[str, Any]:
    """Measure a model on windows of the held-out system.

    `error` is the squared error per coordinate after each point, the mean over windows;
    `error_after_moons` its mean from where every moon has come round until all of them have come
    round together, and `error_after_all` from there on. `outputs[n][m]` is the share of head n in
    what all heads add to moon m, `keys[n][m]` the share of moon m in the matrix that makes head
    n's keys; of three heads the n-th is the one matched with moon n. `disentanglement` is the mean
    share of the matched heads; 1/3 if all heads predict all moons alike. `support` is the mean
    number of points with weight.
    """
    parts, support = _measured(model, windows[:, :-1])
    error = np.asarray(jnp.mean((jnp.sum(parts, axis=2) - windows[:, 1:]) ** 2, axis=(0, 2)))
    energy = np.asarray(jnp.sum(parts**2, axis=(0, 1))).reshape(parts.shape[2], MOONS, 2).sum(-1)
    weight = np.asarray(model.keys.matrix()) ** 2
    reading = weight.reshape(model.config.num_heads, -1, MOONS, 2).sum(axis=(1, 3))
    outputs = energy / energy.sum(axis=0, keepdims=True)
    keys = reading / reading.sum(axis=1, keepdims=True)
    entangled = len(outputs) != MOONS
    order = list(range(len(outputs))) if entangled else matched(outputs)
    facts = about(len(error))
    moons, everything = math.ceil(max(facts["periods"])), math.ceil(facts["common_period"])
    return {
        "error": error.tolist(),
        "error_after_moons": float(error[moons:everything].mean()),
        "error_after_all": float(error[everything:].mean()),
        "outputs": outputs[order].tolist(),
        "keys": keys[order].tolist(),
        "disentanglement": None if entangled else float(np.diag(outputs[order]).mean()),
        "support": float(support),
    }


def matched(shares: Float[np.ndarray, "N M"]) -> list[int]:
    """Return the head of each moon, one each, so that the sum of their shares is largest.

    >>> matched(np.array([[0.1, 0.7], [0.9, 0.3]]))
    [1, 0]
    """
    moons = np.arange(shares.shape[1])
    orders = itertools.permutations(range(len(shares)))
    return list(max(orders, key=lambda order: shares[list(order), moons].sum()))


def about(length: int) -> dict[str, Any]:
    """Tell the held-out system's periods, in points of a window of such a length."""
    step = spacing(length)
    return {
        "periods": [period / step for period in HELD_OUT],
        "common_period": common_period(HELD_OUT) / step,
    }
