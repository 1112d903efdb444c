"""`python -m experiments.moons [options]`, and `... table OUT...`, `... figure OUT...`."""

import sys

from experiments.moons.experiment import EXPERIMENT
from experiments.runs.command import command

if __name__ == "__main__":
    sys.exit(command(EXPERIMENT, sys.argv[1:]))
