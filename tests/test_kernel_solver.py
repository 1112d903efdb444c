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
    norm, _ = found(two_levels(), order, is_exact)
    # Half types stop at steps of 2^-6 (2^-10 below order 2), which leave their cube (square);
    # float32 at rounding the threshold, once for each of 64 keys.
    np.testing.assert_allclose(norm, 1, atol=2e-5 if is_exact else 1e-3)


def found(y: np.ndarray, order: float, is_exact: bool) -> tuple[np.ndarray, int]:
    """The norms of a block's rows at the thresholds that are found, and after how many passes."""
    given = jnp.asarray(y, jnp.float32)

    def sums(cut, floor):
        x = jnp.maximum(given - cut[:, None], 0)
        return tuple(jnp.sum(power(x, m), axis=1) for m in powers(order))

    passes, cut = search(order, is_exact, jnp.max(given, axis=1) - 1, sums, jnp.max, ())
    above = np.maximum(np.float64(given) - np.float64(cut)[:, None], 0)
    return np.sum(above**order, axis=1) ** (1 / order), int(passes)


@pytest.mark.core
@pytest.mark.parametrize("is_exact", [False, True])
@pytest.mark.parametrize("order", [1.0, 1.5, 2.0, 3.0, 4.0])
def test_many_keys_that_share_the_weight_have_it_all(order, is_exact):
    """Each has so little that the guess hardly moves while the sum is still far from 1."""
    rng, keys = np.random.default_rng(0), 4096
    # The first step, of almost 1, rounds by 2^-24; below order 2 none goes back.
    atol = 1e-5 + (order < 2) * 2.0**-24 * keys ** (1 / order) if is_exact else 1e-3
    for width in (0.0, 1e-5, 1e-3, 1e-2, 0.1, 1.0):
        y = width * rng.normal(size=(1, keys))
        norm, passes = found(y - y.max(), order, is_exact)
        np.testing.assert_allclose(norm, 1, atol=atol, rtol=0, err_msg=str(width))
        assert passes <= 12, f"{passes} passes, {width}"
