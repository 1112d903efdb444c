"""What a device can do, as its vendor says: bounds, not measurements."""

from typing import NamedTuple


class Machine(NamedTuple):
    """One accelerator and its links.

    flops: bfloat16 products, dense, a second. memory: bytes. bandwidth: bytes a second from memory.
    near: how many devices share the fast links. link, far: bytes a second that a device sends over
    these, and over what joins such groups.
    share: of `flops` that the kernels of a transformer usually reach; an assumption.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    near: int
    link: float
    far: float
    share: float = 0.4


# NVIDIA, "H200 Tensor Core GPU" (2023): 989 Tflop/s, 141 GB at 4.8 TB/s, NVLink 900 GB/s both ways,
# eight in a machine; one 400 Gb/s port each. Google Cloud, "TPU v6e" (2024): 918 Tflop/s, 32 GB at
# 1.64 TB/s, links 3,584 Gb/s both ways, pods of 256; data-centre network 100 Gb/s a host of eight.
MACHINES = {
    "h200": Machine("H200", 989e12, 141e9, 4.8e12, 8, 450e9, 50e9),
    "v6e": Machine("TPU v6e", 918e12, 32e9, 1.64e12, 256, 224e9, 1.6e9),
}
