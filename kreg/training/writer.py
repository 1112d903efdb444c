"""Of several processes that make one run, the first writes; the others wait until it has."""

import jax
from jax.experimental import multihost_utils


def is_first() -> bool:
    """Whether this process writes; the only one does."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Return when all processes have come to this point, which has a name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)
