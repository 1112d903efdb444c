"""The folder of a run: who may write to it, whose it is, and which checkpoints it keeps.

config.json             what the run was started with; a call with another config is refused
metrics.jsonl           the log
checkpoints/step_.../   the last ones and the best one
lock                    empty; held by the process that trains here
"""

import errno
import fcntl
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from kreg.training.checkpoint import (
    CheckpointError,
    Meta,
    find_damage,
    read_meta,
    write_checkpoint,
)
from kreg.training.state import TrainState
from kreg.training.writer import is_first, wait_for_all


@dataclass(frozen=True)
class RunDirectory:
    """Manage the folder of one run; see the module's docstring for what lies in it.

    Args:
        best: the metric, and whether less ("min") or more ("max") of it is better; None keeps no
            best checkpoint.
        keep_last: how many of the latest checkpoints stay.
    """

    path: Path
    best: tuple[str, Literal["min", "max"]] | None = ("val_loss", "min")
    keep_last: int = 2

    def __post_init__(self):
        if self.keep_last < 1:
            raise ValueError(f"keep_last: expected at least 1, got {self.keep_last}")
        if self.best is not None and self.best[1] not in ("min", "max"):
            raise ValueError(f'best: expected (name, "min" or "max"), got {self.best}')

    @property
    def metrics(self) -> Path:
        """The log."""
        return self.path / "metrics.jsonl"

    def check_config(self, config: dict) -> None:
        """Refuse a config that differs from the one this folder was started with."""
        stored = self.path / "config.json"
        if not stored.is_file():
            return
        try:
            found = json.loads(stored.read_text())
        except ValueError as error:
            raise ValueError(f"{stored}: expected JSON, got a damaged file: {error}") from error
        wanted = as_json(config)
        if difference := first_difference(wanted, found):
            raise ValueError(
                f"config: {difference[0]}: expected {difference[1]}, but {stored} has "
                f"{difference[2]}. Use another directory, or the config of this one; "
                "nothing has been changed."
            )

    @contextmanager
    def opened(self, config: dict, checkpoint_bytes: int = 0) -> Iterator[None]:
        """Create the folder where there is none, hold its lock, store or check the config.

        Where that fails (another config, another live run, no permission, no room for a checkpoint
        of so many bytes), nothing has been changed. Of several processes the first does it.
        """
        if not is_first():
            wait_for_all("the run's directory")
            self.check_config(config)
            yield
            return
        self.check_config(config)
        created = not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise _naming(error, "cannot write to the run's directory", self.path) from error
        try:
            self._claim(lock)
            self.check_config(config)
            self._require_room(checkpoint_bytes)
            self._store_config(config)
        except BaseException:
            if created:
                (self.path / "lock").unlink()
                self.path.rmdir()
            os.close(lock)
            raise
        wait_for_all("the run's directory")
        try:
            yield
        finally:
            os.close(lock)

    def _claim(self, lock: int) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(
                errno.EWOULDBLOCK, "another run is writing to this directory", str(self.path)
            ) from error

    def _require_room(self, checkpoint_bytes: int) -> None:
        """Find out in the first second, not at the first save, that there is no space."""
        free = shutil.disk_usage(self.path).free
        if free < checkpoint_bytes:
            raise OSError(
                errno.ENOSPC,
                f"no space for a checkpoint of {checkpoint_bytes:,} bytes, {free:,} are free",
                str(self.path),
            )
        # Quotas and limits on the size of a file show only when something is written.
        probe = self.path / ".unfinished_probe"
        try:
            probe.write_bytes(bytes(min(checkpoint_bytes, 2**20)))
        except OSError as error:
            raise _naming(error, "no space for a checkpoint", self.path) from error
        finally:
            probe.unlink(missing_ok=True)

    def _store_config(self, config: dict) -> None:
        stored, unfinished = self.path / "config.json", self.path / ".unfinished_config.json"
        if stored.exists():
            return
        try:
            unfinished.write_text(json.dumps(as_json(config), indent=1) + "\n")
            unfinished.rename(stored)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            raise _naming(error, "cannot write the config", stored) from error

    def checkpoints(self) -> list[Path]:
        """List the checkpoints, oldest first."""
        folder = self.path / "checkpoints"
        return sorted(path for path in folder.glob("step_*") if path.name[5:].isdigit())

    def latest(self) -> Path | None:
        """Find the checkpoint to go on from, None where there is none."""
        return self.checked(found[-1]) if (found := self.checkpoints()) else None

    def best_checkpoint(self) -> Path | None:
        """Find the checkpoint with the best metric (the earliest of equals), None without one."""
        if self.best is None:
            return None
        scored = [(self.score(read_meta(path).metrics), path) for path in self.checkpoints()]
        score, path = min(scored, default=(math.inf, None), key=lambda pair: pair[0])
        return path if score < math.inf else None

    def named(self, which: Literal["best", "last"]) -> Path:
        """Find the best or the last checkpoint; ValueError where there is none."""
        found = self.checkpoints()
        if which == "last" and found:
            return found[-1]
        if which == "best" and found and (best := read_meta(found[-1]).best) is not None:
            # What counts as best was said when the run was started.
            path = replace(self, best=tuple(best)).best_checkpoint()
            if path is not None:
                return path
        raise ValueError(f"which: expected a run with a {which} checkpoint, {self.path} has none")

    def score(self, metrics: dict[str, float]) -> float:
        """Turn metrics into a number of which less is better; inf for none and for NaN."""
        if self.best is None or self.best[0] not in metrics:
            return math.inf
        value = metrics[self.best[0]] * (1 if self.best[1] == "min" else -1)
        return math.inf if math.isnan(value) else value

    def checked(self, path: Path) -> Path:
        """Return a checkpoint after comparing its files with their sums; else CheckpointError."""
        if (damage := find_damage(path)) is None:
            return path
        others = [other.name for other in self.checkpoints() if find_damage(other) is None]
        advice = (
            f"Intact: {', '.join(others)}. Move the damaged folder away to go on from {others[-1]}"
            if others
            else "No other checkpoint is intact. Move the run's directory away to start afresh"
        )
        raise CheckpointError(
            f"checkpoint {path} is damaged: {damage}. {advice}; nothing has been changed."
        )

    def save(self, state: TrainState, meta: Meta) -> None:
        """Write a checkpoint, then remove those that are neither among the last nor the best."""
        path = self.path / "checkpoints" / f"step_{meta.step:08d}"
        write_checkpoint(path, state, replace(meta, config=as_json(meta.config)))
        self._retain()
        wait_for_all("older checkpoints to go")

    def _retain(self) -> None:
        if not is_first():
            return
        keep = {*self.checkpoints()[-self.keep_last :], self.best_checkpoint()}
        for old in self.checkpoints():
            if old not in keep:
                # Renamed first: a kill while deleting must not leave half a checkpoint.
                old = old.rename(old.with_name(f".unfinished_{old.name}"))
                shutil.rmtree(old, ignore_errors=True)

    def sweep(self) -> None:
        """Remove what a kill left: half-written and half-removed folders, checkpoints to drop."""
        wait_for_all("the end of reading")
        if not is_first():
            return
        self._retain()
        for folder in (self.path / "checkpoints").glob(".unfinished_*"):
            shutil.rmtree(folder, ignore_errors=True)
        for file in self.path.glob(".unfinished_*"):
            with suppress(OSError):
                file.unlink()


def _naming(error: OSError, what: str, path: Path) -> OSError:
    """The same kind of error, saying what could not be done, and where."""
    return OSError(error.errno, f"{what}: {error.strerror}", str(path))


def as_json(config: dict) -> dict:
    """Pass a config through JSON, so that tuples and lists compare equal."""
    try:
        return json.loads(json.dumps(config))
    except (TypeError, ValueError) as error:
        raise ValueError(f"config: expected values that fit into JSON: {error}") from error


def first_difference(wanted, found, name: str = "") -> tuple[str, str, str] | None:
    """Name the first field that differs, with both values; None where all agree.

    Examples:
        >>> first_difference({"model": {"width": 8}}, {"model": {"width": 16}})
        ("field 'model.width'", '8', '16')
    """
    if isinstance(wanted, dict) and isinstance(found, dict):
        for key in [*wanted, *(key for key in found if key not in wanted)]:
            inner = f"{name}.{key}" if name else key
            if key not in wanted or key not in found:
                left, right = (
                    repr(side[key]) if key in side else "no such field" for side in (wanted, found)
                )
                return f"field {inner!r}", left, right
            if difference := first_difference(wanted[key], found[key], inner):
                return difference
        return None
    # 1 equals 1.0 but not True; NaN equals itself here.
    if isinstance(wanted, bool) == isinstance(found, bool) and (
        wanted == found or (wanted != wanted and found != found)
    ):
        return None
    return f"field {name!r}", repr(wanted), repr(found)
