"""The task of a config."""

import dataclasses

from experiments.length.config import Config
from experiments.length_tasks import TASKS, Task


def task_of(config: Config) -> Task:
    """Return the task with the config's training lengths; ValueError where it has no such.

    >>> task_of(Config(task="copy")).lengths[-1]
    64
    """
    data = config.data
    task = TASKS[config.task].task
    return dataclasses.replace(task, seq_len=data.seq_len, vary_len=data.vary_len)
