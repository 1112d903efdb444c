"""Numbers that others have published for this benchmark, to stand beside ours."""

from typing import NamedTuple


class Published(NamedTuple):
    """A point of the figure that comes with the authors' code, read off its pixels."""

    train: int
    accuracy: float
    tvd: float


SOURCE = (
    "Memory Mosaics (softmax) as published: read off the pixels of the authors' figure, "
    "±0.003 (hidden markers ±0.01); official automata, whole sequences, number of seeds unknown"
)
MEMORY_MOSAICS = (
    Published(100, 0.924, 0.570),
    Published(500, 0.928, 0.254),
    Published(1000, 0.934, 0.216),
    Published(2500, 0.940, 0.186),
    Published(40000, 0.959, 0.123),
)
