"""Kernels for TPUs, in Pallas Mosaic TPU."""

from pallas_kernels.mosaic_tpu.attention import ATTENTION as ATTENTION
