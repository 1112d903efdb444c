"""Of several processes that make one run, the first writes; the others wait until it has."""

import math
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree


def is_first() -> bool:
    """Whether this process writes; the only one does."""
    return jax.process_index() == 0


def fetch(tree: PyTree) -> Any:
    """Bring arrays to the host, from devices of other processes too; all must call it."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def as_first_says(number: float | None) -> float | None:
    """Give all processes the first one's number, or None."""
    if jax.process_count() == 1:
        return number
    told = np.asarray(math.nan if number is None else number, np.float32)
    found = float(multihost_utils.broadcast_one_to_all(told))
    return None if math.isnan(found) else found


def wait_for_all(what: str) -> None:
    """Return when all processes have come to this point, which has a name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)
