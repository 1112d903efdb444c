"""One run: a method and a seed, from initial weights to a tested checkpoint."""

import functools
import statistics
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from flax import nnx
from jaxtyping import Array, PyTree

from experiments.in_context import environment
from experiments.in_context.config import Config, Model, Training
from experiments.in_context.objective import (
    Apply,
    Rows,
    evaluate,
    held_out,
    make_loss,
    make_measure,
    pad_to,
)
from experiments.in_context.results import METRICS, RESULT, RUN, read_json, run_folder, write_json
from experiments.methods import method
from experiments.regbench import VOCAB_SIZE, Benchmark
from kreg.nn import MemoryMosaic, MosaicConfig
from kreg.training import (
    Progress,
    adamw,
    batches,
    init_state,
    load_params,
    make_step,
    read_metrics,
    train,
)
from kreg.training.data import BatchIterator
from kreg.training.run_directory import RunDirectory
from kreg.training.schedules import regbench
from kreg.training.step import StepFn

BEST = ("loss", "min")


@dataclass(frozen=True)
class Setting:
    """A method and a seed of an experiment."""

    config: Config
    method: str
    seed: int

    @property
    def folder(self) -> Path:
        return run_folder(self.config.folder, self.method, self.seed)

    @property
    def finished(self) -> bool:
        return (self.folder / RESULT).is_file()

    def described(self) -> dict[str, Any]:
        """Return all that decides the outcome, fit for JSON."""
        return {"method": self.method, "seed": self.seed, "experiment": self.config.experiment()}


class Machine(NamedTuple):
    """The compiled parts of a run, the same for all seeds of a method."""

    apply: Apply
    step: StepFn
    tx: optax.GradientTransformation
    measure: Callable[..., dict[str, Array]]


def check_owner(setting: Setting) -> None:
    """Raise ValueError where the run's folder was made with another config; change nothing."""
    RunDirectory(setting.folder).check_config(setting.described())


def announce(setting: Setting) -> None:
    """Say in the run's folder that it is wanted, so that a run that never started can be named."""
    if not (setting.folder / RUN).is_file():
        write_json(setting.folder / RUN, setting.described() | {"sessions": []})


def _open_session(setting: Setting) -> None:
    """Add to the run's record when, by which versions and on what it goes on."""
    sessions = read_json(setting.folder / RUN, ("sessions",))["sessions"]
    now = {"started": datetime.now(UTC).isoformat(timespec="seconds")} | environment.describe()
    write_json(setting.folder / RUN, setting.described() | {"sessions": [*sessions, now]})


def make_model(name: str, sizes: Model, compat: str | None, seed: int) -> MemoryMosaic:
    """Build the model of a method with its initial parameters."""
    chosen = method(name)
    config = MosaicConfig(
        vocab_size=VOCAB_SIZE,
        num_layers=sizes.layers,
        num_heads=sizes.heads,
        embed_dim=sizes.width,
        memory_size=sizes.slots,
        kernel=chosen.kernel,
        bandwidth=chosen.bandwidth,
        attention_dropout=sizes.attention_dropout,
        hidden_dropout=sizes.hidden_dropout,
        compat=compat,
    )
    return MemoryMosaic(config, rngs=nnx.Rngs(seed))


def _parameters(setting: Setting) -> PyTree[Array]:
    options = setting.config
    model = make_model(setting.method, options.model, options.compat, setting.seed)
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


# Cached: the seeds of a method differ in values only, and must not be compiled one by one.
@functools.cache
def _machine(
    name: str, sizes: Model, compat: str | None, options: Training, total_steps: int
) -> Machine:
    graph, _ = nnx.split(nnx.eval_shape(lambda: make_model(name, sizes, compat, 0)), nnx.Param)

    def apply(params, tokens, key):
        return nnx.merge(graph, params)(tokens, dropout_key=key)

    schedule = regbench(options.learning_rate, total_steps=total_steps)
    tx = adamw(schedule, weight_decay=options.weight_decay, clip=options.clip)
    return Machine(apply, make_step(make_loss(apply), tx), tx, make_measure(apply))


def run(setting: Setting, benchmark: Benchmark, *, time_limit: float | None, label: str) -> bool:
    """Train until the steps are done or the time is up, then test; tell whether all is done.

    What is on the disk decides where it starts: a run that was stopped goes on, and ends with the
    losses and parameters that it would have had. The tested parameters are those with the lowest
    validation loss.

    Args:
        time_limit: seconds.
        label: what the progress line calls this run.
    """
    config, options = setting.config, setting.config.training
    _open_session(setting)
    machine = _machine(setting.method, config.model, config.compat, options, config.steps)
    params = _parameters(setting)
    validation = held_out(benchmark.validation, options.batch_size)

    def validate(params: PyTree[Array]) -> dict[str, float]:
        found = evaluate(machine.measure, params, validation)
        return {name: found[name] for name in ("loss", "tvd", "accuracy", "kl")}

    with closing(_data(setting, benchmark)) as data:
        trained = train(
            setting.folder,
            init_state(params, machine.tx, jax.random.key(setting.seed)),
            machine.step,
            data,
            steps=config.steps,
            config=setting.described(),
            evaluate=validate,
            eval_every=max(1, round(config.steps / options.evaluations)),
            log_every=max(1, config.steps // 100),
            tokens_per_batch=_tokens_per_batch(setting, benchmark),
            best=BEST,
            time_limit=time_limit,
            progress=Progress(label),
        )
    if trained.finished:
        _test(setting, benchmark, machine, params, trained.best_step)
    return trained.finished


def _test(
    setting: Setting,
    benchmark: Benchmark,
    machine: Machine,
    like: PyTree[Array],
    best_step: int | None,
) -> None:
    """Measure the best checkpoint on the test automata and write the result, which ends the run."""
    best = load_params(setting.folder, "best", like)
    test = held_out(benchmark.test, setting.config.training.batch_size)
    found = evaluate(machine.measure, best, test)
    about = {"best_step": best_step, "parameters": sum(x.size for x in jax.tree.leaves(like))}
    write_json(setting.folder / RESULT, found | about | _cost(setting, benchmark))


def _data(setting: Setting, benchmark: Benchmark) -> BatchIterator:
    size = setting.config.training.batch_size
    return batches(Rows(benchmark.train), size, seed=setting.seed, collate=pad_to(size))


def _tokens_per_batch(setting: Setting, benchmark: Benchmark) -> int:
    """The tokens of a full batch on average, without padding."""
    return round(setting.config.training.batch_size * float(benchmark.train.lengths.mean()))


def _cost(setting: Setting, benchmark: Benchmark) -> dict[str, Any]:
    """What the run took, over all its commands; the speed is that of the steps alone."""
    events = read_metrics(setting.folder / METRICS)
    speeds = [e["tokens_per_second"] for e in events if e.get("tokens_per_second")]
    speed = statistics.median(speeds) if speeds else None
    tokens = _tokens_per_batch(setting, benchmark)
    return {
        "steps": setting.config.steps,
        "seconds": events[-1]["seconds"],
        "tokens_per_second": speed,
        "ms_per_step": None if speed is None else 1000 * tokens / speed,
    }
