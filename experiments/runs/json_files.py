"""Small files, read with messages that name them and written whole or not at all."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def read_json(path: Path, keys: Iterable[str]) -> dict[str, Any]:
    """Read an object that must have the keys.

    Raises:
        ValueError: it cannot be read, or a key is missing; the message names the file.
    """
    try:
        content = json.loads(path.read_text())
        missing = [key for key in keys if key not in content]
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: expected a JSON object, got {error}") from error
    if missing:
        raise ValueError(f"{path}: expected the key {missing[0]!r}")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file whole or not at all: the old one stays until the new one is on the disk."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write any text as `write_json` does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
