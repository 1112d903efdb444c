r"""An attention problem in canonical form: what every implementation is handed.

B batch, T queries, S keys, N heads, K key heads, G = N / K heads a group, H width of keys, V width
of values.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from kreg.bandwidth import Rule
from kreg.kernels import Kernel


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "query", "key", "value", "bias", "mask", "kernel", "rule", "rows", "offset", "scale",
        "query_lengths", "key_lengths", "query_segments", "key_segments", "dropout_key",
    ],
    meta_fields=["is_causal", "window", "soft_cap", "dropout_rate", "precision"],
)  # fmt: skip
@dataclasses.dataclass(frozen=True)
class Problem:
    """Arrays and options of one attention call, or of a block of its queries."""

    query: Float[Array, "B T N H"]
    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K V"]
    bias: Float[Array, "#B #N #T #S"] | None
    mask: Bool[Array, "#B #N #T #S"] | None
    kernel: Kernel  # an order that is an array has shape [#B, #N, #T, 1]
    rule: Rule  # with h an array of shape [#B, #N, #T, 1]
    rows: Int[Array, " T"]  # absolute index of each query; blocks of queries keep theirs
    offset: Int[Array, " #B"]
    query_lengths: Int[Array, " B"] | None
    key_lengths: Int[Array, " B"] | None
    query_segments: Int[Array, "B T"] | None
    key_segments: Int[Array, "B S"] | None
    dropout_key: UInt32[Array, " 2"] | None
    scale: Float[Array, ""]
    is_causal: bool
    window: tuple[int, int] | None
    soft_cap: float | None
    dropout_rate: float
    precision: jax.lax.PrecisionLike

    @property
    def dtype(self):
        """Type of scores, weights and sums: float32 or wider."""
        return jnp.promote_types(jnp.result_type(self.query, self.key, self.value), jnp.float32)

    def per_query(self) -> "Problem":
        """Marks the fields that have one row a query with that axis, the others with -1."""
        queries = self.query.shape[1]

        def axis(x, at):
            return at if x is not None and x.shape[at] == queries and queries > 1 else -1

        marks = jax.tree.map(lambda _: -1, self)
        return dataclasses.replace(
            marks,
            query=1,
            rows=0,
            bias=None if self.bias is None else axis(self.bias, 2),
            mask=None if self.mask is None else axis(self.mask, 2),
            kernel=jax.tree.map(lambda x: axis(x, 2), self.kernel),
            rule=jax.tree.map(lambda h: axis(h, 2), self.rule),
            query_segments=None if self.query_segments is None else 1,
        )
