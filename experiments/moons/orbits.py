"""The data: three moons on circles, seen at equal steps of time.

A moon of period p stands at (sin a, cos a) with a = 2 pi t / p + 0.3. A system is three periods; it
repeats after their common period. Axes: T points, 6 coordinates, two a moon.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32

MOONS = 3
PERIODS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5)
PHASE = 0.3
# Whole systems repeat at least so often in a window.
_REPEATS = 3

type Periods = tuple[float, ...]

# The nine triples with the shortest common periods; the last one is never trained on.
SYSTEMS: tuple[Periods, ...] = (
    (0.5, 1.0, 2.0),
    (0.5, 1.0, 1.5),
    (0.5, 1.0, 3.0),
    (0.5, 1.5, 3.0),
    (1.0, 1.5, 3.0),
    (0.5, 1.0, 2.5),
    (1.0, 1.5, 2.0),
    (0.5, 1.5, 2.0),
    (1.0, 2.0, 3.0),
)
TRAINED, HELD_OUT = SYSTEMS[:-1], SYSTEMS[-1]


def common_period(periods: Periods) -> float:
    """The time after which a system repeats; periods are multiples of a half.

    >>> common_period((0.5, 1.0, 2.5)), common_period((1.0, 2.0, 3.0))
    (5.0, 6.0)
    """
    return math.lcm(*(round(2 * period) for period in periods)) / 2


LONGEST = max(common_period(periods) for periods in SYSTEMS)
# The time that all systems share; where a window may start.
EVERYTHING = common_period(tuple(itertools.chain(*SYSTEMS)))


def spacing(length: int) -> float:
    """The time between points, so that a window of `length` holds three of the longest repeats."""
    return _REPEATS * LONGEST / length


def positions(
    periods: Periods, start: int, points: int, step: float, *, from_last: bool = False
) -> Float32[np.ndarray, "T 6"]:
    """Place the moons at the times (start + i) step; `from_last` sees the others from the last one.

    >>> positions((1.0, 2.0, 4.0), 0, 2, 0.5)[:, :4].round(3).tolist()
    [[0.296, 0.955, 0.296, 0.955], [-0.296, -0.955, 0.955, -0.296]]
    """
    time = step * (start + np.arange(points))
    angle = 2 * np.pi * time[:, None] / np.array(periods) + PHASE
    moons = np.stack([np.sin(angle), np.cos(angle)], axis=-1)
    if from_last:
        moons[:, :-1] -= moons[:, -1:]
    return moons.reshape(points, -1).astype(np.float32)


@dataclass(frozen=True)
class Windows:
    """Rows by number: window `i` is drawn from (seed, i), a trained system at a random start.

    >>> windows = Windows(rows=4, length=8, seed=0)
    >>> len(windows), windows[0]["points"].shape
    (4, (9, 6))
    """

    rows: int
    length: int
    seed: int

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((self.seed, index))
        return {"points": window(TRAINED[rng.integers(len(TRAINED))], self.length, rng)}


def window(
    periods: Periods, length: int, rng: np.random.Generator
) -> Float32[np.ndarray, "length+1 6"]:
    """A window of `length` points to read, and one more to predict."""
    step = spacing(length)
    start = int(rng.integers(math.ceil(EVERYTHING / step)))
    return positions(periods, start, length + 1, step)


def held_out(length: int, count: int, seed: int) -> Float[np.ndarray, "count length+1 6"]:
    """Windows of the system that is never trained on."""
    rng = np.random.default_rng((seed, 2**32))
    return np.stack([window(HELD_OUT, length, rng) for _ in range(count)])
