"""Rows of scores that break threshold solvers, as float64 arrays already rounded to a type."""

import numpy as np

from experiments.hardware.from_tests import load

BAD = (np.nan, np.inf, -np.inf, 65504.0)


def hard_rows(width: int, dtype: str) -> np.ndarray:
    """Return scores [R, width]: flat, one-hot, two levels, ramps, spreads from 1e-3 to 1e3."""
    rng = np.random.default_rng(width)
    large = 3e4 if dtype == "float16" else 1e6
    normal, ones = rng.normal(size=width), np.ones(width)
    spike = (np.arange(width) == width // 2).astype(np.float64)
    rows = [0 * ones, large * ones, -large * ones]
    rows += [gap * spike for gap in (1.0, 2.0, 3.0, 100.0)]
    rows += [level * (np.arange(width) % 2) for level in (0.01, 1.0, 2.0)]
    rows += [np.linspace(0, 1, width), np.linspace(50, -50, width), normal + large]
    rows += [spread * normal for spread in (1e-3, 1e-2, 0.1, 0.3, 1.0, 10.0, 1e3, large / 4)]
    return load("attention_inputs").rounded(np.stack(rows), dtype)


def padded_rows(width: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Return such rows and their mask, with rows of one key, of no key and of every fifth.

    What is padding holds NaN, infinities and the largest float16.
    """
    x = hard_rows(width, dtype)
    where = np.ones(x.shape, bool)
    where[-3:], where[0, width // 3 :], where[-3, 7] = False, False, True
    where[-1, ::5] = True
    x[~where] = np.resize(BAD, int((~where).sum()))
    return x, where


def long_rows(width: int, dtype: str) -> np.ndarray:
    """Return flat and nearly flat rows [6, width]: fixed counts of iterations fail here."""
    normal = np.random.default_rng(0).normal(size=width)
    rows = [0 * normal, 0 * normal + 1000.0, 0.01 * (np.arange(width) % 2)]
    rows += [1e-3 * normal, 0.1 * normal, normal]
    return load("attention_inputs").rounded(np.stack(rows), dtype)
