"""Settings of every test: quiet CPU JAX, strict rank promotion, where the golden folders are."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


def _folder(variable: str) -> Path | None:
    """The folder a variable names, or None where it is not set."""
    value = os.environ.get(variable)
    return Path(value) if value else None


@pytest.fixture
def key():
    return jax.random.key(0)
