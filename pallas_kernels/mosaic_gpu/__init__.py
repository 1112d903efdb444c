"""Kernels for NVIDIA Hopper in Pallas Mosaic GPU."""

from pallas_kernels.mosaic_gpu.attention import ATTENTION as ATTENTION
