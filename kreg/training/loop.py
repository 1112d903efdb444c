"""The loop of a run: it goes on where the last call stopped, to its last step."""

import os
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from kreg.training.checkpoint import read_params
from kreg.training.course import Course, Evaluate, Plan
from kreg.training.data import BatchIterator
from kreg.training.devices import Devices
from kreg.training.follow import ALONE, follow
from kreg.training.progress import Progress
from kreg.training.run_directory import RunDirectory
from kreg.training.state import TrainState, settled
from kreg.training.step import StepFn
from kreg.training.stopping import Stopping
from kreg.training.writer import is_first


@dataclass(frozen=True)
class TrainResult:
    """Hold how a call of `train` ended.

    Args:
        state: the state after the last update.
        step: updates done, by this call and those before it.
        best_step: the step of the best checkpoint; None where nothing was evaluated.
        finished: whether all steps are done.
        stopped_by: "SIGTERM" or "SIGINT" where one came, even after the last step; "time" where
            steps are left.

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

    @classmethod
    def of(cls, course: Course, state: TrainState, stopped_by: str | None) -> Self:
        """Read off a course how its run ended."""
        finished = not course.going
        reason = None if finished and stopped_by == "time" else stopped_by
        return cls(state, course.step, course.best_step, finished, reason)


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
    devices: Devices | None = None,
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
        devices: how the run is split over devices, of this process or of several that make the
            same call; None for one. A run may go on with other ones: nothing stored depends on it.

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
    plan = Plan.of(
        steps=steps,
        eval_every=eval_every,
        evaluated=evaluate is not None,
        save_every=save_every,
        log_every=log_every,
        tokens_per_batch=tokens_per_batch,
    )
    # The step donates its state; the caller keeps a usable one.
    state = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), state)
    state = settled(state) if devices is None else devices.place(state)
    run = RunDirectory(Path(directory), best, keep_last)
    with (
        Stopping(time_limit) as stopping,
        run.opened(config, state_bytes(state)),
        nullcontext() if devices is None else jax.set_mesh(devices.mesh),
    ):
        course = Course(run, data, evaluate, plan, progress or Progress(quiet=not is_first()))
        (state,), stopped_by = follow(
            [course],
            [course.resume(state, config)],
            lambda state, batch, _: step_fn(
                state, devices.place_batch(batch) if devices else batch
            ),
            stopping,
            ALONE,
        )
    return TrainResult.of(course, state, stopped_by)


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


def state_bytes(state: TrainState) -> int:
    """Return the bytes of a state's arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state))
