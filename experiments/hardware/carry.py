"""What a later session needs of the queue's folder, as one small archive.

A finished run needs its results, not its checkpoints; an unfinished one its last and best.
"""

import os
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from experiments.runs.results import RESULT
from kreg.training.run_directory import RunDirectory


def pack(folder: Path, archive: Path) -> int:
    """Write the archive of a queue's folder; return its bytes."""
    partial = archive.with_name(f".{archive.name}")
    with tarfile.open(partial, "w:gz", compresslevel=1) as tar:
        for path in _needed(folder):
            tar.add(path, path.relative_to(folder), recursive=False)
    os.replace(partial, archive)
    return archive.stat().st_size


def unpack(archive: Path, folder: Path) -> None:
    """Restore a queue's folder that is not there.

    Raises:
        ValueError: it is there (nothing is overwritten), or the archive cannot be read.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"--carry: {folder} holds runs already; nothing has been unpacked")
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    except (OSError, tarfile.TarError, EOFError) as error:
        raise ValueError(f"--carry: cannot unpack {archive}: {error}") from error


def disk_use(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _needed(folder: Path) -> Iterator[Path]:
    """The files to keep, all jobs' and runs'."""
    dropped: set[Path] = set()
    for checkpoints in folder.glob("*/*/seed*/checkpoints"):
        run = checkpoints.parent
        kept = set() if (run / RESULT).is_file() else _checkpoints(run)
        dropped |= {path for path in checkpoints.iterdir() if path not in kept}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "lock" and dropped.isdisjoint(path.parents):
            yield path


def _checkpoints(run: Path) -> set[Path]:
    """The last checkpoint of a run, and the one with the lowest validation loss."""
    directory = RunDirectory(run)
    kept = set()
    for which in ("last", "best"):
        # A run that has not been evaluated has no best one.
        with suppress(ValueError):
            kept.add(directory.named(which))
    return kept
