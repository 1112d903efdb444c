"""Parameters under the authors' names: from the released models into ours, and back."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, overload

import jax.numpy as jnp
import numpy as np
from flax import nnx

from kreg.nn.config import MosaicConfig, TransformerConfig
from kreg.nn.mosaic import MemoryMosaic
from kreg.nn.names import MEMORY, Layout, Path, our_names, table
from kreg.nn.transformer import Transformer


@overload
def from_torch(config: MosaicConfig, state: Mapping[str, Any]) -> MemoryMosaic: ...


@overload
def from_torch(config: TransformerConfig, state: Mapping[str, Any]) -> Transformer: ...


def from_torch(
    config: MosaicConfig | TransformerConfig, state: Mapping[str, Any]
) -> MemoryMosaic | Transformer:
    """Build a model from parameters under the authors' names.

    They are the dense, eft or nano set for a `MosaicConfig`, GPT-2's for a `TransformerConfig`.
    nano models do not divide their logits; `logit_scale` becomes 1 for them, and `compat="nano"`
    has their other constants, too. Types are kept.

    Raises:
      ValueError: names that are missing or unknown, or a shape that does not fit the configuration.

    Examples:
      >>> import kreg.nn
      >>> config = kreg.nn.MosaicConfig(7, 1, 2, 8, 3, contextual_only=True)
      >>> model = nnx.jit(lambda: kreg.nn.MemoryMosaic(config, rngs=nnx.Rngs(0)))()
      >>> state = kreg.nn.to_torch(model)
      >>> model = kreg.nn.from_torch(config, state)
      >>> bool((model.embedding[...] == state["emb.weight"]).all())
      True
    """
    if isinstance(config, TransformerConfig):
        return load(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))), state)
    if any(name.startswith("mosaic.") for name in state):
        config = dataclasses.replace(config, logit_scale=1.0)
    return load(nnx.eval_shape(lambda: MemoryMosaic(config, rngs=nnx.Rngs(0))), state)


def to_torch(module: nnx.Module) -> dict[str, np.ndarray]:
    """Return a module's parameters (or a gradient of that form) under the authors' names.

    Takes a `MemoryMosaic`, a `ContextualMemory` or a `PersistentMemory`, which get the dense
    file's names, or a `Transformer`. The inverse of `from_torch`, bit for bit.

    Examples:
      >>> import kreg.nn
      >>> config = kreg.nn.MosaicConfig(7, num_layers=1, num_heads=2, embed_dim=8, memory_size=3)
      >>> state = kreg.nn.to_torch(kreg.nn.PersistentMemory(config, rngs=nnx.Rngs(0)))
      >>> state["c_proj.weight"].shape, state["pmem.M_k0"].shape
      ((8, 8), (1, 2, 3, 4))
    """
    found: dict[str, np.ndarray] = {}
    for path, variable in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        leaf = np.asarray(variable[...])
        entries = _entries(module, tuple(map(str, path)), leaf.shape)
        found |= {e.name: e.layout.out(leaf[e.index]) for e in entries}
    return found


def load[M: nnx.Module](module: M, state: Mapping[str, Any]) -> M:
    """Return the module with parameters from a state under the authors' names.

    Takes what `to_torch` takes, also as the shapes of `nnx.eval_shape`. Raises as `from_torch`.
    """
    state = our_names(module, {name: np.asarray(array) for name, array in state.items()})
    graph, parameters = nnx.split(module)
    leaves, wanted = {}, set()
    for path, variable in nnx.to_flat_state(parameters):
        entries = list(_entries(module, tuple(map(str, path)), variable.shape))
        wanted |= {e.name for e in entries}
        if all(e.name in state for e in entries):
            leaves[path] = _assemble(entries, state, variable.shape)
    _check_names(wanted, set(state))
    flat = nnx.to_flat_state(parameters)
    values = [(path, leaf.replace(jnp.asarray(leaves[path]))) for path, leaf in flat]
    return nnx.merge(graph, nnx.from_flat_state(values))


class _Entry(NamedTuple):
    """One array of the authors' and where it stands in one of our leaves."""

    name: str
    index: tuple[int, ...]
    layout: Layout


def _entries(module: nnx.Module, path: Path, shape: tuple[int, ...]) -> Iterator[_Entry]:
    """Say which of the authors' arrays make up the leaf at a path of ours."""
    name, layout = table(module)[path]
    layers = shape[:1] if path[0] == "blocks" else ()
    memories = shape[len(layers) : len(layers) + 1] if layout is MEMORY else ()
    for index in np.ndindex(*layers, *memories):
        full = name.format(*index[: len(layers)]) if layers else name
        yield _Entry(f"{full}{index[-1]}" if memories else full, index, layout)


def _assemble(
    entries: list[_Entry], state: Mapping[str, np.ndarray], shape: tuple[int, ...]
) -> np.ndarray:
    """Put the authors' arrays of one leaf together."""
    first = np.empty(shape, state[entries[0].name].dtype)
    for entry in entries:
        wanted = entry.layout.out(first[entry.index]).shape
        array = state[entry.name]
        if array.shape != wanted:
            raise ValueError(f"state: expected {entry.name} of shape {wanted}, got {array.shape}")
        first[entry.index] = entry.layout.into(array)
    return first


def _check_names(wanted: set[str], given: set[str]) -> None:
    if wanted != given:
        missing, unknown = sorted(wanted - given), sorted(given - wanted)
        raise ValueError(f"state: expected the configuration's names; {missing=}, {unknown=}")
