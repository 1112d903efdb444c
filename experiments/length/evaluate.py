"""What a model is judged by: sequences of one length, read whole or written token by token.

Axes: B sequences, T positions.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import P
from jaxtyping import Array, Int, PyTree

from experiments import supports
from experiments.length.model import Apply, Merge
from experiments.length_tasks import IGNORED, MQMTAR, Encoded, Layout, Task, host_batch, metrics
from experiments.length_tasks.layout import prompts
from experiments.length_tasks.metrics import add, teacher_forced
from experiments.length_tasks.randomness import Ints
from experiments.length_tasks.rearranging import Rearrange
from kreg.nn import generate
from kreg.training import Devices, token_cross_entropy
from kreg.training.devices import AXES
from kreg.training.writer import fetch

type Measure = Callable[[PyTree[Array], Encoded], dict[str, Any]]
type Count = Callable[[PyTree[Array], Ints], supports.Counts]
# (parameters, prompt, how many tokens) -> the prompt and these
type Write = Callable[[PyTree[Array], Ints, int], Array]

ONE = Devices()


def make_measure(apply: Apply, task: Task, layout: Layout, devices: Devices = ONE) -> Measure:
    """Compile what a batch of one length adds: loss and labels, and the counts of each metric.

    Rows are split over the devices, filled up to equal shares with rows without labels.

    Besides `teacher_forced` these are the counts of the code of Sparse Attention as Compact Kernel
    Regression, for the tasks that it has.
    """

    @jax.jit
    def measure(params: PyTree[Array], batch: Any) -> dict[str, Any]:
        count = _row_shares(devices)
        filled = _fill(batch.inputs, count, layout.pad), _fill(batch.labels, count, IGNORED)
        inputs, labels = devices.split_batch(filled)
        logits = apply(params, inputs, None)
        loss, labels = token_cross_entropy(logits, labels, ignore=IGNORED)
        said = logits.argmax(axis=-1)[: len(batch.inputs)]
        found: dict[str, Any] = {"loss": loss, "labels": labels}
        found["forced"] = teacher_forced(said, batch, layout)
        if isinstance(task, MQMTAR):
            found["recall"] = metrics.sparse_attention_recall(said, batch.targets, task)
        elif isinstance(task, Rearrange):
            found["released"] = metrics.sparse_attention_exact(said, batch.targets, layout)
        return found

    return measure


def make_count(merge: Merge, devices: Devices = ONE) -> Count:
    """Compile `supports.count`, rows split as those of `make_measure`."""

    @jax.jit
    def count(params: PyTree[Array], tokens: Int[Array, "B T"]) -> supports.Counts:
        filled = devices.split_batch(_fill(tokens, _row_shares(devices), 0))
        given = jnp.arange(len(filled)) < len(tokens)
        inside = jnp.broadcast_to(given[:, None], filled.shape)
        return supports.count(merge(params), filled, inside=inside)

    return count


def make_write(merge: Merge, layout: Layout, devices: Devices = ONE) -> Write:
    """Compile `generate`, whole rows on each device, along whichever axis of the mesh.

    Args:
        merge: makes models that are not split.
    """

    def write(params, prompt, new):
        def part(params, prompt):
            return generate(merge(params), prompt, new, stop_token=layout.eos)

        if devices.count == 1:
            return part(params, prompt)
        over = jax.shard_map(part, in_specs=(P(), P(AXES)), out_specs=P(AXES), check_vma=False)
        return over(params, _fill(prompt, devices.count, layout.pad))[: len(prompt)]

    return jax.jit(write, static_argnums=2)


def _row_shares(devices: Devices) -> int:
    return devices.data * devices.fsdp


def _fill(rows: Array, count: int, value: int) -> Array:
    """Append rows of one value until there is a multiple of `count`."""
    gap = [(0, -len(rows) % count)] + [(0, 0)] * (rows.ndim - 1)
    return jnp.pad(rows, gap, constant_values=value)


def batch_size(samples: int, width: int, positions: int, devices: int = 1) -> int:
    """Return how many sequences of so many positions go together.

    The largest divisor of the number of samples that keeps a batch below so many positions a
    device; at least 1. All batches have one shape, which is compiled once.

    >>> batch_size(1000, 130, 16384), batch_size(1000, 61_191, 16384)
    (125, 1)
    >>> batch_size(1000, 61_191, 16384, devices=8)
    8
    """
    most = max(1, positions // width) * devices
    return max(size for size in range(1, min(samples, most) + 1) if samples % size == 0)


def measure_length(
    measure: Measure,
    params: PyTree[Array],
    task: Task,
    layout: Layout,
    *,
    length: int,
    split: str,
    seed: int,
    samples: int,
    positions: int,
    devices: Devices = ONE,
) -> dict[str, float]:
    """Return the loss and the teacher-forced scores at one length.

    `loss`, `exact`, `exact_with_eos`, `token_accuracy`; where the released code has a metric,
    `released_exact` and for MQMTAR `associative_recall`.
    """
    width = layout.width(task.at(length))
    size = batch_size(samples, width, positions, _row_shares(devices))
    where: dict[str, Any] = {"seed": seed, "split": split, "length": length, "widths": (width,)}
    chunks = _chunks(samples, size)
    batches = (host_batch(task, layout, indices=rows, **where) for rows in chunks)
    return scores(measure, params, batches)


def scores(measure: Measure, params: PyTree[Array], batches: Iterable[Encoded]) -> dict[str, float]:
    """Return what `measure_length` does, of given batches, at least one."""
    totals: Any = None
    for batch in batches:
        found = fetch(measure(params, batch))
        totals = found if totals is None else add(totals, found)
    told = {"loss": float(totals["loss"] / totals["labels"])} | totals["forced"].rates()
    if "released" in totals:
        told["released_exact"] = totals["released"].rates()["exact"]
    if "recall" in totals:
        recall = totals["recall"].rates()
        told["released_exact"] = recall["exact"]
        told["associative_recall"] = recall["associative_recall"]
    return told


def support_length(
    count: Count,
    params: PyTree[Array],
    task: Task,
    layout: Layout,
    *,
    length: int,
    split: str,
    seed: int,
    samples: int,
    positions: int,
    devices: Devices = ONE,
) -> dict[str, Any]:
    """Return how many keys have weight at one length, and how many a query sees."""
    width = layout.width(task.at(length))
    size = batch_size(samples, width, positions, _row_shares(devices))
    where: dict[str, Any] = {"seed": seed, "split": split, "length": length}
    batches = (host_batch(task, layout, indices=rows, **where) for rows in _chunks(samples, size))
    return supports.summary([fetch(count(params, batch.inputs)) for batch in batches])


def generate_length(
    write: Write,
    params: PyTree[Array],
    task: Task,
    layout: Layout,
    *,
    length: int,
    split: str,
    seed: int,
    samples: int,
    positions: int,
    devices: Devices = ONE,
) -> dict[str, float]:
    """Return how often what the model writes after SEP is right, EOS included, and its BLEU.

    One more token than the target has is written, greedily: a row without EOS by then is wrong.
    Nothing for tasks of labels, which are not written.
    """
    if layout.classifies:
        return {}
    written, wanted = [], []
    width = layout.width(task.at(length))
    size = batch_size(samples, width, positions, devices.count)
    for rows in _chunks(samples, size):
        drawn = [task.sample(seed, split, index, length) for index in rows]
        prompt, lengths = prompts(drawn, layout)
        # Sequences of one L are of one length here, so that no padding is read.
        assert (lengths == prompt.shape[1]).all()
        new = drawn[0].target_length + 1
        tokens = fetch(write(params, prompt, int(new)))
        written += tokens[:, prompt.shape[1] :].tolist()
        wanted += [np.asarray(sample.target).tolist() for sample in drawn]
    right = metrics.generated_exact(written, wanted, layout)
    cut = [metrics.before_eos(row, layout.eos) for row in written]
    return {"generated_exact": float(right.mean()), "bleu": metrics.bleu(cut, wanted)}


def _chunks(samples: int, size: int) -> Iterator[range]:
    for number in range(math.ceil(samples / size)):
        yield range(number * size, min(samples, (number + 1) * size))
