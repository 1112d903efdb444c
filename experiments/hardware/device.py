"""What this machine is: device, versions, commit."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from experiments.runs import environment

ROOT = Path(__file__).resolve().parents[2]


def describe(commit: str | None = None) -> dict[str, Any]:
    """Return versions, commit and device, and the device's memory and driver as jax tells them."""
    import jax

    device = jax.devices()[0]
    about = environment.describe()
    about["commit"] = about["commit"] or commit
    limit = (device.memory_stats() or {}).get("bytes_limit")
    about["device"] |= {"runtime": device.client.platform_version, "memory_bytes": limit}
    return about


def probe() -> dict[str, Any]:
    """Return the same from another process, because the one that holds a TPU keeps it.

    Raises:
        RuntimeError: jax does not start there; the message is its last line.
    """
    command = [sys.executable, "-m", "experiments.hardware", "device", "--worker"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(f"jax does not start on this machine: {words[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def slug(about: dict[str, Any]) -> str:
    """Return the device's name as part of a file's name.

    >>> slug({"device": {"kind": "TPU v5 lite"}})
    'tpu-v5-lite'
    """
    return re.sub(r"[^a-z0-9]+", "-", about["device"]["kind"].lower()).strip("-")
