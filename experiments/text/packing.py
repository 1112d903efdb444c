"""Bin packing by best fit decreasing, on counts of lengths: millions of pieces in seconds."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int, Int64

# How many rows look alike: the lengths in them, and how often.
type Pattern = tuple[tuple[int, ...], int]


def pack(
    lengths: Int[np.ndarray, " pieces"], size: int
) -> tuple[Int64[np.ndarray, " pieces"], Int64[np.ndarray, " rows_plus_1"]]:
    """Put pieces of 1 to `size` into rows of `size`; return their order, and where rows begin.

    Row r holds the pieces `order[bounds[r] : bounds[r + 1]]`. From the longest down, a piece goes
    to a row with the least room that is enough, or to a new one. The result depends on nothing but
    the lengths.

    >>> order, bounds = pack(np.array([2, 5, 3, 1]), 6)
    >>> order.tolist(), bounds.tolist()
    ([2, 0, 3, 1], [0, 3, 4])
    """
    lengths = np.asarray(lengths, np.int64)
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= size:
        raise ValueError(f"lengths: expected 1 to {size}, got {lengths.min()} to {lengths.max()}")
    by_length = np.argsort(lengths, kind="stable")
    counts = np.bincount(lengths, minlength=size + 1)
    # Where the pieces of each length begin that are not in a row yet.
    free = np.cumsum(counts) - counts
    orders, sizes = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for pattern, rows in _patterns(counts, size):
        columns = []
        for length in pattern:
            columns.append(by_length[free[length] : free[length] + rows])
            free[length] += rows
        orders.append(np.stack(columns, axis=1).ravel())
        sizes.append(np.full(rows, len(pattern), np.int64))
    bounds = np.concatenate([[0], np.cumsum(np.concatenate(sizes))])
    return np.concatenate(orders), bounds.astype(np.int64)


def _patterns(counts: Int[np.ndarray, " size_plus_1"], size: int) -> Iterator[Pattern]:
    """Fill rows with `counts[length]` pieces of each length."""
    # The rows begun, by the room that is left in them.
    begun: dict[int, list[Pattern]] = {}
    for length in range(size, 0, -1):
        missing = int(counts[length])
        for room in sorted(room for room in begun if room >= length):
            waiting = begun.pop(room) if missing else []
            while waiting:
                pattern, rows = waiting.pop()
                for group in _fill(pattern, rows, room, length, missing):
                    missing -= (len(group[0]) - len(pattern)) * group[1]
                    begun.setdefault(size - sum(group[0]), []).append(group)
        if missing:
            new = -(-missing // (size // length))
            for group in _fill((), new, size, length, missing):
                begun.setdefault(size - sum(group[0]), []).append(group)
    for room in sorted(begun):
        yield from begun[room]


def _fill(
    pattern: tuple[int, ...], rows: int, room: int, length: int, pieces: int
) -> Iterator[Pattern]:
    """Put up to `pieces` of a length into rows that look alike: full ones, a last one, the rest."""
    each = room // length
    full = min(rows, pieces // each)
    last = pieces - full * each if full < rows else 0
    if full:
        yield pattern + (length,) * each, full
    if last:
        yield (*pattern, *(length,) * last), 1
    if rest := rows - full - (last > 0):
        yield pattern, rest
