"""The n-gram baseline with back-off: counts over the words read so far, nothing learned beforehand.

Axes: B sequences, T input positions, V vocabulary. Sequences advance in lock step with the counts
of every order kept up to date, so a position costs the same wherever it is.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float64, Int

from experiments.regbench.alphabet import VOCAB_SIZE, encode
from experiments.regbench.instances import Instances
from experiments.regbench.metrics import Score

# The id of padding stands for the underscore that pads a word on the left.
_UNDERSCORE = 0
_CHUNK_ENTRIES, _MOST_ENTRIES = 2**21, 2**26


class _Counts:
    """Count the n-grams, n = 1 to N, of the words so far, each padded with N - 1 underscores."""

    def __init__(self, sequences: int, order: int, vocab_size: int) -> None:
        self.order, self.vocab_size = order, vocab_size
        self.tables = [
            np.zeros((sequences, vocab_size ** (n - 1), vocab_size), np.int32)
            for n in range(1, order + 1)
        ]
        # The last N - 1 symbols of the current word as the digits of one number.
        self.history = np.zeros(sequences, np.int64)
        self.start_word(np.arange(sequences))

    def start_word(self, rows: Int[np.ndarray, " b"]) -> None:
        """Begin an empty word: N - 1 underscores and the n-grams among them."""
        self.history[rows] = 0
        for n in range(1, self.order):
            self.tables[n - 1][rows, 0, _UNDERSCORE] += self.order - n

    def append(self, rows: Int[np.ndarray, " b"], symbols: Int[np.ndarray, " b"]) -> None:
        """Read one letter in each of the rows."""
        for n in range(1, self.order + 1):
            self.tables[n - 1][rows, self.suffix(n - 1)[rows], symbols] += 1
        longer = self.history[rows] * self.vocab_size + symbols
        self.history[rows] = longer % self.vocab_size ** (self.order - 1)

    def suffix(self, length: int) -> Int[np.ndarray, " B"]:
        """The last `length` symbols of the history as one number."""
        return self.history % self.vocab_size**length

    def followers(self, n: int) -> tuple[Float64[np.ndarray, "B V"], Float64[np.ndarray, "B 1"]]:
        """Count history + symbol at order n, and the history (for n = 1: everything)."""
        rows = np.arange(len(self.history))
        counts = self.tables[n - 1][rows, self.suffix(n - 1)].astype(np.float64)
        if n == 1:
            return counts, counts.sum(axis=-1, keepdims=True)
        flat = self.tables[n - 2].reshape(len(rows), -1)
        return counts, flat[rows, self.suffix(n - 1), None].astype(np.float64)


def predict(
    sequence: str | Int[np.ndarray, " T"],
    order: int,
    *,
    backoff: bool = True,
    uniform: bool = False,
    add_one: bool = False,
    vocab_size: int = VOCAB_SIZE,
) -> Float64[np.ndarray, "T V"]:
    """Predict the symbol after every position of one sequence; see `predict_batch`.

    >>> predict("aab|aac|a", 2)[-1, 1:4].round(3).tolist()
    [0.4, 0.2, 0.2]
    """
    ids = encode(sequence, vocab_size) if isinstance(sequence, str) else np.asarray(sequence)
    options = dict(backoff=backoff, uniform=uniform, add_one=add_one)
    lengths = np.array([len(ids)])
    return predict_batch(ids[None], lengths, order, vocab_size=vocab_size, **options)[0]


def predict_batch(
    input_ids: Int[np.ndarray, "B T"],
    lengths: Int[np.ndarray, " B"],
    order: int,
    *,
    backoff: bool = True,
    uniform: bool = False,
    add_one: bool = False,
    vocab_size: int = VOCAB_SIZE,
) -> Float64[np.ndarray, "B T V"]:
    """Predict the symbol after every position from the n-grams up to it.

    With h the last N - 1 symbols, p(c) = count(h c) / count(h) for the letters c seen after h.
    The mass left over goes to the other letters met so far, in proportion to their probability at
    order N - 1 (by the same rule). Where no letter is left it is lost: rows may sum to less than
    1, as in the original. Rows past the length are zero.

    Args:
        order: N, at least 2.
        backoff: without it letters not seen after h get 0.
        uniform: replace the values of letters taken from the same order by their mean.
        add_one: count + 1 over count(h) + the number of letters met, for the letters seen after h.

    Raises:
        ValueError: `order` is below 2 or so high that a sequence needs more than 2^26 counts, or an
            id within the lengths is neither a letter nor the separator.
    """
    if order < 2 or vocab_size**order > _MOST_ENTRIES:
        raise ValueError(
            f"order: expected at least 2 and {vocab_size}^order counts to fit, got {order}"
        )
    batch, positions = input_ids.shape
    given = input_ids[np.arange(positions) < lengths[:, None]]
    if given.size and not 1 <= given.min() <= given.max() < vocab_size:
        raise ValueError(
            f"input_ids: expected 1 to {vocab_size - 1}, got {given.min()} to {given.max()}"
        )
    counts = _Counts(batch, order, vocab_size)
    rows = np.zeros((batch, positions, vocab_size))
    for position, ids in enumerate(input_ids.T):
        inside = position < lengths
        counts.append(letters := np.flatnonzero(inside & (ids != vocab_size - 1)), ids[letters])
        counts.start_word(np.flatnonzero(inside & (ids == vocab_size - 1)))
        values = _mix(counts, backoff=backoff, uniform=uniform, add_one=add_one)
        rows[inside, position] = values[inside]
    return rows


def _mix(
    counts: _Counts, *, backoff: bool, uniform: bool, add_one: bool
) -> Float64[np.ndarray, "B V"]:
    """Build the distribution from order 1 up (or at order N alone, without back-off)."""
    met = counts.tables[0][:, 0] > 0
    met[:, _UNDERSCORE] = False
    values = np.zeros(met.shape)
    source = np.zeros(met.shape, np.int64)
    for n in range(1 if backoff else counts.order, counts.order + 1):
        followers, total = counts.followers(n)
        seen = met & (followers > 0)
        if add_one:
            followers, total = followers + 1, total + met.sum(axis=-1, keepdims=True)
        share = np.where(seen, followers / total, 0.0)
        if backoff:
            share += _left_over(share, np.where(met & ~seen, values, 0.0))
        values, source = share, np.where(seen, n, source)
    return _flatten(values, source, counts.order) if uniform else values


def _left_over(
    share: Float64[np.ndarray, "B V"], lower: Float64[np.ndarray, "B V"]
) -> Float64[np.ndarray, "B V"]:
    """Hand what the seen letters leave to the unseen, in proportion to the lower order."""
    total = lower.sum(axis=-1, keepdims=True)
    rest = 1.0 - share.sum(axis=-1, keepdims=True)
    return np.divide(rest * lower, total, out=np.zeros_like(lower), where=total > 0)


def _flatten(
    values: Float64[np.ndarray, "B V"], source: Int[np.ndarray, "B V"], order: int
) -> Float64[np.ndarray, "B V"]:
    """Replace the nonzero values that came from one order by their mean."""
    flat = np.zeros_like(values)
    for n in range(1, order + 1):
        group: Bool[np.ndarray, "B V"] = (source == n) & (values > 0)
        size = np.maximum(group.sum(axis=-1, keepdims=True), 1)
        flat += group * (np.where(group, values, 0.0).sum(axis=-1, keepdims=True) / size)
    return flat


def score(
    instances: Instances,
    order: int,
    *,
    backoff: bool = True,
    uniform: bool = False,
    add_one: bool = False,
) -> Score:
    """Score the n-gram predictor against the automata, on every input position."""
    options = dict(backoff=backoff, uniform=uniform, add_one=add_one)
    total = Score()
    size = max(1, _CHUNK_ENTRIES // VOCAB_SIZE**order)
    for start in range(0, len(instances), size):
        chunk = instances[start : start + size]
        predicted = predict_batch(chunk.input_ids, chunk.lengths, order, **options)
        total += Score.of(predicted, chunk.next_symbols(slice(None)), chunk.lengths)
    return total
