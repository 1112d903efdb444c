"""What accuracy is promised, in one table by type. Everything is measured against the oracle.

Inputs are rounded to the type first, so the numbers say what the computation adds. `score` is the
machine epsilon of the arithmetic on scores (float32 for the half types): rounding a score of size
|z| costs any implementation that much, in weights and in gradients.
"""

from dataclasses import dataclass

import jax.numpy as jnp


@dataclass(frozen=True)
class Tolerance:
    """Errors allowed in outputs (relative to the largest value) and gradients (largest entry)."""

    values: float
    gradients: float
    epsilon: float
    score: float

    def total(self, support: int) -> float:
        """|sum p - 1| <= 4 eps sqrt(support) + 2 eps."""
        return 4 * self.epsilon * support**0.5 + 2 * self.epsilon

    def output(self, largest_score: float, largest_value: float = 1.0) -> float:
        """(values + 4 eps max|z|) max|V|."""
        return (self.values + 4 * self.score * largest_score) * largest_value

    def gradient(self, largest_score: float, largest_entry: float) -> float:
        """(gradients + 16 eps max|z|) times the largest entry of the oracle's gradient."""
        return (self.gradients + 16 * self.score * largest_score) * largest_entry


def _epsilon(dtype: str) -> float:
    return float(jnp.finfo(dtype).eps)


_SINGLE = _epsilon("float32")

TOLERANCES = {
    "float64": Tolerance(1e-10, 1e-10, _epsilon("float64"), _epsilon("float64")),
    "float32": Tolerance(2e-6, 1e-5, _SINGLE, _SINGLE),
    # float16 has three bits more than bfloat16: an eighth of its figures.
    "float16": Tolerance(5e-4, 1.25e-3, _epsilon("float16"), _SINGLE),
    "bfloat16": Tolerance(4e-3, 1e-2, _epsilon("bfloat16"), _SINGLE),
}
