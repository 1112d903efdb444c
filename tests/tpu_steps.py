"""What train steps of Memory Mosaics take of a TPU's memory: `python tests/tpu_steps.py`.

Compiles them with the kernels and prints a table.
"""

import argparse
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import tpus
from mosaic_steps import mosaic_step

GIB = 2**30
# Memory of a chip.
HOLDS = {"v5e": 16 * GIB, "v6e": 32 * GIB}
LANGUAGE = {"num_layers": 12, "num_heads": 12, "embed_dim": 768, "memory_size": 2688,
            "vocab_size": 50257}  # fmt: skip
# Sizes, sequences a step and their length: those of the paper's presets, but for the batches of the
# language models, and two with documents packed.
STEPS = {
    "in-context learning": ({"num_layers": 2, "num_heads": 8, "embed_dim": 128,
                             "memory_size": 448}, 32, 512),
    "length generalisation": ({"num_layers": 2, "num_heads": 8, "embed_dim": 512,
                               "memory_size": 2688}, 32, 128),
    "language modelling": (LANGUAGE, 8, 512),
    "language modelling, 4096": (LANGUAGE, 1, 4096),
    "packed documents": ({"num_heads": 4, "embed_dim": 256, "documents": True}, 2, 1024),
}  # fmt: skip


def step(name: str, generation: str, batch: int | None = None) -> tpus.Program:
    """Compile a step in bfloat16 with float32 state, AdamW's moments in it, which is given up."""
    sizes, usual, length = STEPS[name]
    with tpus.meant_for(generation):
        train, state = mosaic_step(**sizes)
    tokens = jax.ShapeDtypeStruct((batch or usual, length), jnp.int32)
    return tpus.compiled(train, state, tokens, generation=generation)


def line(name: str, generation: str, batch: int | None) -> str:
    """A row of the table; the compiler refuses what does not fit."""
    _, usual, length = STEPS[name]
    cells = [name, generation, f"{batch or usual} x {length}"]
    try:
        found = step(name, generation, batch)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        cells += ["", "", "", f"more than {HOLDS[generation] / GIB:.0f}"]
    else:
        sizes = found.argument_bytes, found.output_bytes, found.temporary_bytes, found.bytes
        cells += [f"{x / GIB:.3f}" for x in sizes]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", nargs="+", default=list(STEPS), choices=list(STEPS))
    parser.add_argument(
        "--batch", nargs="+", type=int, default=[None], help="in place of the usual"
    )
    parser.add_argument("--generations", nargs="+", default=list(HOLDS), choices=list(HOLDS))
    options = parser.parse_args()
    print("| step | generation | batch | arguments | outputs | temporary | in all, GiB |")
    print("|---" * 7 + "|")
    for name in options.steps:
        for generation in options.generations:
            for batch in options.batch:
                print(line(name, generation, batch), flush=True)


if __name__ == "__main__":
    main()
