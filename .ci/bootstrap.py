"""Make the Python environments of this repository: `python3 .ci/bootstrap.py [ENVIRONMENT ...]`.

Runs on any python3 >= 3.6 with the standard library alone. Packages come by uv where it is there
and works, else by venv and pip; pinned versions with hashes first, plain ranges where a pin cannot
be had. A stamp inside the environment, written last, makes the next run a matter of milliseconds,
and tells a finished environment from an interrupted one.

Environment variables: KREG_PYTHON, the interpreter to use; KREG_PINS=0, install without the pins;
KREG_UV=0, install with venv and pip.
"""

import collections
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys

import pythons
from pythons import CACHE, KREG_PYTHON, NO_NETWORK, ROOT, SetupError, logged, output, say

STAMP = ".kreg-setup"
KREG_PINS = os.environ.get("KREG_PINS") != "0"

Environment = collections.namedtuple("Environment", "folder pins extras groups more project")
ENVIRONMENTS = {
    "user": Environment(".venv", "requirements.txt", ["experiments"], ["test"], [], True),
    "oldest": Environment(
        ".venv-oldest", "requirements-oldest.txt", ["experiments"], ["test"], ["jax==0.11.2"], True
    ),
    "aot": Environment(
        ".venv-aot", "requirements-aot.txt", ["experiments"], ["test", "aot"], [], True
    ),
    "aot-oldest": Environment(
        ".venv-aot-oldest",
        "requirements-aot-oldest.txt",
        ["experiments"],
        ["test", "aot"],
        ["jax==0.11.2", "jax-cuda13-plugin==0.11.2"],
        True,
    ),
    "lint": Environment(".venv-lint", "requirements-lint.txt", [], ["lint"], [], False),
}

RANGES = (
    "import sys, json, tomllib; t = tomllib.load(open('pyproject.toml', 'rb')); p = t['project'];"
    "extras, groups, project = json.loads(sys.argv[1]);"
    "print(json.dumps((t['build-system']['requires'] + p['dependencies'] if project else [])"
    "+ [r for e in extras for r in p['optional-dependencies'][e]]"
    "+ [r for g in groups for r in t['dependency-groups'][g]]))"
)
WRONG_HASH = re.compile("do not match the hashes|hash mismatch", re.IGNORECASE)
NO_SPACE = re.compile("no space left on device|os error 28", re.IGNORECASE)


def wanted_key(environment):
    """A hash of everything an environment is made from, but the interpreter."""
    digest = hashlib.sha256(ROOT.encode())
    pins = os.path.join(".ci", environment.pins)
    for name in ("pyproject.toml", pins):
        with open(os.path.join(ROOT, name), "rb") as file:
            digest.update(file.read() + b"\0")
    digest.update(json.dumps([KREG_PINS, KREG_PYTHON]).encode())
    return digest.hexdigest()


def read_stamp(folder):
    """The stamp of an environment, or None where there is none or it is damaged."""
    try:
        with open(os.path.join(folder, STAMP)) as file:
            return json.load(file)
    except (OSError, ValueError):
        return None


def write_stamp(folder, stamp):
    """Put the stamp in place in one step."""
    path = os.path.join(folder, STAMP)
    with open(path + ".new", "w") as file:
        json.dump(stamp, file)
    os.replace(path + ".new", path)


def is_ready(folder, key):
    """Whether the environment is finished, up to date, and its interpreter still exists."""
    stamp = read_stamp(folder) or {}
    python = os.path.join(folder, "bin", "python")
    return stamp.get("ready") == key and os.path.exists(python)


def refuse_foreign(environment, folder):
    """Raise where somebody else made the folder: it is not ours to replace."""
    if os.path.lexists(folder) and not os.path.exists(os.path.join(folder, STAMP)):
        raise SetupError(
            "%s exists and was not made by this set-up: move it away or remove it, then run"
            " this again" % environment.folder
        )


def clear(folder):
    """Empty an environment that this file made, finished or not, and mark it as unfinished."""
    os.makedirs(folder, exist_ok=True)
    write_stamp(folder, {"ready": None})
    # The stamp stays: a removal that is interrupted leaves a folder that is still ours.
    for name in set(os.listdir(folder)) - {STAMP}:
        path = os.path.join(folder, name)
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            os.remove(path)


def install_commands(uv, folder, python):
    """The command that makes the environment, and the beginning of one that installs into it."""
    inside = os.path.join(folder, "bin", "python")
    if uv:
        make = [uv, "venv", "--quiet", "--allow-existing", "--python", python.path, folder]
        return make, [uv, "pip", "install", "--quiet", "--python", inside]
    options = ["--quiet", "--disable-pip-version-check", "--retries", "2"]
    return [python.path, "-m", "venv", folder], [inside, "-m", "pip", "install", *options]


def install(environment, uv, python, pinned):
    """Make the environment and fill it; return how far that came and what was printed last."""
    folder = os.path.join(ROOT, environment.folder)
    clear(folder)
    make, fill = install_commands(uv, folder, python)
    made, text = logged(make)
    if not made:
        return "empty", text
    if pinned:
        packages = ["--require-hashes", "-r", os.path.join(".ci", environment.pins)]
    else:
        what = json.dumps([environment.extras, environment.groups, environment.project])
        packages = json.loads(output(os.path.join(folder, "bin", "python"), "-c", RANGES, what))
        packages += environment.more
    filled, text = logged(fill + packages)
    if not filled:
        return "empty", text
    if environment.project:
        done, text = logged([*fill, "--no-deps", "--no-build-isolation", "-e", "."])
        return "done" if done else "without the project", text
    return "done", text


def attempts(environment, uv, python):
    """Every way to install, in order: uv before pip, pins before ranges."""
    by = [uv] if uv else []
    if python.has_pip:
        by.append(None)
    for installer in by:
        for pinned in (True, False) if KREG_PINS else (False,):
            yield installer, pinned


def explain(text):
    """One sentence about why an installation failed."""
    if NO_SPACE.search(text):
        return "no space left on the device"
    if WRONG_HASH.search(text):
        return (
            "a downloaded package is not the file that was pinned (hash mismatch); if you trust"
            " your package index, KREG_PINS=0 installs without the pins"
        )
    if NO_NETWORK.search(text):
        return "no package index could be reached: is there a network?"
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    errors = [line for line in lines if re.match("error|cause", line, re.IGNORECASE)]
    return "; ".join(errors[:2] or lines[-1:]) or "no message"


def choose():
    """The interpreter, and a uv or None: found here where possible, fetched where not."""
    uv = pythons.find_uv()
    python = pythons.find_python(uv)
    uv = uv or pythons.obtain_uv(python)
    if python and (KREG_PYTHON or python.version[:2] <= pythons.NEWEST_TRIED):
        return python, uv
    try:
        if uv is None:
            raise SetupError(
                "there is no Python >= 3.12 on PATH or under pyenv, and no uv to fetch one. "
                + pythons.ADVICE
            )
        return pythons.fetch_python(uv), uv
    except SetupError:
        if python is None:
            raise
    return python, uv


def name_of(uv):
    """What installs, in words."""
    if uv == pythons.OWN_UV:
        return "uv (by pip into .cache/uv)"
    return "uv" if uv else "venv and pip"


def build(environment, key):
    """Make one environment from nothing, trying each way to install until one succeeds."""
    folder = os.path.join(ROOT, environment.folder)
    refuse_foreign(environment, folder)
    python, uv = choose()
    if not (uv or python.has_pip):
        raise SetupError(
            "%s has no venv module and there is no uv: install python3-venv or uv" % python.path
        )
    version = ".".join(str(part) for part in python.version)
    text, offline = "", False
    for installer, pinned in attempts(environment, uv, python):
        if offline and not pinned:
            continue  # where no index answers, ranges are as far away as pins
        chosen = "Python %s (%s), %s, %s versions -> %s" % (
            version, python.origin, name_of(installer),
            "pinned" if pinned else "unpinned", environment.folder,
        )  # fmt: skip
        say(("that failed (%s); now " % explain(text) if text else "") + chosen)
        state, text = install(environment, installer, python, pinned)
        if state == "done":
            write_stamp(folder, {"ready": key, "python": python.path, "version": version})
            return
        if state != "empty" or WRONG_HASH.search(text) or NO_SPACE.search(text):
            break  # what no other way to install would change
        offline = bool(NO_NETWORK.search(text))
    raise SetupError(
        "%s could not be made: %s (all of it: .cache/setup.log)"
        % (environment.folder, explain(text))
    )


def ensure(name):
    """Make an environment unless it is there; one process at a time."""
    environment = ENVIRONMENTS[name]
    key = wanted_key(environment)
    folder = os.path.join(ROOT, environment.folder)
    if is_ready(folder, key):
        return
    os.makedirs(CACHE, exist_ok=True)
    with open(os.path.join(CACHE, "setup.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        pythons.HELD[:] = [lock.fileno()]
        if not is_ready(folder, key):
            build(environment, key)
        pythons.HELD[:] = []


def main(names):
    try:
        for name in names or ["user"]:
            if name not in ENVIRONMENTS:
                wanted = ", ".join(sorted(ENVIRONMENTS))
                raise SetupError("environment: expected one of %s, got %s" % (wanted, name))
            ensure(name)
    except SetupError as error:
        say(str(error))
        return 1
    except OSError as error:
        say("the set-up cannot write or read what it needs: %s" % error)
        return 1
    except KeyboardInterrupt:
        say("interrupted; the next run begins this environment again")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
