"""What a kernel is compiled for, and the shapes that follow from it."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic_tpu.sizes import Sizes, row_multiple


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes and options of one attention call; hashable, for all of it is static.

    width, value_width: of keys and values, padded to whole rows of registers.
    order: r, 1 or more.
    rule: the bandwidth rule's class.
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
    by_key: bool
    dropout_rate: float
    with_support: bool
    sizes: Sizes

    @property
    def is_exact(self) -> bool:
        """Whether products are to float32's precision."""
        return self.dtype == jnp.float32

    @property
    def ones(self) -> int:
        """Rows of ones above the values: weights times these are the sums of rounded weights.

        What all weights of a row are off by alike cancels if averages are divided by that. Where
        weights are dropped it is not what to divide by.
        """
        return 0 if self.is_exact or self.drops else row_multiple(self.dtype)

    @property
    def precision(self):
        return lax.Precision.HIGHEST if self.is_exact else lax.Precision.DEFAULT

    @property
    def drops(self) -> bool:
        return self.dropout_rate > 0

    @property
    def blocks(self) -> int:
        """Blocks of queries."""
        return -(-self.queries // self.sizes.block)

    @property
    def tiles(self) -> int:
        """Tiles of keys."""
        return -(-self.keys // self.sizes.tile)

    @property
    def rows(self) -> int:
        """Queries, padded ones too."""
        return self.blocks * self.sizes.block

    @property
    def columns(self) -> int:
        """Keys, padded ones too."""
        return self.tiles * self.sizes.tile

    @property
    def share(self) -> int:
        """Heads that share a key head."""
        return self.heads // self.key_heads

    @property
    def keeps(self) -> bool:
        """Whether the scores of a block stay on chip, and are formed once."""
        return 4 * self.columns * self.sizes.block <= self.sizes.scores
