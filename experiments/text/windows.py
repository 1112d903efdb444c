"""Rows for a data loader: random windows, whole documents packed, windows that cover everything.

Every row is a dict of int32 arrays of T positions: `tokens`, the `labels` that follow them
(IGNORED_LABEL where there is none), and where documents must not see each other `segment_ids`.
A document's first token is predicted from the end token before it.
"""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int64

from experiments.text.packing import pack
from experiments.text.token_files import Tokens

IGNORED_LABEL = -100

type Row = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class RandomWindows:
    """Windows at random places, row i at a place that is a function of (seed, i).

    Places are uniform and drawn with replacement; documents run on into each other, as in the
    training of Memory Mosaics. A run of n steps takes `rows` = n times the batch size, and
    `kreg.training.batches(..., shuffle=False)`: then no epoch is ever repeated.

    Raises:
        ValueError: a number is below 1 (the seed: below 0), or there are not size + 1 tokens.

    >>> tokens = Tokens.of([[0, 1, 2, 3], [4, 5, 6]], vocab_size=9, end=8)
    >>> row = RandomWindows(tokens, 4, rows=100, seed=0)[7]
    >>> row["tokens"].tolist()[1:] == row["labels"].tolist()[:-1]
    True
    """

    tokens: Tokens
    size: int
    rows: int
    seed: int

    def __post_init__(self) -> None:
        _require_positive(size=self.size, rows=self.rows)
        if self.seed < 0:
            raise ValueError(f"seed: expected 0 or more, got {self.seed}")
        if len(self.tokens) <= self.size:
            raise ValueError(f"size: expected less than {len(self.tokens)} tokens, got {self.size}")

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> Row:
        _require_row(index, self.rows)
        generator = np.random.default_rng((self.seed, int(index)))
        start = int(generator.integers(len(self.tokens) - self.size))
        ids = np.asarray(self.tokens.ids[start : start + self.size + 1], np.int32)
        return {"tokens": ids[:-1], "labels": ids[1:]}


@dataclass(frozen=True, eq=False)
class EvaluationWindows:
    """All tokens in their order, each the label of one position of one row.

    Row k predicts tokens kT to kT + T - 1; it begins with the token before them (the first row:
    with the end token), and knows nothing further back. The last row is filled up.

    Raises:
        ValueError: the size is below 1.

    >>> rows = EvaluationWindows(Tokens.of([[1, 2, 3, 4]], vocab_size=9, end=8), 3)
    >>> [rows[k]["labels"].tolist() for k in range(len(rows))]
    [[1, 2, 3], [4, 8, -100]]
    >>> rows[0]["tokens"].tolist()
    [8, 1, 2]
    """

    tokens: Tokens
    size: int

    def __post_init__(self) -> None:
        _require_positive(size=self.size)

    def __len__(self) -> int:
        return -(-len(self.tokens) // self.size)

    def __getitem__(self, index: int) -> Row:
        _require_row(index, len(self))
        start = int(index) * self.size
        tokens, labels = _shifted(self.tokens, start, start + self.size)
        return _filled(tokens, labels, self.size, self.tokens.end)


@dataclass(frozen=True, eq=False)
class PackedDocuments:
    """Whole documents, as many as fit in a row, which know nothing of each other.

    A document of L tokens, its end included, takes L positions: the end token and all but its
    last as `tokens`, itself as `labels`; each has its own number in `segment_ids`, from 1 on. What
    is left of a row has segment 0 and ignored labels. Every token is the label of one position of
    one row. A document longer than a row is cut into pieces of T positions and a last shorter one;
    each but the first begins with the token before it, and is a segment of its own.

    The rows are packed by best fit from the longest down, and are the same every time; the fullest
    come first.

    Raises:
        ValueError: the size is below 1.

    >>> rows = PackedDocuments(Tokens.of([[1], [2, 3], [4]], vocab_size=9, end=8), 5)
    >>> for name, row in rows[0].items():
    ...     print(name, row.tolist())
    tokens [8, 2, 3, 8, 1]
    labels [2, 3, 8, 1, 8]
    segment_ids [1, 1, 1, 2, 2]
    """

    tokens: Tokens
    size: int
    starts: Int64[np.ndarray, " pieces"] = field(init=False, repr=False)
    lengths: Int64[np.ndarray, " pieces"] = field(init=False, repr=False)
    bounds: Int64[np.ndarray, " rows_plus_1"] = field(init=False, repr=False)
    """Row r holds the pieces from `bounds[r]` to before `bounds[r + 1]`."""

    def __post_init__(self) -> None:
        _require_positive(size=self.size)
        starts, lengths = _pieces(self.tokens.offsets, self.size)
        order, bounds = pack(lengths, self.size)
        for name, value in (("starts", starts[order]), ("lengths", lengths[order])):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "bounds", bounds)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, index: int) -> Row:
        _require_row(index, len(self))
        pieces = range(self.bounds[index], self.bounds[index + 1])
        tokens, labels, segments = [], [], []
        for number, piece in enumerate(pieces, start=1):
            start, length = int(self.starts[piece]), int(self.lengths[piece])
            inputs, targets = _shifted(self.tokens, start, start + length)
            tokens.append(inputs)
            labels.append(targets)
            segments.append(np.full(length, number, np.int32))
        row = _filled(np.concatenate(tokens), np.concatenate(labels), self.size, self.tokens.end)
        segment_ids = np.concatenate(segments)
        return row | {"segment_ids": np.pad(segment_ids, (0, self.size - len(segment_ids)))}


def _pieces(
    offsets: Int64[np.ndarray, " d_plus_1"], size: int
) -> tuple[Int64[np.ndarray, " pieces"], Int64[np.ndarray, " pieces"]]:
    """Cut documents into pieces of at most `size` tokens; return their starts and lengths."""
    lengths = np.diff(offsets)
    counts = -(-lengths // size)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.repeat(offsets[:-1], counts) + within * size
    return starts, np.minimum(np.repeat(offsets[1:], counts) - starts, size)


def _shifted(tokens: Tokens, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens start - 1 to stop - 2, and what follows each; before the first is an end."""
    ids = np.asarray(tokens.ids[max(start - 1, 0) : stop], np.int32)
    if start == 0:
        ids = np.concatenate([np.array([tokens.end], np.int32), ids])
    return ids[:-1], ids[1:]


def _filled(tokens: np.ndarray, labels: np.ndarray, size: int, end: int) -> Row:
    gap = (0, size - len(tokens))
    return {
        "tokens": np.pad(tokens, gap, constant_values=end),
        "labels": np.pad(labels, gap, constant_values=IGNORED_LABEL),
    }


def _require_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name}: expected at least 1, got {number}")


def _require_row(index: int, rows: int) -> None:
    if not 0 <= index < rows:
        raise IndexError(f"index: expected 0 to {rows - 1}, got {index}")
