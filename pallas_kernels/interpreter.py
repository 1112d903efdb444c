"""Whether kernels are interpreted, on a machine without the device that they are for."""

from collections.abc import Set

from jax._src import callback, config


def interpreted() -> bool:
    """True inside Pallas' `force_gpu_interpret_mode` and `force_tpu_interpret_mode`.

    JAX has no public name for asking; its jit knows of the mode, so that nothing compiled in it is
    used outside.
    """
    return _mode() is not None


def effects() -> Set:
    """JAX's effects of a kernel: those simulated are calls to Python, one after the other.

    The mode True, in which a TPU's kernel becomes operations of XLA, has none.
    """
    return frozenset() if _mode() in (None, True) else {callback._OrderedIOEffect}


def _mode():
    state = getattr(config, "pallas_tpu_interpret_mode_context_manager", None)
    return None if state is None else state.value
