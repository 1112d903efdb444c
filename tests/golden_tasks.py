"""Read the golden cases of the tasks: NAME.json below $KREG_GOLDEN_TASKS.

Without that variable it is the subset committed below tests/golden/tasks. Every read is remembered,
so that a test can fail on what is in a file and was neither used nor excluded.
"""

import fnmatch
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest


def folder() -> Path:
    variable = os.environ.get("KREG_GOLDEN_TASKS")
    return Path(variable) if variable else Path(__file__).parent / "golden" / "tasks"


def excluded(path: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


class Record:
    """A JSON object that remembers which of its keys were read."""

    def __init__(self, value: dict[str, Any], path: str) -> None:
        self.value, self.path = value, path
        self.children: dict[str, Any] = {}

    def __contains__(self, key: str) -> bool:
        return key in self.value

    def __getitem__(self, key: str) -> Any:
        """A value, objects (alone or in a list) as records."""
        if key not in self.children:
            value, path = self.value[key], f"{self.path}/{key}"
            if isinstance(value, dict):
                value = Record(value, path)
            elif isinstance(value, list) and value and isinstance(value[0], dict):
                value = [Record(item, path) for item in value]
            self.children[key] = value
        return self.children[key]

    def whole(self, key: str) -> Any:
        """A value as it is, all of it counted as read."""
        self.children[key] = None
        return self.value[key]

    def unread(self) -> set[str]:
        paths = {f"{self.path}/{key}" for key in self.value.keys() - self.children.keys()}
        for child in self.children.values():
            for item in child if isinstance(child, list) else [child]:
                if isinstance(item, Record):
                    paths |= item.unread()
        return paths

    def finish(self, exclusions: Iterable[str]) -> None:
        """Fail on what was neither read nor excluded."""
        left = sorted(path for path in self.unread() if not excluded(path, exclusions))
        assert not left, f"neither used nor excluded: {left}"


def open_record(name: str) -> Record:
    """Open NAME.json; skip the test where the file is not there."""
    path = folder() / f"{name}.json"
    if not path.exists():
        pytest.skip(f"{path.name} is not among the golden files")
    return Record(json.loads(path.read_text()), name)
