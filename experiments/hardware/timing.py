"""Timing: kreg's portable implementations beside `jax.nn.dot_product_attention`."""

from collections.abc import Callable
from typing import Any

import jax

from experiments.hardware.contestants import BASELINES, Group
from experiments.hardware.deadline import Deadline
from experiments.hardware.report import Report, say
from experiments.hardware.stopwatch import COMPILERS, Entry, compiled, race

# What somebody says beforehand, for instance {"kreg xla biweight over jax xla": [1.5, 3.0]}; it is
# copied into the result. Never to be filled in from a measurement.
EXPECTED: dict[str, Any] | None = None

SHAPES = ((4, 512, 8, 64), (4, 2048, 8, 64), (4, 8192, 8, 64), (1, 4096, 16, 128))
METHOD = (
    "In turns in one process; a round is as many calls in a row as fill 20 ms, waited for at the "
    "end. Milliseconds a call: median, least and most over the rounds. times_of: the median over "
    "rounds of this one's time over the other's. jax.nn in float32 uses its default precision but "
    "in 'jax xla highest'; kreg is always at the highest. compile_seconds are those of several "
    "compilations at a time. Calls under about 0.1 ms measure the host as much as the device."
)


def groups(*, smoke: bool) -> list[Group]:
    """List what is compared, short sequences first; smoke: tiny."""
    shapes, dtypes = (
        (((1, 32, 2, 8),), ("float32",)) if smoke else (SHAPES, ("bfloat16", "float32"))
    )
    return [Group(*s, d, b) for s in shapes for d in dtypes for b in (False, True)]


def timing(report: Report, deadline: Deadline, *, smoke: bool = False) -> int:
    """Time group after group until the time is up; return 0."""
    done: dict[str, Any] = {}
    everything = groups(smoke=smoke)
    report.write("timing", _content(done, everything))
    for group in everything:
        if deadline.passed:
            break
        entries = _entries(group, deadline, smoke)
        baselines = {e.name: e for e in entries if e.name in BASELINES and not e.unavailable}
        done[str(group)] = {entry.name: entry.as_json(baselines) for entry in entries}
        for entry in entries:
            say(f"{group}  {_line(entry, baselines)}")
        report.write("timing", _content(done, everything))
    left = [str(group) for group in everything if str(group) not in done]
    say(f"timing: {len(done)} comparisons, {len(left)} not reached{': ' if left else ''}")
    for name in left:
        say(f"  not reached: {name}")
    return 0


def _entries(group: Group, deadline: Deadline, smoke: bool) -> list[Entry]:
    inputs = jax.block_until_ready(group.inputs())
    entries = compiled(_chosen(group, smoke), inputs)
    rounds, seconds = (2, 0.001) if smoke else (7, 0.02)
    race(entries, inputs, deadline, rounds=rounds, seconds=seconds)
    return entries


def _chosen(group: Group, smoke: bool) -> dict[str, Callable[..., Any]]:
    everyone = group.contestants()
    few = (*BASELINES, "kreg xla biweight", "kreg reference biweight")
    return {name: call for name, call in everyone.items() if not smoke or name in few}


def _line(entry: Entry, baselines: dict[str, Entry]) -> str:
    if entry.unavailable:
        return f"{entry.name:26} not available: {entry.unavailable[:90]}"
    found = entry.as_json(baselines)
    times = "  ".join(f"{ratio:.2f} x {name}" for name, ratio in found["times_of"].items())
    temporary = found["temporary_bytes"]
    memory = "" if temporary is None else f"  {temporary / 2**20:.1f} MiB"
    return (
        f"{entry.name:26} {found['median_ms']:9.3f} ms "
        f"[{found['min_ms']:.3f}, {found['max_ms']:.3f}]  {times}{memory}"
    )


def _content(done: dict[str, Any], everything: list[Group]) -> dict[str, Any]:
    left = [str(group) for group in everything if str(group) not in done]
    return {
        "summary": {"comparisons": len(done), "not_reached": len(left)},
        "expected": EXPECTED,
        "method": METHOD,
        "compilations_at_a_time": COMPILERS,
        "causal": True,
        "comparisons": done,
        "not_reached": left,
    }
