"""What a model is judged by: sequences of one length, read whole or written token by token.

Axes: B sequences, T positions.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from experiments import supports
from experiments.length.model import Apply, Model
from experiments.length_tasks import IGNORED, MQMTAR, Encoded, Layout, Task, host_batch, metrics
from experiments.length_tasks.layout import prompts
from experiments.length_tasks.metrics import add, teacher_forced
from experiments.length_tasks.rearranging import Rearrange
from kreg.nn import generate
from kreg.training import token_cross_entropy

type Measure = Callable[[PyTree[Array], Encoded], dict[str, Any]]


def make_measure(apply: Apply, task: Task, layout: Layout) -> Measure:
    """Compile what a batch of one length adds: loss and labels, and the counts of each metric.

    Besides `teacher_forced` these are the counts of the code of Sparse Attention as Compact Kernel
    Regression, for the tasks that it has.
    """

    @jax.jit
    def measure(params: PyTree[Array], batch: Any) -> dict[str, Any]:
        logits = apply(params, batch.inputs, None)
        loss, labels = token_cross_entropy(logits, batch.labels, ignore=IGNORED)
        said = logits.argmax(axis=-1)
        found: dict[str, Any] = {"loss": loss, "labels": labels}
        found["forced"] = teacher_forced(said, batch, layout)
        if isinstance(task, MQMTAR):
            found["recall"] = metrics.sparse_attention_recall(said, batch.targets, task)
        elif isinstance(task, Rearrange):
            found["released"] = metrics.sparse_attention_exact(said, batch.targets, layout)
        return found

    return measure


def batch_size(samples: int, width: int, positions: int) -> int:
    """Return how many sequences of so many positions go together.

    The largest divisor of the number of samples that keeps a batch below so many positions; at
    least 1. All batches have one shape, which is compiled once.

    >>> batch_size(1000, 130, 16384), batch_size(1000, 61_191, 16384)
    (125, 1)
    """
    most = max(1, positions // width)
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
) -> dict[str, float]:
    """Return the loss and the teacher-forced scores at one length.

    `loss`, `exact`, `exact_with_eos`, `token_accuracy`; where the released code has a metric,
    `released_exact` and for MQMTAR `associative_recall`.
    """
    width = layout.width(task.at(length))
    size = batch_size(samples, width, positions)
    where: dict[str, Any] = {"seed": seed, "split": split, "length": length, "widths": (width,)}
    chunks = _chunks(samples, size)
    batches = (host_batch(task, layout, indices=rows, **where) for rows in chunks)
    return scores(measure, params, batches)


def scores(measure: Measure, params: PyTree[Array], batches: Iterable[Encoded]) -> dict[str, float]:
    """Return what `measure_length` does, of given batches, at least one."""
    totals: Any = None
    for batch in batches:
        found = jax.device_get(measure(params, batch))
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
    count: Callable[..., supports.Counts],
    params: PyTree[Array],
    task: Task,
    layout: Layout,
    *,
    length: int,
    split: str,
    seed: int,
    samples: int,
    positions: int,
) -> dict[str, Any]:
    """Return how many keys have weight at one length, and how many a query sees."""
    size = batch_size(samples, layout.width(task.at(length)), positions)
    where: dict[str, Any] = {"seed": seed, "split": split, "length": length}
    batches = (host_batch(task, layout, indices=rows, **where) for rows in _chunks(samples, size))
    return supports.summary([jax.device_get(count(params, batch.inputs)) for batch in batches])


def generate_length(
    model: Model,
    task: Task,
    layout: Layout,
    *,
    length: int,
    split: str,
    seed: int,
    samples: int,
    positions: int,
) -> dict[str, float]:
    """Return how often what the model writes after SEP is right, EOS included, and its BLEU.

    One more token than the target has is written, greedily: a row without EOS by then is wrong.
    Nothing for tasks of labels, which are not written.
    """
    if layout.classifies:
        return {}
    written, wanted = [], []
    width = layout.width(task.at(length))
    size = batch_size(samples, width, positions)
    for rows in _chunks(samples, size):
        drawn = [task.sample(seed, split, index, length) for index in rows]
        prompt, lengths = prompts(drawn, layout)
        # Sequences of one L are of one length here, so that no padding is read.
        assert (lengths == prompt.shape[1]).all()
        new = drawn[0].target_length + 1
        tokens = np.asarray(generate(model, jnp.asarray(prompt), int(new), stop_token=layout.eos))
        written += tokens[:, prompt.shape[1] :].tolist()
        wanted += [np.asarray(sample.target).tolist() for sample in drawn]
    right = metrics.generated_exact(written, wanted, layout)
    cut = [metrics.before_eos(row, layout.eos) for row in written]
    return {"generated_exact": float(right.mean()), "bleu": metrics.bleu(cut, wanted)}


def _chunks(samples: int, size: int) -> Iterator[range]:
    for number in range(math.ceil(samples / size)):
        yield range(number * size, min(samples, (number + 1) * size))
