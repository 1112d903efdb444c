"""What a sweep would cost: parameters, tokens, operations, memory, disk and time."""

import time
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from experiments.runs.cost import minutes
from experiments.runs.experiment import Config, Experiment
from experiments.runs.sweep import company_size, in_company, settings
from experiments.runs.task import Program, Task, step_of, steps_of
from kreg.training import init_state
from kreg.training.follow import STACKED

# The last two checkpoints and the best.
CHECKPOINTS = 3
STEPS = 3


@dataclass(frozen=True)
class Measured:
    """What a few steps of one method say; `runs` of them are one program."""

    method: str
    runs: int
    step_seconds: float
    evaluation_seconds: float
    compile_seconds: float
    operations: float | None
    temporary_bytes: int | None


@dataclass(frozen=True)
class Forecast:
    """What a sweep would cost, and where the numbers come from."""

    name: str
    runs: int
    left: int
    parameters: int
    steps: int
    tokens: int
    operations: float | None
    state_bytes: int
    seconds: float
    measured: Measured | None
    rate: float | None

    def told(self) -> str:
        """Put it in a few lines."""
        lines = [
            f"{self.name}: {self.runs} runs ({self.left} to do) of {self.parameters:,} parameters "
            f"and {self.steps:,} steps",
            f"  tokens      {self.tokens:.3g} a run, {self.tokens * self.runs:.3g} in all",
            f"  operations  {self._operations()}",
            f"  memory      {self._memory()}",
            f"  disk        {_size(CHECKPOINTS * self.state_bytes)} a run at most",
            f"  time        {minutes(self.seconds)} for what is to do ({self._source()})",
        ]
        return "\n".join(lines)

    def _operations(self) -> str:
        by_formula = "no formula"
        if self.operations is not None:
            by_formula = f"{self.operations * self.steps * self.runs:.2g} by formula"
        if self.measured is None or self.measured.operations is None:
            return by_formula
        counted = self.measured.operations * self.steps * self.runs
        return f"{by_formula}, {counted:.2g} as XLA counts them (the body of a loop once)"

    def _memory(self) -> str:
        text = f"{_size(self.state_bytes)} of state a run"
        if self.measured is None or self.measured.temporary_bytes is None:
            return text
        held = _size(self.measured.temporary_bytes)
        return f"{text}, {held} while a step runs ({self.measured.runs} in one program)"

    def _source(self) -> str:
        if self.measured is None:
            return f"at {self.rate:,.0f} tokens a second, as --rate says; without evaluations"
        m = self.measured
        return (
            f"measured with {m.method}: {1000 * m.step_seconds:.3g} ms a step, "
            f"{m.evaluation_seconds:.2g} s an evaluation, {m.compile_seconds:.0f} s to compile"
        )


def forecast[C: Config](
    experiment: Experiment[C], config: C, rate: float | None = None
) -> Forecast:
    """Reckon what a command would cost, by a few steps of its first method; write nothing.

    Args:
        rate: tokens a second; nothing is compiled where it is given.
    """
    if rate is not None and not rate > 0:
        raise ValueError(f"--rate: expected a positive number, got {rate}")
    task = experiment.load_task()
    data = task.load(config)
    program = task.build(config, config.methods[0])
    everything = settings(config)
    waiting = [setting for setting in everything if not setting.finished]
    state = _state(program, config, config.seeds[0])
    tokens = config.steps * task.tokens_per_batch(config, data)
    measured = None if rate else _measure(task, config, data, program)
    if measured is None:
        seconds = len(waiting) * tokens / (rate or 1.0)
    else:
        companies = len(in_company(waiting, measured.runs))
        methods = len({setting.method for setting in waiting})
        seconds = companies * config.steps * measured.step_seconds
        seconds += len(waiting) * (config.training.evaluations + 1) * measured.evaluation_seconds
        seconds += methods * measured.compile_seconds
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    return Forecast(
        name=f"{experiment.name} in {config.folder}",
        runs=len(everything),
        left=len(waiting),
        parameters=parameters,
        steps=config.steps,
        tokens=tokens,
        operations=task.operations(config, data, parameters) if task.operations else None,
        state_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
        seconds=seconds,
        measured=measured,
        rate=rate,
    )


def _state(program: Program, config: Config, seed: int):
    optimizer = program.optimizer(config.training.learning_rate)
    return init_state(program.init(seed), optimizer, jax.random.key(seed))


def _measure(task: Task, config: Config, data: Any, program: Program) -> Measured:
    """Compile the step and an evaluation of one method, and time a few of them."""
    runs, rate = company_size(config), config.training.learning_rate
    seeds = config.seeds[:1] * runs
    states = [_state(program, config, seed) for seed in seeds]
    # The step donates its state.
    params = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), states[0].params)
    with ExitStack() as stack:
        data_of = [stack.enter_context(closing(task.batches(config, data, seed))) for seed in seeds]
        batches = [next(iterator) for iterator in data_of]
    began = time.monotonic()
    alone = _lower(step_of(program, rate), states[0], batches[0])
    if runs == 1:
        arguments, rest, lowered = (states[0], batches[0]), (), alone
    else:
        arguments = (STACKED.states(states), STACKED.batches(batches))
        rest = (jnp.full(runs, rate, jnp.result_type(float)),)
        lowered = _lower(steps_of(program), *arguments, *rest)
    compiled = lowered.compile()
    state, metrics = compiled(*arguments, *rest)
    jax.block_until_ready(metrics)
    program.validate(params, data)
    compiling = time.monotonic() - began
    began = time.monotonic()
    for _ in range(STEPS):
        state, metrics = compiled(state, arguments[1], *rest)
    jax.block_until_ready(metrics)
    stepped = time.monotonic()
    program.validate(params, data)
    evaluated = time.monotonic() - stepped
    memory = compiled.memory_analysis()
    return Measured(
        method=config.methods[0],
        runs=runs,
        step_seconds=(stepped - began) / STEPS,
        evaluation_seconds=evaluated,
        compile_seconds=compiling,
        operations=(alone.cost_analysis() or {}).get("flops"),
        temporary_bytes=None if memory is None else memory.temp_size_in_bytes,
    )


def _lower(jitted: Any, *arguments: Any) -> Any:
    return jitted.lower(*arguments)


def _size(count: float) -> str:
    """Write bytes.

    >>> _size(2_500_000)
    '2.5 MB'
    """
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"
