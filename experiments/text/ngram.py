"""The n-gram baseline: interpolated Kneser-Ney with three discounts, in sorted tables.

With c the count of an n-gram at the highest order N, and below it the number of different tokens
seen before an n-gram,

    p_k(w | h) = (c(h w) - D(c(h w))) / c(h) + g(h) p_{k-1}(w | h'),   p_0 = 1 / V,

where h' is h without its oldest token, c(h) = sum_w c(h w), g(h) c(h) = sum_w D(c(h w)), and
p_k = p_{k-1} after a history that was never seen. A document's history begins with end tokens, as
many as it takes.

References:
    Chen and Goodman, An Empirical Study of Smoothing Techniques for Language Modeling, 1998.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64, UInt64

from experiments.text.token_files import Tokens

_CHUNK = 2**20


@dataclass(frozen=True)
class Score:
    """Hold a sum of -log p in nats over tokens; scores of different tokens add up.

    >>> score = Score(4 * math.log(8), 4) + Score(0.0, 4)
    >>> round(score.loss, 4), round(score.perplexity, 4)
    (1.0397, 2.8284)
    """

    nats: float = 0.0
    tokens: int = 0

    @property
    def loss(self) -> float:
        """Nats per token; NaN without tokens."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    def __add__(self, other: Score) -> Score:
        return Score(self.nats + other.nats, self.tokens + other.tokens)


@dataclass(frozen=True, eq=False)
class _Table:
    """One order. N-grams and histories are numbers in base V, the latest token last, sorted."""

    grams: UInt64[np.ndarray, " g"]
    direct: Float64[np.ndarray, " g"]
    histories: UInt64[np.ndarray, " h"]
    backoff: Float64[np.ndarray, " h"]

    @classmethod
    def of(
        cls, grams: UInt64[np.ndarray, " g"], counts: Int64[np.ndarray, " g"], vocab_size: int
    ) -> _Table:
        """Discount the counts of sorted n-grams."""
        histories, starts = np.unique(grams // np.uint64(vocab_size), return_index=True)
        lost = np.concatenate([[0.0], discounts(counts)])[np.minimum(counts, 3)]
        totals = np.add.reduceat(counts, starts).astype(np.float64)
        sizes = np.diff(starts, append=len(grams))
        direct = (counts - lost) / np.repeat(totals, sizes)
        return cls(grams, direct, histories, np.add.reduceat(lost, starts) / totals)

    def interpolate(
        self, grams: UInt64[np.ndarray, " m"], lower: Float64[np.ndarray, " m"], vocab_size: int
    ) -> Float64[np.ndarray, " m"]:
        """Return p_k from p_{k-1}."""
        histories = grams // np.uint64(vocab_size)
        return _look_up(self.grams, self.direct, grams, 0.0) + lower * _look_up(
            self.histories, self.backoff, histories, 1.0
        )


@dataclass(frozen=True, eq=False)
class KneserNey:
    """Predict the next token from the last `order - 1`; see the module for the formula.

    `across_documents`: whether a history goes on into the document before, as it does for a model
    that reads `RandomWindows` and `EvaluationWindows`; else every document stands alone, as in
    `PackedDocuments`. At the border of a row a model knows less than these n-grams do.

    >>> tokens = Tokens.of([[1, 2], [1, 3], [1, 2]], vocab_size=5, end=4)
    >>> KneserNey.fit(tokens, order=2).predict([1]).round(3).tolist()
    [0.021, 0.039, 0.595, 0.261, 0.084]
    """

    vocab_size: int
    end: int
    across_documents: bool
    tables: tuple[_Table, ...]
    """Orders 1 to N."""

    @classmethod
    def fit(cls, tokens: Tokens, *, order: int = 3, across_documents: bool = False) -> KneserNey:
        """Count the n-grams of all tokens, a million at a time.

        Raises:
            ValueError: there is no token, or `order` is below 1 or so high that n-grams do not fit
                into 64 bits (4 is the most for GPT-2's tokens, 7 for bytes).
        """
        vocab_size = tokens.vocab_size
        if order < 1 or vocab_size**order > 2**64:
            raise ValueError(
                f"order: expected at least 1 and {vocab_size}^order <= 2^64, got {order}"
            )
        if not len(tokens):
            raise ValueError("tokens: expected at least one, got none")
        model = cls(vocab_size, tokens.end, across_documents, ())
        grams, counts = _count(_number(c, vocab_size) for c in model._contexts(tokens, order))
        tables = [_Table.of(grams, counts, vocab_size)]
        for k in range(order - 1, 0, -1):
            suffixes = grams % np.uint64(vocab_size**k)
            grams, counts = np.unique(suffixes, return_counts=True)
            tables.append(_Table.of(grams, counts, vocab_size))
        return cls(vocab_size, tokens.end, across_documents, tuple(reversed(tables)))

    @property
    def order(self) -> int:
        return len(self.tables)

    def predict(self, history: Sequence[int] | np.ndarray) -> Float64[np.ndarray, " V"]:
        """Return the distribution after a history, of which the last N - 1 tokens count.

        A history that is shorter is the beginning of a document.
        """
        filled = [self.end] * self.order + [int(number) for number in history]
        context = np.zeros((self.order, self.vocab_size), np.uint64)
        context[0] = np.arange(self.vocab_size)
        for lag in range(1, self.order):
            context[lag] = filled[-lag]
        return self._probabilities(context)

    def losses(self, tokens: Tokens) -> Float64[np.ndarray, " n"]:
        """Return -log p of every token, ends included, in nats."""
        found = [-np.log(self._probabilities(c)) for c in self._checked_contexts(tokens)]
        return np.concatenate([np.zeros(0), *found])

    def score(self, tokens: Tokens) -> Score:
        """Add the losses of all tokens up."""
        total = Score()
        for context in self._checked_contexts(tokens):
            probabilities = self._probabilities(context)
            total += Score(-float(np.log(probabilities).sum()), len(probabilities))
        return total

    def _checked_contexts(self, tokens: Tokens) -> Iterator[UInt64[np.ndarray, "N m"]]:
        if (tokens.vocab_size, tokens.end) != (self.vocab_size, self.end):
            raise ValueError(
                f"tokens: expected a vocabulary of {self.vocab_size} with end {self.end}, got "
                f"{tokens.vocab_size} with end {tokens.end}"
            )
        return self._contexts(tokens, self.order)

    def _contexts(self, tokens: Tokens, order: int) -> Iterator[UInt64[np.ndarray, "N m"]]:
        """Give each token (row 0) and those before it (row j: j back), a chunk at a time."""
        for start in range(0, len(tokens), _CHUNK):
            places = np.arange(start, min(start + _CHUNK, len(tokens)))
            known = places
            if not self.across_documents:
                document = np.searchsorted(tokens.offsets, places, side="right") - 1
                known = places - tokens.offsets[document]
            first = max(0, start - order + 1)
            ids = np.asarray(tokens.ids[first : places[-1] + 1], np.uint64)
            rows = [ids[np.maximum(places - lag - first, 0)] for lag in range(order)]
            yield np.stack(
                [np.where(known >= lag, row, np.uint64(self.end)) for lag, row in enumerate(rows)]
            )

    def _probabilities(self, context: UInt64[np.ndarray, "N m"]) -> Float64[np.ndarray, " m"]:
        probabilities = np.full(context.shape[1], 1 / self.vocab_size)
        for k, table in enumerate(self.tables, start=1):
            grams = _number(context[:k], self.vocab_size)
            probabilities = table.interpolate(grams, probabilities, self.vocab_size)
        return probabilities


def discounts(counts: Int64[np.ndarray, " g"]) -> Float64[np.ndarray, " 3"]:
    """Return D(1), D(2) and D(3 and more) from how many counts are 1, 2, 3 and 4.

    With Y = n_1 / (n_1 + 2 n_2) that is D(k) = k - (k + 1) Y n_{k+1} / n_k. Where one of the four
    numbers is 0, or a discount lies outside 0 to k, all three are Y (1/2 where n_1 = 0).

    >>> discounts(np.repeat([1, 2, 3, 4], [8, 4, 2, 2])).round(3).tolist()
    [0.5, 1.25, 1.0]
    """
    n = [int(np.count_nonzero(counts == k)) for k in range(5)]
    if not n[1]:
        return np.full(3, 0.5)
    y = n[1] / (n[1] + 2 * n[2])
    if all(n[1:]):
        found = [k - (k + 1) * y * n[k + 1] / n[k] for k in (1, 2, 3)]
        if all(0 <= discount <= k for k, discount in enumerate(found, start=1)):
            return np.array(found)
    return np.full(3, y)


def _number(context: UInt64[np.ndarray, "k m"], vocab_size: int) -> UInt64[np.ndarray, " m"]:
    """Write each column as one number in base V, row 0 the last digit."""
    number = np.zeros(context.shape[1], np.uint64)
    for row in context[::-1]:
        number = number * np.uint64(vocab_size) + row
    return number


def _count(
    chunks: Iterator[UInt64[np.ndarray, " m"]],
) -> tuple[UInt64[np.ndarray, " g"], Int64[np.ndarray, " g"]]:
    """Count equal numbers; like sizes are merged, so that the work grows as n log n."""
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    for chunk in chunks:
        parts.append(np.unique(chunk, return_counts=True))
        while len(parts) > 1 and len(parts[-2][0]) <= 2 * len(parts[-1][0]):
            parts.append(_merge(parts.pop(), parts.pop()))
    while len(parts) > 1:
        parts.append(_merge(parts.pop(), parts.pop()))
    return parts[0]


def _merge(
    one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    numbers, counts = (np.concatenate(pair) for pair in zip(one, other, strict=True))
    order = np.argsort(numbers, kind="stable")
    numbers, counts = numbers[order], counts[order]
    first = np.flatnonzero(np.append(True, numbers[1:] != numbers[:-1]))
    return numbers[first], np.add.reduceat(counts, first)


def _look_up(
    numbers: UInt64[np.ndarray, " g"],
    values: Float64[np.ndarray, " g"],
    wanted: UInt64[np.ndarray, " m"],
    otherwise: float,
) -> Float64[np.ndarray, " m"]:
    place = np.minimum(np.searchsorted(numbers, wanted), len(numbers) - 1)
    return np.where(numbers[place] == wanted, values[place], otherwise)
