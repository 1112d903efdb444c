"""Training batches by number: keys, of which the compiled step draws its sequences."""

from typing import Self

import jax
import numpy as np

from experiments.length_tasks import batch_key


class Keys:
    """Iterate over the keys of a seed's batches; batch n is a function of (seed, n) alone.

    >>> keys = Keys(seed=0)
    >>> first = next(keys)["key"]
    >>> keys.set_state({"next_index": 0})
    >>> bool((next(keys)["key"] == first).all()), keys.get_state()
    (True, {'next_index': 1})
    """

    def __init__(self, seed: int) -> None:
        self._next = 0
        self._key = jax.jit(lambda step: jax.random.key_data(batch_key(seed, "train", step)))

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        key = np.asarray(self._key(np.uint32(self._next)))
        self._next += 1
        return {"key": key}

    def get_state(self) -> dict:
        return {"next_index": self._next}

    def set_state(self, state: dict) -> None:
        self._next = int(state["next_index"])

    def close(self) -> None:
        """There is nothing to close."""
