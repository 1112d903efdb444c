"""Cases that repeat much of what others prove: `make nightly` runs them, ordinary runs do not."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest

NIGHTLY = pytest.mark.nightly


def nightly(values: Iterable[Any], *, but: Collection[Any]) -> list[Any]:
    """All values of a parameter; every run takes those of `but`, `make nightly` all of them."""
    return [x if x in but else pytest.param(x, marks=NIGHTLY) for x in values]
