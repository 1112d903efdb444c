"""`python -m experiments.text fetch NAME FOLDER`, and `... tell`, which prints stories."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from experiments.text.download import Report
from experiments.text.grammar import story
from experiments.text.official import OFFICIAL, fetch


def main(arguments: Sequence[str]) -> int:
    """Do what the words say; return 0, or 2 where that is impossible."""
    reader = argparse.ArgumentParser(prog="python -m experiments.text", description=__doc__)
    commands = reader.add_subparsers(dest="command", required=True)
    get = commands.add_parser("fetch", help="download a data set; run again, it goes on")
    get.add_argument("name", choices=sorted(OFFICIAL))
    get.add_argument("folder", type=Path)
    get.add_argument("--mirror", help="an address with the same files")
    tell = commands.add_parser("tell", help="print stories of the grammar")
    tell.add_argument("--seed", type=int, default=0)
    tell.add_argument("--count", type=int, default=3)
    options = reader.parse_args(arguments)
    try:
        if options.command == "fetch":
            fetch(options.name, options.folder, mirror=options.mirror, report=reporter)
            say(f"{options.name} is in {options.folder}")
        else:
            print("\n\n".join(story(options.seed, number) for number in range(options.count)))
    except (ValueError, OSError) as error:
        say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        say("stopped; the same command goes on from there")
        return 130
    return 0


def reporter(file: str) -> Report:
    """Return what prints how far a file has come, once a second and at the end."""
    started = last = time.monotonic()
    first: int | None = None

    def report(done: int, total: int | None) -> None:
        nonlocal last, first
        first = done if first is None else first
        now = time.monotonic()
        if now - last < 1 and done != total:
            return
        last = now
        share = f" of {total / 1e6:,.1f} MB, {done / max(total, 1):.0%}" if total else " MB"
        speed = (done - first) / 1e6 / max(now - started, 1e-3)
        say(f"{file}: {done / 1e6:,.1f}{share}, {speed:,.1f} MB/s")

    return report


def say(line: str) -> None:
    """Print where the work stands; standard output is for stories."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
