"""`reproduce`, killed again and again, ends with what an undisturbed command gives."""

import random
import signal
import time
from pathlib import Path

import pytest
from killing import lines, signal_when, start

from experiments.paper import EXPERIMENTS
from experiments.runs.results import read_experiment
from experiments.runs.tables import COST_HEADS

KILLS = 20
TINY = {
    "moons": [
        *("--data.length", "60", "--data.windows", "2", "--training.batch-size", "2"),
        *("--training.steps", "60", "--training.evaluations", "15"),
    ],
    "icl": [
        *("--data.train", "10", "--data.validation", "5", "--data.test", "6"),
        *("--data.automata.max-tokens", "24", "--training.batch-size", "4"),
        *("--training.epochs", "20", "--training.evaluations", "15"),
        *("--model.layers", "1", "--model.heads", "2", "--model.width", "8", "--model.slots", "4"),
    ],
}
# The heads of a table that say how long it took, and the keys that do.
TIMES = COST_HEADS[1:]
CLOCK = {"seconds", "tokens_per_second", "ms_per_step"}


def reproduce(name: str, out: Path):
    sweep = ("--methods", "softmax", "biweight", "--seeds", "0", "1", "--out", str(out))
    return start("-m", "experiments", "reproduce", name, *TINY[name], *sweep)


def progress(out: Path) -> int:
    """What there is to see of a command's work: lines of logs, results, and what comes of them."""
    logs = sum(lines(log) for log in out.glob("*/*/metrics.jsonl"))
    return logs + len(list(out.glob("*/*/result.json"))) + len(list(out.glob("[a-z]*.*")))


def finish(process) -> None:
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert "Traceback" not in err


@pytest.mark.nightly
@pytest.mark.parametrize("name", TINY)
def test_killed_twenty_times_it_ends_as_if_nobody_had(name, tmp_path):
    """Half of the kills come while a command starts, half where the work has come so far."""
    pytest.importorskip("matplotlib")
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "killed"
    process, began = reproduce(name, undisturbed), time.monotonic()
    while process.poll() is None and not progress(undisturbed):
        time.sleep(0.01)
    # A little longer than a command needs before it does anything.
    to_start = 1.2 * (time.monotonic() - began)
    finish(process)
    # The figures come last, and take longer than the longest pause.
    last = progress(undisturbed) - 2
    rng = random.Random(0)
    for planned in sorted(rng.randrange(last) for _ in range(KILLS // 2)):
        kill(name, out, time.monotonic() + rng.uniform(0, to_start), reached=0)
        reached = min(max(planned, progress(out) + 1), last)
        kill(name, out, 0, reached, pause=rng.uniform(0, 0.05))
    assert progress(out) <= last
    finish(reproduce(name, out))
    assert_same(name, out, undisturbed)


def kill(name: str, out: Path, at: float, reached: int, pause: float = 0) -> None:
    """Start the command, and kill it at a time or as soon as the work has come so far."""
    process = reproduce(name, out)

    def moment() -> bool:
        return time.monotonic() >= at and progress(out) >= reached

    def paused() -> bool:
        return moment() and not time.sleep(pause)

    signal_when(process, signal.SIGKILL, paused)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def assert_same(name: str, out: Path, reference: Path) -> None:
    """Compare what the folders say, but for the clock."""
    scores = EXPERIMENTS[name].load().scores
    ours, theirs = read_experiment(out, scores), read_experiment(reference, scores)
    assert ours.benchmark == theirs.benchmark and ours.baselines == theirs.baselines
    assert len(ours.runs) == len(theirs.runs) == 4
    for one, other in zip(ours.runs, theirs.runs, strict=True):
        assert one.folder.relative_to(out) == other.folder.relative_to(reference)
        assert one.finished and timeless(one.result) == timeless(other.result)
        assert list(map(timeless, one.events)) == list(map(timeless, other.events))
        assert len(other.sessions) == 1
    assert sum(len(run.sessions) for run in ours.runs) > 4
    assert uncosted(out / "table.md") == uncosted(reference / "table.md")
    assert (out / "figure.png").read_bytes() == (reference / "figure.png").read_bytes()
    assert not list(out.rglob("*.partial")) and not list(out.rglob(".unfinished*"))


def timeless(values: dict) -> dict:
    return {name: value for name, value in values.items() if name not in CLOCK}


def uncosted(table: Path) -> list[list[str]]:
    """The cells of a table but for those under the heads of times."""
    rows = [[cell.strip() for cell in line.split("|")] for line in table.read_text().splitlines()]
    times, kept = [], []
    for row in rows:
        if set(TIMES) <= set(row):
            times = [row.index(head) for head in TIMES]
        times = times if len(row) > 1 else []
        kept.append([cell for place, cell in enumerate(row) if place not in times])
    return kept
