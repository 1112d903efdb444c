"""One checkpoint: a folder that is complete and checked, or does not exist.

    step_00000100/
      arrays/        Orbax: "params" and "training" (optimizer, step, key), flat, named by path
      meta.json      step, metrics, seconds, config, data iterator, and each array's type and shape
      SHA256SUMS     of all the files above; `sha256sum -c SHA256SUMS` checks it by hand

Everything is written under another name first and renamed last, so a kill leaves no half folder
under a checkpoint's name. This is the only file that imports Orbax.
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree
from orbax.checkpoint import v1 as ocp

from kreg.training.state import TrainState
from kreg.training.writer import is_first, wait_for_all

_ARRAYS, _META, _SUMS = "arrays", "meta.json", "SHA256SUMS"


class CheckpointError(ValueError):
    """Say that a checkpoint is damaged, or is not of this run.

    Examples:
        >>> import pathlib, tempfile
        >>> import kreg.training
        >>> with tempfile.TemporaryDirectory() as run:
        ...     pathlib.Path(run, "checkpoints", "step_00000001").mkdir(parents=True)
        ...     kreg.training.load_params(run, "last", {})
        Traceback (most recent call last):
        kreg.training.checkpoint.CheckpointError: checkpoint ...step_00000001 is damaged: ...
    """


@dataclass(frozen=True)
class Meta:
    """Hold what a checkpoint stores besides arrays; all of it fit for JSON."""

    step: int
    metrics: dict[str, float] = field(default_factory=dict)
    best: tuple[str, str] | None = None
    seconds: float = 0.0
    config: dict = field(default_factory=dict)
    data: dict | None = None
    arrays: dict[str, dict[str, str]] = field(default_factory=dict)


def write_checkpoint(path: Path, state: TrainState, meta: Meta) -> None:
    """Save a state as the folder `path`.

    Where that is impossible (no space, no permission), OSError names the folder, and nothing is
    left behind. Of several processes all must call, each having a part of the arrays.
    """
    unfinished = path.with_name(f".unfinished_{path.name}")
    parts = {name: _flatten(jax.tree.map(_raw, tree)) for name, tree in _parts(state).items()}
    described = {name: {k: _describe(v) for k, v in part.items()} for name, part in parts.items()}
    text = json.dumps(asdict(meta) | {"arrays": described}, indent=1)
    with _naming(path, unfinished):
        if is_first():
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
    wait_for_all(f"the folder of {path.name}")
    with _naming(path, unfinished), _quiet():
        ocp.save_checkpointables(str((unfinished / _ARRAYS).absolute()), parts)
    wait_for_all(f"the arrays of {path.name}")
    with _naming(path, unfinished):
        if is_first():
            (unfinished / _META).write_text(text)
            (unfinished / _SUMS).write_text(
                "".join(f"{digest}  {name}\n" for name, digest in _digests(unfinished).items())
            )
            unfinished.rename(path)
    wait_for_all(f"all of {path.name}")


@contextmanager
def _naming(path: Path, unfinished: Path) -> Iterator[None]:
    """Remove what is unfinished after an error, and make it one that names the checkpoint."""
    try:
        yield
    # Orbax reports a full disk as ValueError, OSError or an error of its own, by the file it hit.
    except Exception as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        code, reason = _reason(error)
        raise OSError(
            code,
            f"cannot save the checkpoint: {reason}; what was saved before is unchanged",
            str(path),
        ) from error


def read_meta(path: Path) -> Meta:
    """Read what a checkpoint stores besides arrays; CheckpointError where it is damaged."""
    try:
        return Meta(**json.loads((path / _META).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path / _META} is missing or damaged: {error}") from error


def find_damage(path: Path) -> str | None:
    """Compare every file with its SHA-256; return what is wrong in words, None if nothing is."""
    try:
        lines = (path / _SUMS).read_text().splitlines()
        expected = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
        found = _digests(path)
    except (OSError, ValueError) as error:
        return f"{_SUMS} cannot be read ({error})"
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} is not listed in {_SUMS}"
        if expected[name] != found[name]:
            return f"{name} is truncated or altered (its SHA-256 differs)"
    return None


def read_state(path: Path, like: TrainState) -> TrainState:
    """Load a whole state with the structure, types and devices of `like`."""
    loaded = _load(path, _parts(like))
    return TrainState(params=loaded["params"], **loaded["training"])


def read_params(path: Path, like: PyTree[Array]) -> PyTree[Array]:
    """Load the parameters alone, with the structure, types and devices of `like`."""
    return _load(path, {"params": like})["params"]


def _parts(state: TrainState) -> dict[str, PyTree[Array]]:
    """Parameters apart from the rest, so that they can be loaded alone."""
    rest = {"opt_state": state.opt_state, "step": state.step, "key": state.key}
    return {"params": state.params, "training": rest}


def _load(path: Path, like: dict[str, PyTree[Array]]) -> dict[str, PyTree[Array]]:
    wanted = {name: _flatten(jax.tree.map(_abstract, tree)) for name, tree in like.items()}
    found = read_meta(path).arrays
    for part, leaves in wanted.items():
        _require_same({k: _describe(v) for k, v in leaves.items()}, found.get(part, {}), path)
    try:
        with _quiet():
            loaded = ocp.load_checkpointables(str((path / _ARRAYS).absolute()), wanted)
    except Exception as error:
        raise CheckpointError(f"{path} cannot be loaded: {_reason(error)[1]}") from error
    return {name: _unflatten(loaded[name], tree) for name, tree in like.items()}


def _require_same(wanted: dict[str, str], found: dict[str, str], path: Path) -> None:
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise CheckpointError(
                f"{path} belongs to another model or optimizer: array {name!r}: expected "
                f"{wanted.get(name, 'no such array')}, found {found.get(name, 'no such array')}"
            )


def _flatten(tree: PyTree[Array]) -> dict[str, Array]:
    """The leaves by path."""
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in leaves:
            raise ValueError(f"params: two leaves have the path {name!r}")
        leaves[name] = leaf
    return leaves


def _unflatten(leaves: dict[str, Array], like: PyTree[Array]) -> PyTree[Array]:
    def restore(path, leaf):
        loaded = leaves[jax.tree_util.keystr(path, simple=True, separator="/")]
        if _is_key(leaf):
            return jax.random.wrap_key_data(loaded, impl=jax.random.key_impl(leaf))
        return loaded

    return jax.tree_util.tree_map_with_path(restore, like)


def _is_key(leaf: Array | jax.ShapeDtypeStruct) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _raw(leaf: Array) -> Array:
    """An array as it is, a key of random numbers as its data."""
    return jax.random.key_data(leaf) if _is_key(leaf) else jnp.asarray(leaf)


def _abstract(leaf: Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """What Orbax has to restore, and where: on the leaf's devices, else on the first one."""
    raw = jax.eval_shape(_raw, leaf)
    sharding = (_raw(leaf) if isinstance(leaf, jax.Array) else leaf).sharding
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(raw.shape, raw.dtype, sharding=sharding)


def _describe(leaf: Array | jax.ShapeDtypeStruct) -> str:
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder but the sums themselves; dot files are not ours."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != _SUMS and not path.name.startswith("."):
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            digests[path.relative_to(folder).as_posix()] = digest
    return digests


def _reason(error: BaseException) -> tuple[int, str]:
    """The operating system's number and words, wherever in the chain of errors they are."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno:
            return cause.errno, os.strerror(cause.errno)
        # TensorStore puts the number into its text.
        if match := re.search(r"os_error_code='(\d+)'", str(cause)):
            return int(match[1]), os.strerror(int(match[1]))
        cause = cause.__cause__ or cause.__context__
    return errno.EIO, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in Path(record.pathname).parts


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Orbax's log off the terminal: whatever fails there reaches the caller as an error.

    After an error the filter stays, because Orbax's threads report theirs a little later.
    """
    logger = logging.getLogger("absl")
    logger.addFilter(_not_from_orbax)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logger.removeFilter(_not_from_orbax)
