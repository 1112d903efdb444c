r"""What one training step costs on many devices, by formula.

A Memory Mosaic of L layers, width C, M learned pairs a layer, V tokens; R rows of T positions in a
batch; D x F x Q devices along data, fsdp and sequence. P parameters are

    P = V C + L (5 C^2 + 2 M C)

(two keys, a value and two outputs; M pairs of key and value). For every position, 2 P products and
sums forward, twice that backward; and for attention over the causal half of T keys, of which the
share d has weight: one full pass for the scores and two products forward, seven backward,

    flops = 6 P R T + L C R T^2 (1 + (4 + 14) d / 2)

What a device sends, in bytes: parameters are gathered for the forward and for the backward pass
and their gradients scattered, over fsdp; gradients are summed over data and sequence; with a split
sequence keys and values are gathered, and their gradients scattered, in each layer.
"""

from typing import NamedTuple

from experiments.scaling.machines import Machine


class Sizes(NamedTuple):
    """A Memory Mosaic, its batch, and the share of the causal pairs that have weight."""

    layers: int = 12
    width: int = 768
    slots: int = 2688
    vocabulary: int = 50257
    rows: int = 512
    length: int = 512
    density: float = 0.3

    @property
    def parameters(self) -> int:
        layer = 5 * self.width**2 + 2 * self.slots * self.width
        return self.vocabulary * self.width + self.layers * layer

    @property
    def flops(self) -> float:
        """Of one step of all devices together."""
        positions = self.rows * self.length
        pairs = positions * self.length / 2
        attention = self.layers * self.width * pairs * (2 + 18 * self.density)
        return 6.0 * self.parameters * positions + attention


class Split(NamedTuple):
    """Devices along each axis of the mesh."""

    data: int = 1
    fsdp: int = 1
    sequence: int = 1

    @property
    def devices(self) -> int:
        return self.data * self.fsdp * self.sequence


class Bytes(NamedTuple):
    """What a device sends in a step, by axis of the mesh."""

    data: float
    fsdp: float
    sequence: float


def _gathered(n: float, devices: int) -> float:
    return n * (devices - 1) / devices


def sent(sizes: Sizes, split: Split, *, number: int = 4, narrow: int = 2) -> Bytes:
    """Bytes that one device sends: `number` bytes a parameter, `narrow` a key or value."""
    parameters = number * sizes.parameters
    same = split.data * split.sequence
    # Every device of a row of fsdp holds its part of the sum over all others.
    data = 2 * _gathered(parameters / split.fsdp, same)
    fsdp = 3 * _gathered(parameters, split.fsdp)
    rows = sizes.rows / (split.data * split.fsdp)
    keys = 2 * rows * sizes.length * sizes.width * narrow
    return Bytes(data, fsdp, 2 * sizes.layers * _gathered(keys, split.sequence))


def state_bytes(sizes: Sizes, split: Split, number: int = 4) -> float:
    """Parameters, their gradients and AdamW's two moments on one device."""
    return 4 * number * sizes.parameters / split.fsdp


class Prediction(NamedTuple):
    """Seconds of a step: of arithmetic, of messages, and of both where nothing overlaps."""

    compute: float
    messages: float

    @property
    def share(self) -> float:
        """Of the time in which devices compute, if messages are not hidden behind it."""
        return self.compute / (self.compute + self.messages)


def predict(machine: Machine, sizes: Sizes, split: Split) -> Prediction:
    """Predicts a step; the innermost axes of the mesh get the fast links, as far as these reach."""
    found = sent(sizes, split)
    seconds, inner = 0.0, 1
    for axis in ("sequence", "fsdp", "data"):
        inner *= getattr(split, axis)
        seconds += getattr(found, axis) / (machine.link if inner <= machine.near else machine.far)
    compute = sizes.flops / split.devices / (machine.flops * machine.share)
    return Prediction(compute, seconds)


def break_even(*, width: int = 64, rounds: int = 4, narrow: int = 2, wide: int = 4) -> float:
    """Queries to a key below which keys that stay send less than keys that are gathered.

    With as many key heads as heads; with a key head for G of them divide by G.
    """
    return narrow * 2 * width / (wide * (2 * width + 8 + 2 * rounds))
