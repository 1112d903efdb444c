"""N-back and Local count: a label for every source token."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from experiments.length_tasks.randomness import Ints, Random
from experiments.length_tasks.rearranging import Symbols
from experiments.length_tasks.task import Sample, Task, namespace, pick, require


@dataclass(frozen=True)
class NBack(Task):
    """Label every token with the one `num_steps` before it, 0 where there is none.

    A source is 0 and L symbols, independent and uniform on 1..vocab_size - 1.

    >>> sample = NBack().sample(seed=0, split="test", index=0, length=6)
    >>> len(sample.source), bool((sample.target[2:] == sample.source[:-2]).all())
    (7, True)
    """

    vocab_size: int = 16
    num_steps: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        require("vocab_size", 2, self.vocab_size, 2**31 - 2)
        require("num_steps", 1, self.num_steps, self.lengths[0])

    @property
    def data_ids(self) -> int:
        return self.vocab_size

    @property
    def classes(self) -> int:
        return self.vocab_size

    def source_length(self, length: int) -> int:
        return length + 1

    def target_length(self, length: int) -> int:
        return length + 1

    def draw(self, random: Random, tables: Any) -> Symbols:
        length = self.draw_length(random)
        shape = (random.size(length, self.lengths[-1]),)
        return Symbols(length, random.integers(1, self.vocab_size - 1, shape))

    def assemble(self, draws: Symbols) -> Sample:
        xp = namespace(draws.symbols)
        source = xp.pad(draws.symbols, (1, 0))
        target = xp.pad(source, (self.num_steps, 0))[: source.shape[0]]
        return Sample(source, draws.length + 1, target, draws.length + 1)


class Blocks(NamedTuple):
    """Hold the number of blocks, and the symbol and the length of each."""

    count: Ints
    symbols: Ints
    repeats: Ints


@dataclass(frozen=True)
class LocalCount(Task):
    """Label every token with the number of equal ones right before it.

    A source is floor(L / ((max_reps + 2) / 2)) blocks of one symbol each, their lengths uniform on
    2..max_reps and neighbours of different symbols (`Random.chain`), so that L is its mean length
    at most. There are `max_reps` classes; the authors' tokenizer has room for fewer.

    >>> LocalCount().sample(seed=0, split="test", index=0).target[:3].tolist()
    [0, 1, 2]
    """

    seq_len: int = 96
    vary_len: int = 32
    vocab_size: int = 16
    max_reps: int = 48

    def __post_init__(self) -> None:
        super().__post_init__()
        require("vocab_size", 2, self.vocab_size, 2**31 - 2)
        require("max_reps", 2, self.max_reps, 2 * self.lengths[0] - 2)

    @property
    def data_ids(self) -> int:
        return self.vocab_size

    @property
    def classes(self) -> int:
        return self.max_reps

    def blocks(self, length: int) -> int:
        """The number of blocks."""
        return 2 * length // (self.max_reps + 2)

    def source_length(self, length: int) -> int:
        return self.blocks(length) * self.max_reps

    def target_length(self, length: int) -> int:
        return self.source_length(length)

    def draw(self, random: Random, tables: Any) -> Blocks:
        count = self.by_length(random, self.blocks, self.draw_length(random))
        most = self.blocks(self.lengths[-1])
        symbols = random.chain(self.vocab_size, count, most)
        return Blocks(
            count, symbols, random.integers(2, self.max_reps, (random.size(count, most),))
        )

    def assemble(self, draws: Blocks) -> Sample:
        xp = namespace(draws.symbols)
        ends = xp.cumsum(draws.repeats)
        place = xp.arange(self.longest_source)
        block = xp.searchsorted(ends, place, side="right")
        starts = pick(ends - draws.repeats, block)
        length = ends[draws.count - 1]
        return Sample(pick(draws.symbols, block), length, place - starts, length)
