"""Random automata and random walks in them, many at once.

Axes: n automata, S states, D edges of a state, W words, L letters of a word. The distribution is
the original benchmark's; the draws are not (those hang on the hash order of CPython's sets).
"""

import numpy as np
from jaxtyping import Int, Int8

from experiments.regbench.automata import Automata
from experiments.regbench.config import AutomataConfig
from experiments.regbench.minimise import minimise


def sample_automata(config: AutomataConfig, count: int, rng: np.random.Generator) -> Automata:
    """Draw `count` random automata and minimise them.

    Nodes and alphabet size are uniform on their ranges. Each node has a uniform number of edges
    (1 to `max_out_degree`) with distinct symbols and distinct targets other than the node itself.

    >>> len(sample_automata(AutomataConfig(), 3, np.random.default_rng(0)))
    3
    """
    return minimise(sample_raw(config, count, rng))


def sample_raw(config: AutomataConfig, count: int, rng: np.random.Generator) -> Automata:
    """Draw automata as they are before minimising; nodes past their number have no edges."""
    node = np.arange(config.max_nodes)
    nodes = rng.integers(config.min_nodes, config.max_nodes, (count, 1), endpoint=True)
    size = rng.integers(config.min_alphabet, config.max_alphabet, (count, 1), endpoint=True)
    alphabet = rng.permuted(np.tile(np.arange(1, config.letters + 1), (count, 1)), axis=1)
    shape = (count, config.max_nodes)
    degree = rng.integers(1, config.max_out_degree, shape, endpoint=True)
    ranks = _distinct(np.broadcast_to(size, shape), config.max_out_degree, rng)
    others = _distinct(np.broadcast_to(nodes - 1, shape), config.max_out_degree, rng)
    edge = (np.arange(config.max_out_degree) < degree[..., None]) & (node < nodes)[..., None]
    symbols = np.take_along_axis(alphabet[:, None], ranks, axis=-1)
    # Skip the node itself.
    targets = others + (others >= node[:, None])
    return Automata.from_edges(np.where(edge, symbols, 0), targets)


def _distinct(
    limit: Int[np.ndarray, "n S"], number: int, rng: np.random.Generator
) -> Int[np.ndarray, "n S D"]:
    """Draw `number` distinct integers below `limit` in random order."""
    drawn = np.empty((*limit.shape, 0), np.int64)
    for taken in range(number):
        value = rng.integers(0, limit - taken)
        # The value counts the integers not yet taken: step over the taken ones from below.
        for smaller in np.moveaxis(np.sort(drawn, axis=-1), -1, 0):
            value += value >= smaller
        drawn = np.concatenate([drawn, value[..., None]], axis=-1)
    return drawn


def walk(
    automata: Automata, words: int, length: int, rng: np.random.Generator
) -> tuple[Int8[np.ndarray, "n W L"], Int8[np.ndarray, "n W L"]]:
    """Walk from the starts, edges equally likely: the symbols read and the states reached."""
    count, states, degree = automata.symbols.shape
    base = np.arange(count)[:, None] * states
    degrees = automata.degrees.ravel()
    symbols, targets = automata.symbols.ravel(), automata.targets.ravel()
    state = np.zeros((count, words), np.int64)
    seen = np.empty((2, length, count, words), np.int8)
    for step in range(length):
        slot = (rng.random((count, words)) * degrees[base + state]).astype(np.int64)
        edge = (base + state) * degree + slot
        state = targets[edge].astype(np.int64)
        seen[0, step], seen[1, step] = symbols[edge], state
    return np.moveaxis(seen[0], 0, -1), np.moveaxis(seen[1], 0, -1)
