r"""A small Memory Mosaic trained over devices, of this process or of several, for tests.

As a command it is one of several processes, and writes what it found into a folder:

    python -m experiments.launch.local --processes 2 --devices-per-process 2 \
        python tests/split_training.py FOLDER 2 DATA,FSDP,SEQUENCE METHODS [float64]
"""

import functools
import json
import sys
from contextlib import closing
from pathlib import Path

import jax
import numpy as np
import optax
from flax import nnx

import kreg
from kreg import nn, training
from kreg.training import Devices
from kreg.training.data import Row
from kreg.training.processes import start
from kreg.training.writer import fetch

# Every third batch is filled up with blank rows: with four processes three have nothing else.
ROWS, BATCH, LENGTH, VOCABULARY = 18, 8, 32, 20
# Arrays of the model have about a thousand numbers and more, so that some of them are split.
CONFIG = nn.MosaicConfig(VOCABULARY, 1, 2, 32, 40, attention_dropout=0.1, hidden_dropout=0.1)
ONE = Devices()

METHODS = {
    "softmax": (kreg.gaussian, kreg.Adaptive),
    "biweight": (kreg.biweight, kreg.Adaptive),
    "epanechnikov": (kreg.epanechnikov, kreg.Adaptive),
    "triweight": (kreg.triweight, kreg.Adaptive),
    "norm_relu": (kreg.epanechnikov, kreg.Fixed),
    "relumax": (kreg.epanechnikov, kreg.Anchored),
    "top8_softmax": (kreg.gaussian, functools.partial(kreg.Nearest, 8)),
    "top8_uniform": (kreg.box, functools.partial(kreg.Nearest, 8)),
}


class Rows:
    """Packed documents; remembers which were asked for."""

    def __init__(self):
        self.read: set[int] = set()

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> Row:
        self.read.add(index)
        rng = np.random.default_rng(index)
        tokens = rng.integers(0, VOCABULARY, LENGTH).astype(np.int32)
        documents = np.sort(rng.integers(0, 3, LENGTH)).astype(np.int32)
        return {"tokens": tokens, "labels": np.roll(tokens, -1), "documents": documents}


def blank(row: Row) -> Row:
    return row | {"labels": np.full_like(row["labels"], -1)}


def batches(rows: Rows, devices: Devices):
    """The same batches for any devices."""
    split = devices if devices.count > 1 else None
    return training.batches(rows, BATCH, seed=0, blank=blank, prefetch=0, devices=split)


def started(devices: Devices, tx, dtype: str, **changes):
    """A step and a state of the model, split over the devices."""
    config = nn.MosaicConfig(**{**vars(CONFIG), "layout": devices.layout, **changes})
    graph, params = nnx.split(nn.MemoryMosaic(config, rngs=nnx.Rngs(0)))
    params = jax.tree.map(lambda x: x.astype(dtype), params)

    def loss(params, batch, key):
        logits = nnx.merge(graph, params)(
            batch["tokens"], segment_ids=batch["documents"], dropout_key=key
        )
        return training.mean_token_cross_entropy(logits, batch["labels"], ignore=-1), {}

    state = training.init_state(params, tx, jax.random.key(1))
    split = devices if devices.count > 1 else None
    return training.make_step(loss, tx, devices=split), devices.place(state)


def read(devices: Devices) -> list[int]:
    """The rows that this process reads for the first two batches, which are full."""
    rows = Rows()
    with closing(batches(rows, devices)) as data:
        next(data), next(data)
    return sorted(rows.read)


def losses(devices: Devices, steps: int, dtype: str) -> list[float]:
    """The loss of every step, of AdamW with clipping."""
    found = []
    with jax.set_mesh(devices.mesh), closing(batches(Rows(), devices)) as data:
        step, state = started(devices, training.adamw(3e-3, weight_decay=0.1, clip=1.0), dtype)
        for _ in range(steps):
            state, metrics = step(state, next(data))
            found.append(float(metrics["loss"]))
    return found


def gradients(devices: Devices, method: str) -> np.ndarray:
    """The gradients of the first step, of all parameters."""
    kernel, bandwidth = METHODS[method]
    with jax.set_mesh(devices.mesh), closing(batches(Rows(), devices)) as data:
        # What is subtracted from the parameters is the gradient.
        step, state = started(
            devices, optax.sgd(1.0), "float32", kernel=kernel, bandwidth=bandwidth
        )
        # The step takes the state's memory.
        before = jax.tree.map(np.array, fetch(state.params))
        moved, _ = step(state, next(data))
        found = jax.tree.map(np.subtract, before, fetch(moved.params))
    return np.concatenate([x.ravel() for x in jax.tree.leaves(found)])


def main() -> None:
    folder, count, split, methods, *wide = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", int(count))
    with start(timeout=30, patience=200) as processes:
        devices = Devices(*map(int, split.split(",")))
        told: dict = {"read": read(devices), "float32": losses(devices, 10, "float32")}
        for dtype in wide:
            with jax.enable_x64(True):
                told[dtype] = losses(devices, 50, dtype)
        for method in filter(None, methods.split(",")):
            told[method] = gradients(devices, method).tolist()
        (Path(folder) / f"{processes.index}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
