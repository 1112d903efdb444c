"""Special ids, and a sample as the inputs, targets and loss mask of a model.

Axes: B sequences, T input positions, S source and R target tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from experiments.length_tasks.randomness import Int, Ints
from experiments.length_tasks.task import Sample, Task, namespace, pick

IGNORED = -1
"""The label of a position without loss."""


@dataclass(frozen=True)
class Layout:
    """Hold the special ids of a task and what its sequences look like.

    A sequence is BOS source SEP target EOS, and a model predicts the next token, or BOS source EOS,
    and it labels each source token (`classifies`). Flip-flop has no SEP (`separates` is False).
    """

    bos: int
    sep: int
    eos: int
    pad: int
    vocab_size: int
    """The number of ids a model reads."""
    classes: int
    """The number of logits at a position."""
    separates: bool = True
    classifies: bool = False
    target_pad: int = IGNORED
    """What targets are padded with; a position without a target counts as padding."""

    def positions(self, sample: Sample) -> Int:
        """Return the number of input positions of a sample."""
        if self.classifies:
            return sample.source_length + 2
        return sample.source_length + sample.target_length + 1 + self.separates

    def width(self, task: Task) -> int:
        """Return the number of input positions of the task's longest sequence."""
        longest = task.longest_source, task.longest_target
        return int(self.positions(Sample(np.array(0), longest[0], np.array(0), longest[1])))


def asentmax_layout(task: Task) -> Layout:
    """Return the ids of ASEntmax's code: pad, BOS, EOS, a mask that never occurs, SEP.

    They follow the largest data id (MQMTAR leaves one id out). This is the layout we use: it is
    the only one that serves all tasks, and a superset of the other's meanings.

    >>> from experiments.length_tasks.mqmtar import MQMTAR
    >>> asentmax_layout(MQMTAR()).pad, asentmax_layout(MQMTAR()).vocab_size
    (260, 265)
    """
    pad = task.data_ids + task.spare_ids
    vocab_size = pad + 5
    return Layout(
        bos=pad + 1,
        sep=pad + 4,
        eos=pad + 2,
        pad=pad,
        vocab_size=vocab_size,
        classes=vocab_size if task.classes is None else task.classes,
        separates=task.has_separator,
        classifies=task.classes is not None,
    )


def sparse_attention_layout(task: Task) -> Layout:
    """Return the ids of the code of Sparse Attention as Compact Kernel Regression.

    BOS, SEP, EOS and pad follow the data ids; padded targets are pad. With it come the numbers of
    that code's checkpoints and metrics.

    Raises:
        ValueError: the task is flip-flop or one of labels, which that code has no layout for.

    >>> from experiments.length_tasks.rearranging import Sort
    >>> sparse_attention_layout(Sort()).pad
    35
    """
    if not task.has_separator or task.classes is not None:
        raise ValueError(f"task: expected one with a separator, got {type(task).__name__}")
    bos = task.data_ids
    sep, eos, pad = bos + 1, bos + 2, bos + 3
    return Layout(bos, sep, eos, pad, vocab_size=pad + 1, classes=pad + 1, target_pad=pad)


class Encoded(NamedTuple):
    """Hold what a model reads and should say, for one sequence [T] or for a batch [B, T]."""

    inputs: Ints
    targets: Ints
    mask: Ints
    """True where there is a loss: at what predicts a target token or EOS, or at labelled tokens."""
    length: Int
    """Input positions before the padding."""

    @property
    def labels(self) -> Ints:
        """The targets where there is a loss, IGNORED elsewhere."""
        return namespace(self.targets).where(self.mask, self.targets, IGNORED)


def encode(sample: Sample, layout: Layout, width: int | None = None) -> Encoded:
    """Write a sample as inputs, targets and loss mask; a pure function, for NumPy and JAX arrays.

    Args:
        width: the number of input positions, at least those of the sample; None takes just those
            (on the host only).

    Raises:
        ValueError: the sample is longer than `width`, where that can be seen (not inside jit).

    >>> from experiments.length_tasks.rearranging import Reverse
    >>> one = encode(Sample.of([5, 3], [3, 5]), asentmax_layout(Reverse()), width=7)
    >>> one.inputs.tolist(), one.labels.tolist()
    ([33, 5, 3, 36, 3, 5, 32], [-1, -1, -1, 3, 5, 34, -1])
    """
    length = layout.positions(sample)
    if width is None:
        width = int(length)
    elif isinstance(length, int) and length > width:
        raise ValueError(f"width: expected at least {length}, got {width}")
    if layout.classifies:
        return _labelled(sample, layout, width, length)
    xp = namespace(sample.source)
    place = xp.arange(width + 1)
    start = sample.source_length + 1
    first = start + layout.separates
    sequence = _source(sample, layout, place)
    sequence = xp.where((place == start) & layout.separates, layout.sep, sequence)
    target = pick(sample.target, place - first)
    sequence = xp.where((place >= first) & (place < length), target, sequence)
    sequence = xp.where(place == length, layout.eos, sequence)
    inside = place[:-1] < length
    inputs = xp.where(inside, sequence[:-1], layout.pad)
    targets = xp.where(inside, sequence[1:], layout.target_pad)
    return _encoded(inputs, targets, inside & (place[:-1] >= first - 1), length)


def _source(sample: Sample, layout: Layout, place: Ints) -> Ints:
    """Write BOS and the source; what follows is to be overwritten."""
    xp = namespace(place)
    source = xp.where(place <= sample.source_length, pick(sample.source, place - 1), layout.pad)
    return xp.where(place == 0, layout.bos, source)


def _labelled(sample: Sample, layout: Layout, width: int, length: Int) -> Encoded:
    """Label each source token, with no shift."""
    xp = namespace(sample.source)
    place = xp.arange(width)
    inputs = _source(sample, layout, place)
    inputs = xp.where(place == length - 1, layout.eos, inputs)
    mask = (place >= 1) & (place < length - 1)
    targets = xp.where(mask, pick(sample.target, place - 1), layout.target_pad)
    return _encoded(inputs, targets, mask, length)


def _encoded(inputs: Ints, targets: Ints, mask: Ints, length: Int) -> Encoded:
    int32 = namespace(inputs).int32
    return Encoded(inputs.astype(int32), targets.astype(int32), mask, length)


def bucket(length: int, widths: Sequence[int]) -> int:
    """Return the smallest of the widths that holds `length` positions: few shapes to compile.

    Raises:
        ValueError: none does.

    >>> bucket(131, (64, 128, 256))
    256
    """
    if not (enough := [width for width in widths if width >= length]):
        raise ValueError(f"widths: expected one of at least {length}, got {list(widths)}")
    return min(enough)


def collate(
    samples: Sequence[Sample], layout: Layout, widths: Sequence[int] | None = None
) -> Encoded:
    """Encode samples as a batch, right-padded to the longest or to the smallest width that fits.

    Raises:
        ValueError: there is no sample, or no width fits.
    """
    if not samples:
        raise ValueError("samples: expected at least one, got none")
    longest = max(int(layout.positions(sample)) for sample in samples)
    width = longest if widths is None else bucket(longest, widths)
    rows = [encode(sample, layout, width) for sample in samples]
    return Encoded(*(np.stack(column) for column in zip(*rows, strict=True)))


def prompts(samples: Sequence[Sample], layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Return BOS source SEP of each, left-padded [B, P], to generate from; and the lengths [B].

    >>> from experiments.length_tasks.rearranging import Copy
    >>> samples = [Sample.of([5, 3], [5, 3]), Sample.of([7], [7])]
    >>> prompts(samples, asentmax_layout(Copy()))[0].tolist()
    [[33, 5, 3, 36], [32, 33, 7, 36]]
    """
    ends = [layout.sep] if layout.separates else []
    rows = [[layout.bos, *np.asarray(sample.source).tolist(), *ends] for sample in samples]
    lengths = np.array([len(row) for row in rows], np.int32)
    padded = np.full((len(rows), lengths.max(initial=0)), layout.pad, np.int32)
    for out, row in zip(padded, rows, strict=True):
        out[len(out) - len(row) :] = row
    return padded, lengths


def sparse_attention_mask(inputs: Ints, layout: Layout) -> Ints:
    """Return where the code of Sparse Attention as Compact Kernel Regression has a loss [B, T].

    From the first SEP of a row on, padding excepted; a row without SEP counts whole. On sequences
    of `encode` this is their mask.
    """
    xp = namespace(inputs)
    first = xp.argmax(inputs == layout.sep, axis=-1)[..., None]
    place = xp.broadcast_to(xp.arange(inputs.shape[-1]), inputs.shape)
    return (place >= first) & (inputs != layout.pad)
