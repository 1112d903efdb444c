r"""What one training step costs on many devices, by formula.

A Memory Mosaic of L layers, width C, M learned pairs a layer, V tokens; R rows of T positions in a
batch; D x F x Q devices along data, fsdp and sequence. P parameters are

    P = V C + L (5 C^2 + 2 M C)

(two keys, a value and two outputs; M pairs of key and value). For every position, 2 P products and
sums forward, twice that backward; and for attention over the causal half of T keys, of which the
share d has weight: one full pass for the scores and two products forward, seven backward,

    flops = 6 P R T + L C R T^2 (1 + (4 + 14) d / 2)

What a device sends, in bytes. Over fsdp parameters are gathered, those of features and outputs
twice, since the backward pass forms features again. Gradients are summed over all devices, that of
the embedding twice, once of the lookup, once of the logits (XLA sums, then cuts; where it scatters
the sum, that is half of it). With a split sequence each layer gathers keys and values, and
scatters their gradients; exchanges early and late queries; and gathers the ends of two averages.

What a step keeps on a device beside the state: 13 numbers of every layer for each of its positions
and channels, and 17 more of the layer that is worked on; 2.4 a learned pair; and two a token of the
vocabulary, logits and their gradient. These numbers are read off programs for H200.
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
    embedding = sizes.vocabulary * sizes.width
    matrices = 5 * sizes.layers * sizes.width**2
    data = 2 * _gathered(number * (sizes.parameters + embedding), split.devices)
    fsdp = _gathered(number * (sizes.parameters + matrices), split.fsdp)
    if split.sequence == 1:
        return Bytes(data, fsdp, 0)
    rows = sizes.rows / (split.data * split.fsdp)
    stream = rows * sizes.length * sizes.width
    keys = 4 * _gathered(stream * narrow, split.sequence)
    exchanged = 4 * stream / split.sequence * number
    ends = 2 * rows * sizes.width * number * split.sequence * 2
    averages = _gathered(ends, split.sequence)
    return Bytes(data, fsdp, sizes.layers * (keys + exchanged + averages))


def state_bytes(sizes: Sizes, split: Split, number: int = 4) -> float:
    """Parameters, their gradients and AdamW's two moments on one device."""
    return 4 * number * sizes.parameters / split.fsdp


def activation_bytes(sizes: Sizes, split: Split) -> float:
    """What a step keeps on one device beside its state, in float32 and without dropout."""
    positions = sizes.rows * sizes.length / split.devices
    channels = sizes.width * (13 * sizes.layers + 17)
    return 4 * positions * (channels + 2.4 * sizes.slots + 2 * sizes.vocabulary)


class Prediction(NamedTuple):
    """Seconds of a step: of arithmetic, of messages, and of both where nothing overlaps."""

    compute: float
    messages: float

    @property
    def share(self) -> float:
        """Of the time in which devices compute, if messages are not hidden behind it."""
        return self.compute / (self.compute + self.messages)


def predict(machine: Machine, sizes: Sizes, split: Split) -> Prediction:
    """Predicts a step; the innermost axes of the mesh get the fast links, as far as these reach.

    Where an axis reaches further, what is the same within a group of fast links crosses once.
    """
    found = sent(sizes, split)
    # Gradients are summed over all devices.
    reach = {"sequence": split.sequence, "fsdp": split.fsdp, "data": split.devices}
    seconds, inner = 0.0, 1
    for axis, devices in reach.items():
        inside = 1 if axis == "data" else inner
        together = min(devices, max(1, machine.near // inside))
        here = getattr(found, axis)
        seconds += here / machine.link if together > 1 else 0.0
        seconds += here / together / machine.far if together < devices else 0.0
        inner *= devices
    compute = sizes.flops / split.devices / (machine.flops * machine.share)
    return Prediction(compute, seconds)


def break_even(*, width: int = 64, rounds: int = 4, narrow: int = 2, wide: int = 4) -> float:
    """Queries to a key below which keys that stay send less than keys that are gathered.

    With as many key heads as heads; with a key head for G of them divide by G.
    """
    return narrow * 2 * width / (wide * (2 * width + 8 + 2 * rounds))
