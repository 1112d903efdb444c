"""Attention as kernel regression: sparse attention with compact kernels, in JAX."""

__version__ = "0.1.0"
