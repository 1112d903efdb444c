"""The queue: the next slice of long runs, which go on where the last slice stopped.

There is no state but the folders of the runs: finished runs are skipped, an unfinished one goes on
from its checkpoint, so that any slice may be cut anywhere.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

import jax

from experiments.hardware.carry import disk_use, pack, unpack
from experiments.hardware.deadline import Deadline
from experiments.hardware.jobs import NO_DATA, Job, read_queue, state
from experiments.hardware.report import Report, one_line, say
from experiments.runs.results import read_experiment

# Seconds kept back for the last step, its checkpoint and the archive.
RESERVE = 20
# A slice that cannot save has to be lost; this is a hundred checkpoints of the paper's model.
FREE_BYTES = 2**30


def work_on_queue(report: Report, deadline: Deadline, *, jobs: Path, carry: Path | None) -> int:
    """Run the jobs in order until the time is up; 1 where one broke, 2 where none can run."""
    folder = report.out / "queue"
    try:
        if carry is not None:
            unpack(carry, folder)
        folder.mkdir(parents=True, exist_ok=True)
        waiting = read_queue(jobs, folder)
        states = _states(waiting)
        if (free := shutil.disk_usage(folder).free) < FREE_BYTES:
            raise ValueError(f"{folder}: expected 1 GiB of free disk, got {free / 2**30:.2f}")
    except (ValueError, OSError) as error:
        say(f"queue: {one_line(error)}")
        return 2
    if jax.default_backend() != "cpu":
        # The seeds of a method are one program, compiled once a machine.
        jax.config.update("jax_compilation_cache_dir", str(report.out / "compiled"))
    broken: dict[str, str] = {}
    report.write("queue", _content(states, broken, folder))
    for job, before in zip(waiting, states, strict=True):
        if before["state"] in ("done", NO_DATA):
            continue
        if deadline.left <= 1.5 * RESERVE:
            break
        stopped = _attempt(job, (deadline.left - RESERVE) / 60, broken)
        report.write("queue", _content(_states(waiting), broken, folder))
        if stopped:
            break
    return _conclude(_states(waiting), broken, report, folder)


def _attempt(job: Job, minutes: float, broken: dict[str, str]) -> bool:
    """Work on a job for so many minutes; remember why it broke; tell whether it was stopped."""
    say(f"{job.name}: {' '.join(job.arguments)}")
    # Only here: it imports all of training, which the contract and the timing can do without.
    from experiments.runs.sweep import prepare, sweep

    stopped = False
    try:
        config = job.config(minutes)
        prepare(job.experiment, config)
        # By its time or by a signal: either way the next job has to wait for another slice.
        stopped = sweep(job.experiment, config, say) is not None
    # The other jobs should still get their time.
    except Exception as error:
        broken[job.name] = one_line(error)
        say(f"{job.name}: broken: {broken[job.name]}")
        sys.excepthook(type(error), error, error.__traceback__)
    if any(run.finished for run in job.runs()):
        text = job.experiment.table(read_experiment(job.folder))
        (job.folder / "table.md").write_text(text)
    return stopped


def _states(jobs: list[Job]) -> list[dict[str, Any]]:
    """How far each job is; one that has not begun is reckoned at its experiment's pace so far."""
    states: list[dict[str, Any]] = []
    paces: dict[str, float] = {}
    for job in jobs:
        kind = job.experiment.name
        states.append(state(job, paces.get(kind)))
        if pace := states[-1]["steps_per_second"]:
            paces[kind] = pace
    return states


def _content(states: list[dict[str, Any]], broken: dict[str, str], folder: Path) -> dict[str, Any]:
    hours = [s["hours_left"] for s in states]
    runs = {
        "runs_done": sum(s["runs_done"] for s in states),
        "runs": sum(s["runs"] for s in states),
    }
    return {
        "summary": {
            "jobs_done": sum(s["state"] == "done" for s in states),
            "jobs": len(states),
            **runs,
            "hours_left": None if None in hours else round(sum(hours), 2),
            "broken": sorted(broken),
        },
        "broken": broken,
        "disk": {"used_bytes": disk_use(folder), "free_bytes": shutil.disk_usage(folder).free},
        "jobs": states,
    }


def _conclude(
    states: list[dict[str, Any]], broken: dict[str, str], report: Report, folder: Path
) -> int:
    """Say where everything stands and what the next session needs; return the exit status."""
    for s in states:
        hours = "unknown" if s["hours_left"] is None else f"{s['hours_left']:.1f} h"
        speed = s["steps_per_second"]
        pace = f", {speed:.1f} steps/s" if speed else ""
        say(
            f"{s['name']}: {s['state']}, {s['runs_done']} of {s['runs']} runs, step "
            f"{s['steps_done']:,} of {s['steps']:,}{pace}, left: {hours}"
        )
        if s["state"] == NO_DATA:
            say(f"  {s['missing']}")
    archive = report.out / "carry.tar.gz"
    size = pack(folder, archive)
    content = _content(states, broken, folder)
    report.write("queue", content | {"carry": {"file": str(archive), "bytes": size}})
    say(f"{folder} takes {content['disk']['used_bytes'] / 2**20:.1f} MiB")
    say(
        f"the same command goes on from {folder}; where that will not survive, keep {archive} "
        f"({size / 2**20:.1f} MiB) and give it to the next one with --carry"
    )
    return int(bool(broken))
