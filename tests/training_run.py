"""A toy training for the tests of kreg.training; run as a script, it is what they kill."""

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from kreg.training import (
    Progress,
    TrainResult,
    adamw,
    batches,
    decay_matrices,
    init_state,
    make_step,
    train,
)
from kreg.training.schedules import warmup_cosine

STEPS = 30
CONFIG = {"model": {"width": 8, "layers": 2}, "methods": ("biweight",), "rate": 1e-2}
ROWS = 50


def rows() -> list[dict[str, np.ndarray]]:
    """Fifty rows, so that batches of sixteen leave a small one at the end of an epoch."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(ROWS, 8)).astype(np.float32)
    targets = np.tanh(inputs[:, :4] * 2)
    return [{"x": x, "y": y} for x, y in zip(inputs, targets, strict=True)]


def initial_params() -> dict[str, Any]:
    rng = np.random.default_rng(1)
    blocks = {"matrix": 0.5 * rng.normal(size=(2, 8, 8)), "scale": np.ones((2, 8))}
    params = {"blocks": blocks, "head": 0.5 * rng.normal(size=(8, 4))}
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)


def predict(params: dict[str, Any], x: ArrayLike) -> jax.Array:
    for layer in range(2):
        blocks = params["blocks"]
        x = jnp.tanh(jnp.asarray(x) @ blocks["matrix"][layer]) * blocks["scale"][layer][None, :]
    return jnp.asarray(x) @ params["head"]


def loss(params: dict, batch: dict, key: jax.Array) -> tuple[jax.Array, dict]:
    """Squared error with input dropout, so that a wrong random key shows."""
    keep = jax.random.bernoulli(key, 0.9, batch["x"].shape)
    error = predict(params, batch["x"] * keep) - batch["y"]
    return jnp.mean(error**2), {"mean_error": jnp.mean(error)}


@jax.jit
def validation(params: dict) -> jax.Array:
    table = rows()
    x, y = (np.stack([row[name] for row in table]) for name in "xy")
    return jnp.mean((predict(params, x) - y) ** 2)


@cache
def optimizer_and_step():
    """Built once, so that the runs of one process share one compilation."""
    tx = adamw(
        warmup_cosine(1e-2, warmup_steps=5, decay_steps=STEPS, floor=1e-4),
        weight_decay=0.1,
        decays=decay_matrices(),
        clip=1.0,
    )
    return tx, make_step(loss, tx)


def run(directory: Path, *, steps: int = STEPS, pause: float = 0.0, **options) -> TrainResult:
    """Train; `pause` seconds a row make it slow enough to be killed somewhere in particular."""

    def collate(chosen: Sequence[dict]) -> dict[str, np.ndarray]:
        time.sleep(pause)
        return {name: np.stack([row[name] for row in chosen]) for name in "xy"}

    data = batches(rows(), 16, seed=3, collate=collate)
    defaults: dict[str, Any] = {
        "config": CONFIG,
        "evaluate": lambda params: {"val_loss": float(validation(params))},
        "eval_every": 10,
        "save_every": 4,
        "log_every": 1,
        "tokens_per_batch": 16,
        "progress": Progress(quiet=True),
    }
    tx, step = optimizer_and_step()
    state = init_state(initial_params(), tx, jax.random.key(1))
    try:
        return train(directory, state, step, data, steps=steps, **defaults | options)
    finally:
        data.close()


def checksums(directory: Path) -> dict[str, str]:
    """Every file and folder below a directory, with the files' contents."""
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in sorted(directory.rglob("*"))
    }


def log_without_clock(directory: Path) -> list[dict]:
    """The log's lines but for what the clock says."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    clock = {"seconds", "tokens_per_second"}
    return [{k: v for k, v in line.items() if k not in clock} for line in lines]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--pause", type=float, default=0.0)
    arguments = parser.parse_args()
    result = run(arguments.directory, pause=arguments.pause, progress=Progress())
    print(json.dumps({"step": result.step, "stopped_by": result.stopped_by}))
