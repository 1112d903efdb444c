"""When a run stops early: a signal, or the end of its slice of time."""

import signal
import threading
import time
from functools import cache
from types import FrameType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Of several processes' reasons the last of these is the reason of all.
_REASONS = (None, "time", "SIGINT", "SIGTERM")


class Stopping:
    """Tell, between two steps, whether to save and stop.

    While it is entered, the first SIGTERM or SIGINT is only remembered; a second one acts as it
    would have before. Outside the main thread Python allows no handlers: only time counts there.
    """

    def __init__(self, time_limit: float | None):
        if time_limit is not None and not time_limit > 0:
            raise ValueError(f"time_limit: expected a positive number of seconds, got {time_limit}")
        self._ends_at = None if time_limit is None else time.monotonic() + time_limit
        self._signal: str | None = None
        self._previous: dict[int, Any] = {}
        self._asked: jax.Array | None = None

    @property
    def reason(self) -> str | None:
        """ "SIGTERM", "SIGINT", "time", or None to go on."""
        if self._signal is not None:
            return self._signal
        timed_out = self._ends_at is not None and time.monotonic() >= self._ends_at
        return "time" if timed_out else None

    def agreed(self) -> str | None:
        """Return the reason that all processes go by, so that all stop at the same step.

        All must call it after every step. Each call asks all processes, and returns what they
        answered to the one before: nobody waits for the step that has just begun.
        """
        if jax.process_count() == 1:
            return self.reason
        answered, self._asked = self._asked, _most(_REASONS.index(self.reason))
        return None if answered is None else _REASONS[int(answered)]

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())


def _most(number: int) -> jax.Array:
    """Begin to find the largest of all processes' numbers."""
    mesh = _all_devices()
    mine = np.full(jax.local_device_count(), number, np.int32)
    spread = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    with jax.set_mesh(mesh):  # whatever mesh the training has set
        return _largest(jax.make_array_from_process_local_data(spread, mine))


@cache
def _all_devices() -> Mesh:
    return Mesh(np.array(jax.devices()), "all")


@jax.jit
def _largest(numbers: jax.Array) -> jax.Array:
    return jax.lax.with_sharding_constraint(jnp.max(numbers), PartitionSpec())
