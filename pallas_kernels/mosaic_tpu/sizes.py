"""How the work is cut on each generation of TPUs, and what fits into its memories."""

from typing import NamedTuple

import jax.numpy as jnp


class Sizes(NamedTuple):
    """How the work is cut.

    block: queries of a program. piece: keys whose scores are formed at once, and skipped at once.
    pieces: of a tile, which is fetched at once. scores: bytes that scores kept on chip may take.
    memory: bytes of vector memory that a program may take in all; 0 for the compiler's own limit.
    """

    block: int
    piece: int
    pieces: int
    scores: int
    memory: int = 0

    @property
    def tile(self) -> int:
        return self.piece * self.pieces

    def scalar_bytes(self, queries: int, share: int) -> int:
        """Scalar memory that the kernel of keys takes, the greediest: bits of tiles and bounds.

        share: heads that share a key head.
        """
        return 4 * -(-queries // self.block) * (2 * share + 2 * 4 + 1)


_MIB = 2**20
# Pieces of 256 keys suit the matrix units of v6e and v7x better, but on v6e the forward kernel then
# spills 377 registers, not 37 (change `piece` here: `make schedules` tells). Scores of a block take
# a kilobyte a key; of vector memory v4 has 16 MiB, v5e and v6e 128, v5p and v7x 64.
_SMALL = Sizes(block=256, piece=128, pieces=4, scores=4 * _MIB)
_MIDDLE = _SMALL._replace(scores=16 * _MIB, memory=40 * _MIB)
_LARGE = _SMALL._replace(scores=32 * _MIB, memory=64 * _MIB)
_OF_DEVICES = {
    "TPU v4": _SMALL,
    "TPU v5 lite": _LARGE,
    "TPU v5": _MIDDLE,
    "TPU v6 lite": _LARGE,
    "TPU7x": _MIDDLE,
}
_OTHER_NAMES = {"TPU v5e": "TPU v5 lite", "TPU v5p": "TPU v5", "TPU v6e": "TPU v6 lite",
                "TPU7": "TPU7x"}  # fmt: skip
# For the interpreter: as little as keeps every kind of border.
_INTERPRETED = Sizes(block=128, piece=128, pieces=2, scores=256 * 1024)

# Scalar memory of one program, of the MiB that there is: blocks come in twice, one of them ahead.
SCALAR_BYTES = 768 * 1024


def is_known(device: str) -> bool:
    """Whether there are kernels for a kind of device, or it is the host, which interprets them."""
    return device == "cpu" or _OTHER_NAMES.get(device, device) in _OF_DEVICES


def sizes_of(device: str) -> Sizes:
    """The sizes for a kind of device that is known."""
    return _OF_DEVICES.get(_OTHER_NAMES.get(device, device), _INTERPRETED)


def row_multiple(dtype) -> int:
    """What the width of an operand is padded to: registers hold 8 rows of 32 bits."""
    return 32 // jnp.dtype(dtype).itemsize
