"""Many deterministic automata at once, as padded edge lists.

Axes: n automata, S states, D edges of a state, T input positions, V vocabulary. State 0 is the
start and every state accepts. The edges of a state are sorted by symbol, the missing ones last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int, Int8

from experiments.regbench.alphabet import VOCAB_SIZE, characters, encode


@dataclass(frozen=True, eq=False)
class Automata:
    """Hold the edges of n automata: `symbols` (ids, 0 for no edge) and `targets` (-1 for no edge).

    >>> loop = Automata.from_transitions([[{"b": 1}, {"c": 1, "a": 0}]])
    >>> loop.symbols.tolist(), loop.targets.tolist()
    ([[[2, 0], [1, 3]]], [[[1, -1], [0, 1]]])
    """

    symbols: Int8[np.ndarray, "n S D"]
    targets: Int8[np.ndarray, "n S D"]

    @classmethod
    def from_edges(
        cls, symbols: Int[np.ndarray, "n S D"], targets: Int[np.ndarray, "n S D"]
    ) -> Automata:
        """Sort the edges of every state by symbol, the missing ones (symbol 0) last."""
        missing = symbols <= 0
        order = np.argsort(np.where(missing, np.iinfo(np.int8).max, symbols), axis=-1)
        symbols = np.where(missing, 0, symbols).astype(np.int8)
        targets = np.where(missing, -1, targets).astype(np.int8)
        take = np.take_along_axis
        return cls(take(symbols, order, axis=-1), take(targets, order, axis=-1))

    @classmethod
    def from_transitions(
        cls,
        automata: Sequence[Sequence[Mapping[str, int]]],
        vocab_size: int = VOCAB_SIZE,
    ) -> Automata:
        """Read automata given as one mapping, letter to state, for every state (start first).

        Raises:
            ValueError: an automaton has no or over 127 states, or an edge leads to none of them.
        """
        sizes = [len(nodes) for nodes in automata]
        if not all(1 <= size <= 127 for size in sizes):
            raise ValueError(f"automata: expected 1 to 127 states each, got {sizes}")
        degree = max((len(edges) for nodes in automata for edges in nodes), default=1)
        shape = (len(automata), max(sizes, default=1), max(degree, 1))
        symbols, targets = np.zeros(shape, np.int64), np.full(shape, -1)
        for number, nodes in enumerate(automata):
            for state, edges in enumerate(nodes):
                symbols[number, state, : len(edges)] = encode("".join(edges), vocab_size)
                targets[number, state, : len(edges)] = list(edges.values())
                if not all(0 <= target < len(nodes) for target in edges.values()):
                    raise ValueError(
                        f"automata: expected targets 0 to {len(nodes) - 1}, got {dict(edges)}"
                    )
        return cls.from_edges(symbols, targets)

    def __len__(self) -> int:
        return len(self.symbols)

    def __getitem__(self, indices: slice | np.ndarray | Sequence[int]) -> Automata:
        return Automata(self.symbols[indices], self.targets[indices])

    @property
    def degrees(self) -> Int[np.ndarray, "n S"]:
        """Count the edges of each state."""
        return np.count_nonzero(self.symbols, axis=-1)

    @property
    def sizes(self) -> Int[np.ndarray, " n"]:
        """Count the states up to the last one an edge leads to (all, in canonical form)."""
        return np.maximum(self.targets.max(axis=(1, 2), initial=0), 0) + 1

    def transitions(self, index: int, vocab_size: int = VOCAB_SIZE) -> list[dict[str, int]]:
        """Write one automaton as one dictionary, letter to state, for every state.

        >>> Automata.from_transitions([[{"b": 1}, {"a": 0}]]).transitions(0)
        [{'b': 1}, {'a': 0}]
        """
        letters = characters(vocab_size)
        size = self.sizes[index]
        return [
            {letters[symbol]: int(target) for symbol, target in zip(*edges, strict=True) if symbol}
            for edges in zip(self.symbols[index, :size], self.targets[index, :size], strict=True)
        ]

    def keys(self) -> list[bytes]:
        """Give each automaton a hashable key: its edges.

        Keys of minimised automata are equal if and only if the languages are.
        """
        number, state, slot = np.nonzero(self.symbols)
        edges = np.stack(
            [state, self.symbols[number, state, slot], self.targets[number, state, slot]], axis=-1
        ).astype(np.int8)
        ends = np.cumsum(np.bincount(number, minlength=len(self)))
        return [rows.tobytes() for rows in np.split(edges, ends[:-1])] if len(self) else []

    def next_symbols(self, vocab_size: int = VOCAB_SIZE) -> Float64[np.ndarray, "n S V"]:
        """Give the next symbol's distribution in every state: 1 / degree on each edge's symbol.

        The row of a state without edges is zero.
        """
        number, state, slot = np.nonzero(self.symbols)
        table = np.zeros((*self.symbols.shape[:2], vocab_size))
        table[number, state, self.symbols[number, state, slot]] = 1 / self.degrees[number, state]
        return table

    def read(
        self, input_ids: Int[np.ndarray, "n T"], separator_id: int = VOCAB_SIZE - 1
    ) -> Int8[np.ndarray, "n T"]:
        """Run every automaton over its sequence and give the state after each position.

        A separator returns to the start; a symbol without an edge leads to -1 until the next one.

        >>> Automata.from_transitions([[{"b": 1}, {"a": 0}]]).read(np.array([[2, 1, 1, 19]]))
        array([[ 1,  0, -1,  0]], dtype=int8)
        """
        rows = np.arange(len(self))
        state = np.zeros(len(self), np.int8)
        states = np.empty(input_ids.shape, np.int8)
        for position, ids in enumerate(input_ids.T):
            match = (self.symbols[rows, state] == ids[:, None]) & (ids > 0)[:, None]
            following = np.where(match, self.targets[rows, state], -1).max(axis=-1, initial=-1)
            state = np.where(ids == separator_id, 0, np.where(state < 0, -1, following))
            states[:, position] = state
        return states
