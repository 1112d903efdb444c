"""The tests' oracle, tolerances, inputs and cells, loaded from the folder of this repository."""

import importlib
import sys
from types import ModuleType

from experiments.hardware.device import ROOT

TESTS = ROOT / "tests"


def load(name: str) -> ModuleType:
    """Import a module of tests/, which is no package; none of those asked for needs pytest.

    Raises:
        FileNotFoundError: this is an installed copy, without the repository around it.
    """
    if not (TESTS / f"{name}.py").is_file():
        raise FileNotFoundError(f"{TESTS / name}.py: run this from a clone of the repository")
    if str(TESTS) not in sys.path:
        sys.path.insert(0, str(TESTS))
    return importlib.import_module(name)
