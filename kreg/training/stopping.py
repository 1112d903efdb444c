"""When a run stops early: a signal, or the end of its slice of time."""

import signal
import threading
import time
from types import FrameType
from typing import Any, Self


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

    @property
    def reason(self) -> str | None:
        """ "SIGTERM", "SIGINT", "time", or None to go on."""
        if self._signal is not None:
            return self._signal
        timed_out = self._ends_at is not None and time.monotonic() >= self._ends_at
        return "time" if timed_out else None

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
