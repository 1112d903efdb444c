"""What is split over which axes of a mesh, and functions that run on the parts."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, reshard
from jaxtyping import Array

type Axes = str | tuple[str, ...] | None


class Layout(NamedTuple):
    """Axes of a mesh over which a model's batch, heads and sequence are split; a static value.

    Examples:
        >>> import kreg
        >>> kreg.sharding.Layout(batch=("data", "fsdp"), sequence="sequence").heads
    """

    batch: Axes = None
    heads: Axes = None
    sequence: str | None = None


class Places(NamedTuple):
    """A mesh, and which of its axes what is split over, by the letters of a problem's axes."""

    mesh: Mesh | AbstractMesh
    axes: dict[str, tuple[str, ...]]

    @classmethod
    def of(cls, mesh: Mesh | AbstractMesh | None, layout: Layout) -> "Places":
        """Checks the names; the mesh is that of `jax.set_mesh` where None."""
        mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
        split = {name: _tuple(axes) for name, axes in layout._asdict().items()}
        used = [axis for axes in split.values() for axis in axes]
        for name, axes in split.items():
            if any(axis not in mesh.axis_names or used.count(axis) > 1 for axis in axes):
                advice = "" if mesh.axis_names else "; set one with jax.set_mesh or mesh="
                raise ValueError(
                    f"{name}: expected axes of the mesh, each once; it has {mesh.axis_names}, "
                    f"got {axes}{advice}"
                )
        kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
        for name, axes in split.items():
            if any(kinds[axis] == AxisType.Manual for axis in axes):
                raise ValueError(
                    f"{name}: expected axes that no jax.shard_map around has mapped, got {axes}; "
                    "inside of one kreg.attention takes a device's batch and heads"
                )
        heads, sequence = split["heads"], split["sequence"]
        axes = {"b": split["batch"], "n": heads, "k": heads, "t": sequence, "s": sequence}
        return cls(mesh, axes)

    @property
    def own(self) -> set[str]:
        """Axes that functions of parts are mapped over: all but those that somebody mapped before.

        Those that split nothing, too: kernels are not for JAX to split.
        """
        manual = AxisType.Manual
        kinds = zip(self.mesh.axis_names, self.mesh.axis_types, strict=True)
        return {name for name, kind in kinds if kind != manual}

    @property
    def device_kind(self) -> str:
        """What the mesh's devices are called; "" where it does not say."""
        if isinstance(self.mesh, Mesh):
            return self.mesh.devices.flat[0].device_kind
        device = self.mesh.abstract_device
        return "" if device is None else device.device_kind

    @property
    def sequence(self) -> str | None:
        return self.axes["s"][0] if self.axes["s"] else None

    def size(self, letter: str) -> int:
        """Over how many devices an axis of arrays is split."""
        size = 1
        for axis in self.axes[letter]:
            size *= self.mesh.shape[axis]
        return size

    def check(self, sizes: dict[str, int]) -> None:
        """Raises ValueError where batch or heads, of these sizes, cannot be split evenly."""
        for letter, name in (("b", "batch"), ("n", "heads"), ("k", "heads")):
            length, size = sizes.get(letter, 1), self.size(letter)
            if length % size and length > 1:
                raise ValueError(
                    f"{name}: expected axes whose size divides the {length} of the arrays, got "
                    f"{self.axes[letter]} of size {size}"
                )

    def spec(self, shape: tuple[int, ...], names: str, split: str = "bnkts") -> PartitionSpec:
        """How an array with axes of these names is split along those of the given letters.

        An axis of size 1 serves all devices.
        """
        return PartitionSpec(
            *(
                self.axes[name] or None if name in split and size > 1 else None
                for name, size in zip(names, shape, strict=True)
            )
        )

    def run(self, body: Callable, specs: Any, outs: Any, arguments: Any, checks: bool) -> Any:
        """Runs a function of parts of arrays on every device.

        specs: of the leaves of the arguments, in a tree like them. checks: whether JAX keeps book
        of what differs from device to device, as it must where the function sums over devices.
        """
        leaves, tree = jax.tree.flatten(arguments)
        flat = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, PartitionSpec))

        def of_leaves(*leaves):
            return body(*jax.tree.unflatten(tree, leaves))

        over = jax.shard_map(
            of_leaves,
            mesh=self.mesh,
            in_specs=tuple(flat),
            out_specs=outs,
            axis_names=self.own,
            check_vma=checks,
        )
        return over(*map(self.placed, leaves, flat))

    def placed(self, x: Array, spec: PartitionSpec) -> Array:
        """Splits an array along explicit axes of the mesh."""
        kinds = zip(self.mesh.axis_names, self.mesh.axis_types, strict=True)
        explicit = {name for name, kind in kinds if kind == AxisType.Explicit}
        if not explicit:
            return x
        wanted = (tuple(a for a in _tuple(axes) if a in explicit) or None for axes in spec)
        return reshard(x, NamedSharding(self.mesh, PartitionSpec(*wanted)))


def _tuple(axes: Axes) -> tuple[str, ...]:
    if axes is None:
        return ()
    return axes if isinstance(axes, tuple) else (axes,)
