"""Timing of the kernels for this device: at stated sparsities, beside softmax attention of others.

Everybody gets the same tensors. Peers that are not installed, or do not run here, say why.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

import kreg
from experiments.hardware.deadline import Deadline
from experiments.hardware.peers import peers
from experiments.hardware.report import Report, say
from experiments.hardware.sparse_inputs import PUBLISHED, sparse_inputs
from experiments.hardware.stopwatch import Entry, compiled, race
from kreg.canonical import canonical
from kreg.implementations import kernels_for

# What is said beforehand in pallas_kernels/README.md: time of kreg's biweight, forward and
# backward, over that of another, by length. Never to be filled in from a measurement.
EXPECTED: dict[str, dict[int, float]] = {
    "flash-attention 2": {4096: 1 / 1.2, 8192: 1 / 1.4, 32768: 1 / 1.8, 131072: 1 / 3.0},
    "adasplash 2": {4096: 1 / 1.35, 8192: 1 / 1.4, 32768: 1 / 1.6, 131072: 1 / 1.9},
}
BASELINES = ("jax cudnn", "jax flash attention", "tokamax", "flash-attention 2", "adasplash 2")
METHOD = (
    "Causal, in turns in one process; a round is as many calls in a row as fill 20 ms, waited for "
    "at the end. Tokens: batch times length is 16,384 or more. 'live' is the share of the tiles "
    "below the diagonal (64 x 64 on a GPU, 256 queries x 128 keys on a TPU) that have weight under "
    "the biweight kernel."
)


@dataclass(frozen=True)
class Group:
    """What is compared with each other: one length, width and direction."""

    length: int
    width: int
    backward: bool
    tokens: int = 16384

    @property
    def share(self) -> float:
        """Share of the tiles with weight, as published; of short sequences about a half."""
        return 1 - PUBLISHED.get(self.length, 0.5)

    @property
    def batch(self) -> int:
        return max(1, self.tokens // self.length)

    @property
    def heads(self) -> int:
        return 1024 // self.width

    def __str__(self) -> str:
        direction = "forward+backward" if self.backward else "forward"
        return f"B{self.batch} T{self.length} N{self.heads} H{self.width} bfloat16 {direction}"

    def inputs(self) -> list[jax.Array]:
        return sparse_inputs(
            self.batch, self.length, self.heads, self.width, self.share, "bfloat16"
        )


def groups(*, smoke: bool) -> list[Group]:
    if smoke:
        return [Group(128, 16, True, tokens=128)]
    lengths = (8192, 32768, 131072, 4096, 1024, 2048, 16384, 65536)
    return [Group(t, h, b) for b in (True, False) for h in (64, 128) for t in lengths]


def kernel_timing(report: Report, deadline: Deadline, *, smoke: bool = False) -> int:
    """Time group after group until the time is up; return 0.

    Goes on from what an earlier session has left in the folder of results.
    """
    done: dict[str, Any] = dict(report.earlier("kernels").get("comparisons", {}))
    everything = groups(smoke=smoke)
    report.write("kernels", _content(done, everything))
    for group in everything:
        if str(group) in done:
            continue
        if deadline.passed:
            break
        done[str(group)] = _compare(group, deadline, smoke)
        for name, found in done[str(group)]["times"].items():
            say(f"{group}  live {done[str(group)]['live']}  {name:22} {_line(found)}")
        report.write("kernels", _content(done, everything))
    left = [str(group) for group in everything if str(group) not in done]
    say(f"kernels: {len(done)} comparisons, {len(left)} not reached")
    return 0


def _compare(group: Group, deadline: Deadline, smoke: bool) -> dict[str, Any]:
    inputs = jax.block_until_ready(group.inputs())
    entries = compiled(_contestants(group), inputs)
    entries += peers(inputs, group.backward)
    rounds, seconds = (2, 0.001) if smoke else (7, 0.02)
    race(entries, inputs, deadline, rounds=rounds, seconds=seconds)
    baselines = {e.name: e for e in entries if e.name in BASELINES and not e.unavailable}
    times = {entry.name: entry.as_json(baselines) for entry in entries}
    return {"live": _live(inputs), "rates": _rates(group, entries), "times": times}


def _contestants(group: Group) -> dict[str, Callable[..., Any]]:
    def softmax(query, key, value):
        return jax.nn.dot_product_attention(
            query, key, value, is_causal=True, implementation="cudnn"
        )

    def tokamax(query, key, value):
        attend = importlib.import_module("tokamax").dot_product_attention
        return attend(query, key, value, is_causal=True, implementation=("mosaic", "triton"))

    def flash(query, key, value):
        """The kernel for TPUs that jax brings along."""
        name = "jax.experimental.pallas.ops.tpu.flash_attention"
        attend = importlib.import_module(name).flash_attention
        turned = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
        found = attend(*turned, causal=True, sm_scale=query.shape[-1] ** -0.5)
        return jnp.swapaxes(found, 1, 2)

    implementation = kernels_for(jax.devices()[0].device_kind) or "mosaic_gpu"
    attentions: dict[str, Callable[..., Any]] = {"jax cudnn": softmax, "tokamax": tokamax}
    if implementation == "mosaic_tpu":
        attentions = {"jax flash attention": flash, "tokamax": tokamax}
    kernels = {"biweight": kreg.biweight, "epanechnikov": kreg.epanechnikov}
    for name, kernel in (kernels | {"triweight": kreg.triweight}).items():

        def attend(query, key, value, kernel=kernel):
            return kreg.attention(
                query, key, value, kernel=kernel, is_causal=True, implementation=implementation
            )

        attentions[f"kreg {name}"] = attend

    return {name: _turn(group, attention) for name, attention in attentions.items()}


def _turn(group: Group, attention: Callable[..., Any]) -> Callable[..., Any]:
    """What is timed of an attention."""

    def both(query, key, value, cotangent):
        output, pull = jax.vjp(attention, query, key, value)
        return output, pull(cotangent)

    def forward(query, key, value, cotangent):
        return attention(query, key, value)

    return both if group.backward else forward


def _live(inputs: list[jax.Array]) -> float | None:
    """Share of the tiles at and below the diagonal that have weight."""
    try:
        kernels = importlib.import_module(
            f"pallas_kernels.{kernels_for(jax.devices()[0].device_kind)}"
        )
        query, key, value, _ = inputs
        share = jax.jit(lambda *x: kernels.ATTENTION.live_share(canonical(*x, is_causal=True)))(
            query, key, value
        )
        return round(float(share), 3)
    # Whatever keeps the kernels from running is told with their times.
    except Exception:
        return None


def _rates(group: Group, entries: list[Entry]) -> dict[str, float]:
    """Teraflops a second that dense softmax attention would need to take as long."""
    pairs = group.batch * group.heads * group.length * (group.length + 1) / 2
    flops = pairs * group.width * (14 if group.backward else 4)
    return {e.name: flops / min(e.seconds) / 1e12 for e in entries if e.seconds}


def _line(found: dict[str, Any]) -> str:
    if "unavailable" in found:
        return f"not available: {found['unavailable'][:90]}"
    times = "  ".join(f"{ratio:.2f} x {name}" for name, ratio in found["times_of"].items())
    return f"{found['median_ms']:9.3f} ms  {times}"


def _content(done: dict[str, Any], everything: list[Group]) -> dict[str, Any]:
    left = [str(group) for group in everything if str(group) not in done]
    return {
        "summary": {"comparisons": len(done), "not_reached": len(left)},
        "expected": EXPECTED,
        "method": METHOD,
        "comparisons": done,
        "not_reached": left,
    }
