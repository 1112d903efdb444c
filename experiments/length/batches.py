"""Training batches by number; the compiled step draws their sequences itself."""

from typing import Self

import numpy as np

from experiments.length_tasks import device_seed


class Numbers:
    """Iterate over the numbers of a seed's batches; batch n is a function of (seed, n) alone.

    Numbers have no axes, so that they are whole on every device (`kreg.training.Devices`).

    >>> numbers = Numbers(seed=5)
    >>> next(numbers)
    {'seed': array(5, dtype=uint32), 'number': array(0, dtype=uint32)}
    >>> numbers.get_state()
    {'next_index': 1}
    """

    def __init__(self, seed: int) -> None:
        self._next, self._seed = 0, np.asarray(device_seed(seed))

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        number = np.asarray(np.uint32(self._next))
        self._next += 1
        return {"seed": self._seed, "number": number}

    def get_state(self) -> dict:
        return {"next_index": self._next}

    def set_state(self, state: dict) -> None:
        self._next = int(state["next_index"])

    def close(self) -> None:
        """There is nothing to close."""
