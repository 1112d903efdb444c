"""Rows of any length are summed whole, each number once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kreg.rowwise import totals

pytestmark = pytest.mark.core


@pytest.mark.parametrize("n", [1, 127, 128, 1536, 1792, 2048, 64 * 29, 64 * 37 + 5, 65_536])
def test_totals_are_the_sums(n):
    x = jax.random.randint(jax.random.key(n), (2, 3, n), -8, 9).astype(jnp.float32)
    for found, wanted in zip(jax.jit(totals)(x, x * x), (x, x * x), strict=True):
        np.testing.assert_array_equal(found, np.asarray(wanted, np.float64).sum(-1))
