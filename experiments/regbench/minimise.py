"""The smallest automaton of a language, for many automata at once, and its canonical numbering.

Axes: n automata, S states, D edges of a state. Every state accepts and a missing edge leads to a
sink that does not, so two states differ at once when their symbols differ.
"""

import numpy as np
from jaxtyping import Int

from experiments.regbench.automata import Automata


def minimise(automata: Automata) -> Automata:
    """Merge the states no word tells apart, drop those no word reaches, and number the rest.

    The number of states S of the arrays stays; states past `sizes` have no edges.

    References:
        Moore, Gedanken-Experiments on Sequential Machines, 1956.

    >>> twins = Automata.from_transitions([[{"a": 1, "b": 2}, {"c": 0}, {"c": 0}]])
    >>> minimise(twins).transitions(0)
    [{'a': 1, 'b': 1}, {'c': 0}]
    """
    blocks = _blocks(automata)
    return canonical(Automata(automata.symbols, _follow(blocks, automata.targets)))


def canonical(automata: Automata) -> Automata:
    """Number the states breadth first from the start, symbols in alphabetical order.

    States that cannot be reached are dropped. Equal languages get equal arrays once minimised.

    >>> swapped = Automata.from_transitions([[{"a": 2}, {"c": 0}, {"b": 1}]])
    >>> canonical(swapped).transitions(0)
    [{'a': 1}, {'b': 2}, {'c': 0}]
    """
    order, number = _breadth_first(automata)
    rows = np.arange(len(automata))[:, None]
    dropped = (order < 0)[..., None]
    symbols = np.where(dropped, 0, automata.symbols[rows, order])
    targets = np.where(dropped, -1, _follow(number, automata.targets)[rows, order])
    return Automata(symbols.astype(np.int8), targets.astype(np.int8))


def _blocks(automata: Automata) -> Int[np.ndarray, "n S"]:
    """Refine the partition by symbols until it is stable; a block is named by its lowest state."""
    slots = range(automata.symbols.shape[-1])
    blocks = np.zeros(automata.symbols.shape[:2], np.int64)
    for slot in slots:
        blocks = _split(blocks, automata.symbols[..., slot])
    while True:
        previous = blocks
        # Equal blocks have equal symbols, so their edges face each other slot by slot.
        following = _follow(previous, automata.targets)
        for slot in slots:
            blocks = _split(blocks, following[..., slot])
        if np.array_equal(blocks, previous):
            return blocks


def _split(
    blocks: Int[np.ndarray, "n S"], values: Int[np.ndarray, "n S"]
) -> Int[np.ndarray, "n S"]:
    """Keep two states together when both their blocks and their values agree."""
    pairs = blocks * 256 + values
    return np.argmax(pairs[:, :, None] == pairs[:, None, :], axis=-1)


def _follow(
    names: Int[np.ndarray, "n S"], targets: Int[np.ndarray, "n S D"]
) -> Int[np.ndarray, "n S D"]:
    """Rename the targets of the edges, leaving -1 where there is none."""
    rows = np.arange(len(targets))[:, None, None]
    return np.where(targets < 0, -1, names[rows, targets]).astype(np.int8)


def _breadth_first(
    automata: Automata,
) -> tuple[Int[np.ndarray, "n S"], Int[np.ndarray, "n S"]]:
    """Visit the states breadth first: the state at each place, the place of each state (or -1)."""
    count, states, degree = automata.symbols.shape
    rows = np.arange(count)
    order, number = np.full((2, count, states), -1)
    order[:, 0] = number[:, 0] = 0
    reached = np.ones(count, np.int64)
    for place in range(states):
        for slot in range(degree):
            target = automata.targets[rows, order[:, place], slot]
            new = (order[:, place] >= 0) & (target >= 0) & (number[rows, target] < 0)
            fresh = rows[new]
            order[fresh, reached[new]] = target[new]
            number[fresh, target[new]] = reached[new]
            reached[new] += 1
    return order, number
