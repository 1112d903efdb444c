"""The contract, for kernels that are interpreted: a structure at a time, few shapes."""

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import oracle
from test_contract import Case, Structure, build, check_gradients, check_output, check_stats

import kreg

# What no kernels take: a word of the error, and arguments.
DECLINED = [
    ("Gaussian", {"kernel": kreg.gaussian}),
    ("Nearest", {"bandwidth": kreg.Nearest(3)}),
    ("order", {"kernel": kreg.Kernel(jnp.full((1, 1, 1, 1), 2.0))}),
    ("bias", {"bias": jnp.zeros((1, 1, 4, 4))}),
    ("soft cap", {"logits_soft_cap": 1.0}),
    ("null score", {"null_score": 0.0}),
    ("boolean mask", {"mask": jnp.ones((4, 4), bool)}),
    ("wider", {"width": 264}),
]


@dataclass(frozen=True, eq=False)
class Interpreted:
    """An implementation whose kernels are run by an interpreter.

    mode: the context in which they are; structures: by name, what is compiled once; op: what calls
    them; widest: of values in half types, up to where rounding their weights costs nothing.
    """

    implementation: str
    mode: Callable[[], AbstractContextManager]
    structures: dict[str, Structure]
    op: Callable = kreg.attention
    widest: float = math.inf

    @functools.cache  # noqa: B019, there are a few for all time
    def compiled(self, name: str):
        """Output, stats and the gradients of query, key, value and h."""
        s = self.structures[name]

        @jax.jit
        def run(query, key, value, cotangent, mask, h):
            def attend(query, key, value, h):
                return self.op(
                    query, key, value, mask=mask, implementation=self.implementation,
                    return_stats=True, **s.arguments(h), **s.options,
                )  # fmt: skip

            out, pull, stats = jax.vjp(attend, query, key, value, h, has_aux=True)
            names = "query", "key", "value", "h"
            return out, stats, dict(zip(names, pull(cotangent), strict=True))

        return run

    def computed(self, name: str, case: Case, h: np.ndarray | None = None):
        dtype = self.structures[name].dtype
        arrays = [jnp.asarray(x, "float32").astype(dtype) for x in case.arrays]
        h = jnp.ones((1, 1, 1, 1)) if h is None else jnp.asarray(h, "float32")
        mask = kreg.Mask(**{k: jax.tree.map(jnp.asarray, v) for k, v in case.mask.items()})
        with self.mode():
            found = self.compiled(name)(*arrays, mask, h)
            return jax.tree.map(
                lambda x: np.asarray(x.astype("float32") if x.dtype == dtype else x), found
            )

    def check(self, name: str, case: Case, ties: bool = False, h: np.ndarray | None = None) -> None:
        """h: of the rule, 1 if not given; an array of the scores' rank."""
        s = self.structures[name]
        cell = s.cell if h is None else s.cell_at(h)
        clean = [np.where(np.isfinite(x), x, 0) for x in case.arrays]
        scale = 1.0 if s.rule == "fixed" else None
        want = oracle.attention(
            *clean[:3], case.bias, case.where, order=cell.order, rule=cell.rule, scale=scale
        )
        out, stats, gradients = self.computed(name, case, h)
        rounded = s.dtype != "float32" and s.shape.V > self.widest
        check_output(s, case, clean[2], want, out, 1 + rounded)
        check_stats(s, want, stats)
        if not (ties and s.rule == "anchored"):
            check_gradients(s, case, clean[3], want, gradients)


def drawn(s: Structure, seed: int, spread: float = 1.0, parts: int = 0, ties: bool = False) -> Case:
    """A case without bias and without a boolean array; masks that are neutral are left out."""
    case = build(s, seed, spread, 0.5, parts & ~3, ties)
    names = {4: ("key_start", "key_stop"), 8: ("query_start", "query_stop"), 16: ("segment_ids",),
             32: ("query_seq_lengths", "key_value_seq_lengths")}  # fmt: skip
    mask = {name: case.mask[name] for bit, part in names.items() if parts & bit for name in part}
    return Case(case.arrays, case.bias, mask, case.where)


def average_of_ones(implementation: str, keys: int) -> np.ndarray:
    """Of bfloat16 values: 1 however weights are rounded, if what is divided by is their sum."""
    query, key = np.random.default_rng(0).normal(size=(2, 1, keys, 1, 16))
    query, key = (jnp.asarray(4 * x, "bfloat16") for x in (query[:, :66], key))
    out = kreg.attention(query, key, jnp.ones_like(key), implementation=implementation)
    return np.asarray(out, np.float32)
