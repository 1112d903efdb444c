"""Batches: of samples by number on the host, or drawn by a compiled function on the device."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax

from experiments.length_tasks.layout import Encoded, Layout, collate, encode
from experiments.length_tasks.randomness import DeviceRandom
from experiments.length_tasks.task import Sample, Task


def host_batch(
    task: Task,
    layout: Layout,
    *,
    seed: int,
    split: str,
    indices: Iterable[int],
    length: int | None = None,
    widths: Sequence[int] | None = None,
) -> Encoded:
    """Return the samples of a split with these numbers: one batch, NumPy arrays [B, T].

    Args:
        length: L of every sample; None draws it.
        widths: pad to the smallest of these that fits, not to the longest sample.

    >>> from experiments.length_tasks.layout import asentmax_layout
    >>> from experiments.length_tasks.rearranging import Copy
    >>> layout = asentmax_layout(Copy())
    >>> host_batch(Copy(), layout, seed=0, split="test", indices=range(3), length=8).inputs.shape
    (3, 18)
    """
    samples = [task.sample(seed, split, index, length) for index in indices]
    return collate(samples, layout, widths)


def device_samples(task: Task, key: jax.Array, count: int, tables: Any = ()) -> Sample:
    """Draw samples, padded to the task's longest; to be compiled with static `task` and `count`."""

    def one(key: jax.Array) -> Sample:
        return task.assemble(task.draw(DeviceRandom(key), tables))

    return jax.vmap(one)(jax.random.split(key, count))


def device_batch(
    task: Task, layout: Layout, key: jax.Array, count: int, tables: Any = ()
) -> Encoded:
    """Draw a batch [B, T] with T = `layout.width(task)`; static: all but the key and the tables.

    It follows the law of `host_batch`, with other draws.

    Args:
        key: see `batch_key`.
        tables: `task.tables(seed, split)`.

    >>> from experiments.length_tasks.layout import asentmax_layout
    >>> from experiments.length_tasks.rearranging import Copy
    >>> draw = jax.jit(device_batch, static_argnums=(0, 1, 3))
    >>> draw(Copy(), asentmax_layout(Copy()), jax.random.key(0), 4).inputs.shape
    (4, 130)
    """
    samples = device_samples(task, key, count, tables)
    width = layout.width(task)
    return jax.vmap(lambda sample: encode(sample, layout, width))(samples)
