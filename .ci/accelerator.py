"""Print the path of a Python whose jax sees a GPU or a TPU: `python3 .ci/accelerator.py`.

Such a machine often brings its own Python with jax and has no package index. Only where no Python
sees an accelerator is the ordinary environment made, and its path printed. Standard library alone,
Python >= 3.6.
"""

import os
import shutil
import sys

import bootstrap
from pythons import KREG_PYTHON, ROOT, SetupError, output, say

PROBE = (
    "import jax, re; import importlib.util as u; device = jax.devices()[0];"
    "recent = tuple(map(int, re.findall('[0-9]+', jax.__version__)[:3])) >= (0, 11, 1);"
    "print(int(recent and device.platform != 'cpu')); print(device.device_kind);"
    "print(' '.join(n for n in ('jaxtyping', 'flax', 'optax', 'orbax') if u.find_spec(n) is None))"
)


def interpreters():
    """The Pythons to ask: the one that runs this file, those on PATH, the ordinary environment."""
    own = os.path.join(ROOT, ".venv", "bin", "python")
    named = [KREG_PYTHON, sys.executable]
    named += [shutil.which("python3"), shutil.which("python"), own]
    return [path for i, path in enumerate(named) if path and path not in named[:i]]


def accelerator():
    """The first Python that sees an accelerator and has what the experiments import, or None."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    incomplete = None
    for path in interpreters():
        answer = (output(path, "-c", PROBE) or "0").split("\n")
        if answer[0] != "1":
            continue
        if not answer[2]:
            say("%s, whose jax sees %s" % (path, answer[1]))
            return path
        incomplete = incomplete or (path, answer[1], answer[2].replace(" ", ", "))
    if incomplete:
        raise SetupError("%s sees %s but lacks %s: install these" % incomplete)
    return None


def main():
    try:
        found = accelerator()
    except SetupError as error:
        say(str(error))
        return 1
    if found is None:
        say("no Python here has a jax >= 0.11.1 that sees an accelerator: using .venv")
        status = bootstrap.main(["user"])
        if status:
            return status
        found = os.path.join(ROOT, ".venv", "bin", "python")
    print(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
