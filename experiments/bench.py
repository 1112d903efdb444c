"""How fast kreg is on this machine, beside jax.nn, PyTorch and the entmax package.

Everybody is timed in turns in one process, forward and backward, so that what slows the machine
slows all of them; what counts is the ratio. PyTorch and entmax take part where they are installed
(pip install torch entmax). Times depend on machine and load: compare within a run only.
"""

import argparse
import dataclasses
import importlib.util
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import kreg
from experiments.runs.environment import describe
from experiments.runs.json_files import write_json
from kreg.training import Devices
from kreg.training.devices import cores

KERNELS = {
    "gaussian": kreg.gaussian,
    "biweight": kreg.biweight,
    "epanechnikov": kreg.epanechnikov,
    "triweight": kreg.triweight,
    "order 2.7": kreg.rectified_polynomial(1 / 0.37),
}
METHOD = (
    "Forward and backward (gradients of all inputs), float32, in turns in one process, every round "
    "in another order. A turn is two calls: the first finds caches, memory and threads as somebody "
    "else left them (first_ms, first_over), the second as it left them itself (median_ms, over). "
    "jax.nn on CPU forms the whole score matrix and computes the masked half too; kreg does "
    "neither, so its Gaussian is the like-for-like baseline. Rows come first, JAX by itself, then "
    "beside entmax: PyTorch's large arrays change from what size on malloc asks the system for "
    "memory, and fresh pages cost as much as a softmax. Where it says devices, as many CPU devices "
    "have rows of the batch each; all others use one device."
)


@dataclasses.dataclass(frozen=True)
class Options:
    """What is timed, how often, and where results go."""

    lengths: list[int]
    rows: list[int]
    batch: int
    heads: int
    width: int
    devices: int
    rounds: int
    out: Path


def parse(arguments: list[str] | None = None) -> Options:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--lengths", type=int, nargs="*", default=[512, 2048], help="of causal attention")
    add("--rows", type=int, nargs=2, default=[4096, 1024], help="rows and their width, for maps")
    add("--batch", type=int, default=4)
    add("--heads", type=int, default=8)
    add("--width", type=int, default=64, help="of a head")
    add("--devices", type=int, help="CPU devices; by default one a core, if rows suffice")
    add("--rounds", type=int, default=7, help="turns of each; 5 times as many of what takes little")
    add("--out", type=Path, default=Path("runs/bench"), help="folder for bench.json and bench.md")
    given = parser.parse_args(arguments)
    given.devices = devices_for(parser, given.batch, given.devices)
    return Options(**vars(given))


def devices_for(parser: argparse.ArgumentParser, batch: int, wanted: int | None) -> int:
    """How many CPU devices a batch is split over, and from now on there are so many."""
    count = wanted or max(n for n in range(1, min(batch, cores()) + 1) if batch % n == 0)
    if batch % count:
        parser.error(f"--devices: expected a divisor of the batch of {batch}, got {count}")
    jax.config.update("jax_num_cpu_devices", count)
    return count


@dataclasses.dataclass
class Contestant:
    """A compiled call; what it took to compile, its temporary memory, its seconds a round.

    first: seconds of the first call of every turn; seconds: of the second.
    """

    call: Callable[[], Any]
    compile_seconds: float | None = None
    temporary_bytes: int | None = None
    first: list[float] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)

    def turn(self) -> None:
        for seconds in (self.first, self.seconds):
            start = time.perf_counter()
            self.call()
            seconds.append(time.perf_counter() - start)


def main(options: Options) -> None:
    comparisons = {}

    def compare(name: str, contestants: dict[str, Contestant], rounds: int) -> None:
        comparisons[name] = run(contestants, rounds)
        show(name, comparisons[name])
        write(options.out / "bench", {"method": METHOD, "results": comparisons})

    rows = f"rows {options.rows[0]} x {options.rows[1]}"
    alone = maps(options.rows)
    compare(rows, alone, 5 * options.rounds)
    if peers := entmax_maps(options.rows):
        again = {name: dataclasses.replace(c, first=[], seconds=[]) for name, c in alone.items()}
        compare(f"{rows}, beside entmax", again | peers, 5 * options.rounds)
    for length in options.lengths:
        name = f"causal attention B{options.batch} T{length} N{options.heads} H{options.width}"
        compare(name, attention(options, length), (5 if length <= 1024 else 1) * options.rounds)
    print(f"written: {options.out / 'bench.json'}, {options.out / 'bench.md'}")


def write(path: Path, found: dict[str, Any]) -> None:
    """Write what was found so far as path.json, with versions and machine, and path.md."""
    path.parent.mkdir(parents=True, exist_ok=True)
    peers = {name: metadata.version(name) for name in ("torch", "entmax") if optional(name)}
    machine = {"cores": os.cpu_count(), "processor": processor(), "peers": peers}
    write_json(path.with_suffix(".json"), describe() | machine | found)
    path.with_suffix(".md").write_text(markdown(found["results"]))


def attention(options: Options, length: int) -> dict[str, Contestant]:
    """Compile the attentions at one length."""
    shape = (options.batch, length, options.heads, options.width)
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = [jax.random.normal(key, shape) for key in keys]
    found = {
        "jax.nn softmax": compiled(
            lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True), arrays
        )
    }
    for name, kernel in KERNELS.items():

        def attend(q, k, v, kernel=kernel):
            return kreg.attention(q, k, v, kernel=kernel, is_causal=True)

        found[f"kreg {name}"] = compiled(attend, arrays)
    relumax = {"kernel": kreg.epanechnikov, "bandwidth": kreg.Anchored()}
    found["kreg relumax"] = compiled(
        lambda q, k, v: kreg.attention(q, k, v, is_causal=True, **relumax), arrays
    )
    alpha = kreg.Kernel.from_alpha(jnp.asarray(1.37))
    found["kreg traced alpha 1.37"] = compiled(
        lambda q, k, v, kernel: kreg.attention(q, k, v, kernel=kernel, is_causal=True),
        [*arrays[:3], alpha, arrays[3]],
    )
    if options.devices > 1:
        found |= split_attention(options.devices, arrays)
    if torch := optional("torch"):
        found["torch SDPA softmax"] = torch_attention(torch, arrays)
    return found


def split_attention(count: int, arrays: list[jax.Array]) -> dict[str, Contestant]:
    """The same of several devices, each with rows of the batch of its own."""
    devices = Devices(data=count)
    rows: Any = devices.place_batch(arrays)
    found = {}
    for name in ("gaussian", "biweight"):

        def attend(q, k, v, kernel=KERNELS[name]) -> Any:
            options = {"mesh": devices.mesh, "batch": "data", "kernel": kernel}
            return kreg.sharding.attention(q, k, v, is_causal=True, **options)

        found[f"kreg {name}, {count} devices"] = compiled(attend, rows, devices.compiler_options)
    return found


def maps(shape: list[int]) -> dict[str, Contestant]:
    """Compile the maps on rows of scores."""
    x, cotangent = scores(shape)
    functions = {
        "jax.nn.softmax": jax.nn.softmax,
        "kreg.softmax": kreg.softmax,
        "kreg.entmax15": kreg.entmax15,
        "kreg.sparsemax": kreg.sparsemax,
        "bisection, 50 steps, alpha 1.5": bisection,
    }
    return {name: compiled(f, [x, cotangent]) for name, f in functions.items()}


def entmax_maps(shape: list[int]) -> dict[str, Contestant]:
    """Those of the entmax package, where it is installed."""
    torch, entmax = optional("torch"), optional("entmax")
    if not (torch and entmax):
        return {}
    x, cotangent = scores(shape)
    return {
        f"entmax.{name}": torch_map(torch, getattr(entmax, name), x, cotangent)
        for name in ("entmax15", "sparsemax")
    }


def scores(shape: list[int]) -> jax.Array:
    """Rows and cotangents."""
    return jax.random.normal(jax.random.key(0), (2, *shape))


@jax.custom_jvp
def bisection(x: jax.Array) -> jax.Array:
    """3/2-entmax by 50 bisections of the threshold: what a plain JAX version does."""
    y = x / 2
    low = jnp.max(y, axis=-1, keepdims=True) - 1

    def halve(i, low):
        middle = low + 0.5 ** (i + 1)
        total = jnp.sum(jnp.square(jnp.maximum(y - middle, 0)), axis=-1, keepdims=True)
        return jnp.where(total >= 1, middle, low)

    low = jax.lax.fori_loop(0, 50, halve, low)
    p = jnp.square(jnp.maximum(y - low, 0))
    return p / jnp.sum(p, axis=-1, keepdims=True)


@bisection.defjvp
def _bisection_jvp(primals, tangents):
    p = bisection(*primals)
    u = jnp.sqrt(p)
    mean = jnp.sum(u * tangents[0], axis=-1, keepdims=True) / jnp.sum(u, axis=-1, keepdims=True)
    return p, u * (tangents[0] - mean)


def compiled(
    function: Callable[..., jax.Array], arrays: list[Any], options: dict[str, Any] | None = None
) -> Contestant:
    """Compile value and gradients; the last array is the output's cotangent."""

    def both(*arrays):
        output, pull = jax.vjp(function, *arrays[:-1])
        return output, pull(arrays[-1])

    start = time.perf_counter()
    executable = jax.jit(both).lower(*arrays).compile(options)
    seconds = time.perf_counter() - start
    analysis = executable.memory_analysis()
    temporary = None if analysis is None else analysis.temp_size_in_bytes
    return Contestant(lambda: jax.block_until_ready(executable(*arrays)), seconds, temporary)


def torch_attention(torch: Any, arrays: list[jax.Array]) -> Contestant:
    query, key, value, cotangent = (
        torch.from_numpy(np.array(x)).transpose(1, 2).contiguous() for x in arrays
    )
    inputs = [x.requires_grad_() for x in (query, key, value)]
    attend = torch.nn.functional.scaled_dot_product_attention

    def call():
        return torch.autograd.grad(attend(*inputs, is_causal=True), inputs, cotangent)

    return Contestant(call)


def torch_map(torch: Any, function: Callable, x: jax.Array, cotangent: jax.Array) -> Contestant:
    x, cotangent = (
        torch.from_numpy(np.array(x)).requires_grad_(),
        torch.from_numpy(np.array(cotangent)),
    )
    return Contestant(lambda: torch.autograd.grad(function(x, dim=-1), x, cotangent))


def optional(name: str) -> Any:
    """Import a module where it is installed."""
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


def run(contestants: dict[str, Contestant], rounds: int) -> dict[str, Any]:
    """Time all in turns; ratios are those of medians, to the first and to kreg's Gaussian."""
    for contestant in contestants.values():
        contestant.call()
    # Threads of the one before may still be spinning, and its arrays fill the cache: nobody follows
    # the same one every time.
    shuffle = random.Random(0).sample
    for _ in range(rounds):
        for contestant in shuffle(list(contestants.values()), len(contestants)):
            contestant.turn()
    medians = {name: statistics.median(c.seconds) for name, c in contestants.items()}
    first = {name: statistics.median(c.first) for name, c in contestants.items()}
    bases = [
        n
        for n in ("jax.nn softmax", "jax.nn.softmax", "kreg gaussian", "torch SDPA softmax")
        if n in medians
    ]
    return {
        name: {
            "median_ms": 1000 * medians[name],
            "min_ms": 1000 * min(c.seconds),
            "compile_seconds": c.compile_seconds,
            "temporary_bytes": c.temporary_bytes,
            "first_ms": 1000 * first[name],
            "over": {base: medians[name] / medians[base] for base in bases},
            "first_over": {base: first[name] / first[base] for base in bases},
        }
        for name, c in contestants.items()
    }


def markdown(comparisons: dict[str, Any]) -> str:
    """Build one table a comparison."""
    parts = []
    for title, results in comparisons.items():
        bases = list(next(iter(results.values()))["over"])
        head = [
            "",
            "median ms",
            "least ms",
            *(f"/ {base} (first calls)" for base in bases),
            "temporary MB",
            "compile s",
        ]
        lines = [title, "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for name, r in results.items():
            temporary, seconds = r["temporary_bytes"], r["compile_seconds"]
            cells = [
                name, f"{r['median_ms']:.1f}", f"{r['min_ms']:.1f}",
                *(f"{r['over'][base]:.2f} ({r['first_over'][base]:.2f})" for base in bases),
                "" if temporary is None else f"{temporary / 1e6:.0f}",
                "" if seconds is None else f"{seconds:.1f}",
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def processor() -> str:
    """Name the processor, where Linux says."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def show(title: str, results: dict[str, Any]) -> None:
    print(markdown({title: results}), flush=True)


if __name__ == "__main__":
    main(parse())
