"""How much of a budget of minutes is left."""

import time


class Deadline:
    """Count down from a number of minutes.

    >>> Deadline(1).left <= 60, Deadline(0).passed
    (True, True)
    """

    def __init__(self, minutes: float):
        self._ends = time.monotonic() + 60 * minutes

    @property
    def left(self) -> float:
        """Seconds, never below 0."""
        return max(0.0, self._ends - time.monotonic())

    @property
    def passed(self) -> bool:
        return self.left == 0
