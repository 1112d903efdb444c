"""Processes that tests start in order to kill them, and waiting for the moment to do it."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def start(*words: str) -> subprocess.Popen:
    """Start Python with these words."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *words],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def signal_when(process: subprocess.Popen, number: int, moment: Callable[[], bool]) -> None:
    """Wait for a moment of the run, and send it the signal then."""
    deadline = time.monotonic() + 120
    while not moment():
        if process.poll() is not None:
            pytest.fail(f"the run ended before its moment came: {process.communicate()}")
        if time.monotonic() > deadline:
            process.kill()
            pytest.fail("the moment never came")
        time.sleep(0.002)
    process.send_signal(number)


def lines(log: Path) -> int:
    """Count the lines of a file that may not be there yet."""
    return log.read_bytes().count(b"\n") if log.exists() else 0
