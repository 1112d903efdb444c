"""The implementations of `attention`, and which one is chosen.

An implementation takes a canonical `Problem` and returns output and Stats, or raises
NotImplementedError, which means "not these inputs" and nothing else.
"""

import functools
import importlib
from collections.abc import Callable

import jax
from jaxtyping import Array

from kreg import chunked, fused, reference
from kreg.problem import Problem
from kreg.stats import Stats

# Scores of up to this many bytes are formed at once; larger problems go block by block. On CPU the
# limits are about the sizes of caches, the smaller one where the blocks have a backward pass of
# their own; on accelerators the limit is a small part of their memory.
_FUSED_BYTES = 2 * 2**20
_DENSE_BYTES = {"cpu": 48 * 2**20}
_DENSE_BYTES_ELSEWHERE = 2**30
# The platforms that kernels are compiled for, what Hopper's devices are called, and from how many
# queries and keys on kernels, which work on 64 of each and more at once, are worth it.
_PLATFORMS = {"mosaic_gpu": "cuda", "mosaic_tpu": "tpu"}
_HOPPER = ("H100", "H200", "H800", "H20", "GH200")
_LEAST = {"t": 16, "s": 128}


def _kernels(name: str) -> Callable[[Problem], tuple[Array, Stats | None]]:
    def attend(problem: Problem) -> tuple[Array, Stats | None]:
        return importlib.import_module(f"pallas_kernels.{name}").ATTENTION.attend(problem)

    return attend


def _in_blocks(problem: Problem) -> tuple[Array, Stats | None]:
    return (fused if _fuses(problem) else chunked).attend(problem)


def _fuses(problem: Problem) -> bool:
    return jax.default_backend() == "cpu" and fused.takes(problem)


IMPLEMENTATIONS: dict[str, Callable[[Problem], tuple[Array, Stats | None]]] = {
    "reference": reference.attend,
    "xla": _in_blocks,
    "mosaic_gpu": _kernels("mosaic_gpu"),
    "mosaic_tpu": _kernels("mosaic_tpu"),
}


def run(problem: Problem, implementation: str | None) -> tuple[Array, Stats | None]:
    """Runs the named implementation, or the best one for the problem."""
    if implementation is not None:
        return _compiled(problem, implementation)
    name, _ = choose(problem)
    return _compiled(problem, name, _portable(problem)[0] if name in _PLATFORMS else None)


# Compiled as one, so that calls outside jit do not trace and compile their loops each time.
@functools.partial(jax.jit, static_argnames=("name", "elsewhere"))
def _compiled(
    problem: Problem, name: str, elsewhere: str | None = None
) -> tuple[Array, Stats | None]:
    if elsewhere is None:
        return IMPLEMENTATIONS[name](problem)
    # The program may yet be compiled for the host of the device.
    found = {_PLATFORMS[name]: IMPLEMENTATIONS[name]}
    return jax.lax.platform_dependent(problem, **found, default=IMPLEMENTATIONS[elsewhere])


def may_run_kernels(implementation: str | None, *devices: str) -> bool:
    """Whether `run` may run kernels, on devices of these kinds; for some problems it does not."""
    if implementation is not None:
        return implementation in _PLATFORMS
    return any(kernels_for(device) for device in devices)


def check(implementation: str | None) -> None:
    """Raises ValueError where the name is not one of the implementations."""
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation: expected None or one of {sorted(IMPLEMENTATIONS)}, "
            f"got {implementation!r}"
        )


def choose(problem: Problem) -> tuple[str, str]:
    """Chooses kernels where there are some for the device and the problem, else by size."""
    device = device_kind()
    name = kernels_for(device)
    if name is None:
        return _portable(problem)
    if any(problem.sizes[axis] < least for axis, least in _LEAST.items()):
        name, why = _portable(problem)
        return name, f"{why}; kernels are for {_LEAST['t']} queries and {_LEAST['s']} keys or more"
    module = importlib.import_module(f"pallas_kernels.{name}")
    reason = module.ATTENTION.declined(problem)
    if reason is None:
        return name, f"kernels for {device} take these inputs"
    name, why = _portable(problem)
    return name, f"{why}; {reason}"


def _portable(problem: Problem) -> tuple[str, str]:
    """Chooses by size: dense while the scores are small, in blocks of queries beyond."""
    sizes = problem.sizes
    size = sizes["b"] * sizes["n"] * sizes["t"] * sizes["s"] * problem.dtype.itemsize
    limit = _DENSE_BYTES.get(jax.default_backend(), _DENSE_BYTES_ELSEWHERE)
    if _fuses(problem):
        limit = _FUSED_BYTES
    what = f"the scores take {size / 2**20:.1f} MiB, the limit is {limit / 2**20:.0f}"
    if size <= limit:
        return "reference", f"dense is fastest: {what}"
    return "xla", f"blocks of queries are faster, in memory linear in length: {what}"


def kernels_for(device: str) -> str | None:
    """The implementation by kernels for a kind of device, None where there is none."""
    if is_hopper(device):
        return "mosaic_gpu"
    return "mosaic_tpu" if device.startswith("TPU") else None


def is_hopper(device: str) -> bool:
    """True for devices of compute capability 9.0."""
    return any(name in device for name in _HOPPER)


def device_kind() -> str:
    """What a program that is traced now is meant for: the mesh says, else the default device.

    "cpu" where that has no kernels; the program may be compiled for one that has all the same.
    """
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is not None:
        return device.device_kind
    return "cpu" if jax.default_backend() == "cpu" else jax.devices()[0].device_kind
