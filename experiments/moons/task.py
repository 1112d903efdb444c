"""Both models of a method as one run: AdamW knows numbers one by one, so neither sees the other."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Key, PyTree

from experiments.methods import method
from experiments.moons import orbits
from experiments.moons.config import Config
from experiments.moons.findings import about, findings
from experiments.moons.model import MoonsConfig, MoonsModel
from experiments.runs.task import Program, Task
from kreg.training import adamw, batches
from kreg.training.data import BatchIterator

# Errors beyond this count no more in the loss, so that windows not yet understood do not rule it.
_CLIP = 0.5

type Heads = tuple[int, int]

MODELS: dict[str, Heads] = {"one head": (1, 2 * orbits.MOONS), "three heads": (orbits.MOONS, 2)}


@dataclass(frozen=True)
class Data:
    """Windows that choose the checkpoint, of trained systems, and windows of the held-out one."""

    validation: Float[Array, "W T+1 6"]
    test: Float[Array, "W T+1 6"]


def make_model(name: str, heads: Heads, seed: int) -> MoonsModel:
    """Build a model of so many heads of such a width."""
    chosen = method(name)
    described = MoonsConfig(*heads, kernel=chosen.kernel, bandwidth=chosen.bandwidth)
    return MoonsModel(described, rngs=nnx.Rngs(seed))


def clipped_error(
    predicted: Float[Array, "*B T I"], points: Float[Array, "*B T+1 I"]
) -> Float[Array, ""]:
    """Average min(|error|, 1/2)^2 over all coordinates of the points to come."""
    return jnp.mean(jnp.clip(predicted - points[..., 1:, :], -_CLIP, _CLIP) ** 2)


@functools.cache
def _program(name: str, floor: float, steps: int) -> Program:
    def split(heads: Heads):
        return nnx.split(nnx.eval_shape(lambda: make_model(name, heads, 0)), nnx.Param)

    graphs = {model: split(heads)[0] for model, heads in MODELS.items()}

    def init(seed: int) -> PyTree[Array]:
        models = {model: make_model(name, heads, seed) for model, heads in MODELS.items()}
        return {
            model: nnx.to_pure_dict(nnx.state(made, nnx.Param)) for model, made in models.items()
        }

    def errors(params: PyTree[Array], points: Float[Array, "B T+1 6"]) -> dict[str, Array]:
        predicted = {m: nnx.merge(graph, params[m])(points[:, :-1]) for m, graph in graphs.items()}
        return {model: clipped_error(answer, points) for model, answer in predicted.items()}

    def loss(params: PyTree[Array], batch: dict[str, Array], key: Key[Array, ""]):
        del key
        return sum(errors(params, batch["points"]).values(), jnp.zeros(())), {}

    measure = jax.jit(errors)

    def validate(params: PyTree[Array], data: Data) -> dict[str, float]:
        found = {m: float(error) for m, error in measure(params, data.validation).items()}
        return {"loss": sum(found.values()), **found}

    def test(params: PyTree[Array], data: Data) -> dict[str, Any]:
        return {m: findings(nnx.merge(g, params[m]), data.test) for m, g in graphs.items()}

    def optimizer(rate):
        return adamw(optax.linear_schedule(rate, floor, steps))

    return Program(init, loss, optimizer, validate, test)


def _load(config: Config) -> Data:
    data = config.data
    trained = orbits.Windows(data.windows, data.length, 2**32 + data.seed)
    validation = jnp.stack([trained[i]["points"] for i in range(data.windows)])
    return Data(validation, jnp.asarray(orbits.held_out(data.length, data.windows, data.seed)))


def _describe(config: Config, data: Data) -> tuple[dict[str, Any], str]:
    sentence = f"{len(orbits.TRAINED)} systems to learn from, an unseen one to test on"
    return about(config.data.length), f"{sentence} ({config.data.windows} windows)"


def _batches(config: Config, data: Data, seed: int) -> BatchIterator:
    size = config.training.batch_size
    source = orbits.Windows(config.steps * size, config.data.length, seed)
    return batches(source, size, seed=seed, shuffle=False)


TASK = Task(
    load=_load,
    describe=_describe,
    baselines=lambda data: {},
    build=lambda config, name: _program(name, config.training.floor, config.steps),
    batches=_batches,
    tokens_per_batch=lambda config, data: config.training.batch_size * config.data.length,
)
