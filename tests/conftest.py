"""Settings of every test: quiet CPU JAX, strict rank promotion, the core's doctests marked."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

CORE = Path(__file__).resolve().parent.parent / "kreg"


def pytest_collection_modifyitems(items):
    """The examples of the pure core, which are no functions to decorate, belong to the core too."""
    for item in items:
        if item.path.parent == CORE:
            item.add_marker(pytest.mark.core)


@pytest.fixture
def key():
    return jax.random.key(0)
