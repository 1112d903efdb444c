"""An experiment's command: `[options]`, `table OUT...`, `figure OUT...`."""

import argparse
import functools
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.runs.command_line import parse
from experiments.runs.cost import Cost
from experiments.runs.experiment import Config, DataError, Experiment
from experiments.runs.json_files import write_json, write_text
from experiments.runs.results import COST, read_experiment

if TYPE_CHECKING:
    from kreg.training.processes import Processes


def command(experiment: Experiment, arguments: Sequence[str]) -> int:
    """Do what the words say; return 0, 2 where that is impossible, 3 where runs are left to do.

    Who stops it by SIGTERM has what was asked for: 0, too.
    """
    first, *rest = arguments or [""]
    if first in ("table", "figure"):
        return report(experiment, first, rest)
    try:
        config = parse(experiment, arguments)
    except ValueError as error:
        return explain(error)
    return as_exit(reproduce(experiment, config))


# What `reproduce` returns where SIGTERM stopped it: nothing is to follow.
TERMINATED = 143


def as_exit(status: int) -> int:
    """The status of a command: who asks for an end by SIGTERM gets what was asked for."""
    return 0 if status == TERMINATED else status


def reproduce[C: Config](experiment: Experiment[C], config: C) -> int:
    """Train and test what is missing, then write the table and the figure."""
    try:
        with joined() as processes:
            if processes.alone:
                make_devices(config)
            elif processes.count > 1 and not getattr(config, "devices", ""):
                can = (
                    "expected one that splits the run"
                    if hasattr(config, "devices")
                    else (f"{experiment.name} has none, and runs as one process")
                )
                say(f"error: --devices: {can}, with {processes.count} processes")
                return 2
            return _reproduce(experiment, config)
    except KeyboardInterrupt:
        say("stopped; the same command goes on from there")
        return 130


def make_devices(config: Config) -> None:
    """Let JAX on CPU have as many devices as a run is split over, where nobody said how many.

    To be called before anything touches a device; elsewhere than on CPU it changes nothing. Words
    that make no sense are `prepare`'s to name.
    """
    import jax

    counts = re.findall(r"=(\d+)", getattr(config, "devices", ""))
    if counts and jax.config.jax_num_cpu_devices < 1:
        jax.config.update("jax_num_cpu_devices", max(1, math.prod(map(int, counts))))


@functools.cache
def joined() -> "Processes":
    """The processes that a launcher started, which make the same command; mostly one."""
    from kreg.training.processes import start

    return start()


def _reproduce[C: Config](experiment: Experiment[C], config: C) -> int:
    # Only now: these take seconds to import, and --help needs none of them.
    from experiments.runs.sweep import prepare, sweep
    from kreg.training import CheckpointError
    from kreg.training.writer import is_first

    try:
        prepare(experiment, config)
    except (ValueError, OSError) as error:
        return explain(error)
    try:
        stopped_by = sweep(experiment, config, say if is_first() else lambda line: None)
    # Other errors in here are ours, and deserve their traceback.
    except (CheckpointError, DataError, OSError) as error:
        if joined().count > 1:
            # The others may wait for this process: it has to end as one that failed.
            raise
        return explain(error)
    status = {None: 0, "SIGTERM": TERMINATED}.get(stopped_by, 3)
    if not is_first():
        return status
    write_table(experiment, config.folder)
    write_cost(experiment, config.folder)
    try:
        write_figure(experiment, config.folder)
    # Nothing to draw yet, or nothing to draw with: the runs are no worse for that.
    except ValueError as error:
        say(f"no figure: {error}")
    return status


def report(experiment: Experiment, what: str, arguments: Sequence[str]) -> int:
    """Write table.md, or figure.png and figure.pdf, into each of the folders."""
    program = f"{experiment.program} {what}"
    reader = argparse.ArgumentParser(prog=program, description=report.__doc__)
    reader.add_argument("out", nargs="+", type=Path, help="folder of runs, as --out named it")
    write = {"table": write_table, "figure": write_figure}[what]
    try:
        for out in reader.parse_args(arguments).out:
            write(experiment, out)
    except (ValueError, OSError) as error:
        return explain(error)
    return 0


def write_table(experiment: Experiment, out: Path) -> None:
    """Write table.md, and print it."""
    text = experiment.table(read_experiment(out, experiment.scores))
    write_text(out / "table.md", text)
    print(text)
    say(f"wrote {out / 'table.md'}")


def write_cost(experiment: Experiment, out: Path) -> None:
    """Write cost.json, and say what the finished runs took."""
    cost = Cost.of(read_experiment(out, experiment.scores))
    write_json(out / COST, cost.as_json())
    if cost.runs:
        say(cost.told())


def write_figure(experiment: Experiment, out: Path) -> None:
    """Write figure.png and figure.pdf."""
    for path in experiment.draw(read_experiment(out, experiment.scores), out / "figure"):
        say(f"wrote {path}")


def say(line: str) -> None:
    """Print where the work stands; standard output is for tables."""
    print(line, file=sys.stderr, flush=True)


def explain(error: ValueError | OSError) -> int:
    """Say in one line what is wrong."""
    words = " ".join(str(error).split())
    if isinstance(error, OSError) and error.filename:
        words = f"{error.filename}: {error.strerror}"
    say(f"error: {words}")
    return 2
