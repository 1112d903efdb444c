"""Read the golden cases: pairs of NAME.npz (arrays) and NAME.json (descriptions).

The folder is $KREG_GOLDEN; without that variable, the subset committed below tests/golden. Every
read is remembered, so that a test can fail on what is in a file and was neither used nor excluded.
"""

import fnmatch
import functools
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest


class Exclusion(NamedTuple):
    """What is left out (a pattern on FILE/KEY) and why."""

    pattern: str
    reason: str


EXCLUSIONS = (
    Exclusion("init_stats/nano*", "we draw as the dense file does, not as nanoMosaics"),
    Exclusion("threemoons/*/generate_cached", "the authors' cache leaves values of new points 0"),
    Exclusion("wkv/gated/*", "no released Memory Mosaic gates its leaky average (k = 0 always)"),
    Exclusion(
        "wkv/*/coded_*",
        "the CUDA backward multiplies the decay's gradient by the decay; autodiff does not",
    ),
    Exclusion("wkv/*/true_grad_k", "derivative in the gate, which the model holds at 0"),
    Exclusion("eft_task_stack/logits at padding", "padding hides its keys there; no loss reads it"),
    Exclusion("trajectory/relumax/final/*", "chaotic: 1e-13 at the start becomes 1e-3 here"),
    Exclusion("trajectory/relumax/after_step10/*", "chaotic: beyond the comparable steps"),
)


def folder_of(name: str) -> Path | None:
    """The folder that holds NAME.json: $KREG_GOLDEN if set, else a folder below tests/golden."""
    variable = os.environ.get("KREG_GOLDEN")
    if variable:
        folders = [Path(variable)]
        if not any(folders[0].glob("*.npz")):
            raise FileNotFoundError(
                f"KREG_GOLDEN: expected a folder with .npz files, got {variable!r}"
            )
    else:
        folders = sorted(p for p in (Path(__file__).parent / "golden").glob("*") if p.is_dir())
    return next((f for f in folders if (f / f"{name}.json").exists()), None)


@cache
def description(name: str) -> dict[str, Any]:
    """NAME.json, or {} where the file is not there."""
    folder = folder_of(name)
    return json.loads((folder / f"{name}.json").read_text()) if folder else {}


@cache
def _arrays(name: str) -> Any:
    folder = folder_of(name)
    return np.load(folder / f"{name}.npz", allow_pickle=False) if folder else None


def exclusion(path: str) -> Exclusion | None:
    """The entry of EXCLUSIONS that covers FILE/KEY, if any."""
    return next((e for e in EXCLUSIONS if fnmatch.fnmatchcase(path, e.pattern)), None)


def group_names(name: str) -> list[str]:
    """Names of the groups with an array that is not excluded; [] without the file."""
    arrays = _arrays(name)
    keys = [] if arrays is None else [k for k in arrays.files if not exclusion(f"{name}/{k}")]
    return list(dict.fromkeys(key.split("/")[0] for key in keys))


@dataclass
class Group:
    """One group of a file, or the whole file (name ""). Keys are relative to the group."""

    file: str
    name: str
    info: dict[str, Any]
    _prefix: str
    _keys: frozenset[str]
    _used: set[str] = field(default_factory=set)

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def __getitem__(self, key: str) -> np.ndarray:
        array = _arrays(self.file)[self._prefix + key]
        self._used.add(key)
        return array

    def under(self, prefix: str) -> dict[str, np.ndarray]:
        """Every array below PREFIX/, by the rest of its key."""
        return {name: self[f"{prefix}/{name}"] for name in self.names_under(prefix)}

    def names_under(self, prefix: str) -> list[str]:
        """The rest of every key below PREFIX/."""
        start = prefix + "/"
        return sorted(k[len(start) :] for k in self._keys if k.startswith(start))

    def members(self, last: str) -> list[str]:
        """What stands before /LAST in the keys that end so, say the methods that have a "y"."""
        ending = "/" + last
        return sorted(k[: -len(ending)] for k in self._keys if k.endswith(ending))

    def chosen(self, last: str, *, among: Sequence[str], rest: bool) -> list[str]:
        """Those of `members` that are (or, with `rest`, are not) named; the others are set aside.

        One test takes the ones and another, that runs less often, the rest, if there is any.
        """
        members = self.members(last)
        taken = [name for name in members if (name in among) != rest]
        if rest and not taken:
            pytest.skip(f"{self.file}/{self.name}: no other methods are in this folder")
        for name in set(members) - set(taken):
            self._used.update(f"{name}/{key}" for key in self.names_under(name))
        return taken

    def finish(self, cases: int) -> None:
        """Fail unless at least one case was used and nothing unexcluded was left unread."""
        left = sorted(k for k in self._keys - self._used if not self._excluded(k))
        assert cases > 0, f"{self.file}/{self.name}: no case was used"
        assert not left, (
            f"{self.file}/{self.name}: {len(left)} arrays neither used nor excluded: {left[:9]}"
        )
        print(f"golden {self.file}/{self.name}: {cases} cases, {len(self._used)} arrays")

    def _excluded(self, key: str) -> bool:
        return exclusion(f"{self.file}/{self._prefix}{key}") is not None


def open_group(name: str, group: str = "") -> Group:
    """Open a group of NAME.npz, or the whole file; skip the test where the file is not there."""
    arrays = _arrays(name)
    if arrays is None:
        pytest.skip(f"{name}.npz is neither in KREG_GOLDEN nor in the committed subset")
    prefix = f"{group}/" if group else ""
    keys = frozenset(k[len(prefix) :] for k in arrays.files if k.startswith(prefix))
    info = description(name)
    return Group(name, group, info["groups"].get(group, {}) if group else info, prefix, keys)


def float32_error(info: dict[str, Any], *path: str) -> float:
    """The error of the official code in float32 (E32 in the README); 0 where it is not given."""
    node: Any = info.get("float32_official", {})
    for name in path:
        node = node.get(name, {})
    return node[0] if node else 0.0


def assert_close(
    actual: Any, golden: np.ndarray, what: str, float32_error: float = 0.0, relative: float = 1e-11
) -> None:
    """Assert |a - b| <= relative max|b| + 1e-14 + 1e-6 float32_error (golden README, section 6)."""
    actual, golden = np.asarray(actual), np.asarray(golden)
    assert actual.shape == golden.shape, (
        f"{what}: expected shape {golden.shape}, got {actual.shape}"
    )
    allowed = relative * np.max(np.abs(golden), initial=0.0) + 1e-14 + 1e-6 * float32_error
    error = np.max(np.abs(actual - golden), initial=0.0)
    assert error <= allowed, f"{what}: off by {error:.3e}, allowed {allowed:.3e}"


@cache
def kernel_and_rule(method: str) -> tuple[Any, Any]:
    """The kernel and the bandwidth factory that a method's name in the files stands for."""
    import kreg

    if match := re.fullmatch(r"top(\d+)_(softmax|uniform)", method):
        kernel = kreg.gaussian if match[2] == "softmax" else kreg.box
        return kernel, functools.partial(kreg.Nearest, int(match[1]))
    return {
        "softmax": (kreg.gaussian, kreg.Adaptive),
        "epanechnikov": (kreg.epanechnikov, kreg.Adaptive),
        "biweight": (kreg.biweight, kreg.Adaptive),
        "triweight": (kreg.triweight, kreg.Adaptive),
        "relumax": (kreg.epanechnikov, kreg.Anchored),
        "norm_relu": (kreg.epanechnikov, kreg.Fixed),
    }[method]


# The authors' constructor arguments that a configuration has under another name.
_RENAMED = {
    "vocab_size": "vocab_size",
    "n_layer": "num_layers",
    "n_head": "num_heads",
    "n_embd": "embed_dim",
    "pmem_size": "memory_size",
    "pmem_count": "memory_count",
    "v_shift": "value_shift",
    "k_kernel_size": "key_kernel",
    "v_kernel_size": "value_kernel",
    "ic_dropout": "attention_dropout",
    "hd_dropout": "hidden_dropout",
    "bias": "use_bias",
    "pre_ln": "pre_norm",
    "weight_tying": "tie_weights",
    "attn_only": "contextual_only",
    "skip_tokens": "skip_tokens",
}
_LOW_RANK = {"lowrlinearconv": True, "linearconv": False}
# These do not change the logits: a buffer's size, and which positions have a loss.
_WITHOUT_EFFECT = ("block_size", "task")


def mosaic_config(constructor: dict[str, Any], method: str, compat: str) -> Any:
    """The configuration that the authors' constructor arguments stand for."""
    import kreg.nn

    kernel, bandwidth = kernel_and_rule(method)
    options: dict[str, Any] = {"vocab_size": 1, "num_layers": 1, "memory_size": 1}
    for name, value in constructor.items():
        if name in ("k_fe_type", "v_fe_type"):
            kind = "low_rank_keys" if name.startswith("k") else "low_rank_values"
            options[kind] = _LOW_RANK[value]
        elif name not in _WITHOUT_EFFECT:
            options[_RENAMED[name]] = value
    return kreg.nn.MosaicConfig(**options, kernel=kernel, bandwidth=bandwidth, compat=compat)
