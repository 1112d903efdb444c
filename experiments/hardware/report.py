"""Where results go: a JSON file a part, whole at every moment, and a copy to be committed."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.hardware.device import slug
from experiments.runs.json_files import write_json


@dataclass(frozen=True)
class Report:
    """Write parts below `out`, and copies named after the device below `results`."""

    out: Path
    results: Path | None
    about: dict[str, Any]

    def write(self, part: str, content: dict[str, Any]) -> None:
        """Replace the file of a part by what is known now."""
        whole = _plain(self.about | content)
        write_json(self.out / f"{part}.json", whole)
        if self.results is not None:
            write_json(self.results / f"{slug(self.about)}-{part}.json", whole)

    def earlier(self, part: str) -> dict[str, Any]:
        """What the copy of a part holds, if it is of this device, commit and these versions."""
        if self.results is None:
            return {}
        file = self.results / f"{slug(self.about)}-{part}.json"
        found = json.loads(file.read_text()) if file.is_file() else {}
        same = all(found.get(name) == _plain(value) for name, value in self.about.items())
        return found if found and same else {}


def say(line: str) -> None:
    """Print a line at once: whoever stops the command has seen what there was."""
    print(line, flush=True)


def one_line(error: BaseException) -> str:
    """Put an error into a line: its type and the first line of its message."""
    words = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {words[0][:300]}"


def _plain(value: Any) -> Any:
    """Spell the numbers that JSON lacks."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
