"""How right the predictions are: sums and counts of a batch, which add up.

Axes: B sequences, T positions. Everything with predictions is a pure function that works on NumPy
and on JAX arrays, inside jit too; predictions are the argmax of the logits at every position.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from experiments.length_tasks.layout import Encoded, Layout
from experiments.length_tasks.mqmtar import MQMTAR
from experiments.length_tasks.randomness import Int, Ints
from experiments.length_tasks.task import namespace


class Counts(NamedTuple):
    """Hold what a batch adds to the scores. Rows without any loss are no sequences."""

    sequences: Int
    exact: Int
    """Sequences whose target is right, EOS aside."""
    exact_with_eos: Int
    tokens: Int
    """Target tokens, without EOS."""
    correct: Int
    """Target tokens that are right."""

    def rates(self) -> dict[str, float]:
        """Return `exact`, `exact_with_eos` and `token_accuracy`; NaN of nothing."""
        return {
            "exact": _rate(self.exact, self.sequences),
            "exact_with_eos": _rate(self.exact_with_eos, self.sequences),
            "token_accuracy": _rate(self.correct, self.tokens),
        }


def teacher_forced(predictions: Ints, batch: Encoded, layout: Layout) -> Counts:
    """Count what is predicted rightly after the true tokens before it; for every task.

    Sequences of labelled tokens have no EOS to predict, so that both kinds of exact agree.
    `jax.tree.map(operator.add, ...)` or `add` joins the counts of batches.

    >>> from experiments.length_tasks import Copy, asentmax_layout, host_batch
    >>> layout = asentmax_layout(Copy())
    >>> batch = host_batch(Copy(), layout, seed=0, split="test", indices=range(2), length=4)
    >>> teacher_forced(batch.targets, batch, layout).rates()
    {'exact': 1.0, 'exact_with_eos': 1.0, 'token_accuracy': 1.0}
    """
    mask = batch.mask
    kept = mask if layout.classifies else mask & (batch.targets != layout.eos)
    right = predictions == batch.targets
    some = mask.any(axis=-1)
    return Counts(
        sequences=some.sum(),
        exact=((right | ~kept).all(axis=-1) & some).sum(),
        exact_with_eos=((right | ~mask).all(axis=-1) & some).sum(),
        tokens=kept.sum(),
        correct=(right & kept).sum(),
    )


def add[T](one: T, other: T) -> T:
    """Add counts of two batches field by field."""
    return jax.tree.map(lambda a, b: a + b, one, other)


class RecallCounts(NamedTuple):
    """Hold the counts of recalled values."""

    pairs: Int
    correct: Int
    """Queries whose value is right, all its tokens."""
    sequences: Int
    exact: Int
    """Sequences with all values right."""

    def rates(self) -> dict[str, float]:
        """Return `associative_recall` and `exact`; NaN of nothing."""
        return {
            "associative_recall": _rate(self.correct, self.pairs),
            "exact": _rate(self.exact, self.sequences),
        }


def sparse_attention_recall(predictions: Ints, targets: Ints, task: MQMTAR) -> RecallCounts:
    """Count as the code of Sparse Attention as Compact Kernel Regression does for MQMTAR.

    It looks at the last |target| + 1 columns and there at the values alone: neither the query
    separators nor EOS are checked. Only right for sequences of equal length, without padding.

    Raises:
        ValueError: there are fewer columns.
    """
    tail = task.num_q * (task.v_len + 1) + 1
    if targets.shape[-1] < tail or predictions.shape != targets.shape:
        raise ValueError(
            f"predictions: expected two arrays of one shape with at least {tail} columns, got "
            f"{predictions.shape} and {targets.shape}"
        )
    right = (predictions == targets)[..., -tail:-1]
    values = right.reshape(*right.shape[:-1], task.num_q, task.v_len + 1)[..., 1:].all(axis=-1)
    exact = values.all(axis=-1)
    return RecallCounts(values.size, values.sum(), exact.size, exact.sum())


def sparse_attention_exact(predictions: Ints, targets: Ints, layout: Layout) -> Counts:
    """Count as the code of Sparse Attention as Compact Kernel Regression does for the other tasks.

    The last column is dropped, and what follows SEP in the shifted targets is compared: without
    padding this is the target without EOS. In a padded row EOS and the padding have to be predicted
    too. A row without exactly one SEP scores 0 and has no tokens. EOS is never checked by itself:
    `exact_with_eos` equals `exact`.
    """
    xp = namespace(targets)
    targets, right = targets[..., :-1], (predictions == targets)[..., :-1]
    separators = targets == layout.sep
    single = separators.sum(axis=-1) == 1
    place = xp.broadcast_to(xp.arange(targets.shape[-1]), targets.shape)
    kept = (place > xp.argmax(separators, axis=-1)[..., None]) & single[..., None]
    exact = ((right | ~kept).all(axis=-1) & single).sum()
    return Counts(single.size, exact, exact, kept.sum(), (right & kept).sum())


def generated_exact(
    generated: Sequence[Sequence[int]] | np.ndarray,
    targets: Sequence[Sequence[int]],
    layout: Layout,
) -> np.ndarray:
    """Tell which generated rows are right as asentmax does: the target, then EOS.

    A row is cut at its first EOS, and compared whole without one. Every target token counts,
    separators too.

    >>> from experiments.length_tasks import Copy, asentmax_layout
    >>> layout = asentmax_layout(Copy())
    >>> generated_exact([[5, 3, layout.eos, 9], [5, 3, 3]], [[5, 3], [5, 3]], layout).tolist()
    [True, False]
    """
    pairs = zip(generated, targets, strict=True)
    return np.array([before_eos(row, layout.eos) == list(target) for row, target in pairs], bool)


def before_eos(ids: Sequence[int] | np.ndarray, eos: int) -> list[int]:
    """Cut a row at the first EOS.

    >>> before_eos([5, 34, 3], 34)
    [5]
    """
    row = np.asarray(ids, int).tolist()
    return row[: row.index(eos)] if eos in row else row


def bleu(predictions: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> float:
    """Return corpus BLEU-4 on ids, without smoothing: what asentmax picks its sort checkpoints by.

    The geometric mean of the shares of n-grams (n = 1 to 4) that occur in the target, each as often
    as there at most, times exp(1 - |target| / |prediction|) where that is below 1.

    References:
        Papineni et al., `BLEU: a Method for Automatic Evaluation of Machine Translation
        <https://aclanthology.org/P02-1040/>`_, 2002.

    >>> bleu([[1, 2, 3, 4, 5]], [[1, 2, 3, 4, 5]])
    1.0
    """
    shared, total = np.zeros(4), np.zeros(4)
    lengths = np.zeros(2)
    for prediction, target in zip(predictions, targets, strict=True):
        lengths += len(prediction), len(target)
        for n in range(1, 5):
            ours, theirs = _ngrams(prediction, n), _ngrams(target, n)
            shared[n - 1] += (ours & theirs).total()
            total[n - 1] += ours.total()
    if not shared.all():
        return 0.0
    brevity = min(0.0, 1.0 - lengths[1] / lengths[0])
    return float(np.exp(brevity + np.log(shared / total).mean()))


def _ngrams(ids: Sequence[int], n: int) -> Counter[tuple[int, ...]]:
    return Counter(tuple(ids[place : place + n]) for place in range(len(ids) - n + 1))


def _rate(part: Int, whole: Int) -> float:
    return float(part) / float(whole) if whole else float("nan")
