"""How many instructions the TPU kernels have, and spills: `python tests/tpu_schedules.py`.

Compiles them for every generation and writes a table beside this file, as JSON and as Markdown.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import tpus

import kreg

# Instructions and spills hang on these.
PROGRAMS: dict[str, dict[str, Any]] = {
    "width 64": {"width": 64},
    "width 128": {"width": 128},
    "width 64, float32": {"width": 64, "dtype": jnp.float32},
    "width 64, order 2.5": {"width": 64, "kernel": kreg.rectified_polynomial(2.5)},
    "width 64, anchored": {"width": 64, "bandwidth": kreg.Anchored()},
}


def attention(width, length=2048, keys=None, dtype=jnp.bfloat16, heads=2, key_heads=1, **options):
    """Attention with its gradients, and the shapes of its arguments; as many keys as queries."""
    options = {"implementation": "mosaic_tpu", "is_causal": True} | options
    sizes = (length, heads), (keys or length, key_heads)
    query, key = (jax.ShapeDtypeStruct((1, *size, width), dtype) for size in sizes)

    def both(query, key, value, dout):
        attend = functools.partial(kreg.attention, **options)
        out, pull = jax.vjp(attend, query, key, value)
        return out, pull(dout)

    return both, query, key, key, query


def schedules(
    programs: Mapping[str, dict[str, Any]],
    generations: Iterable[str] = tuple(tpus.GENERATIONS),
) -> list[dict[str, Any]]:
    """A row for each kernel of each program, for each generation."""
    return [
        {"program": program, "generation": generation} | dataclasses.asdict(kernel)
        for program, options in programs.items()
        for generation in generations
        for kernel in tpus.compiled(*attention(**options), generation=generation).kernels
    ]


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a table: a line for each kernel, a column for each generation."""
    generations = list(dict.fromkeys(row["generation"] for row in rows))
    cells: dict[tuple[str, str], dict[str, list[str]]] = {}
    for row in rows:
        cell = cells.setdefault((row["program"], row["name"]), {})
        numbers = "{bundles} / {spill_stores} / {spill_fills}".format(**row)
        cell.setdefault(row["generation"], []).append(numbers)
    lines = [
        "Bundles / stores / fills of spilled vectors, as they are written, not as often as run.\n",
        "| program | kernel | " + " | ".join(generations) + " |",
        "|---" * (2 + len(generations)) + "|",
    ]
    for (program, name), cell in cells.items():
        columns = ["; ".join(cell.get(generation, [])) for generation in generations]
        lines.append(f"| {program} | {name} | " + " | ".join(columns) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(""))
    out = parser.parse_args().out
    rows = schedules(PROGRAMS)
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    out.with_suffix(".json").write_text(json.dumps(versions | {"kernels": rows}, indent=1) + "\n")
    out.with_suffix(".md").write_text(markdown(rows))
    print(markdown(rows))


if __name__ == "__main__":
    main()
