"""How a training is split over devices: one mesh, and one table of what is split over what.

The computation is written for one device; arrays are split, and JAX does the rest. So the numbers
do not depend on how many devices there are, but for the order in which sums are formed.
"""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

import kreg
from kreg.training.optimizer import names

# The axes of a mesh, and what lies along them. Rows of a batch lie along the first two; parameters
# and the optimizer's moments along `fsdp`, by their longest axis; time along `sequence`.
AXES = ("data", "fsdp", "sequence")
ROWS = ("data", "fsdp")
# Layers are stacked below these names, and looped over: that axis stays whole.
_STACKED = ("blocks",)
# Arrays of fewer numbers stay whole: to gather them costs more than to have them.
_LEAST = 1024


@dataclass(frozen=True)
class Devices:
    """Say how many devices lie along each axis of the mesh; their product is that of all devices.

    Args:
        data: rows of the batch are split over these, and parameters are whole on each.
        fsdp: rows are split over these, too, and so are parameters and the optimizer's state.
        sequence: time is split over these.
        among: the devices, in order; those of `jax.devices()` where None.
        explicit: whether the mesh has explicit axes, for code of the caller's that wants them; the
            step itself is split by JAX either way.

    Examples:
        >>> from kreg import training
        >>> devices = training.Devices.of("data=1")
        >>> devices.mesh.shape["data"], devices.count
        (1, 1)
        >>> training.Devices.of("data=2,model=4")
        Traceback (most recent call last):
        ValueError: devices: expected data, fsdp or sequence, each once with =COUNT, got 'model=4'
    """

    data: int = 1
    fsdp: int = 1
    sequence: int = 1
    among: tuple[Any, ...] | None = field(default=None, repr=False)
    explicit: bool = False

    def __post_init__(self):
        for axis in AXES:
            if getattr(self, axis) < 1:
                raise ValueError(f"{axis}: expected at least 1, got {getattr(self, axis)}")

    @classmethod
    def of(cls, text: str) -> Self:
        """Read "data=2,fsdp=4"; what is left out is 1."""
        counts: dict[str, Any] = {}
        for part in filter(None, text.split(",")):
            axis, _, count = part.partition("=")
            if axis not in AXES or axis in counts or not count.isdigit():
                raise ValueError(
                    f"devices: expected data, fsdp or sequence, each once with =COUNT, got {part!r}"
                )
            counts[axis] = int(count)
        return cls(**counts)

    @property
    def count(self) -> int:
        """How many devices there are."""
        return self.data * self.fsdp * self.sequence

    @functools.cached_property
    def mesh(self) -> Mesh:
        """The mesh of all devices of all processes; ValueError where they are not so many."""
        among = jax.devices() if self.among is None else self.among
        found = len(among)
        if found < self.count or (found > self.count and jax.process_count() > 1):
            raise ValueError(
                f"devices: expected {found}, as many as there are, got {self}, which are "
                f"{self.count}"
            )
        shape = self.data, self.fsdp, self.sequence
        kind = AxisType.Explicit if self.explicit else AxisType.Auto
        types = (kind,) * len(AXES)
        return jax.make_mesh(shape, AXES, axis_types=types, devices=among[: self.count])

    @property
    def layout(self) -> kreg.sharding.Layout | None:
        """What a model of `kreg.nn` is to be told; None on one device."""
        if self.count == 1:
            return None
        return kreg.sharding.Layout(ROWS, sequence="sequence" if self.sequence > 1 else None)

    @functools.cached_property
    def compiler_options(self) -> dict[str, bool] | None:
        """What a step is to be compiled with, as `jax.jit` takes it.

        Where this process has a CPU device for every core, each device computes its products by
        itself: the cores wait for each other when they exchange gradients, not at every product.
        """
        here = [d for d in self.mesh.devices.flat if d.process_index == jax.process_index()]
        alone = len(here) >= cores() and all(device.platform == "cpu" for device in here)
        return {"xla_cpu_multi_thread_eigen": False} if alone else None

    def shardings(self, tree: PyTree[Array]) -> PyTree[NamedSharding]:
        """How parameters, an optimizer's state, or a whole state are split."""

        def one(path, leaf):
            return NamedSharding(self.mesh, _spec(names(path), leaf.shape, self.fsdp))

        return jax.tree_util.tree_map_with_path(one, tree)

    def place(self, tree: PyTree[Array]) -> PyTree[Array]:
        """Split arrays that every process has whole."""
        return jax.tree.map(_put, tree, self.shardings(tree))

    def rows(self, batch_size: int) -> np.ndarray:
        """Number the rows of a batch that this process's devices hold, in ascending order.

        Raises:
            ValueError: a batch that the devices along `data` and `fsdp` do not divide.

        Examples:
            >>> from kreg import training
            >>> training.Devices().rows(4).tolist()
            [0, 1, 2, 3]
        """
        if batch_size % (self.data * self.fsdp):
            raise ValueError(
                f"batch: expected rows that {self.data} x {self.fsdp} devices divide, "
                f"got {batch_size}"
            )
        split = NamedSharding(self.mesh, PartitionSpec(ROWS))
        held = split.addressable_devices_indices_map((batch_size,)).values()
        return np.unique([np.arange(batch_size)[index] for index in held])

    def place_batch(
        self, batch: PyTree[np.ndarray | Array], batch_size: int | None = None
    ) -> PyTree[Array]:
        """Split a batch by rows and time; arrays that lie on the mesh already stay as they are.

        Numbers without axes, of which a step draws its rows itself, are whole on every device.

        Args:
            batch: arrays with a row of the batch each, time next.
            batch_size: rows of the whole batch where the arrays hold no more than this process's
                `rows`; where None they hold all, in every process.
        """
        everywhere = set(self.mesh.devices.flat)

        def one(leaf):
            if isinstance(leaf, jax.Array) and leaf.sharding.device_set == everywhere:
                return leaf
            if leaf.ndim == 0:
                return _put(leaf, NamedSharding(self.mesh, PartitionSpec()))
            size = leaf.shape[0] if batch_size is None else batch_size
            here = self.rows(size)
            split = NamedSharding(self.mesh, self._of_rows(leaf.shape))
            if batch_size is None:
                return _put(leaf, split)

            def part(index):
                first, stop, _ = index[0].indices(size)
                # Rows of a device are next to each other here, too.
                at = np.searchsorted(here, first)
                return leaf[at : at + stop - first, *index[1:]]

            return jax.make_array_from_callback((size, *leaf.shape[1:]), split, part)

        return jax.tree.map(one, batch)

    def split_batch(self, batch: PyTree[Array]) -> PyTree[Array]:
        """Have the rows that a compiled function makes lie as `place_batch` puts those of a batch.

        To be traced under `jax.set_mesh`; on one device it does nothing.
        """
        if self.count == 1:
            return batch
        return jax.tree.map(
            lambda rows: jax.lax.with_sharding_constraint(rows, self._of_rows(rows.shape)), batch
        )

    def _of_rows(self, shape: tuple[int, ...]) -> PartitionSpec:
        has_time = len(shape) > 1 and shape[1] % self.sequence == 0
        return PartitionSpec(ROWS, *(("sequence",) if has_time else ()))

    def keeping(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Let a step return its state split as `shardings` says, and its metrics whole."""

        def constrained(state, batch):
            state, metrics = step(state, batch)
            whole = NamedSharding(self.mesh, PartitionSpec())
            metrics = jax.lax.with_sharding_constraint(metrics, whole)
            return jax.lax.with_sharding_constraint(state, self.shardings(state)), metrics

        def typed(state, batch):
            specs = jax.tree.map(lambda sharding: sharding.spec, self.shardings(state))
            split: Any = jax.sharding.auto_axes(step, out_sharding=(specs, PartitionSpec()))
            return split(state, batch)

        return typed if self.explicit else constrained


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _spec(path: tuple[str, ...], shape: tuple[int, ...], parts: int) -> PartitionSpec:
    """Split the longest axis that can be; None but for large arrays."""
    first = 1 if any(part in _STACKED for part in path) else 0
    fits = [at for at in range(first, len(shape)) if shape[at] % parts == 0]
    if parts == 1 or not fits or np.prod(shape) < _LEAST:
        return PartitionSpec()
    at = max(fits, key=lambda at: shape[at])
    return PartitionSpec(*(None,) * at, "fsdp")


def _put(x: Array | np.ndarray, sharding: NamedSharding) -> Array:
    """Give every device its part; also where other processes have some of the devices."""
    if jax.process_count() == 1:
        return jax.device_put(x, sharding)
    if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = _put(jax.random.key_data(x), NamedSharding(sharding.mesh, PartitionSpec()))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    whole = np.asarray(x)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])
