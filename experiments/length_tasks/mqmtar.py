"""Multi-query multi-token associative recall: key-value words in a text, then keys to look up."""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from experiments.length_tasks.randomness import TABLES, Ints, Random, host_random
from experiments.length_tasks.task import Sample, Task, namespace, pick, require

SPACE, KEY_VALUE_SEPARATOR, QUERY_SEPARATOR, FIRST_LETTER = range(4)


class Tables(NamedTuple):
    """Hold the words of a split, one a row."""

    keys: Ints
    values: Ints


class Recall(NamedTuple):
    """Hold L, the number of pairs, their words, the free spaces left of each, and the queries."""

    length: Ints
    pairs: Ints
    keys: Ints
    values: Ints
    left: Ints
    queries: Ints


@dataclass(frozen=True)
class MQMTAR(Task):
    """Look up the values of `num_q` keys among m = floor(num_kv L / (k_len + v_len + 2)) pairs.

    The source has a row of floor(L/m) tokens for each pair (spaces, key, separator, value, a space,
    spaces), then each query: a separator and a key. The target has for each a separator and the
    value. Keys are distinct and values are distinct, drawn from the split's tables of `vocab_size`
    words; pairs may be asked for more than once. Letters are 3..abc_size + 2.

    Raises:
        ValueError: a table wants more words than there are, or the shortest L has fewer pairs than
            queries.

    References:
        Vasylenko et al., `Long-Context Generalization with Sparse Attention
        <https://arxiv.org/abs/2506.16640>`_, 2025.

    >>> sample = MQMTAR().sample(seed=0, split="test", index=0, length=64)
    >>> len(sample.source), len(sample.target)
    (76, 12)
    """

    abc_size: int = 256
    vocab_size: int = 10_000
    k_len: int = 2
    v_len: int = 2
    num_kv: float = 0.8
    num_q: int = 4
    spare_ids = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("abc_size", "k_len", "v_len", "num_q"):
            require(name, 1, getattr(self, name), 2**31 - 5)
        words = self.abc_size ** min(self.k_len, self.v_len)
        require("vocab_size", 1, self.vocab_size, min(words, 2**31 - 1))
        if self.abc_size ** max(self.k_len, self.v_len) >= 2**63:
            raise ValueError("abc_size: expected fewer than 2^63 words of the longer length")
        # With a larger share the rows would be narrower than what stands in them.
        if not 0 < self.num_kv <= 1:
            raise ValueError(f"num_kv: expected above 0 and at most 1, got {self.num_kv}")
        if self.pairs(self.lengths[0]) < self.num_q:
            raise ValueError(
                f"num_q: expected at most the {self.pairs(self.lengths[0])} pairs of length "
                f"{self.lengths[0]}, got {self.num_q}"
            )

    @property
    def data_ids(self) -> int:
        return FIRST_LETTER + self.abc_size

    @property
    def core(self) -> int:
        """The tokens of a row that are not free spaces."""
        return self.k_len + self.v_len + 2

    def pairs(self, length: int) -> int:
        """The number of pairs."""
        return min(int(length * self.num_kv // self.core), self.vocab_size)

    def source_length(self, length: int) -> int:
        pairs = self.pairs(length)
        return pairs * (length // pairs) + self.num_q * (self.k_len + 1)

    def target_length(self, length: int) -> int:
        return self.num_q * (self.v_len + 1)

    def tables(self, seed: int, split: str) -> Tables:
        """Draw the words of a split, keys first; a function of the arguments alone."""
        return _tables(self.abc_size, self.vocab_size, self.k_len, self.v_len, seed, split)

    def draw(self, random: Random, tables: Tables) -> Recall:
        length = self.draw_length(random)
        pairs = self.by_length(random, self.pairs, length)
        count = random.size(pairs, max(map(self.pairs, self.lengths)))
        keys = tables.keys[random.distinct(self.vocab_size, count)]
        values = tables.values[random.distinct(self.vocab_size, count)]
        # A row is what is left of 2 (r + 1) slots, the core in their middle, after deleting some of
        # the others at random.
        width = length // pairs
        slots = 2 * (width + 1)
        before = slots // 2 - (self.core - 1) // 2
        after, free = slots - before - self.core, width - self.core
        most = max(number // self.pairs(number) for number in self.lengths) - self.core
        left = random.hypergeometric(before, after, free, most, count)
        queries = random.integers(0, pairs - 1, (self.num_q,))
        return Recall(length, pairs, keys, values, left, queries)

    def assemble(self, draws: Recall) -> Sample:
        xp = namespace(draws.left)
        width = draws.length // draws.pairs
        body = draws.pairs * width
        ends = [xp.full((draws.left.shape[0], 1), SPACE)]
        between = xp.full_like(ends[0], KEY_VALUE_SEPARATOR)
        core = xp.concatenate([draws.keys, between, draws.values, *ends], axis=1)

        place = xp.arange(self.longest_source)
        row = xp.clip(place // width, 0, draws.left.shape[0] - 1)
        column = place % width - draws.left[row]
        inside = (column >= 0) & (column < self.core)
        text = xp.where(inside, core[row, xp.clip(column, 0, self.core - 1)], SPACE)
        asked = _with_separators(draws.keys[draws.queries])
        source = xp.where(place < body, text, pick(asked, place - body))
        target = _with_separators(draws.values[draws.queries])
        return Sample(source, body + asked.shape[0], target, target.shape[0])


def _with_separators(words: Ints) -> Ints:
    """Write words one after the other, each with the query separator before it."""
    xp = namespace(words)
    return xp.pad(words, ((0, 0), (1, 0)), constant_values=QUERY_SEPARATOR).reshape(-1)


@functools.lru_cache(maxsize=64)
def _tables(letters: int, count: int, k_len: int, v_len: int, seed: int, split: str) -> Tables:
    random = host_random(seed, split, purpose=TABLES)
    return draw_tables(random, letters, count, k_len, v_len)


def draw_tables(random: Random, letters: int, count: int, k_len: int, v_len: int) -> Tables:
    """Draw distinct words, keys first, every choice of them equally likely."""
    keys, values = (
        spell(np.asarray(random.distinct(letters**length, count)), letters, length)
        for length in (k_len, v_len)
    )
    return Tables(keys, values)


def spell(numbers: np.ndarray, letters: int, length: int) -> np.ndarray:
    """Write the words with these numbers.

    The authors' order: the second letter counts fastest, then the first, the third, the fourth.

    >>> spell(np.arange(4), 2, 2).tolist()
    [[3, 3], [3, 4], [4, 3], [4, 4]]
    """
    words = np.empty((len(numbers), length), np.int32)
    fastest_first = [1, 0, *range(2, length)] if length > 1 else [0]
    for place in fastest_first:
        numbers, digit = np.divmod(numbers, letters)
        words[:, place] = FIRST_LETTER + digit
    words.flags.writeable = False
    return words
