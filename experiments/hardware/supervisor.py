"""Run the parts, each in a process of its own, and end them when their time is over.

A part that crashes, hangs or exhausts the device's memory takes nothing with it: what it wrote
stays, and the next one starts on a free device.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from experiments.hardware.deadline import Deadline
from experiments.hardware.device import ROOT, probe
from experiments.hardware.options import PARTS, Options
from experiments.hardware.report import Report, say

# Of the whole budget; the last part gets all that the others left.
SHARES = {"contract": 0.35, "kernels": 0.35, "timing": 0.15}
# A part ends by itself; so many seconds past its time it is asked to, and later made to.
GRACE, LAST = 25, 20
NO_TIME = "no time left"
CPU_ONLY = (
    "experiments.hardware: only a CPU found, nothing was run; it needs a machine whose jax sees a "
    "GPU or a TPU (--allow-cpu runs it here)"
)


def supervise(options: Options) -> int:
    """Do what the options say; return 1 where a check failed or a part broke, else 0."""
    try:
        about = probe()
    except RuntimeError as error:
        say(f"experiments.hardware: {error}")
        return 1
    about["commit"] = about["commit"] or options.commit
    device = about["device"]
    if options.part == "device":
        say(json.dumps(about, indent=2))
        return 0
    if device["platform"] == "cpu" and not options.allow_cpu:
        say(CPU_ONLY)
        return 0
    say(
        f"{device['kind']} ({device['platform']}, {device['count']} device(s)), jax "
        f"{about['versions']['jax']}, commit {about['commit']}; results in {options.out}"
    )
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        return _supervise(options, Report(options.out, None, about))
    except OSError as error:
        say(f"experiments.hardware: {error.filename or options.out}: {error.strerror}")
        return 2


def _supervise(options: Options, report: Report) -> int:
    deadline = Deadline(options.budget)
    statuses: dict[str, int | str] = {}
    report.write("summary", {"status": statuses})
    for part in PARTS if options.part is None else (options.part,):
        seconds = deadline.left
        if options.part is None and part in SHARES:
            seconds = min(seconds, 60 * options.budget * SHARES[part])
        say(f"\n== {part}, at most {seconds / 60:.1f} min")
        # An older session's result must not pass for this one's.
        (options.out / f"{part}.json").unlink(missing_ok=True)
        statuses[part] = _run(options, part, seconds) if seconds else NO_TIME
        report.write("summary", {"status": statuses, "parts": _results(options, statuses)})
    say("\n== summary")
    found = _results(options, statuses)
    for part, status in statuses.items():
        ended = "" if status == 0 else f" (ended with: {status})"
        say(f"{part}: {_words(found[part])}{ended}")
        for name in _failures(options.out / f"{part}.json"):
            say(f"  failed: {name}")
    return int(any(status not in (0, NO_TIME) for status in statuses.values()))


def _run(options: Options, part: str, seconds: float) -> int:
    """Run one part to its end or the end of its time; return its exit status."""
    command = [sys.executable, "-m", "experiments.hardware"]
    command += options.of_worker(part, seconds / 60)
    folder, environment = None, dict(os.environ)
    if part == "pytest":
        if importlib.util.find_spec("pytest") is None:
            say("pytest is not installed here")
            return 1
        command = [sys.executable, "-m", "pytest", "-m", "core", "-p", "no:cacheprovider", "tests"]
        # The tests choose the CPU unless the variable is set; empty leaves the choice to jax.
        folder, environment["JAX_PLATFORMS"] = ROOT, ""
    child = subprocess.Popen(command, cwd=folder, env=environment)
    try:
        return child.wait(seconds + GRACE)
    except subprocess.TimeoutExpired:
        say(f"{part}: still running after its time, stopped")
        return _stop(child)
    except BaseException:
        _stop(child)
        raise


def _stop(child: subprocess.Popen) -> int:
    """Ask a process to save and end, then end it."""
    child.terminate()
    try:
        return child.wait(LAST)
    except subprocess.TimeoutExpired:
        child.kill()
        return child.wait()


def _results(options: Options, parts: dict[str, Any]) -> dict[str, dict[str, Any] | None]:
    """Collect the summaries that the parts have written."""
    files = {part: options.out / f"{part}.json" for part in parts}
    return {
        part: json.loads(file.read_text()).get("summary") if file.is_file() else None
        for part, file in files.items()
    }


def _failures(file: Path) -> list[str]:
    """The failed checks by name, also of a part that could not say so itself any more."""
    return json.loads(file.read_text()).get("failures", []) if file.is_file() else []


def _words(summary: dict[str, Any] | None) -> str:
    if summary is None:
        return "no result"
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in summary.items())
