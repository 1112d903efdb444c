"""Flip-flop and Parity: one bit to say about a sequence of bits."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from experiments.length_tasks.randomness import Ints, Random
from experiments.length_tasks.task import Sample, Task, namespace

WRITE, IGNORE, READ = 2, 3, 4


class Memory(NamedTuple):
    """Hold the number of command-bit pairs, their bits, and which pairs after the first write."""

    pairs: Ints
    bits: Ints
    writes: Ints


@dataclass(frozen=True)
class FlipFlop(Task):
    """Tell the bit of the last write: floor(L/2) commands, each with a random bit.

    The first command writes, the last one reads (its bit is the target and not in the source),
    every other writes with probability `write_prob` and is to be ignored otherwise.

    References:
        Liu et al., `Exposing Attention Glitches with Flip-Flop Language Modeling
        <https://arxiv.org/abs/2306.00946>`_, 2023.

    >>> FlipFlop().sample(seed=0, split="test", index=0, length=8).source.shape
    (7,)
    """

    write_prob: float = 0.8
    has_separator = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lengths[0] < 4:
            raise ValueError(f"seq_len: expected lengths of at least 4, got {self.lengths[0]}")
        if not 0 <= self.write_prob <= 1:
            raise ValueError(f"write_prob: expected 0 to 1, got {self.write_prob}")

    @property
    def data_ids(self) -> int:
        return READ + 1

    def source_length(self, length: int) -> int:
        return 2 * (length // 2) - 1

    def target_length(self, length: int) -> int:
        return 1

    def draw(self, random: Random, tables: Any) -> Memory:
        pairs = self.draw_length(random) // 2
        size = random.size(pairs, self.lengths[-1] // 2)
        return Memory(
            pairs, random.integers(0, 1, (size,)), random.bernoulli(self.write_prob, size - 2)
        )

    def assemble(self, draws: Memory) -> Sample:
        xp = namespace(draws.bits)
        number = xp.arange(draws.bits.shape[0])
        later = xp.pad(draws.writes, (1, 1)) & (number < draws.pairs - 1)
        writes = (number == 0) | later
        commands = xp.where(writes, WRITE, xp.where(number == draws.pairs - 1, READ, IGNORE))
        source = xp.stack([commands, draws.bits], axis=1).reshape(-1)[:-1]
        last = xp.max(xp.where(writes, number, 0))
        return Sample(source, 2 * draws.pairs - 1, draws.bits[last][None], 1)


class Bits(NamedTuple):
    """Hold L and the bits, of which the first L count."""

    length: Ints
    bits: Ints


@dataclass(frozen=True)
class Parity(Task):
    """Tell whether the number of ones among L bits is even (1) or odd (0)."""

    @property
    def data_ids(self) -> int:
        return 2

    def source_length(self, length: int) -> int:
        return length

    def target_length(self, length: int) -> int:
        return 1

    def draw(self, random: Random, tables: Any) -> Bits:
        length = self.draw_length(random)
        return Bits(length, random.integers(0, 1, (random.size(length, self.lengths[-1]),)))

    def assemble(self, draws: Bits) -> Sample:
        xp = namespace(draws.bits)
        ones = xp.sum(xp.where(xp.arange(draws.bits.shape[0]) < draws.length, draws.bits, 0))
        return Sample(draws.bits, draws.length, (1 - ones % 2)[None], 1)
