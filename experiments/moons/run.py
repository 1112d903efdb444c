"""Train a model, and measure on the held-out system when, and by which heads, it predicts."""

import functools
import itertools
import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Key, PyTree

from experiments.methods import folder_name, method
from experiments.moons.model import MoonsConfig, MoonsModel
from experiments.moons.orbits import HELD_OUT, MOONS, Windows, common_period, held_out, spacing
from kreg.training import Progress, TrainResult, adamw, batches, init_state, make_step, train

# Errors beyond this count no more in the loss, so that windows not yet understood do not rule it.
_CLIP = 0.5

type Heads = tuple[int, int]

MODELS: dict[str, Heads] = {"one head": (1, 2 * MOONS), "three heads": (MOONS, 2)}


@dataclass(frozen=True)
class Config:
    """What a command can be told."""

    preset: Literal["smoke", "small", "paper"] = "smoke"
    method: str = "softmax"
    seed: int = 0
    length: int = 200
    batch_size: int = 16
    steps: int = 300
    peak: float = 1e-2
    floor: float = 5e-6
    windows: int = 32

    @property
    def name(self) -> str:
        """The folder of a command's runs."""
        return f"{self.preset}-{folder_name(self.method)}-seed{self.seed}"


PRESETS = {
    "smoke": Config(),
    "small": Config("small", length=400, batch_size=32, steps=400),
    "paper": Config("paper", length=800, batch_size=64, steps=500),
}


def make_model(config: Config, heads: Heads) -> MoonsModel:
    """Build a model of so many heads of such a width."""
    chosen = method(config.method)
    described = MoonsConfig(*heads, kernel=chosen.kernel, bandwidth=chosen.bandwidth)
    return MoonsModel(described, rngs=nnx.Rngs(config.seed))


def clipped_error(
    predicted: Float[Array, "*B T I"], points: Float[Array, "*B T+1 I"]
) -> Float[Array, ""]:
    """Average min(|error|, 1/2)^2 over all coordinates of the points to come."""
    return jnp.mean(jnp.clip(predicted - points[..., 1:, :], -_CLIP, _CLIP) ** 2)


def run(
    config: Config, name: str, folder: Path, *, time_limit: float | None, progress: Progress
) -> tuple[MoonsModel, TrainResult]:
    """Train the model of a name until its steps are done or the time is up; going on where it was.

    Args:
        time_limit: seconds.

    Raises:
        ValueError: the folder holds a run with another configuration; nothing was changed.
    """
    model = make_model(config, MODELS[name])
    graph, state = nnx.split(model, nnx.Param)
    params = nnx.to_pure_dict(state)
    windows = jnp.asarray(held_out(config.length, config.windows, config.seed))

    def loss_of(
        params: PyTree[Array], batch: dict[str, Array], key: Key[Array, ""]
    ) -> tuple[Array, dict[str, Array]]:
        del key
        points = batch["points"]
        return clipped_error(nnx.merge(graph, params)(points[:, :-1]), points), {}

    measure = jax.jit(lambda params: loss_of(params, {"points": windows}, jax.random.key(0))[0])
    schedule = optax.linear_schedule(config.peak, config.floor, config.steps)
    tx = adamw(schedule)
    source = Windows(config.steps * config.batch_size, config.length, config.seed)
    with closing(batches(source, config.batch_size, seed=config.seed, shuffle=False)) as data:
        trained = train(
            folder,
            init_state(params, tx, jax.random.key(config.seed)),
            make_step(loss_of, tx),
            data,
            steps=config.steps,
            config={"model": name, **asdict(config)},
            evaluate=lambda params: {"val_loss": float(measure(params))},
            eval_every=max(1, config.steps // 10),
            log_every=max(1, config.steps // 50),
            time_limit=time_limit,
            progress=progress,
        )
    return nnx.merge(graph, trained.state.params), trained


def findings(config: Config, model: MoonsModel) -> dict[str, Any]:
    """Measure a model on windows of the held-out system.

    `error` is the squared error per coordinate after each point, the mean over windows;
    `error_after_moons` its mean from where every moon has come round until all of them have come
    round together, and `error_after_all` from there on. `outputs[n][m]` is the share of head n in
    what all heads add to moon m, `keys[n][m]` the share of moon m in the matrix that makes head
    n's keys. `disentanglement` is the mean share of the head that predicts a moon, each head but
    one moon; 1/3 if all heads predict all moons alike.
    """
    windows = jnp.asarray(held_out(config.length, config.windows, config.seed))
    parts = _jitted(MoonsModel.contributions)(model, windows[:, :-1])
    error = np.asarray(jnp.mean((jnp.sum(parts, axis=2) - windows[:, 1:]) ** 2, axis=(0, 2)))
    energy = np.asarray(jnp.sum(parts**2, axis=(0, 1))).reshape(parts.shape[2], MOONS, 2).sum(-1)
    weight = np.asarray(model.keys.matrix()) ** 2
    reading = weight.reshape(model.config.num_heads, -1, MOONS, 2).sum(axis=(1, 3))
    outputs = energy / energy.sum(axis=0, keepdims=True)
    facts = about(config)
    moons, everything = math.ceil(max(facts["periods"])), math.ceil(facts["common_period"])
    return {
        "val_loss": float(clipped_error(jnp.sum(parts, axis=2), windows)),
        "error": error.tolist(),
        "error_after_moons": float(error[moons:everything].mean()),
        "error_after_all": float(error[everything:].mean()),
        "outputs": outputs.tolist(),
        "keys": (reading / reading.sum(axis=1, keepdims=True)).tolist(),
        "disentanglement": matched(outputs) if len(outputs) == MOONS else None,
    }


def matched(shares: Float[np.ndarray, "N M"]) -> float:
    """Average the shares of heads that are matched with moons, one each, in the best way.

    >>> matched(np.array([[0.1, 0.7], [0.9, 0.3]]))
    0.8
    """
    moons = np.arange(shares.shape[1])
    orders = itertools.permutations(range(len(shares)))
    return float(max(shares[list(order), moons].mean() for order in orders))


def about(config: Config) -> dict[str, Any]:
    """What the figures have to say about the held-out system: periods, in points."""
    step = spacing(config.length)
    return {
        "config": asdict(config),
        "periods": [period / step for period in HELD_OUT],
        "common_period": common_period(HELD_OUT) / step,
    }


# One compilation for the models of one shape.
@functools.cache
def _jitted(function: Callable) -> Callable:
    return jax.jit(function)
