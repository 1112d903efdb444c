"""`python -m experiments reproduce NAME [...]` and `python -m experiments report OUT...`."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.paper import EXPERIMENTS, named, of_folder
from experiments.runs import command
from experiments.runs.command import explain, say
from experiments.runs.cost import minutes


def main(arguments: Sequence[str]) -> int:
    """Do what the words say; return 0, 2 where that is impossible, 3 where runs are left to do."""
    reader = argparse.ArgumentParser(prog="python -m experiments", description=_description())
    commands = reader.add_subparsers(dest="command", required=True)
    one = commands.add_parser(
        "reproduce",
        help="train what is missing of an experiment, then write its table and figure",
        epilog="Other options go to the experiment's own command: --data.train, --time-limit, ...",
        allow_abbrev=False,
    )
    one.add_argument("name", help=", ".join(EXPERIMENTS))
    one.add_argument("--preset", choices=("smoke", "small", "paper"), default="smoke")
    one.add_argument("--dry-run", action="store_true", help="say what it would cost, do nothing")
    one.add_argument(
        "--rate",
        type=float,
        help="tokens a second to reckon with in a dry run; by default a few steps are measured",
    )
    page = commands.add_parser("report", help="one HTML page of folders of runs")
    page.add_argument("out", nargs="+", type=Path, help="folder of runs")
    page.add_argument("--to", type=Path, default=Path("report.html"), help="file to write")
    options, more = reader.parse_known_args(arguments)
    if more and options.command == "report":
        page.error(f"unrecognized arguments: {' '.join(more)}")
    try:
        if options.command == "report":
            return _report(options.out, options.to)
        return _reproduce(options, more)
    except (ValueError, OSError) as error:
        return explain(error)


def _description() -> str:
    there = [
        f"{name}: {entry.title}{'' if entry.exists else ' (not in this version)'}"
        for name, entry in EXPERIMENTS.items()
    ]
    return f"The paper's experiments. {'; '.join(there)}."


def _reproduce(options: argparse.Namespace, more: Sequence[str]) -> int:
    """Do the folders of an experiment one after the other; stop at the first that is not done."""
    entry = named(options.name)
    experiment = entry.load()
    configs = [command.parse(experiment, words) for words in entry.commands(options.preset, more)]
    if options.dry_run:
        from experiments.runs.forecast import forecast

        seconds = []
        for config in configs:
            experiment.check(config)
            if getattr(config, "devices", ""):
                say("the forecast is that of one device")
                config = dataclasses.replace(config, devices="")
            found = forecast(experiment, config, options.rate)
            print(found.told(), flush=True)
            seconds.append(found.seconds)
        if len(seconds) > 1:
            print(f"{len(seconds)} folders: {minutes(sum(seconds))}")
        return 0
    for config in configs:
        if status := command.reproduce(experiment, config):
            return command.as_exit(status)
    return 0


def _report(folders: Sequence[Path], to: Path) -> int:
    """Write one page of all folders."""
    from experiments.runs.json_files import write_text
    from experiments.runs.page import page, section

    sections = [section(of_folder, out) for out in folders]
    write_text(to, page(sections))
    say(f"wrote {to}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
