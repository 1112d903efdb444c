"""The kernels for this device against the portable implementation: a wide matrix of shapes.

The portable one computes in float32 at the highest precision from the same rounded inputs; it is
held to the oracle by the other checks.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import kreg
from experiments.hardware.findings import Check, Finding, apart, largest, wide
from experiments.hardware.from_tests import load
from kreg.implementations import kernels_for

RULES = {"adaptive": kreg.Adaptive, "anchored": kreg.Anchored, "fixed": kreg.Fixed}
ORDERS = (2, 1, 3, 4, 2.5)
WIDTHS = (64, 128, 16, 32, 256)
DTYPES = ("bfloat16", "float16", "float32")
LENGTHS = ((1, 1), (63, 63), (64, 130), (65, 65), (200, 777), (1000, 1000), (4096, 4096))
_CASES = 42
# How many values of an axis are skipped after every round: of 40,000 tries these let the most
# values of two axes meet, 92 % of them.
_SKIPPED = (6, 5, 1, 4, 5, 7, 3)
MASKS = ("causal", "none", "offset -1", "window", "segments", "lengths", "ranges by key")


@dataclass(frozen=True)
class Shape:
    """One case: T queries, S keys, H width, heads in groups of `share`."""

    T: int
    S: int
    H: int
    share: int
    order: float
    rule: str
    mask: str
    dtype: str

    def options(self) -> dict[str, Any]:
        keys = jax.random.split(jax.random.key(1), 2)
        by_key = jnp.arange(self.S) * self.T // self.S

        def segments(key, size):
            return jnp.sort(jax.random.randint(key, (2, size), 0, 5), axis=1)

        return {
            "none": {},
            "causal": {"is_causal": True},
            "offset -1": {"is_causal": True, "causal_offset": -1},
            "window": {"local_window_size": (70, 5)},
            "segments": {
                "segment_ids": (segments(keys[0], self.T), segments(keys[1], self.S)),
            },
            "lengths": {"key_value_seq_lengths": jnp.array([self.S // 2, 0])},
            "ranges by key": {"mask": kreg.Mask(query_start=by_key, query_stop=by_key + 90)},
        }[self.mask]


def shapes() -> list[Shape]:
    """List cases in which every value of every axis meets many of the others."""
    axes = LENGTHS, WIDTHS, (1, 2, 4), ORDERS, tuple(RULES), MASKS, DTYPES
    columns = [
        [axis[(i + skipped * (i // len(axis))) % len(axis)] for i in range(_CASES)]
        for skipped, axis in zip(_SKIPPED, axes, strict=True)
    ]
    found = []
    for (T, S), *rest in zip(*columns, strict=True):
        shape = Shape(T, S, *rest)
        # These Hopper's kernels do not take; see pallas_kernels/README.md.
        wide = shape.dtype == "float32" and shape.H > 128
        small = shape.dtype == "float16" and shape.rule == "fixed" and shape.order > 1
        if not (wide or small):
            found.append(shape)
    return found


def kernel_checks(*, smoke: bool = False) -> list[Check]:
    """List the checks; none where there are no kernels for the device."""
    kernels = kernels_for(jax.devices()[0].device_kind)
    if kernels is None:
        return []
    dtypes = [d for d in DTYPES if (kernels, d) != ("mosaic_tpu", "float16")]
    cases = [shape for shape in shapes() if shape.dtype in dtypes]
    found = [Check(f"kernels {shape}", _equal, (shape, kernels)) for shape in cases]
    found += [Check(f"kernels twice {d}", _twice, (d, kernels)) for d in dtypes]
    found += [Check(f"kernels flat rows {n}", _flat, (n, kernels)) for n in (4096, 131072)]
    return found[:1] if smoke else found


def _inputs(shape: Shape) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), 4)
    sizes = (shape.T, 4), (shape.S, 4 // shape.share), (shape.S, 4 // shape.share), (shape.T, 4)
    query, key, value, cotangent = (
        jax.random.normal(key, (2, *size, shape.H)) for key, size in zip(keys, sizes, strict=True)
    )
    if shape.rule == "fixed":
        query, key = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (query, key))
    return [x.astype(shape.dtype) for x in (query, key, value, cotangent)]


def _both(shape: Shape, implementation: str, inputs: list[jax.Array]) -> list[np.ndarray]:
    """Output and the gradients of query, key, value and h, as float64."""
    options: dict[str, Any] = shape.options()
    if shape.rule == "fixed":
        options["scale"] = 1.0
    h = jnp.full((1, 4, 1, 1), 1.2 if shape.rule == "fixed" else 1.0)

    @jax.jit
    def run(query, key, value, cotangent, h):
        def attend(query, key, value, h):
            return kreg.attention(
                query, key, value, kernel=kreg.Kernel(shape.order),
                bandwidth=RULES[shape.rule](h), implementation=implementation, **options,
            )  # fmt: skip

        output, pull = jax.vjp(attend, query, key, value, h)
        return output, *pull(cotangent)

    return [wide(x) for x in run(*inputs, h)]


def _equal(shape: Shape, kernels: str) -> Iterator[Finding]:
    inputs = _inputs(shape)
    got = _both(shape, kernels, inputs)
    want = _both(shape, "xla", [x.astype("float32") for x in inputs])
    tolerance = load("tolerances").TOLERANCES[shape.dtype]
    # No score is greater than the product of the lengths.
    lengths = [np.linalg.norm(wide(x), axis=-1).max() for x in inputs[:2]]
    score = lengths[0] * lengths[1] * (1 if shape.rule == "fixed" else shape.H**-0.5)
    for name, g, w in zip(("output", "query", "key", "value", "h"), got, want, strict=True):
        bound = tolerance.gradient(score, largest(w))
        if name == "output":
            bound = tolerance.output(score, largest(wide(inputs[2])))
        # Both round, and a sum over all queries of what nearly cancels rounds more.
        yield Finding(f"kernels {shape}: {name}", _apart(g, w), (8 if name == "h" else 2) * bound)


def _apart(got: np.ndarray, want: np.ndarray) -> float:
    return largest(got - want)


def _twice(dtype: str, kernels: str) -> Iterator[Finding]:
    shape = Shape(1000, 1000, 64, 2, 2, "adaptive", "causal", dtype)
    inputs = _inputs(shape)
    first, second = (_both(shape, kernels, inputs) for _ in range(2))
    pairs = zip(("output", "query", "key", "value", "h"), first, second, strict=True)
    for name, one, two in itertools.islice(pairs, 4):
        yield Finding(f"kernels twice {dtype}: {name}", _apart(one, two), 0.0)


def _flat(keys: int, kernels: str) -> Iterator[Finding]:
    """Rows of equal scores: what fixed numbers of steps get wrong most."""
    query, key = jnp.zeros((1, 64, 1, 64), "bfloat16"), jnp.ones((1, keys, 1, 64), "bfloat16")
    value = jnp.ones((1, keys, 1, 64), "bfloat16")
    for order in ORDERS:
        output, stats = kreg.attention(
            query, key, value, kernel=kreg.Kernel(order), implementation=kernels,
            return_stats=True,
        )  # fmt: skip
        yield Finding(f"kernels flat {keys} {order}: output", apart(output, np.ones(1)), 4e-3)
        off = np.abs(np.asarray(stats.threshold, np.float64) + order * keys ** (-1 / order)).max()
        yield Finding(f"kernels flat {keys} {order}: t", off, float(stats.residual.max()))
