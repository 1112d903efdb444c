"""Endless batches from an in-memory source, resumable to the very next batch.

The order is ours: a permutation of the rows for every epoch, drawn from (seed, epoch). Grain, where
it is installed, runs through that order and prefetches in a thread; where it is not, a stand-in
of a few lines does. Both give the same batches and the same state, so that a run saved on one
kind of machine goes on, unchanged, on the other.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np

from kreg.training.devices import Devices

type Row = dict[str, np.ndarray]
type Batch = dict[str, np.ndarray]
# Makes a row that counts for nothing, of the shapes of the one that it is given.
type Blank = Callable[[Row], Row]
type Collate = Callable[[Sequence[Row]], Batch]


class Source(Protocol):
    """Rows by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Row: ...


class BatchIterator(Iterator[Batch], Protocol):
    """Iterate without end; the state is a small dict fit for JSON."""

    def get_state(self) -> dict: ...

    def set_state(self, state: dict, /) -> None: ...

    def close(self) -> None: ...


def filled(rows: Sequence[Row], count: int, blank: Blank) -> list[Row]:
    """Fill rows up to so many with blank ones."""
    return [*rows, *(blank(rows[0]) for _ in range(count - len(rows)))]


def stack(rows: Sequence[Row]) -> Batch:
    """Stack rows of equal shapes along a new first axis."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def batches(
    source: Source,
    batch_size: int,
    *,
    seed: int,
    shuffle: bool = True,
    drop_remainder: bool = False,
    blank: Blank | None = None,
    collate: Collate = stack,
    prefetch: int = 2,
    devices: Devices | None = None,
) -> BatchIterator:
    """Iterate over a source without end, every row once an epoch, in another order every epoch.

    Args:
        drop_remainder: leave out the rows that do not fill a batch. Otherwise the last batch of an
            epoch may be smaller, which costs one more compilation of the step; `blank` avoids that.
        blank: makes a row that counts for nothing, say one whose labels are all ignored, of a row;
            an epoch's last batch is filled up with it.
        collate: makes a batch of a list of rows.
        prefetch: batches prepared ahead by Grain; 0 prepares each when it is asked for.
        devices: split batches over them. Of several processes each reads the rows of its own
            devices alone; together the batches are those of one process.

    Examples:
        >>> import numpy as np
        >>> rows = [{"x": np.array(i)} for i in range(5)]
        >>> iterator = batches(rows, 2, seed=0, shuffle=False)
        >>> [next(iterator)["x"].tolist() for _ in range(4)]
        [[0, 1], [2, 3], [4], [0, 1]]
        >>> iterator.get_state()
        {'next_index': 4}
        >>> iterator.close()
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    if len(source) < (batch_size if drop_remainder else 1):
        raise ValueError(
            f"source: expected at least one batch of {batch_size} rows, got {len(source)} rows"
        )
    if devices is not None:
        # Raises where the devices cannot split it.
        devices.rows(batch_size)
    schedule = _Epochs(source, batch_size, seed, shuffle, drop_remainder, blank, collate, devices)
    try:
        import grain
    except ImportError:
        return _PlainIterator(schedule)
    options = grain.ReadOptions(num_threads=min(prefetch, 1), prefetch_buffer_size=prefetch)
    return iter(grain.MapDataset.source(schedule).to_iter_dataset(options))


class _Epochs:
    """The batches of all epochs, by number: the same interface as a source, without an end."""

    def __init__(
        self,
        source: Source,
        batch_size: int,
        seed: int,
        shuffle: bool,
        drop_remainder: bool,
        blank: Blank | None,
        collate: Collate,
        devices: Devices | None,
    ):
        self._source, self._collate, self._batch_size = source, collate, batch_size
        self._blank, self._devices = blank, devices
        rows = len(source)
        self._an_epoch = rows // batch_size if drop_remainder else -(-rows // batch_size)

        # The last two epochs: prefetching runs a little ahead across the boundary.
        @lru_cache(maxsize=2)
        def order(epoch: int) -> np.ndarray | range:
            if not shuffle:
                return range(rows)
            return np.random.default_rng((seed, epoch)).permutation(rows)

        self._order = order

    def __len__(self) -> int:
        # Grain wants a length; no run reaches this one.
        return 2**62

    def __getitem__(self, index: int) -> Batch:
        epoch, within = divmod(int(index), self._an_epoch)
        start = within * self._batch_size
        chosen = self._order(epoch)[start : start + self._batch_size]
        size = len(chosen) if self._blank is None else self._batch_size
        if self._devices is None:
            return self._collate([self._row(chosen, place) for place in range(size)])
        here = self._collate([self._row(chosen, place) for place in self._devices.rows(size)])
        return self._devices.place_batch(here, size)

    def _row(self, chosen: Sequence[int] | np.ndarray, place: int) -> Row:
        if place < len(chosen):
            return self._source[int(chosen[place])]
        assert self._blank is not None
        return self._blank(self._source[int(chosen[0])])


class _PlainIterator:
    """What Grain's iterator offers, without Grain."""

    def __init__(self, schedule: _Epochs):
        self._schedule, self._next = schedule, 0

    def __iter__(self) -> "_PlainIterator":
        return self

    def __next__(self) -> Batch:
        batch = self._schedule[self._next]
        self._next += 1
        return batch

    def get_state(self) -> dict:
        return {"next_index": self._next}

    def set_state(self, state: dict) -> None:
        self._next = int(state["next_index"])

    def close(self) -> None:
        pass
