"""What a kernel is compiled for, and the shapes that follow from it."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

# Queries in a block and keys in a tile: what one warpgroup multiplies at once, and the unit that is
# skipped.
TILE = 64
# Lengths of arrays that are copied in swizzled tiles are multiples of this.
LENGTH = 8
# Bits in a word of the map of live tiles, and the words that one copy must hold at least.
WORD = 32
_WORDS_A_COPY = 4
# Shared memory that a program may have, and each of two on a multiprocessor; what a buffer is
# rounded up to; what sums across warps take, and barriers; the most tiles that are fetched ahead.
_SHARED_BYTES = 227 * 1024
_HALF_BYTES = 113 * 1024
_ROUNDED = 1024
ACROSS_WARPS_BYTES = 1024
_BARRIER_BYTES = 1024
_MOST_STAGES = 3


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes and options of one attention call; hashable, for all of it is static.

    width, value_width: of keys and values, padded to whole tiles.
    order: r, 1 or more.
    rule: the bandwidth rule's class.
    dtype: of the operands of products: float32 inputs are sums of `parts` bfloat16 ones.
    interpreted: whether the kernel is to be run by the interpreter, which knows of no products of
        registers and of no sums that go on in an accumulator.
    by_key: whether keys have numbers of their own that say which queries see them.
    dropout_rate: probability with which a weight is dropped.
    with_support: whether keys with weight are counted.
    """

    batch: int
    queries: int
    keys: int
    heads: int
    key_heads: int
    width: int
    value_width: int
    order: float
    rule: type
    dtype: Any
    out_dtype: Any
    parts: int
    interpreted: bool
    by_key: bool
    dropout_rate: float
    with_support: bool

    @property
    def sums_rounded(self) -> bool:
        """Whether averages are divided by the sums of weights as products take them.

        What all weights of a row are off by alike then cancels; wide values leave no registers for
        it, and parts of float32 are off by nothing.
        """
        return self.parts == 1 and self.value_width <= TILE

    @property
    def in_registers(self) -> bool:
        """Whether weights go to a product from registers; parts would take too many."""
        return self.parts == 1 and not self.interpreted

    @property
    def drops(self) -> bool:
        return self.dropout_rate > 0

    @property
    def blocks(self) -> int:
        """Blocks of queries."""
        return -(-self.queries // TILE)

    @property
    def tiles(self) -> int:
        """Tiles of keys."""
        return -(-self.keys // TILE)

    @property
    def share(self) -> int:
        """Heads that share a key head."""
        return self.heads // self.key_heads

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Which parts of two operands are multiplied, small products first."""
        pairs = [(i, j) for i in range(self.parts) for j in range(self.parts)]
        return sorted((p for p in pairs if sum(p) < self.parts), key=sum, reverse=True)


def stages(shared: Callable[[int], dict[str, Any]]) -> int:
    """How many tiles to fetch ahead, for what a program shares given that number.

    Two, where two programs then share a multiprocessor; else as many as fit.
    """
    needed = {count: _bytes(shared(count)) for count in range(1, _MOST_STAGES + 1)}
    for least, limit in ((2, _HALF_BYTES), (1, _SHARED_BYTES)):
        fitting = [count for count, size in needed.items() if size <= limit]
        if fitting and max(fitting) >= least:
            return max(fitting)
    raise NotImplementedError(f"a program would need {needed[1]} bytes of shared memory")


def _bytes(shared: dict[str, Any]) -> int:
    buffers = [x for x in shared.values() if hasattr(x, "dtype")]
    sizes = (math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in buffers)
    return (
        sum(-(-size // _ROUNDED) * _ROUNDED for size in sizes) + ACROSS_WARPS_BYTES + _BARRIER_BYTES
    )


def words(tiles: int) -> int:
    """Words of a map of so many tiles; what is copied must be a multiple of 16 bytes."""
    return -(-tiles // (WORD * _WORDS_A_COPY)) * _WORDS_A_COPY
