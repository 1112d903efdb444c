"""How many instructions the TPU kernels have, and spills: `python tests/tpu_schedules.py`.

Compiles them for every generation and writes a table beside this file, as JSON and as Markdown.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import tpus
from toy_tpu_kernel import listed_products


def toy() -> tuple[Any, ...]:
    """Three tiles of queries, as many keys as no fast memory holds."""
    lists = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((3,), (3, 1, 1024))]
    query, keys = (jax.ShapeDtypeStruct((n, 128), jnp.bfloat16) for n in (384, 2**20))
    return listed_products, *lists, query, keys


# Functions and the shapes of their arguments.
PROGRAMS: dict[str, Callable[[], tuple[Any, ...]]] = {"toy": toy}


def schedules(
    programs: Mapping[str, Callable[[], tuple[Any, ...]]],
    generations: Iterable[str] = tuple(tpus.GENERATIONS),
) -> list[dict[str, Any]]:
    """A row for each kernel of each program, for each generation."""
    return [
        {"program": program, "generation": generation} | dataclasses.asdict(kernel)
        for program, made in programs.items()
        for generation in generations
        for kernel in tpus.compiled(*made(), generation=generation).kernels
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
