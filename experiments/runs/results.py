"""The folders of an experiment: who writes what, and reading it back.

OUT/experiment.json           which experiment, what all runs in OUT share, facts about the data
OUT/baselines.json            scores that need no training, where there are any
OUT/table.md, figure.png, figure.pdf, cost.json      for people
OUT/METHOD/seedK[-lrX]/run.json     method, seed, experiment, versions, commit, device
                 metrics.jsonl, checkpoints/
                 result.json  written once, when the run has been tested
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.methods import folder_name, rank
from experiments.runs.json_files import read_json
from kreg.training.metrics import read_metrics

EXPERIMENT, BASELINES, RUN, RESULT, COST = (
    f"{name}.json" for name in ("experiment", "baselines", "run", "result", "cost")
)
METRICS = "metrics.jsonl"
# Folders from when there was one experiment do not name it.
FIRST = "in_context"


@dataclass(frozen=True)
class Run:
    """One method and seed, as its folder tells it; `result` is empty until it is tested."""

    folder: Path
    method: str
    seed: int
    result: dict[str, Any]
    events: list[dict[str, Any]]
    sessions: list[dict[str, Any]] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return bool(self.result)

    @property
    def name(self) -> str:
        """The method, and what the run has otherwise than the folder's others."""
        variant = self.folder.name.partition("-")[2]
        return f"{self.method}, {variant}" if variant else self.method

    def state(self, steps: int) -> str:
        """Say how far an unfinished run has come."""
        last = max((event["step"] for event in self.events), default=0)
        if last == 0:
            return "not started"
        return f"stopped at step {last:,} of {steps:,}" if last < steps else "trained, not tested"

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Return the steps of the evaluations and what they found on the validation set."""
        points = [(e["step"], e[name]) for e in self.events if e["event"] == "eval" and name in e]
        return [step for step, _ in points], [value for _, value in points]


@dataclass(frozen=True)
class Results:
    """All that a folder of runs holds."""

    folder: Path
    name: str
    experiment: dict[str, Any]
    benchmark: dict[str, Any]
    baselines: dict[str, dict[str, float]]
    runs: list[Run]

    def by_method(self) -> dict[str, list[Run]]:
        """Group the finished runs, methods (and their variants) in the order of a table."""
        finished = [run for run in self.runs if run.finished]
        # The runs are in order.
        names = dict.fromkeys(run.name for run in finished)
        return {name: [run for run in finished if run.name == name] for name in names}

    @property
    def unfinished(self) -> list[Run]:
        return [run for run in self.runs if not run.finished]


def run_folder(out: Path, method: str, seed: int, variant: str = "") -> Path:
    """Return the folder of one run.

    >>> run_folder(Path("out"), "entmax:1.25", 0, "lr0.003").as_posix()
    'out/entmax-1.25/seed0-lr0.003'
    """
    return out / folder_name(method) / (f"seed{seed}-{variant}" if variant else f"seed{seed}")


def read_experiment(out: Path, scores: Iterable[str] = ()) -> Results:
    """Read a folder of runs, whose results must have the scores.

    Raises:
        ValueError: it is not one, or a file in it cannot be understood; the message names the file.
    """
    if not (out / EXPERIMENT).is_file():
        raise ValueError(f"{out}: expected a folder of runs with {EXPERIMENT} in it")
    shared = read_json(out / EXPERIMENT, ("experiment", "benchmark"))
    baselines = read_json(out / BASELINES, ()) if (out / BASELINES).is_file() else {}
    runs = [_read_run(file.parent, scores) for file in out.glob(f"*/seed*/{RUN}")]
    runs.sort(key=lambda run: (rank(run.method), run.name, run.seed))
    return Results(
        out, shared.get("name", FIRST), shared["experiment"], shared["benchmark"], baselines, runs
    )


def _read_run(folder: Path, scores: Iterable[str]) -> Run:
    about = read_json(folder / RUN, ("method", "seed"))
    result = {}
    if (folder / RESULT).is_file():
        result = read_json(folder / RESULT, (*scores, "steps", "seconds"))
    events = read_metrics(folder / METRICS) if (folder / METRICS).is_file() else []
    return Run(folder, about["method"], about["seed"], result, events, about.get("sessions", []))
