"""A 7z archive in parts: named files out of it, and nothing else."""

import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any


def extract(parts: Sequence[Path], names: Sequence[str], folder: Path, *, most: int) -> list[Path]:
    """Write the files called `names`, wherever they lie in the archive, into `folder`.

    Where a file goes is decided here, never by the archive: its paths are only compared, and
    links, folders and all other members are left alone. A file appears when it is whole; one that
    is there already is replaced then.

    Args:
        parts: the parts in their order: NAME.7z.001, NAME.7z.002, ...
        most: bytes of a file at most, unpacked.

    Raises:
        ValueError: the package py7zr is missing, the archive is damaged, a name is missing or there
            twice, is a link or a folder, or a file is too large. Nothing has been written then.
    """
    try:
        import multivolumefile  # pyrefly: ignore[missing-import]
        import py7zr  # pyrefly: ignore[missing-import]
        from py7zr.exceptions import ArchiveError  # pyrefly: ignore[missing-import]
    except ImportError as error:
        raise ValueError(
            f"py7zr: expected the package that reads {parts[0].name}, got none; "
            f"`pip install py7zr`, or run `7z x {parts[0].name}` in {parts[0].parent}"
        ) from error
    missing = [part for part in parts if not part.is_file()]
    if missing:
        raise ValueError(f"parts: expected {len(parts)} files, got no {missing[0]}")
    writers = _Writers(Path(folder), names, most)
    try:
        with (
            multivolumefile.open(parts[0].with_suffix(""), "rb") as joined,
            py7zr.SevenZipFile(joined) as archive,
        ):
            members = [_find(archive.list(), name, most) for name in names]
            archive.extract(targets=members, factory=writers)
        return writers.settle()
    # py7zr lets errors of the decompressors through.
    except (ArchiveError, EOFError, OSError, RuntimeError) as error:
        if isinstance(error, OSError) and error.filename:
            raise
        raise ValueError(f"{parts[0]}: expected a whole 7z archive, got {error!r}") from error
    finally:
        writers.discard()


def _find(members: Sequence[Any], name: str, most: int) -> str:
    """Return the path of the one member called `name`."""
    found = [member for member in members if PurePosixPath(member.filename).name == name]
    if len(found) != 1 or not found[0].is_file or found[0].is_symlink:
        raise ValueError(f"names: expected one file {name} in the archive, got {found}")
    if found[0].uncompressed > most:
        raise ValueError(
            f"most: expected {name} of at most {most:,} bytes, got {found[0].uncompressed:,}"
        )
    return found[0].filename


class _Writers:
    """What py7zr asks for a file to write a member to."""

    def __init__(self, folder: Path, names: Sequence[str], most: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._paths = {name: folder / name for name in names}
        self._partial = {name: folder / f"{name}.unpacking" for name in names}
        self._most, self._open = most, {}

    def create(self, filename: str) -> "_Writer":
        name = PurePosixPath(filename).name
        file = open(self._partial[name], "wb")
        self._open[name] = file
        return _Writer(file, self._most)

    def settle(self) -> list[Path]:
        """Give the files their names."""
        for file in self._open.values():
            file.flush()
            os.fsync(file.fileno())
        for name, path in self._paths.items():
            self._partial[name].replace(path)
        return list(self._paths.values())

    def discard(self) -> None:
        """Close the files and remove what has no name yet."""
        for file in self._open.values():
            file.close()
        for partial in self._partial.values():
            partial.unlink(missing_ok=True)


class _Writer:
    """A file that takes a bounded number of bytes, with the methods that py7zr calls."""

    def __init__(self, file: IO[bytes], most: int) -> None:
        self._file, self._left = file, most

    def write(self, data: bytes) -> int:
        self._left -= len(data)
        if self._left < 0:
            raise ValueError("most: expected fewer bytes; the archive says less than it holds")
        return self._file.write(data)

    def read(self, size: int | None = None) -> bytes:
        return b""

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.tell()

    def flush(self) -> None:
        self._file.flush()

    def size(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.flush()
