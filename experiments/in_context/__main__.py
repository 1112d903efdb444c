"""`python -m experiments.in_context [options]`, and `... table OUT...`, `... figure OUT...`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str]) -> int:
    """Do what the words say; return 0, 2 where that is impossible, 3 where runs are left to do."""
    command, *rest = arguments or [""]
    if command in ("table", "figure"):
        return report(command, rest)
    try:
        return experiment(arguments)
    except KeyboardInterrupt:
        say("stopped; the same command goes on from there")
        return 130


def experiment(arguments: Sequence[str]) -> int:
    """Train and test, then write the table and the figure."""
    from experiments.in_context.command_line import parse

    try:
        config = parse(arguments)
        # After parsing: these take seconds to import, and --help needs none of them.
        from experiments.in_context.sweep import prepare, sweep
        from kreg.training import CheckpointError

        prepare(config)
    except (ValueError, OSError) as error:
        return _explain(error)
    try:
        complete = sweep(config, say)
    # Other errors in here are ours, and deserve their traceback.
    except (CheckpointError, OSError) as error:
        return _explain(error)
    _write("table", config.folder)
    try:
        _write("figure", config.folder)
    # Nothing to draw yet, or nothing to draw with: the runs are no worse for that.
    except ValueError as error:
        say(f"no figure: {error}")
    return 0 if complete else 3


def report(what: str, arguments: Sequence[str]) -> int:
    """Write table.md, or figure.png and figure.pdf, into each of the folders."""
    program = f"python -m experiments.in_context {what}"
    reader = argparse.ArgumentParser(prog=program, description=report.__doc__)
    reader.add_argument("out", nargs="+", type=Path, help="folder of runs, as --out named it")
    try:
        for out in reader.parse_args(arguments).out:
            _write(what, out)
    except (ValueError, OSError) as error:
        return _explain(error)
    return 0


def _write(what: str, out: Path) -> None:
    """Write a table, which is also printed, or a figure."""
    from experiments.in_context import figure, table
    from experiments.in_context.results import read_experiment

    found = read_experiment(out)
    if what == "figure":
        written = figure.draw(found, out / "figure")
    else:
        written = [out / "table.md"]
        written[0].write_text(text := table.markdown(found))
        print(text)
    for path in written:
        say(f"wrote {path}")


def say(line: str) -> None:
    """Print where the work stands; standard output is for tables."""
    print(line, file=sys.stderr, flush=True)


def _explain(error: ValueError | OSError) -> int:
    """Say in one line what is wrong."""
    words = " ".join(str(error).split())
    if isinstance(error, OSError) and error.filename:
        words = f"{error.filename}: {error.strerror}"
    say(f"error: {words}")
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
