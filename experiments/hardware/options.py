"""The command line of `python -m experiments.hardware`."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PARTS = ("contract", "kernels", "timing", "queue")
QUEUE = Path(__file__).with_name("queue.toml")
SMOKE_QUEUE = Path(__file__).with_name("smoke_queue.toml")


@dataclass(frozen=True)
class Options:
    """What the command was told."""

    part: str | None
    budget: float
    out: Path
    results: Path | None
    queue: Path
    carry: Path | None
    commit: str | None
    allow_cpu: bool
    smoke: bool
    worker: bool

    def of_worker(self, part: str, minutes: float) -> list[str]:
        """Return the words that make another process do one part."""
        words = [part, "--worker", "--budget", str(minutes), "--out", str(self.out)]
        for name in ("results", "queue", "carry", "commit"):
            if (value := getattr(self, name)) is not None:
                words += [f"--{name}", str(value)]
        return [*words, "--smoke"] if self.smoke else words


def parse(arguments: Sequence[str]) -> Options:
    """Read the words; --help and mistakes end in SystemExit, explained."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.hardware",
        description="Check, time and use the accelerator of this machine.",
    )
    add = parser.add_argument
    add(
        "part",
        nargs="?",
        choices=(*PARTS, "pytest", "device"),
        help="all but pytest and device if none is named",
    )
    add("--budget", type=_minutes, default=9.0, metavar="MINUTES", help="for all (default 9)")
    add("--out", type=Path, default=Path("runs/hardware"), help="folder (default runs/hardware)")
    add("--results", type=Path, metavar="FOLDER", help="for copies of the small JSON files")
    add("--queue", type=Path, metavar="FILE", help=f"the jobs (default {QUEUE.name} beside this)")
    add(
        "--carry", type=Path, metavar="FILE", help="an earlier session's carry.tar.gz to go on from"
    )
    add("--commit", help="what to write as the commit where there is no git")
    add("--allow-cpu", action="store_true", help="do the work although there is only a CPU")
    add("--smoke", action="store_true", help="tiny sizes, to see that it works")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    given = vars(parser.parse_args(arguments))
    given["queue"] = given["queue"] or (SMOKE_QUEUE if given["smoke"] else QUEUE)
    return Options(**given)


def _minutes(word: str) -> float:
    minutes = float(word)
    if not 0 < minutes < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number of minutes, got {word}")
    return minutes
