"""`python -m experiments.moons --preset smoke|small|paper`: train, measure and draw.

Two models learn to predict systems of three moons: one head that sees all six coordinates, and
three heads of two. Writes moons.json and moons.png beside the runs. The same command goes on where
it was stopped. On two CPU cores smoke takes a quarter of a minute, small one, and paper, the
published setting, four.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


def main(arguments: Sequence[str]) -> int:
    """Do what the words say; return 0, 2 where that is impossible, 3 where steps are left to do."""
    options = _reader().parse_args(arguments)
    # After parsing: these take seconds to import, and --help needs none of them.
    from experiments.methods import method
    from experiments.moons import figure
    from experiments.moons.run import MODELS, PRESETS, about, findings, run
    from kreg.training import Progress

    config = dataclasses.replace(PRESETS[options.preset], method=options.method, seed=options.seed)
    folder = options.out or Path("runs/moons") / config.name
    try:
        method(config.method)
        limit = None if options.time_limit is None else 60 * options.time_limit / len(MODELS)
        found = about(config) | {"models": {}}
        for name in MODELS:
            place = folder / name.replace(" ", "_")
            model, trained = run(config, name, place, time_limit=limit, progress=Progress(name))
            if not trained.finished:
                say(f"stopped in {name}; the same command goes on from there")
                return 3
            found["models"][name] = findings(config, model)
        _whole(folder / "moons.json", lambda path: _dump(found, path))
        _whole(folder / "moons.png", lambda path: figure.draw(found, path))
    except (ValueError, OSError) as error:
        say(f"error: {' '.join(str(error).split())}")
        return 2
    for name, model in found["models"].items():
        moons, everything = model["error_after_moons"], model["error_after_all"]
        say(
            f"{name}: error {moons:.4f} after every moon came round, {everything:.4f} after all did"
        )
    three = found["models"]["three heads"]["disentanglement"]
    say(f"the head of a moon has {three:.0%} of its prediction; wrote {folder}/moons.json and .png")
    return 0


def _reader() -> argparse.ArgumentParser:
    wide = argparse.RawDescriptionHelpFormatter
    reader = argparse.ArgumentParser(
        prog="python -m experiments.moons", description=__doc__, formatter_class=wide
    )
    reader.add_argument("--preset", choices=("smoke", "small", "paper"), default="smoke")
    reader.add_argument("--method", default="softmax", help="kernel and rule, as in in_context")
    reader.add_argument("--seed", type=int, default=0, help="of weights and windows")
    reader.add_argument("--out", type=Path, help="folder; by default one in runs/moons")
    reader.add_argument("--time-limit", type=float, help="stop cleanly after so many minutes")
    return reader


def _dump(found: dict, path: Path) -> None:
    path.write_text(json.dumps(found, indent=2) + "\n")


def _whole(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        write(partial)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def say(line: str) -> None:
    """Print on standard error."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
