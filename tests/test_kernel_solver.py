"""The search for thresholds that all kernels share, by itself."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.solver import power, powers, search


def two_levels() -> np.ndarray:
    """Rows of 64 scores y: some equal best ones, the others equal, up to a bandwidth below."""
    best = np.arange(64) < np.array([1, 2, 3, 5, 8, 20, 63])[:, None]
    depths = np.linspace(0.01, 1.2, 60)[:, None, None]
    return np.where(best, 0.7, 0.7 - depths).reshape(-1, 64)


@pytest.mark.core
@pytest.mark.parametrize("is_exact", [False, True])
@pytest.mark.parametrize("order", [1.0, 1.5, 2.0, 2.5, 3.0, 4.0])
def test_from_the_best_score_less_one_every_row_is_found(order, is_exact):
    """The kernel for few keys starts there, where Halley's step may lead past every score."""
    y = jnp.asarray(two_levels(), jnp.float32)

    def sums(cut, floor):
        x = jnp.maximum(y - cut[:, None], 0)
        return tuple(jnp.sum(power(x, m), axis=1) for m in powers(order))

    _, cut = search(order, is_exact, jnp.max(y, axis=1) - 1, sums, jnp.max, ())
    total = np.sum(np.maximum(np.float64(y) - np.float64(cut)[:, None], 0) ** order, axis=1)
    # Half types stop at steps of 2^-6 (2^-10 below order 2), which leave their cube (square);
    # float32 at rounding the threshold, once for each of 64 keys.
    np.testing.assert_allclose(total ** (1 / order), 1, atol=2e-5 if is_exact else 1e-3)
