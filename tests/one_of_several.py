"""One of the processes that test_processes.py starts; it stops, kills or miscounts them."""

import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from kreg.training.processes import Processes, start
from kreg.training.stopping import Stopping


def over_all_devices() -> jax.Array:
    """Add up numbers of which every device holds one: 1, 2, ..."""
    mesh = jax.make_mesh((jax.device_count(),), ("all",))
    numbers = np.arange(1, jax.device_count() + 1)
    spread = jax.NamedSharding(mesh, jax.P("all"))
    held = jax.make_array_from_callback(numbers.shape, spread, lambda at: numbers[at])
    with jax.set_mesh(mesh):
        return jax.jit(jnp.sum)(held)


def add(processes: Processes, folder: Path) -> None:
    tell(processes, sum=int(over_all_devices()))


def fail(processes: Processes, folder: Path) -> None:
    """The second one fails while the first one waits."""
    if not processes.is_first:
        raise ArithmeticError("on purpose")
    time.sleep(600)


def leave(processes: Processes, folder: Path) -> None:
    sys.exit(3)


def idle(processes: Processes, folder: Path) -> None:
    (folder / f"ready{processes.index}").touch()
    time.sleep(600)


def step(processes: Processes, folder: Path, limit: float | None = None) -> None:
    """Take steps until somebody has a reason to stop."""
    steps, reason = 0, None
    mesh = jax.make_mesh((jax.device_count(),), ("all",))
    with Stopping(limit) as stopping, jax.set_mesh(mesh):
        while reason is None:
            over_all_devices().block_until_ready()
            steps += 1
            reason = stopping.agreed()
            if steps == 5:
                (folder / f"ready{processes.index}").touch()
    tell(processes, steps=steps, reason=reason)


def step_in_time(processes: Processes, folder: Path) -> None:
    """Only the first one's time is limited."""
    step(processes, folder, limit=1.0 if processes.is_first else None)


def tell(processes: Processes, **found: object) -> None:
    # Gloo writes to the same place, and not always whole lines.
    print("\n" + json.dumps({"index": processes.index, "count": processes.count, **found}))


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 2)
    with start(timeout=int(sys.argv[3]), patience=100) as processes:
        globals()[sys.argv[1]](processes, Path(sys.argv[2]))
