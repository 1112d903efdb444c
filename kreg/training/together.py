"""Several runs of one configuration in one program: seeds, and learning rates.

Each run keeps its own folder, data, key and log, and on disk nothing tells it from a run alone:
it may be resumed with others or without.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from kreg.training.course import Course, Evaluate, Plan
from kreg.training.data import BatchIterator
from kreg.training.follow import STACKED, follow
from kreg.training.loop import TrainResult, state_bytes
from kreg.training.progress import Progress
from kreg.training.run_directory import RunDirectory
from kreg.training.state import TrainState, settled
from kreg.training.step import LossFn, update
from kreg.training.stopping import Stopping

# (states, batches, learning rates) -> (states, metrics), every leaf with a leading axis of runs
type StepsFn = Callable[
    [TrainState, PyTree[Array], Float[Array, " R"]], tuple[TrainState, dict[str, Array]]
]


def make_steps(
    loss_fn: LossFn,
    optimizer: Callable[[Float[Array, ""]], optax.GradientTransformation],
    *,
    compute_dtype: DTypeLike | None = None,
    one_by_one: bool | None = None,
) -> StepsFn:
    """Compile the update of `make_step` for R runs as one program.

    Args:
        loss_fn: that of one run; see `make_step`.
        optimizer: the optimizer with a given learning rate, an array. The rate is no part of the
            optimizer's state, so that a run's checkpoints are those that it would have alone.
        one_by_one: whether the program updates one run after the other (lax.map) or all side by
            side (vmap). None means side by side but on CPU, where no core is idle and the arrays of
            all runs find less room in caches: three small Memory Mosaics (batch 16, 64 tokens,
            width 64) take 1.5 to 1.6 times as long side by side as apart, one by one 1.01 to 1.04.

    Returns:
        `steps(states, batches, learning_rates) -> (states, metrics)`, all with a leading axis of
        runs. It donates `states`.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from kreg import training
        >>> steps = training.make_steps(lambda p, x, key: (((p - x) ** 2).sum(), {}), optax.sgd)
        >>> state = training.init_state(jnp.zeros(1), optax.sgd(0.0), jax.random.key(0))
        >>> two = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), state)
        >>> two, metrics = steps(two, jnp.ones((2, 1)), jnp.array([0.25, 0.5]))
        >>> two.params.tolist(), metrics["loss"].tolist()
        ([[0.5], [1.0]], [1.0, 1.0])
    """

    def one(state: TrainState, batch: PyTree[Array], rate: Float[Array, ""]):
        return update(loss_fn, optimizer(rate), compute_dtype, state, batch)

    def each(states: TrainState, batches: PyTree[Array], rates: Float[Array, " R"]):
        return jax.lax.map(lambda run: one(*run), (states, batches, rates))

    if one_by_one is None:
        one_by_one = jax.default_backend() == "cpu"
    return jax.jit(each if one_by_one else jax.vmap(one), donate_argnums=0)


def train_together(
    directories: Sequence[str | os.PathLike],
    states: Sequence[TrainState],
    steps_fn: StepsFn,
    data: Sequence[BatchIterator],
    *,
    learning_rates: Sequence[float],
    steps: int,
    configs: Sequence[dict],
    evaluate: Evaluate | None = None,
    eval_every: int | None = None,
    save_every: int | None = None,
    log_every: int = 10,
    tokens_per_batch: int | None = None,
    best: tuple[str, Literal["min", "max"]] | None = ("val_loss", "min"),
    keep_last: int = 2,
    time_limit: float | None = None,
    progress: Sequence[Progress] | None = None,
) -> list[TrainResult]:
    """Do what `train` does for each of several runs, all in one program.

    Where that program rounds as the single one does, losses and parameters are those of the runs
    alone; mostly they differ in the last digits. Runs that a kill left at different steps are
    brought level first. The seconds in a run's log are its share of the time.

    Args:
        directories: one a run, as all sequences here.
        steps_fn: from `make_steps`; batches are stacked for it on the host.

    Raises:
        ValueError: as in `train`; sequences of different lengths, or none.
        OSError: as in `train`; every log is then as its run's last checkpoint left it.

    Examples:
        >>> import tempfile
        >>> import jax, jax.numpy as jnp, numpy as np, optax
        >>> from kreg import training
        >>> steps = training.make_steps(
        ...     lambda p, batch, key: (((p - batch["x"]) ** 2).sum(), {}), optax.sgd
        ... )
        >>> state = training.init_state(jnp.zeros(1), optax.sgd(0.0), jax.random.key(0))
        >>> data = [training.batches([{"x": np.float32(1)}], 1, seed=seed) for seed in (0, 1)]
        >>> with tempfile.TemporaryDirectory() as runs:
        ...     results = training.train_together(
        ...         [f"{runs}/a", f"{runs}/b"],
        ...         [state, state],
        ...         steps,
        ...         data,
        ...         learning_rates=[0.25, 0.5],
        ...         steps=2,
        ...         configs=[{"rate": 0.25}, {"rate": 0.5}],
        ...         progress=[training.Progress(quiet=True)] * 2,
        ...     )
        ...     training.load_params(f"{runs}/a", "last", like=jnp.zeros(1))
        Array([0.75], dtype=float32)
        >>> [result.state.params.tolist() for result in results]
        [[0.75], [1.0]]
        >>> for iterator in data:
        ...     iterator.close()
    """
    counts = {len(x) for x in (directories, states, data, learning_rates, configs)}
    if len(counts) > 1 or not directories:
        raise ValueError(f"directories: expected as many as states, data, ..., got {counts}")
    plan = Plan.of(
        steps=steps,
        eval_every=eval_every,
        evaluated=evaluate is not None,
        save_every=save_every,
        log_every=log_every,
        tokens_per_batch=tokens_per_batch,
    )
    runs = [RunDirectory(Path(directory), best, keep_last) for directory in directories]
    shown = progress or [Progress() for _ in runs]
    rates = jnp.asarray(learning_rates, jnp.result_type(float))
    with Stopping(time_limit) as stopping, ExitStack() as locks:
        for run, config, state in zip(runs, configs, states, strict=True):
            locks.enter_context(run.opened(config, state_bytes(state)))
        courses = [
            Course(run, iterator, evaluate, plan, progress)
            for run, iterator, progress in zip(runs, data, shown, strict=True)
        ]
        resumed = [
            course.resume(settled(state), config)
            for course, state, config in zip(courses, states, configs, strict=True)
        ]
        ends, stopped_by = follow(
            courses,
            resumed,
            lambda state, batch, going: steps_fn(state, batch, rates[jnp.array(going)]),
            stopping,
            STACKED,
        )
    return [
        TrainResult.of(course, state, stopped_by)
        for course, state in zip(courses, ends, strict=True)
    ]
