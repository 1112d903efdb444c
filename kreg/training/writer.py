"""Of several processes that make one run, the first writes; the others wait until it has."""

from typing import Any

import jax
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


def wait_for_all(what: str) -> None:
    """Return when all processes have come to this point, which has a name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)
