"""What train steps of Memory Mosaics take of a TPU's memory: `python tests/tpu_steps.py`.

Compiles them with the kernels and prints a table. Language models are in bfloat16 with float32
parameters and moments; the other experiments are as their commands run them, in float32 with three
seeds in one program.
"""

import argparse
import dataclasses
import functools
import json
import os
import subprocess
import sys
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import tpus
from mosaic_steps import experiment_step, length_step, mosaic_step

from experiments.in_context.experiment import EXPERIMENT as IN_CONTEXT

GIB = 2**30
# Memory of a chip.
HOLDS = {"v5e": 16 * GIB, "v6e": 32 * GIB}
# What the compiler can write of all operations of a model takes longer than to compile it.
WORDLESS = {"LIBTPU_INIT_ARGS": ""}


def in_context():
    """As `python -m experiments reproduce icl --preset paper` does it, at a thousand automata."""
    config = IN_CONTEXT.presets["paper"]
    data = dataclasses.replace(config.data, train=1000, validation=32, test=32)
    return experiment_step(IN_CONTEXT, dataclasses.replace(config, data=data))


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
    "length, sort, 3 x 128 x 130": length_step,
    **{
        f"language model, {batch} x {size}": functools.partial(language, batch, size)
        for batch, size in [(8, 512), (1, 4096)]
    },
    "packed documents, 2 x 1024": documents,
}


# Its fields that are numbers, and the kernels it calls.
NUMBERS = "argument_bytes", "output_bytes", "reused_bytes", "temporary_bytes", "bytes"


def compiled(name: str, generation: str) -> dict[str, Any]:
    """Compile a step of STEPS; its state is given up for the next one."""
    with tpus.meant_for(generation):
        step, *shapes = STEPS[name]()
    found = tpus.compiled(step, *shapes, generation=generation)
    numbers = {number: getattr(found, number) for number in NUMBERS}
    return {"step": name, "generation": generation, "calls": found.calls} | numbers


def compiled_apart(name: str, generation: str) -> dict[str, Any]:
    """Do so in a process of its own, whose compiler writes nothing about it."""
    command = [sys.executable, __file__, "--json", "--steps", name, "--generations", generation]
    text = subprocess.run(command, env=os.environ | WORDLESS, check=True, stdout=subprocess.PIPE)
    return json.loads(text.stdout.splitlines()[-1])


def line(found: dict[str, Any]) -> str:
    """A row of the table."""
    numbers = (found[x] / GIB for x in NUMBERS if x != "reused_bytes")
    cells = [found["step"], found["generation"], *(f"{x:.3f}" for x in numbers)]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", nargs="+", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--generations", nargs="+", default=list(HOLDS), choices=list(HOLDS))
    parser.add_argument("--json", action="store_true", help="a line of JSON for each")
    options = parser.parse_args()
    os.environ.update(WORDLESS)
    if not options.json:
        print("| step | generation | arguments | outputs | temporary | in all, GiB |")
        print("|---" * 6 + "|")
    for name in options.steps:
        for generation in options.generations:
            found = compiled(name, generation)
            print(json.dumps(found) if options.json else line(found), flush=True)


if __name__ == "__main__":
    main()
