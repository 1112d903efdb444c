"""What the model is trained on, and what it is judged by: the loss of every token of a text.

Axes: B windows, T positions, V vocabulary.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from experiments.text import IGNORED_LABEL, LossByPosition, document_positions
from kreg.training import mean_token_cross_entropy
from kreg.training.data import Batch, Row, Source, filled, stack
from kreg.training.step import LossFn
from kreg.training.writer import fetch

# (parameters, tokens, segments or None, dropout key or None) -> logits
type Apply = Callable[
    [PyTree[Array], Int[Array, "B T"], Int[Array, "B T"] | None, Array | None],
    Float[Array, "B T V"],
]
type Measure = Callable[[PyTree[Array], Batch], Float[Array, "B T"]]


def blank(row: Row, end: int) -> Row:
    """Return a row without labels, of the shapes of this one."""
    fillings = {"tokens": end, "labels": IGNORED_LABEL, "segment_ids": 0}
    return {name: np.full_like(row[name], fillings[name]) for name in row}


def make_loss(apply: Apply) -> LossFn:
    """Return the mean cross-entropy of a batch over its labels, with dropout."""

    def loss(params: PyTree[Array], batch: dict[str, Array], key: Array):
        logits = apply(params, batch["tokens"], batch.get("segment_ids"), key)
        return mean_token_cross_entropy(logits, batch["labels"], ignore=IGNORED_LABEL), {}

    return loss


def make_measure(apply: Apply) -> Measure:
    """Compile the losses of a batch, one a position; those at ignored labels mean nothing."""

    @jax.jit
    def measure(params: PyTree[Array], batch: dict[str, Array]) -> Float[Array, "B T"]:
        logits = apply(params, batch["tokens"], batch.get("segment_ids"), None)
        wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        label = jnp.maximum(batch["labels"], 0)[..., None]
        return -jnp.take_along_axis(jax.nn.log_softmax(wide), label, axis=-1)[..., 0]

    return measure


def held_out(rows: Source, batch_size: int, end: int) -> Iterator[Batch]:
    """Give all rows in batches of one shape."""
    empty = functools.partial(blank, end=end)
    for start in range(0, len(rows), batch_size):
        stop = min(start + batch_size, len(rows))
        yield stack(filled([rows[index] for index in range(start, stop)], batch_size, empty))


def by_position(
    measure: Measure, params: PyTree[Array], batches: Iterator[Batch]
) -> LossByPosition:
    """Add up the losses of all labels by their position: in the window, or in the document."""
    total = None
    for batch in batches:
        losses, labels = fetch(measure(params, batch)), batch["labels"]
        if "segment_ids" in batch:
            losses, labels = _by_document(losses, labels, batch["segment_ids"])
        found = LossByPosition.of(losses, labels)
        total = found if total is None else total + found
    assert total is not None
    return total


def _by_document(
    losses: np.ndarray, labels: np.ndarray, segment_ids: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Give every label a row of its own, in which it stands where it stands in its document."""
    rows, columns = np.nonzero(labels != IGNORED_LABEL)
    places = document_positions(segment_ids)[rows, columns]
    shape = (len(rows), labels.shape[1])
    moved, kept = np.zeros(shape, losses.dtype), np.full(shape, IGNORED_LABEL, labels.dtype)
    moved[np.arange(len(rows)), places] = losses[rows, columns]
    kept[np.arange(len(rows)), places] = labels[rows, columns]
    return moved, kept


def summary(nats: float, tokens: int, text_bytes: int) -> dict[str, Any]:
    """Return what is reported of a sum of -log p: per token, and per byte of the text itself.

    >>> summary(8 * math.log(2), 8, 16)
    {'loss': 0.6931471805599453, 'perplexity': 2.0, 'bits_per_byte': 0.5, 'tokens': 8}
    """
    loss = nats / tokens
    bits = nats / math.log(2) / text_bytes
    return {
        "loss": loss,
        # A run that diverged has a loss all the same.
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": bits,
        "tokens": tokens,
    }


def edges(block: int) -> list[int]:
    """Return where the bins of positions begin, and the end of the last: powers of two.

    >>> edges(48)
    [0, 1, 2, 4, 8, 16, 32, 48]
    """
    return [0, *(2**k for k in range(block.bit_length()) if 2**k < block), block]
