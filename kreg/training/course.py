"""The course of one run: where it starts, and what is due after each of its steps.

Who takes the steps does not matter here: the run alone, or several runs in one program.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import jax
import numpy as np
from jaxtyping import Array, PyTree

from kreg.training.checkpoint import Meta, read_meta, read_state
from kreg.training.data import BatchIterator
from kreg.training.metrics import MetricsFile, Silent
from kreg.training.progress import Progress
from kreg.training.run_directory import RunDirectory
from kreg.training.state import TrainState
from kreg.training.writer import is_first

type Evaluate = Callable[[PyTree[Array]], dict[str, float]]


@dataclass(frozen=True)
class Plan:
    """How often what happens."""

    steps: int
    eval_every: int | None
    save_every: int
    log_every: int
    tokens_per_batch: int | None

    @classmethod
    def of(
        cls,
        *,
        evaluated: bool,
        steps: int,
        eval_every: int | None,
        save_every: int | None,
        log_every: int,
        tokens_per_batch: int | None,
    ) -> Self:
        """Fill in what is left open; ValueError for a number below 1."""
        numbers = dict(steps=steps, eval_every=eval_every, save_every=save_every)
        for name, number in (numbers | {"log_every": log_every}).items():
            if number is not None and number < 1:
                raise ValueError(f"{name}: expected at least 1, got {number}")
        eval_every = (eval_every or steps) if evaluated else None
        save_every = save_every or eval_every or max(1, steps // 10)
        return cls(steps, eval_every, save_every, log_every, tokens_per_batch)

    def evaluates(self, step: int) -> bool:
        return self.eval_every is not None and self._due(step, self.eval_every)

    def logs(self, step: int) -> bool:
        return self._due(step, self.log_every)

    def saves(self, step: int) -> bool:
        return self._due(step, self.save_every)

    def _due(self, step: int, every: int) -> bool:
        return step % every == 0 or step == self.steps


class Course:
    """One run in one call of `train` or `train_together`.

    The step's results come as functions: what they return is cut out of a larger array where
    several runs share a program, and mostly nobody wants it.
    """

    def __init__(
        self,
        directory: RunDirectory,
        data: BatchIterator,
        evaluate: Evaluate | None,
        plan: Plan,
        progress: Progress,
    ):
        self.directory, self.data = directory, data
        self._evaluate, self.plan, self.progress = evaluate, plan, progress
        self._best: Path | None = None
        self._best_score = math.inf

    def resume(self, state: TrainState, config: dict) -> TrainState:
        """Restore the last checkpoint, or start at step 0; change nothing on disk."""
        self._meta = Meta(step=0, config=config, best=self.directory.best)
        latest = self.directory.latest()
        self._find_best()
        if latest is not None:
            stored = read_meta(latest)
            if stored.step > self.plan.steps:
                raise ValueError(
                    f"steps: expected at least the {stored.step} that {latest} has done, "
                    f"got {self.plan.steps}"
                )
            state = read_state(latest, state)
            self.data.set_state(stored.data or {})
            self._meta = replace(self._meta, step=stored.step, seconds=stored.seconds)
        return state

    @property
    def step(self) -> int:
        """Updates done."""
        return self._meta.step

    @property
    def going(self) -> bool:
        """Whether there are steps left."""
        return self.step < self.plan.steps

    @property
    def best_step(self) -> int | None:
        """The step of the best checkpoint."""
        return None if self._best is None else read_meta(self._best).step

    @contextmanager
    def begun(self) -> Iterator[None]:
        """Hold the log open; after an OSError it is as the last checkpoint left it."""
        self._watch = _Watch(self._meta.seconds, self.step)
        self._log = Silent()
        if is_first():
            self._log = MetricsFile(self.directory.metrics, step=self.step)
        self.directory.sweep()
        try:
            if 0 < self.step < self.plan.steps:
                self.progress.note(f"going on from step {self.step}")
            yield
        except OSError:
            self._log.rollback()
            raise
        finally:
            self._log.close()
            self.progress.close()

    def share(self, runs: int) -> None:
        """Count one so many-th of the time from here on, and leave out what compiles now."""
        self._watch.share(runs)

    def log(self, metrics: Callable[[], dict[str, Array]]) -> None:
        """Count a step, and write its metrics where that is due."""
        self._meta = replace(self._meta, step=self.step + 1, metrics={})
        self._watch.started(self.step, metrics)
        if not self.plan.logs(self.step):
            return
        found = jax.device_get(metrics())
        values = {name: _plain(value) for name, value in found.items()}
        pace = self._watch.lap(self.step)
        tokens = self.plan.tokens_per_batch
        speed = None if pace is None or tokens is None else tokens * self._watch.runs / pace
        clock = {"seconds": self._watch.seconds(), "tokens_per_second": speed}
        self._log.write("train", self.step, values | clock)
        self.progress.update(
            self.step,
            self.plan.steps,
            loss=float(found["loss"]),
            seconds_per_step=pace,
            tokens_per_second=speed,
        )

    def evaluate(self, state: Callable[[], TrainState]) -> bool:
        """Evaluate where that is due; tell whether it was."""
        if self._evaluate is None or not self.plan.evaluates(self.step):
            return False
        scores = {name: float(value) for name, value in self._evaluate(state().params).items()}
        best = self.directory.best
        if best is not None and best[0] not in scores:
            raise ValueError(f"best: expected one of {sorted(scores)}, got {best[0]!r}")
        self._log.write("eval", self.step, scores | {"seconds": self._watch.seconds()})
        shown = "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
        self.progress.note(f"step {self.step}/{self.plan.steps}  {shown}")
        self._meta = replace(self._meta, metrics=scores)
        return True

    def save(self, state: Callable[[], TrainState], stopping: bool) -> bool:
        """Save where that is due, at a new best evaluation, or before a stop; tell whether."""
        is_best = self.directory.score(self._meta.metrics) < self._best_score
        if not (stopping or self.plan.saves(self.step) or is_best):
            return False
        seconds, data = self._watch.seconds(), self.data.get_state()
        self.directory.save(state(), replace(self._meta, seconds=seconds, data=data))
        self._find_best()
        self._log.mark()
        return True

    def rested(self) -> None:
        """Begin a lap: what happened since the last step was none."""
        self._watch.lap(self.step)

    def _find_best(self) -> None:
        self._best = self.directory.best_checkpoint()
        if self._best is not None:
            self._best_score = self.directory.score(read_meta(self._best).metrics)


class _Watch:
    """Time: the run's, over all its calls, and that of a step, without compiling or evaluating.

    The run's time is its share: a second of three runs in one program is a third of one for each.
    """

    def __init__(self, seconds: float, step: int):
        self.runs = 1
        self._spent, self._since = seconds, time.monotonic()
        self._lap = (self._since, step)
        self._compiled = False

    def share(self, runs: int) -> None:
        now = time.monotonic()
        self._spent += (now - self._since) / self.runs
        self._since, self.runs, self._compiled = now, runs, False

    def seconds(self) -> float:
        return round(self._spent + (time.monotonic() - self._since) / self.runs, 3)

    def started(self, step: int, metrics: Callable[[], dict[str, Array]]) -> None:
        """Begin the first lap when the first step, which compiles, is done."""
        if not self._compiled:
            jax.block_until_ready(metrics())
            self._lap = (time.monotonic(), step)
            self._compiled = True

    def lap(self, step: int) -> float | None:
        """Seconds a step since the last lap; None where there was no step."""
        now = time.monotonic()
        began, since = self._lap
        self._lap = (now, step)
        return (now - began) / (step - since) if step > since else None


def _plain(value: Array) -> float | int | list:
    number = np.asarray(value)
    # bfloat16 is of no kind that JSON knows.
    return (number if number.dtype.kind in "iub" else number.astype(np.float64)).tolist()
