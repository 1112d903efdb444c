"""What the devices of a compiled program send each other, read from its text."""

import math
import re
from typing import NamedTuple

import numpy as np

KINDS = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all"
_MESSAGE = re.compile(rf"= (.*?) ({KINDS})(-start)?\(")
_ARRAY = re.compile(r"\b(pred|[subf]\w*?(\d+)\w*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) .*\{$")
_LOOP = re.compile(r" while\(.*body=%?([\w.-]+)")
_CALL = re.compile(r"(?:calls|to_apply|branch_computations)=\{?%?([\w.-]+(?:, *%[\w.-]+)*)")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')


class Message(NamedTuple):
    """One collective as it is written.

    bytes: of the array that it gives, on each device. devices: how many talk to each other.
    loops: the trip counts of the loops around it, the innermost last; None where not known.
    """

    kind: str
    bytes: int
    devices: int
    loops: tuple[int | None, ...] = ()

    @property
    def once(self) -> float:
        """Bytes that a device sends each time."""
        others = self.devices - 1
        return (
            self.bytes
            * {
                "all-reduce": 2 * others / self.devices,
                "all-gather": others / self.devices,
                "all-to-all": others / self.devices,
                "reduce-scatter": others,
                "collective-permute": 1,
            }[self.kind]
        )

    def sent(self, trips: int) -> float:
        """Bytes that a device sends, loops of unknown length being run so many times."""
        return self.once * np.prod([trips if n is None else n for n in self.loops], initial=1.0)


def messages(text: str) -> list[Message]:
    """Lists the collectives of a compiled program, `jax.stages.Compiled.as_text()`."""
    lines, inside, called = [], "", {}
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            inside = found[1]
        trips = _TRIPS.search(line)
        if found := _LOOP.search(line):
            called.setdefault(found[1], (inside, (int(trips[1]) if trips else None,)))
        elif found := _CALL.search(line):
            for name in re.split(r", *%?", found[1]):
                called.setdefault(name, (inside, ()))
        if found := _MESSAGE.search(line):
            lines.append((found, line, inside))
    return [
        Message(found[2], _bytes(found, _devices(line)), _devices(line), _loops(inside, called))
        for found, line, inside in lines
    ]


def sent(found: list[Message], trips: int = 1) -> float:
    """Bytes that one device sends in all."""
    return float(sum(message.sent(trips) for message in found))


def _loops(inside: str, called: dict) -> tuple[int | None, ...]:
    loops: tuple[int | None, ...] = ()
    while inside in called:
        inside, around = called[inside]
        loops = around + loops
    return loops


def _bytes(found: re.Match, devices: int) -> int:
    """Of all arrays that it gives; what is only begun gives its operands, too."""
    types, kind, begun = found.groups()
    total = sum(
        math.prod(int(n) for n in shape.split(",") if n) * max(int(bits or 8), 8) // 8
        for _, bits, shape in _ARRAY.findall(types)
    )
    if begun and kind == "all-gather":
        return total * devices // (devices + 1)
    if begun and kind == "reduce-scatter":
        return total // (devices + 1)
    return total // 2 if begun and kind == "collective-permute" else total


def _devices(line: str) -> int:
    if found := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return int(np.prod([int(sizes[name]) for name in re.findall(r"'(\w+)'", found[2])]))
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(found[2])
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(found[1].split(","))
    return len(re.findall(r"\{\d+,\d+\}", line))
