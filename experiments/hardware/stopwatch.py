"""Compile contestants side by side, then time them in turns."""

import math
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import jax

from experiments.hardware.deadline import Deadline
from experiments.hardware.report import one_line

COMPILERS = min(8, os.cpu_count() or 1)


@dataclass
class Entry:
    """One contestant: compiled, its seconds a call in each round, or why there are none."""

    name: str
    call: Any = None
    compile_seconds: float = math.nan
    temporary_bytes: int | None = None
    calls: int = 1
    seconds: list[float] = field(default_factory=list)
    unavailable: str = ""

    def over(self, other: "Entry") -> float:
        """Return the median over rounds of the ratio of times: what moves both cancels."""
        return statistics.median(
            mine / theirs for mine, theirs in zip(self.seconds, other.seconds, strict=False)
        )

    def as_json(self, baselines: dict[str, "Entry"]) -> dict[str, Any]:
        if self.unavailable:
            return {"unavailable": self.unavailable}
        low, high = min(self.seconds), max(self.seconds)
        times = {"median_ms": statistics.median(self.seconds), "min_ms": low, "max_ms": high}
        return {
            **{name: 1000 * seconds for name, seconds in times.items()},
            "rounds": len(self.seconds),
            "calls_a_round": self.calls,
            "compile_seconds": self.compile_seconds,
            "temporary_bytes": self.temporary_bytes,
            "times_of": {name: self.over(entry) for name, entry in baselines.items()},
        }


def compiled(contestants: dict[str, Callable[..., Any]], inputs: list[Any]) -> list[Entry]:
    """Compile all, several at a time; the seconds of one are those of a busy machine."""

    def one(name: str) -> Entry:
        entry = Entry(name)
        start = time.perf_counter()
        try:
            executable = jax.jit(contestants[name]).lower(*inputs).compile()
        # Not every device has every implementation, and each says so in its own way.
        except Exception as error:
            entry.unavailable = one_line(error)
            return entry
        entry.compile_seconds = time.perf_counter() - start
        entry.call = executable
        analysis = executable.memory_analysis()
        entry.temporary_bytes = None if analysis is None else analysis.temp_size_in_bytes
        return entry

    with ThreadPoolExecutor(COMPILERS) as pool:
        return list(pool.map(one, contestants))


def race(
    entries: list[Entry], inputs: list[Any], deadline: Deadline, *, rounds: int, seconds: float
) -> None:
    """Time the entries in turns, `seconds` or one call each a round, at least one round."""
    for entry in entries:
        _attempt(entry, lambda entry=entry: _warm_up(entry, inputs, seconds))
    for number in range(rounds):
        if number and deadline.passed:
            break
        for entry in entries:
            _attempt(
                entry, lambda entry=entry: entry.seconds.append(_time(entry, inputs, entry.calls))
            )


def _attempt(entry: Entry, work: Callable[[], None]) -> None:
    if entry.unavailable:
        return
    try:
        work()
    # Most of all a device without memory for dense scores.
    except Exception as error:
        entry.unavailable = one_line(error)


def _warm_up(entry: Entry, inputs: list[Any], seconds: float) -> None:
    """Call twice, and let the second say how many calls fill a round."""
    _time(entry, inputs, 1)
    entry.calls = max(1, min(1000, round(seconds / max(_time(entry, inputs, 1), 1e-9))))


def _time(entry: Entry, inputs: list[Any], calls: int) -> float:
    """Return seconds a call: the device works them off in order, so the last one ends them all."""
    output, start = None, time.perf_counter()
    for _ in range(calls):
        output = entry.call(*inputs)
    jax.block_until_ready(output)
    return (time.perf_counter() - start) / calls
