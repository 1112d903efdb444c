"""Whether kernels are interpreted, on a machine without a GPU."""

from collections.abc import Set

from jax._src import callback, config


def interpreted() -> bool:
    """True inside `jax.experimental.pallas.mosaic_gpu.force_gpu_interpret_mode()`.

    JAX has no public name for asking; its jit knows of the mode, so that nothing compiled in it is
    used outside.
    """
    state = getattr(config, "pallas_tpu_interpret_mode_context_manager", None)
    return state is not None and state.value is not None


def effects() -> Set:
    """JAX's effects of a kernel: interpreted ones are calls to Python, one after the other."""
    return {callback._OrderedIOEffect} if interpreted() else frozenset()
