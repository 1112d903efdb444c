"""The jobs of a queue file, and how far each one is, read from its folder of runs."""

import argparse
import re
import shlex
import statistics
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.paper import SEEDS, named
from experiments.runs.command_line import parse
from experiments.runs.experiment import Config, DataError, Experiment
from experiments.runs.results import EXPERIMENT, Run, read_experiment

NO_DATA = "without data"


@dataclass(frozen=True)
class Job:
    """What follows `python -m experiments reproduce`, and the folder of its runs."""

    name: str
    arguments: tuple[str, ...]
    folder: Path

    @property
    def experiment(self) -> Experiment:
        """The experiment that the first word names; ValueError where there is none."""
        try:
            return named(self.arguments[0]).load()
        except ValueError as error:
            raise ValueError(f"job {self.name!r}: {error}") from error

    def config(self, minutes: float | None = None) -> Config:
        """Return the command's config, stopping after so many minutes.

        Raises:
            ValueError: the words make no config; the message names the job.
        """
        experiment = self.experiment
        reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        reader.add_argument("--preset", choices=tuple(SEEDS), default="smoke")
        try:
            options, words = reader.parse_known_args(self.arguments[1:])
            words += ["--out", str(self.folder)]
            words += [] if minutes is None else ["--time-limit", str(minutes)]
            (command,) = named(self.arguments[0]).commands(options.preset, words)
            return parse(experiment, command)
        except (ValueError, SystemExit, argparse.ArgumentError) as error:
            raise ValueError(f"job {self.name!r}: {error}") from error

    def missing(self, config: Config) -> str | None:
        """Return what this machine lacks to do the job; None where it lacks nothing.

        Raises:
            ValueError: no run could start like this; the message names the job.
        """
        try:
            self.experiment.check(config)
        except DataError as error:
            return str(error)
        except ValueError as error:
            raise ValueError(f"job {self.name!r}: {error}") from error
        return None

    def runs(self) -> list[Run]:
        """Return the runs that the folder holds."""
        return read_experiment(self.folder).runs if (self.folder / EXPERIMENT).is_file() else []


def read_queue(file: Path, out: Path) -> list[Job]:
    """Read the jobs of a file, whose runs live in folders below `out`.

    Raises:
        ValueError: the file is not a queue; the message names it.
    """
    try:
        tables = tomllib.loads(file.read_text())["job"]
        jobs = [Job(t["name"], tuple(shlex.split(t["arguments"])), out / t["name"]) for t in tables]
        if empty := [job.name for job in jobs if not job.arguments]:
            raise ValueError(f"no words in {', '.join(empty)}")
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file}: expected [[job]] tables with name, arguments: {error}"
        ) from error
    names = [job.name for job in jobs]
    for name in names:
        if not re.fullmatch(r"[\w.-]+", name) or names.count(name) > 1:
            raise ValueError(f"{file}: expected names fit for folders, none twice, got {name!r}")
    return jobs


def state(job: Job, pace: float | None) -> dict[str, Any]:
    """Say how far a job is.

    Args:
        pace: steps a second to reckon with where the job itself has none yet.
    """
    config = job.config()
    missing = job.missing(config)
    runs = [r for r in job.runs() if r.method in config.methods and r.seed in config.seeds]
    count = len(config.methods) * len(config.seeds) * max(1, len(config.learning_rates))
    done = [_steps(run, config) for run in runs]
    own = _pace(runs)
    left = count * config.steps - sum(done)
    finished = [run for run in runs if run.finished]
    name = NO_DATA if missing else "in progress" if any(done) else "waiting"
    name = "done" if len(finished) == count else name
    speed = own or pace
    return {
        "name": job.name,
        "state": name,
        "runs_done": len(finished),
        "runs": count,
        "steps_done": sum(done),
        "steps": count * config.steps,
        "steps_per_second": own,
        "hours_left": 0.0 if name == "done" else left / speed / 3600 if speed else None,
        "in_progress": [
            {"method": run.method, "seed": run.seed, "step": steps, "steps": config.steps}
            for run, steps in zip(runs, done, strict=True)
            if steps and not run.finished
        ],
        "results": [_result(run, job.experiment.scores) for run in finished],
        "missing": missing,
        "arguments": list(job.arguments),
        "folder": str(job.folder),
    }


def _steps(run: Run, config: Config) -> int:
    """The steps in a run's log, which may be a little ahead of its last checkpoint."""
    return config.steps if run.finished else max((e["step"] for e in run.events), default=0)


def _pace(runs: list[Run]) -> float | None:
    """Steps a second, evaluations and start-up included: what the clock of the runs' logs says."""
    ends = [max(run.events, key=lambda event: event["step"]) for run in runs if run.events]
    speeds = [end["step"] / end["seconds"] for end in ends if end["step"] and end.get("seconds")]
    return statistics.median(speeds) if speeds else None


def _result(run: Run, scores: tuple[str, ...]) -> dict[str, Any]:
    """The scores of a run and what it took, without the long lists."""
    kept = {name: run.result.get(name) for name in (*scores, "steps", "seconds", "best_step")}
    short = {name: value for name, value in kept.items() if not isinstance(value, list)}
    return {"method": run.method, "seed": run.seed} | short
