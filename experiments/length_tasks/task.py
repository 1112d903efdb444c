"""What every task has: a range of lengths, a law of draws, and a sample put together from draws.

Axes: S source tokens, R target tokens; padded where the length beside them is smaller.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np

from experiments.length_tasks.randomness import Int, Ints, Random, host_random


class Sample(NamedTuple):
    """Hold a source and its target; what lies past a length means nothing."""

    source: Ints
    source_length: Int
    target: Ints
    target_length: Int

    @classmethod
    def of(cls, source: Any, target: Any) -> Sample:
        """Make a sample of two lists of ids.

        >>> Sample.of([5, 3], [3, 5]).source_length
        2
        """
        source, target = np.asarray(source, np.int32), np.asarray(target, np.int32)
        return cls(source, len(source), target, len(target))

    def trimmed(self) -> Sample:
        """Cut the padding off, on the host."""
        source, target = self.source[: self.source_length], self.target[: self.target_length]
        return Sample.of(source, target)


@dataclass(frozen=True)
class Task(ABC):
    """Describe a task with lengths L uniform on seq_len - vary_len to seq_len + vary_len.

    A subclass says what is drawn and how a sample comes of it. Its settings are all there is to it,
    so that tasks compare, hash and serve as static arguments.

    Raises:
        ValueError: vary_len is negative or not below seq_len, or a setting makes no task.
    """

    seq_len: int = 48
    vary_len: int = 16

    has_separator: ClassVar[bool] = True
    """Whether a separator stands between source and target in the sequence."""
    spare_ids: ClassVar[int] = 0
    """Ids that asentmax leaves unused between the data and its special ids."""

    def __post_init__(self) -> None:
        if not 0 <= self.vary_len < self.seq_len:
            raise ValueError(f"vary_len: expected 0 to {self.seq_len - 1}, got {self.vary_len}")

    @property
    @abstractmethod
    def data_ids(self) -> int:
        """The ids of sources and targets are those below this number."""

    @property
    def classes(self) -> int | None:
        """The number of classes where every source token has a label; None for other tasks."""
        return None

    @property
    def lengths(self) -> range:
        """Every L that can be drawn."""
        return range(self.seq_len - self.vary_len, self.seq_len + self.vary_len + 1)

    @cached_property
    def longest_source(self) -> int:
        """The most source tokens of any L in range."""
        return max(map(self.source_length, self.lengths))

    @cached_property
    def longest_target(self) -> int:
        """The most target tokens of any L in range."""
        return max(map(self.target_length, self.lengths))

    @abstractmethod
    def source_length(self, length: int) -> int:
        """The most source tokens for this L."""

    @abstractmethod
    def target_length(self, length: int) -> int:
        """The most target tokens for this L."""

    def at(self, length: int) -> Self:
        """Return the same task with every L equal to `length`.

        Raises:
            ValueError: the task has no sample of this length.
        """
        return dataclasses.replace(self, seq_len=length, vary_len=0)

    def tables(self, seed: int, split: str) -> Any:
        """Return what all samples of a split share; () for most tasks."""
        return ()

    @abstractmethod
    def draw(self, random: Random, tables: Any) -> Any:
        """Draw what a sample is made of."""

    @abstractmethod
    def assemble(self, draws: Any) -> Sample:
        """Put a sample together: a pure function of the draws, for NumPy and JAX arrays."""

    def sample(self, seed: int, split: str, index: int, length: int | None = None) -> Sample:
        """Return sample `index` of a split, a function of the arguments alone.

        Args:
            length: L; None draws it.

        Raises:
            ValueError: a number is out of its range.
        """
        task = self if length is None else self.at(length)
        random = host_random(seed, split, index)
        return task.assemble(task.draw(random, task.tables(seed, split))).trimmed()

    def draw_length(self, random: Random) -> Ints:
        """Draw L."""
        return random.integers(self.lengths[0], self.lengths[-1])

    def by_length(self, random: Random, of_length: Callable[[int], int], length: Ints) -> Ints:
        """Evaluate a function of L, on the device by a table."""
        first = self.lengths[0]
        return random.lookup([of_length(number) for number in self.lengths], length - first)


def require(name: str, low: int, value: int, high: int) -> None:
    """Check that a setting lies in a range that includes both ends.

    Raises:
        ValueError: it does not.
    """
    if not low <= value <= high:
        raise ValueError(f"{name}: expected {low} to {high}, got {value}")


def namespace(array: Any) -> Any:
    """Return the module, NumPy or jax.numpy, that an array belongs to."""
    return array.__array_namespace__()


def pick(values: Ints, index: Ints) -> Ints:
    """Read values at places, some of which may lie outside and then mean nothing."""
    xp = namespace(values)
    return values[xp.clip(index, 0, values.shape[0] - 1)]
