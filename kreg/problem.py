r"""An attention problem in canonical form: what every implementation is handed.

B batch, T queries, S keys, N heads, K key heads, G = N / K heads a group, H width of keys, V width
of values.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from kreg.bandwidth import Rule
from kreg.kernels import Kernel
from kreg.masks import Mask
from kreg.split import WHOLE, Split


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "query", "key", "value", "bias", "null", "mask", "kernel", "rule", "rows", "columns",
        "pairs", "scale", "dropout_key", "draws",
    ],
    meta_fields=["soft_cap", "dropout_rate", "precision", "with_stats", "split"],
)  # fmt: skip
@dataclasses.dataclass(frozen=True)
class Problem:
    """Arrays and options of one attention call, or of a part of its batch, heads, queries, keys."""

    query: Float[Array, "B T N H"]
    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K V"]
    bias: Float[Array, "#B #N #T #S"] | None
    null: Float[Array, "#B #N #T 1"] | None
    mask: Mask
    kernel: Kernel  # an order that is an array has shape [#B, #N, #T, 1]
    rule: Rule  # with h an array of shape [#B, #N, #T, 1]
    rows: Int[Array, " T"]  # number of each query; parts of a problem keep theirs
    columns: Int[Array, " S"]
    pairs: UInt32[Array, "B N"]  # absolute index of each batch entry and head
    scale: Float[Array, ""]
    dropout_key: UInt32[Array, " 2"] | None
    soft_cap: float | None
    dropout_rate: float
    precision: jax.lax.PrecisionLike
    with_stats: bool
    split: Split = WHOLE  # of the keys; those of the problem are the ones here
    # Numbers that dropout draws by, where these are a larger problem's.
    draws: tuple[Int[Array, " T"], Int[Array, " S"]] | None = None

    @property
    def dtype(self):
        """Type of scores, weights and sums: float32 or wider."""
        return jnp.promote_types(jnp.result_type(self.query, self.key, self.value), jnp.float32)

    @property
    def sizes(self) -> dict[str, int]:
        """Length of each axis by its letter: b, t, s, n, k."""
        batch, queries, heads, _ = self.query.shape
        keys, groups = self.key.shape[1:3]
        return {"b": batch, "t": queries, "s": keys, "n": heads, "k": groups}

    def axes(self) -> "Problem":
        """Names the axes of every array, in a tree of the problem's structure; dots have none."""

        def named(tree, names):
            return jax.tree.map(lambda _: names, tree)

        return dataclasses.replace(
            self,
            query=named(self.query, "btn."),
            key=named(self.key, "bsk."),
            value=named(self.value, "bsk."),
            bias=named(self.bias, "bnts"),
            null=named(self.null, "bnt."),
            mask=self.mask.axes(),
            kernel=named(self.kernel, "bnt."),
            rule=named(self.rule, "bnt."),
            rows="t",
            columns="s",
            pairs="bn",
            scale="",
            dropout_key=named(self.dropout_key, "."),
            draws=None if self.draws is None else ("t", "s"),
        )

    @property
    def drawn(self) -> tuple[Int[Array, " T"], Int[Array, " S"]]:
        """Numbers of queries and keys that dropout draws by."""
        return (self.rows, self.columns) if self.draws is None else self.draws

    def part(self, **cuts: tuple[int | Array, int]) -> "Problem":
        """Cuts axes to (start, size); arrays of size 1 along an axis serve all parts of it.

        A start may be traced, the size not.
        """
        problem = self
        for axis, (start, size) in cuts.items():
            problem = problem._along(axis, functools.partial(_slice, start=start, size=size))
        return problem

    def lengthened(self, axis: str, more: int) -> "Problem":
        """Adds entries at the end of an axis; what they hold is finite where the last entry is."""

        def pad(x, at):
            return jnp.pad(x, [(0, more if i == at else 0) for i in range(x.ndim)], mode="edge")

        sizes = self.sizes
        problem = self._along(axis, pad)
        numbers = jnp.arange(sizes[axis] + more)
        if axis == "t":
            return dataclasses.replace(problem, rows=numbers)
        return dataclasses.replace(problem, columns=numbers)

    def _along(self, axis: str, change: Callable[[Array, int], Array]) -> "Problem":
        """Changes every array that has the axis at more than size 1."""
        full = self.sizes[axis]

        def leaf(x, names):
            at = names.find(axis)
            return change(x, at) if at >= 0 and x.shape[at] == full else x

        return jax.tree.map(leaf, self, self.axes())


def _slice(x: Array, axis: int, start: int | Array, size: int) -> Array:
    if isinstance(start, int):
        return jax.lax.slice_in_dim(x, start, start + size, axis=axis)
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis=axis)
