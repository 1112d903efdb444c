"""The authors' files: STEM.src and STEM.trg, a sample a line, each with an index of line starts.

A line is decimal ids joined by one space. FILE.idx holds the offset of every line's first byte,
eight bytes each, little-endian.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from experiments.length_tasks.randomness import Ints
from experiments.length_tasks.task import Sample

_LINE = re.compile(rb"(?:0|[1-9][0-9]{0,9})(?: (?:0|[1-9][0-9]{0,9}))*\n")
_OFFSET = np.dtype("<u8")
_CHUNK = 2**22


class Lines:
    """Read any line of a file of ids, without reading the others.

    The first use makes the index: beside the file where that can be written, else in memory.

    Raises:
        ValueError: the file is empty or ends within a line, or an index is not this file's.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.stat().st_size:
            raise ValueError(f"{self.path}: expected at least one line, got an empty file")
        self._bytes = np.memmap(self.path, np.uint8, "r")
        if self._bytes[-1] != ord("\n"):
            raise ValueError(f"{self.path}: expected a newline at the end, got a file cut short")
        self._index_path = self.path.with_name(self.path.name + ".idx")
        self._starts = self._read_index() if self._index_path.exists() else self._make_index()

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> np.ndarray:
        """Return the ids of a line, int32.

        Raises:
            IndexError: there is no such line.
            ValueError: it holds something else, or ids above 2^31 - 1.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path}: expected a line from 0 to {len(self) - 1}, got {index}")
        line = self._line(index)
        if not _LINE.fullmatch(line):
            shown = line if len(line) <= 40 else line[:40] + b"..."
            raise ValueError(
                f"{self.path}, line {index + 1}: expected ids joined by one space, got {shown!r}"
            )
        ids = np.array(line.split(), np.int64)
        if ids.max() >= 2**31:
            raise ValueError(
                f"{self.path}, line {index + 1}: expected ids below 2^31, got {ids.max()}"
            )
        return ids.astype(np.int32)

    def _line(self, index: int) -> bytes:
        """The bytes of a line; wherever they are not one line, the index is wrong."""
        start = int(self._starts[index])
        last = index + 1 == len(self)
        end = len(self._bytes) if last else int(self._starts[index + 1])
        line = self._bytes[start:end].tobytes()
        begins = start == 0 or self._bytes[start - 1 : start].tobytes() == b"\n"
        if not begins or line.count(b"\n") != 1 or not line.endswith(b"\n"):
            raise ValueError(
                f"{self._index_path}: expected the starts of the lines of {self.path.name}, got "
                f"{start} for line {index + 1}; delete the index to have it made anew"
            )
        return line

    def _read_index(self) -> np.ndarray:
        size = self._index_path.stat().st_size
        if not size or size % _OFFSET.itemsize:
            raise ValueError(
                f"{self._index_path}: expected eight bytes a line, got {size} bytes; delete the "
                f"index to have it made anew"
            )
        self._starts: np.ndarray = np.memmap(self._index_path, _OFFSET, "r")
        for end in (0, len(self._starts) - 1):
            self._line(end)
        if self._starts[0]:
            raise ValueError(f"{self._index_path}: expected 0 first, got {self._starts[0]}")
        return self._starts

    def _make_index(self) -> np.ndarray:
        try:
            with _replacing(self._index_path) as file:
                for part in self._scan():
                    file.write(part.tobytes())
        except OSError:
            return np.concatenate(list(self._scan()))
        return np.memmap(self._index_path, _OFFSET, "r")

    def _scan(self) -> Iterator[np.ndarray]:
        """Find the line starts, a chunk of the file at a time."""
        yield np.zeros(1, _OFFSET)
        for begin in range(0, len(self._bytes), _CHUNK):
            chunk = self._bytes[begin : begin + _CHUNK]
            starts = np.flatnonzero(chunk == ord("\n")) + begin + 1
            yield starts[starts < len(self._bytes)].astype(_OFFSET)


class SampleFiles:
    """Read the samples of STEM.src and STEM.trg by number.

    Raises:
        ValueError: the files differ in their number of lines; or as `Lines` does.
    """

    def __init__(self, stem: str | os.PathLike[str]) -> None:
        self.source, self.target = (Lines(f"{os.fspath(stem)}{end}") for end in (".src", ".trg"))
        if len(self.source) != len(self.target):
            raise ValueError(
                f"{self.target.path}: expected {len(self.source)} lines as in "
                f"{self.source.path.name}, got {len(self.target)}"
            )

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        return Sample.of(self.source[index], self.target[index])


def write_samples(stem: str | os.PathLike[str], samples: Iterable[Sample]) -> int:
    """Write STEM.src and STEM.trg with their indices, and return the number of samples.

    Samples are taken one at a time. The files appear when they are whole, the source last; nothing
    that is there is replaced.

    Raises:
        ValueError: there is a file of this name, no sample, or a sample that is not made of lines
            of non-negative ids.
    """
    data = [Path(f"{os.fspath(stem)}{end}") for end in (".trg", ".src")]
    for path in data:
        for taken in (path, path.with_name(path.name + ".idx")):
            if taken.exists():
                raise ValueError(f"stem: expected new files, but {taken} exists")
    with contextlib.ExitStack() as stack:
        # Closed in the reverse order: indices first, then the target, the source last.
        texts = [stack.enter_context(_replacing(path)) for path in reversed(data)][::-1]
        indices = [
            stack.enter_context(_replacing(path.with_name(path.name + ".idx"))) for path in data
        ]
        offsets, count = [0, 0], 0
        for count, sample in enumerate(samples, start=1):
            cut = sample.trimmed()
            for number, ids in enumerate((cut.target, cut.source)):
                line = _format(ids, count)
                texts[number].write(line)
                indices[number].write(np.array(offsets[number], _OFFSET).tobytes())
                offsets[number] += len(line)
        if not count:
            raise ValueError("samples: expected at least one, got none")
    return count


def _format(ids: Ints, number: int) -> bytes:
    line = b" ".join(b"%d" % value for value in ids) + b"\n"
    if not _LINE.fullmatch(line):
        raise ValueError(f"samples: expected ids from 0, got {line[:40]!r} in sample {number}")
    return line


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file that gets its name once it is written whole and on the disk."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
