"""Copy, Reverse and Sort: the target holds the source's symbols in some order."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

from experiments.length_tasks.randomness import Ints, Random
from experiments.length_tasks.task import Sample, Task, namespace, pick, require


class Symbols(NamedTuple):
    """Hold L and the symbols, of which the first L count."""

    length: Ints
    symbols: Ints


@dataclass(frozen=True)
class Rearrange(Task):
    """Draw L symbols, independent and uniform; the target has them in another order."""

    vocab_size: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        require("vocab_size", 1, self.vocab_size, 2**31 - 2)

    @property
    def data_ids(self) -> int:
        return self.vocab_size

    def source_length(self, length: int) -> int:
        return length

    def target_length(self, length: int) -> int:
        return length

    def draw(self, random: Random, tables: Any) -> Symbols:
        length = self.draw_length(random)
        shape = (random.size(length, self.lengths[-1]),)
        return Symbols(length, random.integers(0, self.vocab_size - 1, shape))

    def assemble(self, draws: Symbols) -> Sample:
        return Sample(draws.symbols, draws.length, self.rearrange(draws), draws.length)

    @abstractmethod
    def rearrange(self, draws: Symbols) -> Ints:
        """Return the target."""


@dataclass(frozen=True)
class Copy(Rearrange):
    """Repeat the source.

    >>> task = Copy()
    >>> sample = task.sample(seed=0, split="test", index=0, length=5)
    >>> bool((sample.source == sample.target).all()), len(sample.target)
    (True, 5)
    """

    def rearrange(self, draws: Symbols) -> Ints:
        return draws.symbols


@dataclass(frozen=True)
class Reverse(Rearrange):
    """Repeat the source backwards."""

    def rearrange(self, draws: Symbols) -> Ints:
        xp = namespace(draws.symbols)
        return pick(draws.symbols, draws.length - 1 - xp.arange(draws.symbols.shape[0]))


@dataclass(frozen=True)
class Sort(Rearrange):
    """Put the source's symbols in ascending order."""

    def rearrange(self, draws: Symbols) -> Ints:
        xp = namespace(draws.symbols)
        inside = xp.arange(draws.symbols.shape[0]) < draws.length
        return xp.sort(xp.where(inside, draws.symbols, self.vocab_size))
