"""Kernels for NVIDIA Hopper in Pallas Mosaic GPU."""

from pallas_kernels.mosaic_gpu.attention import ATTENTION as ATTENTION
from pallas_kernels.mosaic_gpu.attention import live_tiles as live_tiles
