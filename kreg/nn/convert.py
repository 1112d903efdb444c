"""Parameters under the authors' names: from the released models into ours, and back.

Our layouts: a linear map is [in, out], a convolution [tap, in, out], a persistent memory
[memory, pair, head, width]; the blocks of a mosaic have a leading layer axis.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from kreg.nn.config import MosaicConfig
from kreg.nn.memory import ContextualMemory, PersistentMemory
from kreg.nn.mosaic import MemoryMosaic


def from_torch(config: MosaicConfig, state: Mapping[str, Any]) -> MemoryMosaic:
    """Build a model from parameters under the authors' names (the dense, eft or nano set).

    nano models do not divide their logits; `logit_scale` becomes 1 for them. Types are kept.

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
    state = {name: np.asarray(array) for name, array in state.items()}
    if any(name.startswith("mosaic.") for name in state):
        config = dataclasses.replace(config, logit_scale=1.0)
    return load(nnx.eval_shape(lambda: MemoryMosaic(config, rngs=nnx.Rngs(0))), state)


def to_torch(module: nnx.Module) -> dict[str, np.ndarray]:
    """Return a module's parameters (or a gradient of that form) under the dense file's names.

    Takes a `MemoryMosaic`, a `ContextualMemory` or a `PersistentMemory`. The inverse of
    `from_torch`, bit for bit.

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
        found |= {
            e.name: e.layout.out(leaf[e.index])
            for e in _entries(module, tuple(map(str, path)), leaf.shape)
        }
    return found


def load[M: nnx.Module](module: M, state: Mapping[str, Any]) -> M:
    """Return the module with parameters from a state under the authors' names.

    Takes what `to_torch` takes, also as the shapes of `nnx.eval_shape`. Raises as `from_torch`.
    """
    state = _dense_names({name: np.asarray(array) for name, array in state.items()})
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


class _Layout(NamedTuple):
    out: Callable[[np.ndarray], np.ndarray]
    into: Callable[[np.ndarray], np.ndarray]


class _Entry(NamedTuple):
    """One array of the authors' and where it stands in one of our leaves."""

    name: str
    index: tuple[int, ...]
    layout: _Layout


type _Path = tuple[str, ...]
type _Table = dict[_Path, tuple[str, _Layout]]

_SAME = _Layout(lambda a: a, lambda a: a)
_LINEAR = _Layout(lambda a: a.T, lambda a: a.T)
_CONVOLUTION = _Layout(lambda a: a.transpose(2, 1, 0), lambda a: a.transpose(2, 1, 0))
_MEMORY = _Layout(lambda a: a.transpose(1, 0, 2)[None], lambda a: a[0].transpose(1, 0, 2))


def _projection(ours: _Path, theirs: str, low_rank: bool) -> _Table:
    inner, layout = ("linear", _LINEAR) if low_rank else ("conv", _CONVOLUTION)
    return {
        (*ours, "projection", "kernel"): (f"{theirs}.{inner}.weight", layout),
        (*ours, "projection", "bias"): (f"{theirs}.{inner}.bias", _SAME),
        (*ours, "projection", "mix"): (f"{theirs}.coef", _SAME),
    }


def _shared(config: MosaicConfig) -> _Table:
    """What both memories have."""
    return _projection(("keys",), "k_featurizer", config.low_rank_keys) | {
        ("keys", "average", "decay"): ("leaky_key_beta", _SAME),
        ("kernel_beta",): ("kernel_beta", _SAME),
        ("out", "kernel"): ("c_proj.weight", _LINEAR),
        ("out", "bias"): ("c_proj.bias", _SAME),
    }


def _contextual(config: MosaicConfig) -> _Table:
    values = _projection(("values",), "v_featurizer", config.low_rank_values)
    return _shared(config) | values | {("values", "value_beta"): ("value_beta", _SAME)}


def _persistent(config: MosaicConfig) -> _Table:
    """The names of memories end in their number, which `_entries` appends."""
    return _shared(config) | {
        ("value_beta",): ("value_beta", _SAME),
        ("memory_keys",): ("pmem.M_k", _MEMORY),
        ("memory_values",): ("pmem.M_v", _MEMORY),
    }


def _norm(ours: str, theirs: str) -> _Table:
    return {(ours, leaf): (f"{theirs}.{name}", _SAME) for leaf, name in _NORM_LEAVES}


_NORM_LEAVES = (("scale", "weight"), ("bias", "bias"))


def _below(ours: str, theirs: str, table: _Table) -> _Table:
    return {(ours, *path): (theirs + name, layout) for path, (name, layout) in table.items()}


def _table(module: nnx.Module) -> _Table:
    """Map our paths to the authors' names; "{}" in a name stands for the layer."""
    config: MosaicConfig = getattr(module, "config")  # noqa: B009 - of three classes
    if isinstance(module, ContextualMemory):
        return _contextual(config)
    if isinstance(module, PersistentMemory):
        return _persistent(config)
    block = _below("contextual", "attn.", _contextual(config)) | _norm("contextual_norm", "ln1")
    block |= _below("persistent", "pmem.", _persistent(config)) | _norm("persistent_norm", "ln2")
    ends = {("embedding",): ("emb.weight", _SAME), ("head",): ("head.weight", _SAME)}
    return _below("blocks", "blocks.{}.", block) | _norm("norm", "ln_out") | ends


def _entries(module: nnx.Module, path: _Path, shape: tuple[int, ...]) -> Iterator[_Entry]:
    """Say which of the authors' arrays make up the leaf at a path of ours."""
    name, layout = _table(module)[path]
    layers = shape[:1] if path[0] == "blocks" else ()
    memories = shape[len(layers) : len(layers) + 1] if layout is _MEMORY else ()
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


_EFT = {
    "leaky_average.linear.": "k_featurizer.conv.",
    "leaky_average.leaky_beta_w_under": "leaky_key_beta",
}
_NANO = {
    "mosaic.wte.": "emb.",
    "mosaic.ln_f.": "ln_out.",
    "mosaic.h.": "blocks.",
    "ln_1.": "ln1.",
    "ln_2.": "ln2.",
    "mlp.": "pmem.",
    "W_k.": "conv.",
    "W_v.": "linear.",
    "k_featurizer.leaky_avg.": "",
    "k_featurizer.key_scale": "kernel_beta",
    "v_featurizer.val_scale": "value_beta",
    "out_scale": "value_beta",
}


def _dense_names(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rename and reshape the eft and nano sets to the dense set."""
    found: dict[str, np.ndarray] = {}
    for name, array in state.items():
        if name == "lm_head.weight" or name.endswith("leaky_beta_u_under"):
            # The same parameters once more, under a second name.
            continue
        dense = name
        for old, new in (_NANO | _EFT).items():
            dense = re.sub(rf"(^|\.){re.escape(old)}", rf"\g<1>{new}", dense)
        if match := re.fullmatch(r"(.*)P_([kv])", dense):
            stem = f"{match[1]}pmem.M_{match[2]}"
            found |= {f"{stem}{i}": memory for i, memory in enumerate(array)}
            continue
        if dense.endswith("k_featurizer.conv.weight") and array.ndim == 2:
            array = array[:, :, None]
        # nano keeps one number per head as [1, N, 1, 1].
        found[dense] = array.reshape(-1) if array.ndim == 4 and _per_head(array) else array
    return found


def _per_head(array: np.ndarray) -> bool:
    return array.shape[0] == 1 and array.shape[2:] == (1, 1)
