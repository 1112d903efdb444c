"""The loop: steps, log, evaluation, checkpoints, and going on where the last call stopped."""

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from kreg.training.checkpoint import Meta, read_meta, read_params, read_state
from kreg.training.data import BatchIterator
from kreg.training.metrics import MetricsFile
from kreg.training.progress import Progress
from kreg.training.run_directory import RunDirectory
from kreg.training.state import TrainState
from kreg.training.step import StepFn
from kreg.training.stopping import Stopping

type Evaluate = Callable[[PyTree[Array]], dict[str, float]]


@dataclass(frozen=True)
class TrainResult:
    """Hold how a call of `train` ended.

    Args:
        state: the state after the last update.
        step: updates done, by this call and those before it.
        best_step: the step of the best checkpoint; None where nothing was evaluated.
        finished: whether all steps are done.
        stopped_by: "time", "SIGTERM" or "SIGINT" where they are not.

    Examples:
        >>> import jax, optax
        >>> from kreg import training
        >>> state = training.init_state({}, optax.sgd(0.1), jax.random.key(0))
        >>> result = training.TrainResult(state, 40, None, finished=False, stopped_by="time")
        >>> result.step, result.finished, result.stopped_by
        (40, False, 'time')
    """

    state: TrainState
    step: int
    best_step: int | None
    finished: bool
    stopped_by: str | None = None


def train(
    directory: str | os.PathLike,
    state: TrainState,
    step_fn: StepFn,
    data: BatchIterator,
    *,
    steps: int,
    config: dict,
    evaluate: Evaluate | None = None,
    eval_every: int | None = None,
    save_every: int | None = None,
    log_every: int = 10,
    tokens_per_batch: int | None = None,
    best: tuple[str, Literal["min", "max"]] | None = ("val_loss", "min"),
    keep_last: int = 2,
    time_limit: float | None = None,
    progress: Progress | None = None,
) -> TrainResult:
    """Run a training to its last step, from wherever `directory` says that it is.

    The same call resumes an interrupted run: it may have been killed at any moment. On one kind of
    machine the losses and the final parameters are those of a run that nobody interrupted.

    Args:
        directory: of this run alone; made if need be. Holds config.json, metrics.jsonl and
            checkpoints/.
        state: the state at step 0; left usable. It also gives the shapes to restore.
        step_fn: from `make_step`.
        data: from `batches`; its position is saved and restored. The caller closes it.
        steps: the updates of the whole run, those of earlier calls included.
        config: what determines the run, fit for JSON; a directory with another one is refused.
        evaluate: `params -> {name: number}`, called every `eval_every` updates and after the last.
        save_every: updates between checkpoints; by default those of `eval_every`, else a tenth of
            the run. A new best evaluation and the end are saved, too.
        log_every: updates between lines in the log.
        tokens_per_batch: for the speed in the log; left out where None.
        best: which of evaluate's numbers chooses the best checkpoint, and whether "min" or "max".
        keep_last: how many of the last checkpoints stay; the best one stays, too.
        time_limit: seconds after which to save and return; at least one update is done.
        progress: where to show what happens; by default on standard error.

    Raises:
        ValueError: another config; a damaged checkpoint (CheckpointError), or another model's.
        OSError: the directory cannot be written, is full, or another live run holds it. The
            checkpoints and the log are then as the last save left them.

    Examples:
        >>> import tempfile
        >>> import jax, jax.numpy as jnp, numpy as np, optax
        >>> from kreg import training
        >>> tx, data = optax.sgd(0.25), training.batches([{"x": np.float32(1)}], 1, seed=0)
        >>> step = training.make_step(lambda p, batch, key: (((p - batch["x"]) ** 2).sum(), {}), tx)
        >>> state = training.init_state(jnp.zeros(1), tx, jax.random.key(0))
        >>> with tempfile.TemporaryDirectory() as run:
        ...     quiet = training.Progress(quiet=True)
        ...     result = training.train(run, state, step, data, steps=2, config={}, progress=quiet)
        ...     training.load_params(run, "last", like=jnp.zeros(1))
        Array([0.75], dtype=float32)
        >>> result.step, result.finished, result.state.params.tolist()
        (2, True, [0.75])
        >>> data.close()
    """
    _require_positive(
        steps=steps, eval_every=eval_every, save_every=save_every, log_every=log_every
    )
    eval_every = (eval_every or steps) if evaluate is not None else None
    plan = _Plan(
        steps=steps,
        eval_every=eval_every,
        save_every=save_every or eval_every or max(1, steps // 10),
        log_every=log_every,
        tokens_per_batch=tokens_per_batch,
    )
    # The step donates its state; the caller keeps a usable one.
    state = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), state)
    run = RunDirectory(Path(directory), best, keep_last)
    with Stopping(time_limit) as stopping, run.opened(config, _bytes(state)):
        loop = _Loop(run, step_fn, data, evaluate, plan, progress or Progress())
        return loop.run(*loop.resume(state, config), stopping)


def load_params(
    directory: str | os.PathLike, which: Literal["best", "last"], like: PyTree[Array]
) -> PyTree[Array]:
    """Load the parameters of a run's best or last checkpoint.

    Args:
        like: parameters, or their `jax.eval_shape`, of the same structure, shapes and types.

    Raises:
        ValueError: no such checkpoint; a damaged one (CheckpointError), or another model's.

    Examples:
        What a run left is loaded in the example of `train`. A folder without runs has nothing:

        >>> import tempfile
        >>> from kreg import training
        >>> with tempfile.TemporaryDirectory() as run:
        ...     training.load_params(run, "last", like={})
        Traceback (most recent call last):
        ValueError: ...
    """
    run = RunDirectory(Path(directory))
    return read_params(run.checked(run.named(which)), like)


@dataclass(frozen=True)
class _Plan:
    """How often what happens."""

    steps: int
    eval_every: int | None
    save_every: int
    log_every: int
    tokens_per_batch: int | None

    def evaluates(self, step: int) -> bool:
        return self.eval_every is not None and self._due(step, self.eval_every)

    def logs(self, step: int) -> bool:
        return self._due(step, self.log_every)

    def saves(self, step: int) -> bool:
        return self._due(step, self.save_every)

    def _due(self, step: int, every: int) -> bool:
        return step % every == 0 or step == self.steps


class _Loop:
    """One call of `train`."""

    def __init__(
        self,
        directory: RunDirectory,
        step_fn: StepFn,
        data: BatchIterator,
        evaluate: Evaluate | None,
        plan: _Plan,
        progress: Progress,
    ):
        self.directory, self.step_fn, self.data = directory, step_fn, data
        self.evaluate, self.plan, self.progress = evaluate, plan, progress
        self.best: Path | None = None
        self.best_score = math.inf

    def resume(self, state: TrainState, config: dict) -> tuple[TrainState, Meta]:
        """Restore the last checkpoint, or start at step 0; change nothing on disk."""
        meta = Meta(step=0, config=config, best=self.directory.best)
        latest = self.directory.latest()
        self.find_best()
        if latest is not None:
            stored = read_meta(latest)
            if stored.step > self.plan.steps:
                raise ValueError(
                    f"steps: expected at least the {stored.step} that {latest} has done, "
                    f"got {self.plan.steps}"
                )
            state = read_state(latest, state)
            self.data.set_state(stored.data or {})
            meta = replace(meta, step=stored.step, seconds=stored.seconds)
        return state, meta

    def run(self, state: TrainState, meta: Meta, stopping: Stopping) -> TrainResult:
        """Take steps until the last one or a reason to stop."""
        self.watch = _Watch(meta.seconds, meta.step)
        self.log = MetricsFile(self.directory.metrics, step=meta.step)
        self.directory.sweep()
        try:
            if 0 < meta.step < self.plan.steps:
                self.progress.note(f"going on from step {meta.step}")
            stopped_by = None
            while meta.step < self.plan.steps and stopped_by is None:
                state, metrics = self.step_fn(state, next(self.data))
                meta = replace(meta, step=meta.step + 1, metrics={})
                stopped_by = self.after_step(state, meta, metrics, stopping)
        except OSError:
            self.log.rollback()
            raise
        finally:
            self.log.close()
            self.progress.close()
        finished = meta.step == self.plan.steps
        best_step = None if self.best is None else read_meta(self.best).step
        return TrainResult(state, meta.step, best_step, finished, None if finished else stopped_by)

    def after_step(
        self, state: TrainState, meta: Meta, metrics: dict[str, Array], stopping: Stopping
    ) -> str | None:
        """Log, evaluate and save where it is due; return why to stop, if there is a reason."""
        self.watch.started(metrics)
        if self.plan.logs(meta.step):
            self.write_log(meta.step, metrics)
        if self.evaluate is not None and self.plan.evaluates(meta.step):
            meta = replace(meta, metrics=self.evaluated(self.evaluate, state.params, meta.step))
        is_best = self.directory.score(meta.metrics) < self.best_score
        stopped_by = stopping.reason
        if stopped_by or self.plan.saves(meta.step) or is_best:
            self.save(state, meta)
            self.watch.lap(meta.step)
        return stopped_by

    def write_log(self, step: int, metrics: dict[str, Array]) -> None:
        values = {name: _plain(value) for name, value in jax.device_get(metrics).items()}
        pace = self.watch.lap(step)
        tokens = self.plan.tokens_per_batch
        speed = None if pace is None or tokens is None else tokens / pace
        clock = {"seconds": self.watch.seconds(), "tokens_per_second": speed}
        self.log.write("train", step, values | clock)
        self.progress.update(
            step,
            self.plan.steps,
            loss=float(metrics["loss"]),
            seconds_per_step=pace,
            tokens_per_second=speed,
        )

    def evaluated(self, evaluate: Evaluate, params: PyTree[Array], step: int) -> dict[str, float]:
        scores = {name: float(value) for name, value in evaluate(params).items()}
        best = self.directory.best
        if best is not None and best[0] not in scores:
            raise ValueError(f"best: expected one of {sorted(scores)}, got {best[0]!r}")
        self.log.write("eval", step, scores | {"seconds": self.watch.seconds()})
        shown = "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
        self.progress.note(f"step {step}/{self.plan.steps}  {shown}")
        self.watch.lap(step)
        return scores

    def save(self, state: TrainState, meta: Meta) -> None:
        meta = replace(meta, seconds=self.watch.seconds(), data=self.data.get_state())
        self.directory.save(state, meta)
        self.find_best()
        self.log.mark()

    def find_best(self) -> None:
        self.best = self.directory.best_checkpoint()
        if self.best is not None:
            self.best_score = self.directory.score(read_meta(self.best).metrics)


class _Watch:
    """Time: the run's, over all its calls, and that of a step, without compiling or evaluating."""

    def __init__(self, seconds: float, step: int):
        self._before, self._start = seconds, time.monotonic()
        self._lap = (self._start, step)
        self._compiled = False

    def seconds(self) -> float:
        return round(self._before + time.monotonic() - self._start, 3)

    def started(self, metrics: dict[str, Array]) -> None:
        """Begin the first lap when the first step, which compiles, is done."""
        if not self._compiled:
            jax.block_until_ready(metrics)
            self._lap = (time.monotonic(), self._lap[1] + 1)
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


def _bytes(state: TrainState) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def _require_positive(**numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ValueError(f"{name}: expected at least 1, got {number}")
