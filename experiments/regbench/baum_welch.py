"""The Baum-Welch baseline: a hidden Markov model of the automaton, fitted anew at every position.

A hidden state is an edge of the automaton, the pair (i, j) with number i Q + j; it emits the edge's
symbol. Axes: W words, T steps, S = Q^2 hidden states, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int

from experiments.regbench.alphabet import PAD_ID, VOCAB_SIZE, encode

STATES, ITERATIONS = 12, 10
# Added to what is drawn and to what is counted, and what forbidden transitions keep.
_FLOOR = 1e-5
_REACH = 5


class Hmm(NamedTuple):
    """Probabilities of the first hidden state, of the next one, and of the symbols it emits."""

    start: Float64[np.ndarray, " S"]
    transition: Float64[np.ndarray, "S S"]
    emission: Float64[np.ndarray, "S V"]

    def first(self) -> Float64[np.ndarray, " V"]:
        """The distribution of a word's first symbol."""
        return self.start @ self.emission

    def following(self, word: Int[np.ndarray, " L"]) -> Float64[np.ndarray, " V"]:
        """The distribution of the symbol after a word of at least one symbol."""
        state = self.start
        for place, symbol in enumerate(word):
            state = (state if place == 0 else state @ self.transition) * self.emission[:, symbol]
            state = state / state.sum()
        ahead = state @ self.transition @ self.emission
        return ahead / ahead.sum()


def allowed_transitions(states: int) -> Bool[np.ndarray, "S S"]:
    """Tell which edge may follow which: (i, j) is followed by (j, l), and i is not j.

    >>> allowed_transitions(2).astype(int).tolist()
    [[0, 0, 0, 0], [0, 0, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]
    """
    source, target = np.divmod(np.arange(states**2), states)
    return (source != target)[:, None] & (target[:, None] == source)


def reachable_edges(states: int, steps: int) -> Bool[np.ndarray, "T S"]:
    """Tell which edges a step may take: from state 0, five new states at every step.

    >>> reachable_edges(7, 2)[:, :8].astype(int).tolist()
    [[0, 1, 1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0, 0, 1]]
    """
    source, target = np.divmod(np.arange(states**2), states)
    number = np.arange(states)
    layers = [number == 0, (number >= 1) & (number <= _REACH)]
    layers += [number <= _REACH * step for step in range(2, steps + 1)]
    edges = [
        here[source] & there[target] & (source != target)
        for here, there in itertools.pairwise(layers)
    ]
    return np.array(edges[:steps])


def initial(
    transition: Float64[np.ndarray, "S S"], emission: Float64[np.ndarray, "S V"], states: int
) -> Hmm:
    """Make a model of uniform draws from [0, 1)."""
    start = np.full(states**2, _FLOOR)
    start[1:states] = 1 - _FLOOR
    allowed = allowed_transitions(states)
    return Hmm(
        _normalised(start),
        _normalised(np.where(allowed, transition + _FLOOR, _FLOOR)),
        _normalised(emission + _FLOOR),
    )


def fit(
    words: Sequence[Int[np.ndarray, " L"]],
    model: Hmm,
    *,
    iterations: int = ITERATIONS,
    official_fault: bool = False,
) -> Hmm:
    """Improve a model by expectation and maximisation over words of at least one symbol.

    Args:
        official_fault: count symbols as the original does: where several words have the same
            symbol at the same step, only the last of them counts.
    """
    lengths = np.array([len(word) for word in words])
    if not len(lengths) or lengths.min() < 1:
        raise ValueError(f"words: expected words of at least one symbol, got {lengths.tolist()}")
    symbols = np.full((len(words), lengths.max()), PAD_ID)
    for row, word in zip(symbols, words, strict=True):
        row[: len(word)] = word
    states = round(len(model.start) ** 0.5)
    reachable = reachable_edges(states, symbols.shape[1])
    for _ in range(iterations):
        model = _improve(model, symbols, lengths, reachable, official_fault)
    return model


def _improve(
    model: Hmm,
    symbols: Int[np.ndarray, "W T"],
    lengths: Int[np.ndarray, " W"],
    reachable: Bool[np.ndarray, "T S"],
    official_fault: bool,
) -> Hmm:
    """Count transitions and symbols as expected under a model, and normalise the counts."""
    states = round(len(model.start) ** 0.5)
    emitted = np.moveaxis(model.emission[:, symbols], 0, -1)  # [W, T, S]
    forward, scale = _forward(model, emitted, lengths, reachable)
    backward = _backward(model, emitted, lengths, reachable, scale)
    gamma = forward * backward
    ahead = (emitted * backward)[:, 1:] / scale[:, 1:, None]
    pairs = np.einsum("wti,wtj->ij", forward[:, :-1], ahead, optimize=True) * model.transition
    allowed = allowed_transitions(states)
    leaving = gamma[:, :-1].sum(axis=(0, 1))[:, None]
    transition = np.where(allowed, pairs / (leaving + _FLOOR), _FLOOR) + _FLOOR
    start = gamma[:, 0].mean(axis=0) + _FLOOR
    start[states:] = start[0] = _FLOOR
    emission = _count_symbols(gamma, symbols, model.emission.shape[1], official_fault) + _FLOOR
    emission[:, PAD_ID] = _FLOOR
    return Hmm(_normalised(start), _normalised(transition), _normalised(emission))


def _forward(
    model: Hmm,
    emitted: Float64[np.ndarray, "W T S"],
    lengths: Int[np.ndarray, " W"],
    reachable: Bool[np.ndarray, "T S"],
) -> tuple[Float64[np.ndarray, "W T S"], Float64[np.ndarray, "W T"]]:
    """The state at each step given the symbols so far, and their conditional probabilities."""
    forward, scale = np.zeros_like(emitted), np.ones(emitted.shape[:2])
    for step in range(emitted.shape[1]):
        state = model.start if step == 0 else forward[:, step - 1] @ model.transition
        # As in the original, the first step may be an edge from anywhere.
        state = state * emitted[:, step] * (1 if step == 0 else reachable[step])
        inside = step < lengths
        scale[inside, step] = state.sum(axis=-1)[inside]
        forward[inside, step] = state[inside] / scale[inside, step, None]
    return forward, scale


def _backward(
    model: Hmm,
    emitted: Float64[np.ndarray, "W T S"],
    lengths: Int[np.ndarray, " W"],
    reachable: Bool[np.ndarray, "T S"],
    scale: Float64[np.ndarray, "W T"],
) -> Float64[np.ndarray, "W T S"]:
    """How much likelier a state makes the symbols to come."""
    backward = np.zeros_like(emitted)
    last = emitted.shape[1] - 1
    for step in range(last, -1, -1):
        # As in the original, the longest words may end with any edge.
        backward[step == lengths - 1, step] = 1 if step == last else reachable[step]
        inside = step < lengths - 1
        if inside.any():
            ahead = emitted[:, step + 1] * backward[:, step + 1] / scale[:, step + 1, None]
            state = ahead @ model.transition.T * reachable[step]
            backward[inside, step] = state[inside]
    return backward


def _count_symbols(
    gamma: Float64[np.ndarray, "W T S"],
    symbols: Int[np.ndarray, "W T"],
    vocab_size: int,
    official_fault: bool,
) -> Float64[np.ndarray, "S V"]:
    """How often each state is expected to have emitted each symbol."""
    counts = np.zeros((gamma.shape[2], vocab_size))
    for step in range(symbols.shape[1]):
        if official_fault:
            counts[:, symbols[:, step]] += gamma[:, step].T
        else:
            np.add.at(counts.T, symbols[:, step], gamma[:, step])
    return counts


def _normalised(rows: Float64[np.ndarray, "*B n"]) -> Float64[np.ndarray, "*B n"]:
    return rows / rows.sum(axis=-1, keepdims=True)


def predict(
    sequence: str | Int[np.ndarray, " T"],
    rng: np.random.Generator,
    *,
    states: int = STATES,
    iterations: int = ITERATIONS,
    vocab_size: int = VOCAB_SIZE,
    official_fault: bool = False,
) -> Float64[np.ndarray, "T V"]:
    """Predict the symbol after every position of a sequence.

    At every position inside a word a model is drawn and fitted to all words up to there, the last
    one unfinished; after a separator the model before it tells the first symbol (the draw itself,
    where there was none). A sequence of RegBench takes ten seconds or so.

    Raises:
        ValueError: `states` is below 6, or an id is neither a letter nor the separator.

    >>> predict("aab|aa", np.random.default_rng(0), states=6).shape
    (6, 20)
    """
    ids = encode(sequence, vocab_size) if isinstance(sequence, str) else np.asarray(sequence)
    if states <= _REACH:
        raise ValueError(f"states: expected at least {_REACH + 1}, got {states}")
    if ids.size and not 1 <= ids.min() <= ids.max() < vocab_size:
        raise ValueError(f"sequence: expected ids 1 to {vocab_size - 1}, got {ids.tolist()}")
    rows = np.zeros((len(ids), vocab_size))
    model = _drawn(rng, states, vocab_size)
    words: list[list[int]] = [[]]
    for position, symbol in enumerate(ids.tolist()):
        if symbol == vocab_size - 1:
            words.append([])
            rows[position] = model.first()
            continue
        words[-1].append(symbol)
        seen = [np.array(word) for word in words if word]
        options = dict(iterations=iterations, official_fault=official_fault)
        model = fit(seen, _drawn(rng, states, vocab_size), **options)
        rows[position] = model.following(seen[-1])
    return rows


def _drawn(rng: np.random.Generator, states: int, vocab_size: int) -> Hmm:
    edges = states**2
    return initial(rng.random((edges, edges)), rng.random((edges, vocab_size)), states)
