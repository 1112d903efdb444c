"""Problem instances: the words of one automaton in one sequence, as inputs and labels.

Axes: n instances, W words, L letters of a word, T input positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int, Int8, Int32

from experiments.regbench.alphabet import IGNORED_LABEL, PAD_ID, SEPARATOR_ID
from experiments.regbench.automata import Automata
from experiments.regbench.config import AutomataConfig
from experiments.regbench.sampling import sample_automata, walk


@dataclass(frozen=True, eq=False)
class Instances:
    """Hold one sequence for each automaton, right-padded to the longest.

    `states` is the state after each input position (-1 past the length): with the automata it
    gives the reference distributions without storing them.
    """

    input_ids: Int32[np.ndarray, "n T"]
    labels: Int32[np.ndarray, "n T"]
    lengths: Int32[np.ndarray, " n"]
    states: Int8[np.ndarray, "n T"]
    automata: Automata

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, indices: slice | np.ndarray | Sequence[int]) -> Instances:
        """Select instances; the width T stays."""
        return Instances(
            self.input_ids[indices],
            self.labels[indices],
            self.lengths[indices],
            self.states[indices],
            self.automata[indices],
        )

    def next_symbols(
        self, indices: slice | np.ndarray | Sequence[int]
    ) -> Float64[np.ndarray, "b T V"]:
        """Give the true distribution of the symbol after each input position, zero past the length.

        Where a separator follows it is still the state's: automata do not know where words end.
        """
        states = self.states[indices]
        table = self.automata[indices].next_symbols()
        rows = table[np.arange(len(states))[:, None], states]
        return np.where((states < 0)[..., None], 0.0, rows)


def shift(
    tokens: Int[np.ndarray, "n T_plus_1"], counts: Int[np.ndarray, " n"], separator_id: int
) -> tuple[Int32[np.ndarray, "n T"], Int32[np.ndarray, "n T"], Int32[np.ndarray, " n"]]:
    """Split padded sequences into inputs (all but the last), labels (all but the first), lengths.

    Inputs are padded with 0, labels with -100; a label that is the separator is -100 too.

    >>> inputs, labels, lengths = shift(np.array([[1, 19, 2], [1, 3, 0]]), np.array([3, 2]), 19)
    >>> inputs.tolist(), labels.tolist(), lengths.tolist()
    ([[1, 19], [1, 0]], [[-100, 2], [3, -100]], [2, 1])
    """
    lengths = (counts - 1).astype(np.int32)
    inside = np.arange(tokens.shape[1] - 1) < lengths[:, None]
    following = tokens[:, 1:]
    inputs = np.where(inside, tokens[:, :-1], np.int32(PAD_ID))
    labelled = inside & (following != separator_id)
    return inputs, np.where(labelled, following, np.int32(IGNORED_LABEL)), lengths


def sample_instances(config: AutomataConfig, count: int, rng: np.random.Generator) -> Instances:
    """Draw `count` automata and one instance of each.

    The number of words and their lengths are uniform on their ranges; separators join the words.

    >>> drawn = sample_instances(AutomataConfig(max_tokens=32), 5, np.random.default_rng(0))
    >>> drawn.input_ids.shape, drawn.next_symbols([0, 1]).shape
    ((5, 32), (2, 32, 20))
    """
    automata = sample_automata(config, count, rng)
    words = rng.integers(config.min_words, config.max_words, (count, 1), endpoint=True)
    shape = (count, config.max_words)
    low, high = config.min_word_length, config.max_word_length
    letters = rng.integers(low, high, shape, endpoint=True)
    symbols, states = walk(automata, config.max_words, config.max_word_length, rng)
    tokens, counts = _join(symbols, letters, words, SEPARATOR_ID)
    states, _ = _join(states, letters, words, 0)
    if config.max_tokens is not None:
        counts = np.minimum(counts, config.max_tokens + 1)
    tokens, states = tokens[:, : counts.max()], states[:, : counts.max() - 1]
    input_ids, labels, lengths = shift(tokens, counts, SEPARATOR_ID)
    states = np.where(np.arange(states.shape[1]) < lengths[:, None], states, np.int8(-1))
    return Instances(input_ids, labels, lengths, states, automata)


def _join(
    values: Int8[np.ndarray, "n W L"],
    letters: Int[np.ndarray, "n W"],
    words: Int[np.ndarray, "n 1"],
    separator: int,
) -> tuple[Int8[np.ndarray, "n T_plus_1"], Int[np.ndarray, " n"]]:
    """String the first `letters` values of the first `words` words together, `separator` inside."""
    count, width, longest = values.shape
    number, place = np.arange(width)[:, None], np.arange(longest + 1)
    grid = np.full((count, width, longest + 1), separator, np.int8)
    inside = place < letters[..., None]
    grid[..., :longest][inside[..., :longest]] = values[inside[..., :longest]]
    ends = (place == letters[..., None]) & (number < words[..., None] - 1)
    kept = (inside & (number < words[..., None])) | ends
    counts = kept.sum(axis=(1, 2))
    joined = np.zeros((count, counts.max(initial=1)), np.int8)
    joined[np.arange(joined.shape[1]) < counts[:, None]] = grid[kept]
    return joined, counts


def concatenate(parts: Sequence[Instances]) -> Instances:
    """Put instances of several draws together, padded to the longest that is there."""
    width = max(int(part.lengths.max(initial=0)) for part in parts)

    def pad(rows: np.ndarray, value: int) -> np.ndarray:
        rows = rows[:, :width]
        return np.pad(rows, ((0, 0), (0, width - rows.shape[1])), constant_values=value)

    return Instances(
        np.concatenate([pad(part.input_ids, PAD_ID) for part in parts]),
        np.concatenate([pad(part.labels, IGNORED_LABEL) for part in parts]),
        np.concatenate([part.lengths for part in parts]),
        np.concatenate([pad(part.states, -1) for part in parts]),
        Automata(
            np.concatenate([part.automata.symbols for part in parts]),
            np.concatenate([part.automata.targets for part in parts]),
        ),
    )
