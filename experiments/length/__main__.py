"""`python -m experiments.length [options]`, and `... table OUT...`, `... figure OUT...`."""

import sys

from experiments.length.experiment import EXPERIMENT
from experiments.runs.command import command

if __name__ == "__main__":
    sys.exit(command(EXPERIMENT, sys.argv[1:]))
