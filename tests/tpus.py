"""TPUs that are not there: programs are compiled for five generations of them, and not run.

Needs libtpu, of the dependency group `aot`; `make aot` installs it.
"""

import atexit
import collections
import contextlib
import functools
import importlib.util
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, NamedSharding, use_abstract_mesh


@dataclass(frozen=True)
class Generation:
    """Eight devices of a kind. A device is a chip, but half of one for v7x."""

    topology: str
    device_kind: str
    cores: int = 1
    options: tuple[tuple[str, str], ...] = ()


GENERATIONS = {
    "v4": Generation("v4:2x2x2", "TPU v4", 2, (("chip_config_name", "megacore"),)),
    "v5e": Generation("v5e:2x4", "TPU v5 lite"),
    "v5p": Generation("v5p:2x2x2", "TPU v5", 2),
    "v6e": Generation("v6e:2x4", "TPU v6 lite"),
    "v7x": Generation("tpu7x:2x2x1", "TPU7x"),
}
# Read when libtpu is loaded: no questions to a cloud, no logs, several processes at a time.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
}
# The two texts that are wanted of the many that the compiler can write about a kernel.
USE, CODE = "final_hlo-static-per-bundle-utilization", "final_bundles"


@dataclass
class Kernel:
    """What the compiler made of a kernel: instructions as they are written, not as often as run.

    slots: by unit, how many of its places in the bundles are taken.
    spill_stores, spill_fills: vectors put from registers into memory and back.
    scalar_spills: both, of scalars; their memory is fast, a loop that has them loses little.
    """

    name: str
    bundles: int
    slots: dict[str, int]
    spill_stores: int
    spill_fills: int
    scalar_spills: int


@dataclass
class Program:
    """A compiled function, its kernels in the order of their names; of two that are equal one.

    calls: the names of all kernels that it calls, which are there though nobody told about them.
    argument_bytes, output_bytes, temporary_bytes: on one device; reused_bytes: of arguments that
        are given up for outputs.
    collectives: how often devices talk to each other, by kind, as it is written.
    """

    argument_bytes: int
    output_bytes: int
    reused_bytes: int
    temporary_bytes: int
    calls: list[str]
    kernels: list[Kernel]
    collectives: dict[str, int]

    @property
    def bytes(self) -> int:
        """What the device holds while it runs."""
        return self.argument_bytes + self.output_bytes - self.reused_bytes + self.temporary_bytes


def meant_for(generation: str) -> contextlib.AbstractContextManager:
    """What is traced inside is meant for a TPU, though this machine has none: a mesh says so."""
    kind = GENERATIONS[generation]
    device = AbstractDevice(device_kind=kind.device_kind, num_cores=kind.cores, platform="tpu")
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def mesh(generation: str, **axes: int) -> Mesh:
    """A mesh of up to eight devices, for shapes with a `NamedSharding`."""
    few = devices(generation)[: math.prod(axes.values())]
    return Mesh(np.reshape(np.array(few), tuple(axes.values())), tuple(axes))


def compiled(function: Callable, *shapes: Any, generation: str = "v5e") -> Program:
    """Compiles a function of arrays of the given shapes for a device, or for their mesh."""
    one = jax.sharding.SingleDeviceSharding(devices(generation)[0])
    meshes = {
        x.sharding.mesh
        for x in jax.tree.leaves(shapes)
        if isinstance(getattr(x, "sharding", None), NamedSharding)
    }

    def placed(x):
        sharding = x.sharding if meshes else one
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    # A program that was compiled before is not told about again; one that failed has left words.
    jax.clear_caches()
    for file in _told().iterdir():
        file.unlink()
    where = use_abstract_mesh(*(m.abstract_mesh for m in meshes)) if meshes else None
    # What is compiled already says itself which arguments it gives up.
    function = function if hasattr(function, "lower") else jax.jit(function)
    with where or meant_for(generation):
        executable = function.lower(*jax.tree.map(placed, shapes)).compile()
    text = executable.as_text()
    names = sorted(re.findall(r'%(\S+) = .*custom_call_target="tpu_custom_call"', text))
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    memory = executable.memory_analysis()
    return Program(
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        [_plain(name) for name in names],
        [_kernel(name) for name in names if _files(name, USE)],
        collections.Counter(re.findall(rf"\b({kinds})(?:-start)?\(", text)),
    )


def _plain(name: str) -> str:
    """A kernel's name without the number that tells it from others of the name."""
    return re.sub(r"\.\d+$", "", name)


def _kernel(name: str) -> Kernel:
    """Reads what the compiler wrote about a kernel."""
    use, code = (_text(name, what) for what in (USE, CODE))
    # A heading, the units, how many places each has, a heading, then a line of numbers a bundle.
    _, units, _, _, *bundles = use.splitlines()
    used = np.array([line.split() for line in bundles], int).sum(0)
    slots = dict(zip(units.split(", "), used.tolist(), strict=True))
    return Kernel(
        _plain(name),
        len(bundles),
        slots,
        slots["VSTORE:SPILL"],
        slots["VLOAD:FILL"],
        len(re.findall(r"\bs(?:st|ld) \[smem:\[#allocation\d+_spill", code)),
    )


def _text(name: str, what: str) -> str:
    (file,) = _files(name, what)
    return file.read_text()


def _files(name: str, what: str) -> list[Path]:
    wanted = re.compile(rf"\d+-{re.escape(name)}-\d+-{what}\.txt")
    return [file for file in _told().iterdir() if wanted.fullmatch(file.name)]


@functools.cache
def devices(generation: str) -> list[Any]:
    """Devices to compile for; loads libtpu the first time."""
    if importlib.util.find_spec("libtpu") is None:
        if os.environ.get("KREG_AOT"):
            pytest.fail("libtpu is not installed, and this run is there to use it")
        pytest.skip("needs the compilers of the dependency group aot: make aot")
    _told()
    kind = GENERATIONS[generation]
    return topologies.get_topology_desc(
        platform="tpu", topology_name=kind.topology, **dict(kind.options)
    ).devices


@functools.cache
def _told() -> Path:
    """The folder that the compiler's words go to: one a process, from before libtpu is loaded.

    LIBTPU_INIT_ARGS="" asks for none.
    """
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    words = (
        f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        f" --xla_jf_dump_llo_pass_label_regex=.*{USE}|{CODE}"
    )
    os.environ.setdefault("LIBTPU_INIT_ARGS", words)
    return Path(folder)
