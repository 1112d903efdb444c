"""The authors' names of all parameters, by our paths, and the layouts of their arrays.

Our layouts: a linear map is [in, out], a convolution [tap, in, out], a persistent memory
[memory, pair, head, width]; blocks have a leading layer axis.
"""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from flax import nnx

from kreg.nn.config import MosaicConfig
from kreg.nn.memory import ContextualMemory, PersistentMemory
from kreg.nn.transformer import Transformer


class Layout(NamedTuple):
    """How one array of ours becomes one of theirs, and back."""

    out: Callable[[np.ndarray], np.ndarray]
    into: Callable[[np.ndarray], np.ndarray]


type Path = tuple[str, ...]
type Table = dict[Path, tuple[str, Layout]]

_SAME = Layout(lambda a: a, lambda a: a)
_LINEAR = Layout(lambda a: a.T, lambda a: a.T)
_CONVOLUTION = Layout(lambda a: a.transpose(2, 1, 0), lambda a: a.transpose(2, 1, 0))
MEMORY = Layout(lambda a: a.transpose(1, 0, 2)[None], lambda a: a[0].transpose(1, 0, 2))


def _projection(ours: Path, theirs: str, low_rank: bool) -> Table:
    inner, layout = ("linear", _LINEAR) if low_rank else ("conv", _CONVOLUTION)
    return {
        (*ours, "projection", "kernel"): (f"{theirs}.{inner}.weight", layout),
        (*ours, "projection", "bias"): (f"{theirs}.{inner}.bias", _SAME),
        (*ours, "projection", "mix"): (f"{theirs}.coef", _SAME),
    }


def _shared(config: MosaicConfig) -> Table:
    """What both memories have."""
    return _projection(("keys",), "k_featurizer", config.low_rank_keys) | {
        ("keys", "average", "decay"): ("leaky_key_beta", _SAME),
        ("kernel_beta",): ("kernel_beta", _SAME),
        ("out", "kernel"): ("c_proj.weight", _LINEAR),
        ("out", "bias"): ("c_proj.bias", _SAME),
    }


def _contextual(config: MosaicConfig) -> Table:
    values = _projection(("values",), "v_featurizer", config.low_rank_values)
    return _shared(config) | values | {("values", "value_beta"): ("value_beta", _SAME)}


def _persistent(config: MosaicConfig) -> Table:
    """The names of memories end in their number, which `_entries` appends."""
    return _shared(config) | {
        ("value_beta",): ("value_beta", _SAME),
        ("memory_keys",): ("pmem.M_k", MEMORY),
        ("memory_values",): ("pmem.M_v", MEMORY),
    }


def _norm(ours: str, theirs: str) -> Table:
    return {(ours, leaf): (f"{theirs}.{name}", _SAME) for leaf, name in _NORM_LEAVES}


_NORM_LEAVES = (("scale", "weight"), ("bias", "bias"))


def _below(ours: str, theirs: str, table: Table) -> Table:
    return {(ours, *path): (theirs + name, layout) for path, (name, layout) in table.items()}


def table(module: nnx.Module) -> Table:
    """Map our paths to the authors' names; "{}" in a name stands for the layer."""
    if isinstance(module, Transformer):
        return _transformer()
    config: MosaicConfig = getattr(module, "config")  # noqa: B009 - of three classes
    if isinstance(module, ContextualMemory):
        return _contextual(config)
    if isinstance(module, PersistentMemory):
        return _persistent(config)
    block = _below("contextual", "attn.", _contextual(config)) | _norm("contextual_norm", "ln1")
    block |= _below("persistent", "pmem.", _persistent(config)) | _norm("persistent_norm", "ln2")
    ends = {("embedding",): ("emb.weight", _SAME), ("head",): ("head.weight", _SAME)}
    return _below("blocks", "blocks.{}.", block) | _norm("norm", "ln_out") | ends


def _linear(ours: Path, theirs: str) -> Table:
    return {
        (*ours, "kernel"): (f"{theirs}.weight", _LINEAR),
        (*ours, "bias"): (f"{theirs}.bias", _SAME),
    }


def _transformer() -> Table:
    """GPT-2's names, and of the same kind what GPT-2 does not have."""
    block = _norm("attention_norm", "ln_1") | _norm("perceptron_norm", "ln_2")
    block |= _linear(("attention", "query_key_value"), "attn.c_attn")
    block |= _linear(("attention", "out"), "attn.c_proj")
    block |= _linear(("perceptron", "into"), "mlp.c_fc")
    block |= _linear(("perceptron", "out"), "mlp.c_proj")
    own = ("log_bandwidth", "length_weight", "length_power")
    block |= {("attention", name): (f"attn.{name}", _SAME) for name in own}
    ends = {
        ("embedding",): ("transformer.wte.weight", _SAME),
        ("positions",): ("transformer.wpe.weight", _SAME),
        ("head",): ("lm_head.weight", _SAME),
    }
    block = _below("blocks", "transformer.h.{}.", block)
    return block | _norm("norm", "transformer.ln_f") | ends


def our_names(module: nnx.Module, state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rename a state to the set of names that `table` has for the module."""
    if not isinstance(module, Transformer):
        return _dense_names(state)
    tied = module.config.tie_weights
    return {name: a for name, a in state.items() if not (tied and name == "lm_head.weight")}


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
