"""What train steps of Memory Mosaics take of a TPU's memory: `python tests/tpu_steps.py`.

Compiles them with the kernels and prints a table. Language models are in bfloat16 with float32
parameters and moments; the other experiments are as their commands run them, in float32 with three
seeds in one program.
"""

import argparse
import dataclasses
import functools
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import tpus
from mosaic_steps import experiment_step, mosaic_step

from experiments.in_context.experiment import EXPERIMENT as IN_CONTEXT
from experiments.length.experiment import EXPERIMENT as LENGTH

GIB = 2**30
# Memory of a chip.
HOLDS = {"v5e": 16 * GIB, "v6e": 32 * GIB}


def in_context():
    """As `python -m experiments reproduce icl --preset paper` does it, at a thousand automata."""
    config = IN_CONTEXT.presets["paper"]
    data = dataclasses.replace(config.data, train=1000, validation=32, test=32)
    return experiment_step(IN_CONTEXT, dataclasses.replace(config, data=data))


def length():
    """As `python -m experiments reproduce length --preset paper --task sort --model mosaic`."""
    config = dataclasses.replace(LENGTH.presets["paper"], task="sort", model="mosaic")
    return experiment_step(LENGTH, LENGTH.complete(config))


def language(batch: int, length: int):
    """The language model of the paper."""
    sizes = {"num_layers": 12, "num_heads": 12, "embed_dim": 768, "memory_size": 2688}
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    return *mosaic_step(vocab_size=50257, **sizes), tokens


def documents():
    """Some documents to a sequence, which know nothing of each other."""
    tokens = jax.ShapeDtypeStruct((2, 1024), jnp.int32)
    return *mosaic_step(documents=True, num_heads=4, embed_dim=256), tokens


# Each makes a step and the shapes of what it is given.
STEPS = {
    "in-context learning, 3 x 32 x 641": in_context,
    "length, sort, 3 x 128 x 130": length,
    **{
        f"language model, {batch} x {size}": functools.partial(language, batch, size)
        for batch, size in [(8, 512), (32, 512), (1, 4096), (4, 4096)]
    },
    "packed documents, 2 x 1024": documents,
}


def compiled(name: str, generation: str) -> tpus.Program:
    """Compile a step of STEPS; its state is given up for the next one."""
    with tpus.meant_for(generation):
        step, *shapes = STEPS[name]()
    return tpus.compiled(step, *shapes, generation=generation)


def line(name: str, generation: str) -> str:
    """A row of the table; the compiler refuses what does not fit."""
    try:
        found = compiled(name, generation)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        cells = ["", "", "", f"more than {HOLDS[generation] / GIB:.0f}"]
    else:
        sizes = found.argument_bytes, found.output_bytes, found.temporary_bytes, found.bytes
        cells = [f"{x / GIB:.3f}" for x in sizes]
    return f"| {' | '.join([name, generation, *cells])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", nargs="+", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--generations", nargs="+", default=list(HOLDS), choices=list(HOLDS))
    options = parser.parse_args()
    print("| step | generation | arguments | outputs | temporary | in all, GiB |")
    print("|---" * 6 + "|")
    for name in options.steps:
        for generation in options.generations:
            print(line(name, generation), flush=True)


if __name__ == "__main__":
    main()
