"""The tasks by their names on the command line, and how much of each the paper draws."""

from dataclasses import dataclass

from experiments.length_tasks.bits import FlipFlop, Parity
from experiments.length_tasks.labelling import LocalCount, NBack
from experiments.length_tasks.mqmtar import MQMTAR
from experiments.length_tasks.rearranging import Copy, Reverse, Sort
from experiments.length_tasks.task import Task

LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
HELD_OUT_SAMPLES = 1000
"""Validation and test samples of each length."""
BATCH_SIZE = 128


@dataclass(frozen=True)
class Benchmark:
    """Hold a task with the paper's settings, its number of training samples and test lengths."""

    task: Task
    train_samples: int
    lengths: tuple[int, ...] = LENGTHS

    @property
    def steps(self) -> int:
        """Training steps with the paper's batches."""
        return self.train_samples // BATCH_SIZE


TASKS = {
    "mqmtar": Benchmark(MQMTAR(), 50_000_000, (*LENGTHS, 8192, 16_384, 32_768, 65_536)),
    "sort": Benchmark(Sort(), 40_000_000),
    # The paper's table has 96 too, and stops at 512.
    "reverse": Benchmark(Reverse(), 30_000_000, (64, 96, *LENGTHS[1:])),
    "copy": Benchmark(Copy(), 20_000_000),
    "flip_flop": Benchmark(FlipFlop(), 10_000_000),
    "nback": Benchmark(NBack(), 10_000_000),
    "local_count": Benchmark(LocalCount(), 10_000_000),
    # In the authors' script, not in the paper.
    "parity": Benchmark(Parity(), 10_000_000),
}
