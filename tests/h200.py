"""A GPU that is not there: programs are compiled for an H200 to machine code, and not run.

Needs the compilers of the dependency group `aot`; `make aot` installs them.
"""

import contextlib
import importlib.util
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.experimental import topologies

# Public figures of the H100's chip with the H200's memory.
TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 62914560 device_memory_size: 150754820096
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 12 } runtime_version { major: 13 }
device_description_str: "NVIDIA H200"
"""


@dataclass
class Program:
    """A compiled function; of each of its kernels what the assembler says.

    products: matrix instructions in the code, each as often as it is written.
    """

    temporary_bytes: int
    registers: list[int] = field(default_factory=list)
    spilled_bytes: list[int] = field(default_factory=list)
    products: list[int] = field(default_factory=list)


def compiled(function: Callable, *shapes: Any) -> Program:
    """Compiles a function of arrays of the given shapes for the H200."""
    device = jax.sharding.SingleDeviceSharding(devices()[0])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)
    # Kernels that have been compiled before are not told about again.
    jax.clear_caches()
    with _told() as folder:
        executable = jax.jit(function).lower(*shapes).compile()
        words = [file.read_text() for file in sorted(folder.glob("*.ptxas"))]
        code = [file.read_text() for file in sorted(folder.glob("*.ptx"))]
    analysis = executable.memory_analysis()
    return Program(
        analysis.temp_size_in_bytes,
        [int(n) for text in words for n in re.findall(r"Used (\d+) registers", text)],
        [int(n) for text in words for n in re.findall(r"(\d+) bytes spill", text)],
        [text.count("wgmma.mma_async") for text in code],
    )


def devices(count: int = 1) -> list[Any]:
    """So many of them, in one machine."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        if os.environ.get("KREG_AOT"):
            pytest.fail("the CUDA plugin is not installed, and this run is there to use it")
        pytest.skip("needs the compilers of the dependency group aot: make aot")
    return topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=TARGET, topology=f"1x1x{count}"
    ).devices


@contextlib.contextmanager
def _told() -> Iterator[Path]:
    """Has the assembler's words written to a folder."""
    with tempfile.TemporaryDirectory() as folder:
        wanted = {
            "MOSAIC_GPU_DUMP_TO": folder,
            "MOSAIC_GPU_DUMP_PTXAS": "1",
            "MOSAIC_GPU_DUMP_PTX": "1",
        }
        os.environ.update(wanted)
        try:
            yield Path(folder)
        finally:
            for name in wanted:
                del os.environ[name]
