"""A run's log: one JSON object a line, appended and flushed as it happens."""

import json
import math
import os
from pathlib import Path


class MetricsFile:
    """Append events to a JSON-lines file, and keep it in step with the checkpoints.

    Opening drops the events past the restored step, and a last line torn by a kill, so that the
    file of a resumed run equals the uninterrupted run's (but for what the clock says).
    `mark` remembers the present end as belonging to a checkpoint; `rollback` returns to it.
    """

    def __init__(self, path: str | os.PathLike, *, step: int):
        self.path = Path(path)
        keep = _length_up_to(self.path, step)
        self._file = open(self.path, "ab")
        if self._file.tell() > keep:
            self._file.truncate(keep)
        self._marked = keep

    def write(self, event: str, step: int, values: dict) -> None:
        """Append one line; raise OSError, with the file as it was, where that is impossible."""
        line = json.dumps({"event": event, "step": step, **_finite(values)}, allow_nan=False)
        before = os.fstat(self._file.fileno()).st_size
        try:
            # Unbuffered, in one call: a reader sees whole lines, and nothing waits to be flushed.
            written = os.write(self._file.fileno(), data := f"{line}\n".encode())
            if written < len(data):
                os.write(self._file.fileno(), data[written:])
        except OSError as error:
            os.ftruncate(self._file.fileno(), before)
            raise OSError(
                error.errno, f"cannot append to the log: {error.strerror}", str(self.path)
            ) from error

    def mark(self) -> None:
        """Take the present end as the state that belongs to the checkpoint just saved."""
        self._marked = os.fstat(self._file.fileno()).st_size

    def rollback(self) -> None:
        """Drop what was written since the last mark."""
        self._file.truncate(self._marked)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Silent:
    """Take what a `MetricsFile` takes, and write nothing: for all processes but the first."""

    def write(self, event: str, step: int, values: dict) -> None: ...

    def mark(self) -> None: ...

    def rollback(self) -> None: ...

    def close(self) -> None: ...


def read_metrics(path: str | os.PathLike, event: str | None = None) -> list[dict]:
    """Read a log, or its events of one kind, leaving out a last line torn by a kill.

    Examples:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> log = MetricsFile(f"{folder.name}/metrics.jsonl", step=0)
        >>> log.write("train", 1, {"loss": 0.5})
        >>> log.close()
        >>> read_metrics(log.path)
        [{'event': 'train', 'step': 1, 'loss': 0.5}]
        >>> folder.cleanup()
    """
    events = [_decode(line, path, number) for number, line in enumerate(_lines(Path(path)), 1)]
    return [entry for entry in events if event is None or entry["event"] == event]


def _lines(path: Path) -> list[bytes]:
    """The complete lines of a file, with their ends."""
    lines = path.read_bytes().splitlines(keepends=True)
    return [line for line in lines if line.endswith(b"\n")]


def _length_up_to(path: Path, step: int) -> int:
    """The bytes taken by the lines up to a step; 0 where there is no file."""
    length = 0
    for number, line in enumerate(_lines(path) if path.exists() else [], 1):
        if _decode(line, path, number)["step"] > step:
            break
        length += len(line)
    return length


def _decode(line: bytes, path: str | os.PathLike, number: int) -> dict:
    try:
        entry = json.loads(line)
        step, event = entry["step"], entry["event"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}, line {number}: expected a JSON object with event and step, got "
            f"{line[:80]!r}. Repair or move the file; nothing has been changed."
        ) from error
    values = {name: _number(value) for name, value in entry.items()}
    return {**values, "event": event, "step": step}


# JSON has no number for these three; everything else passes unchanged.
_SPELLED = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def _finite(values: dict) -> dict:
    """Spell the numbers that JSON lacks."""
    return {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }


def _number(value):
    return _SPELLED.get(value, value) if isinstance(value, str) else value
