"""Train steps of Memory Mosaics, to be compiled and not run."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from experiments.length.experiment import EXPERIMENT as LENGTH
from experiments.runs.experiment import Experiment
from kreg import training
from kreg.nn import MemoryMosaic, MosaicConfig


def mosaic_step(documents: bool = False, **sizes: Any):
    """A step in bfloat16, with dropout, and the shapes of its state; `sizes`: of the config.

    documents: whether sequences consist of several that know nothing of each other.
    """
    config = MosaicConfig(**{"vocab_size": 64, "num_layers": 1, "memory_size": 64} | sizes)
    graph, params = nnx.split(
        nnx.eval_shape(lambda: MemoryMosaic(config, rngs=nnx.Rngs(0))), nnx.Param
    )

    def loss_of(params, tokens, key):
        segments = tokens // 16 if documents else None
        logits = nnx.merge(graph, params)(tokens, dropout_key=key, segment_ids=segments)
        return training.mean_token_cross_entropy(logits, tokens, ignore=-1), {}

    tx = optax.adamw(1e-3)
    step = training.make_step(loss_of, tx, compute_dtype=jnp.bfloat16)
    return step, jax.eval_shape(lambda p: training.init_state(p, tx, jax.random.key(0)), params)


def experiment_step(experiment: Experiment, config: Any, name: str = "biweight", seeds: int = 3):
    """The step of an experiment on an accelerator: some seeds side by side in one program.

    Returns it with the shapes of its states, batches and learning rates.
    """
    task = experiment.load_task()
    program, data = task.build(config, name), task.load(config)
    batches = task.batches(config, data, 0)
    batch = next(batches)
    batches.close()

    def start(key):
        return training.init_state(program.init(0), program.optimizer(1e-3), key)

    def of_all(shapes):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((seeds, *x.shape), x.dtype), shapes)

    step = training.make_steps(program.loss, program.optimizer, one_by_one=False)
    state = jax.eval_shape(start, jax.random.key(0))
    return step, *map(of_all, (state, batch, jnp.zeros(())))


def length_step():
    """As `python -m experiments reproduce length --preset paper --task sort --model mosaic`."""
    config = dataclasses.replace(LENGTH.presets["paper"], task="sort", model="mosaic")
    return experiment_step(LENGTH, LENGTH.complete(config))
