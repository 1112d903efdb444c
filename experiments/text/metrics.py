"""What a model's losses say besides their mean; nothing here needs the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64, Int, Int64

from experiments.text.windows import IGNORED_LABEL


@dataclass(frozen=True, eq=False)
class LossByPosition:
    """Hold the sum and number of losses at each position of a row; those of batches add up.

    >>> losses = np.array([[3.0, 1.0], [5.0, 9.0]])
    >>> found = LossByPosition.of(losses, np.array([[7, 7], [7, IGNORED_LABEL]]))
    >>> found.mean.tolist(), (found + found).counts.tolist(), found.loss
    ([4.0, 1.0], [4, 2], 3.0)
    """

    sums: Float64[np.ndarray, " T"]
    counts: Int64[np.ndarray, " T"]

    @classmethod
    def of(cls, losses: Float[np.ndarray, "B T"], labels: Int[np.ndarray, "B T"]) -> LossByPosition:
        """Sum over the rows of a batch; losses at ignored labels do not matter, not even NaN.

        Raises:
            ValueError: the shapes differ.
        """
        losses, labels = np.asarray(losses), np.asarray(labels)
        if losses.ndim != 2 or losses.shape != labels.shape:
            raise ValueError(
                f"losses: expected the labels' [B, T] {labels.shape}, got {losses.shape}"
            )
        labelled = labels != IGNORED_LABEL
        sums = np.where(labelled, losses, 0).sum(axis=0, dtype=np.float64)
        return cls(sums, labelled.sum(axis=0, dtype=np.int64))

    def __add__(self, other: LossByPosition) -> LossByPosition:
        if self.sums.shape != other.sums.shape:
            raise ValueError(f"other: expected {len(self.sums)} positions, got {len(other.sums)}")
        return LossByPosition(self.sums + other.sums, self.counts + other.counts)

    @property
    def mean(self) -> Float64[np.ndarray, " T"]:
        """The mean loss at each position; NaN where there was no label."""
        return _ratio(self.sums, self.counts)

    @property
    def loss(self) -> float:
        """The mean loss over all labels."""
        return float(_ratio(self.sums.sum(), self.counts.sum()))

    def binned(self, edges: Sequence[int]) -> Float64[np.ndarray, " bins"]:
        """Return the mean loss of positions `edges[i]` to before `edges[i + 1]`.

        Raises:
            ValueError: the edges do not increase from 0 or more to at most T.

        >>> LossByPosition(np.array([1.0, 2.0, 6.0]), np.ones(3, np.int64)).binned([0, 1, 3])
        array([1., 4.])
        """
        inside = list(edges) == sorted(set(edges)) and len(edges) > 1
        if not inside or not 0 <= edges[0] < edges[-1] <= len(self.sums):
            raise ValueError(
                f"edges: expected 2 or more, increasing, in 0 to {len(self.sums)}, got {edges}"
            )
        starts, stop = np.asarray(edges[:-1]), edges[-1]
        sums = np.add.reduceat(self.sums[:stop], starts)
        return _ratio(sums, np.add.reduceat(self.counts[:stop], starts))


def document_positions(segment_ids: Int[np.ndarray, "B T"]) -> Int64[np.ndarray, "B T"]:
    """Count the positions since a document began, for losses by position in the document.

    >>> document_positions(np.array([[1, 1, 1, 2, 2, 0]])).tolist()
    [[0, 1, 2, 0, 1, 0]]
    """
    places = np.arange(segment_ids.shape[1])
    begins = np.ones(segment_ids.shape, bool)
    begins[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return places - np.maximum.accumulate(np.where(begins, places, 0), axis=1)


def _ratio(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return np.divide(sums, counts, out=np.full(np.shape(sums), np.nan), where=counts > 0)
