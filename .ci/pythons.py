"""Find a Python >= 3.12, and uv, on the machine at hand; fetch either where it is missing.

A Python is looked for on PATH, under pyenv's versions folder and in uv. Standard library alone,
Python >= 3.6.
"""

import collections
import glob
import os
import re
import shutil
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CACHE = os.path.join(ROOT, ".cache")
LOG = os.path.join(CACHE, "setup.log")
# The lock's descriptor: an installer inherits it, so one that outlives us still holds the lock.
HELD = []
OLDEST = (3, 12)
NEWEST_TRIED = (3, 14)  # some dependencies have no wheels for a newer Python: the last resort
FETCHED = "3.12"
NAMES = ("python3.12", "python3.13", "python3.14", "python3", "python")
KREG_PYTHON = os.environ.get("KREG_PYTHON", "")
KREG_UV = os.environ.get("KREG_UV") != "0"
OWN_UV = os.path.join(CACHE, "uv", "bin", "uv")
ADVICE = "Install Python 3.12, or name one by KREG_PYTHON=/path/to/python3.12."

Interpreter = collections.namedtuple("Interpreter", "path version origin has_pip")

PROBE = (
    "import sys, importlib.util as u; print('%d.%d.%d' % sys.version_info[:3]);"
    "print(sys.implementation.name); print(getattr(sys, '_base_executable', sys.executable));"
    "print(int(u.find_spec('venv') is not None and u.find_spec('ensurepip') is not None))"
)
NO_NETWORK = re.compile(
    "name resolution|name or service not known|nodename nor servname|dns error|could not resolve|"
    "failed to lookup address|error sending request|network is unreachable|no route to host|"
    "connection refused|failed to establish a new connection|NewConnectionError",
    re.IGNORECASE,
)


class SetupError(Exception):
    """The set-up cannot go on; the message is all that the user reads."""


def say(text):
    print("kreg: " + text, file=sys.stderr)
    sys.stderr.flush()


def output(*command):
    """The standard output of a command, or None where it fails or is not there."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, timeout=120, universal_newlines=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None


def logged(command, environ=None):
    """Run a command, its output in the log; return whether it succeeded, and what it printed."""
    terminal = sys.stderr.isatty()
    start = time.time()
    with open(LOG, "a+") as log:
        log.write("\n$ " + " ".join(command) + "\n")
        log.flush()
        begin = log.tell()
        try:
            child = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                env=dict(os.environ, **(environ or {})), pass_fds=HELD,
            )  # fmt: skip
        except OSError as error:
            return False, str(error)
        try:
            while child.poll() is None:
                time.sleep(0.1)
                if terminal:
                    sys.stderr.write("\r  %d s " % (time.time() - start))
                    sys.stderr.flush()
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
            if terminal:
                sys.stderr.write("\r          \r")
        log.seek(begin)
        return child.returncode == 0, log.read()


def probe(path, origin):
    """Start an interpreter and ask it; a pyenv shim exists on PATH and may still refuse to run."""
    answer = (output(path, "-I", "-c", PROBE) or "").split("\n")
    if len(answer) < 4 or answer[1] != "cpython":
        return None
    version = tuple(int(part) for part in answer[0].split("."))
    if version < OLDEST:
        return None
    # PATH may lead into an activated environment, even the one that is to be replaced.
    base = answer[2] if os.path.exists(answer[2]) else path
    return Interpreter(base, version, origin, answer[3] == "1")


def candidates(uv):
    """Where a Python may be, the cheapest places first."""
    for name in NAMES:
        for folder in os.get_exec_path():
            if os.access(os.path.join(folder, name), os.X_OK):
                yield "PATH", os.path.join(folder, name)
    for root in (os.environ.get("PYENV_ROOT"), os.path.expanduser("~/.pyenv")):
        if root:
            for path in sorted(glob.glob(os.path.join(root, "versions", "3.*", "bin", "python3"))):
                if re.search(r"/versions/3\.(1[2-9]|[2-9][0-9])[^/]*/bin", path):
                    yield "pyenv", path
    if uv:
        found = output(uv, "python", "find", "--system", "--no-python-downloads", ">=3.12")
        if found:
            yield "uv", found.strip()


def find_python(uv):
    """The first Python that was tried with the pins, else any newer one, else None."""
    if KREG_PYTHON:
        chosen = probe(shutil.which(KREG_PYTHON) or KREG_PYTHON, "KREG_PYTHON")
        if chosen is None:
            raise SetupError("KREG_PYTHON: expected a CPython >= 3.12, got " + KREG_PYTHON)
        return chosen
    newer = None
    seen = set()
    for origin, path in candidates(uv):
        if os.path.realpath(path) in seen:
            continue
        seen.add(os.path.realpath(path))
        python = probe(path, origin)
        if python and python.version[:2] <= NEWEST_TRIED:
            return python
        newer = newer or python
    return newer


def find_uv():
    """A uv that runs, or None."""
    if not KREG_UV:
        return None
    home = os.path.expanduser("~")
    places = [shutil.which("uv"), os.path.join(home, ".local", "bin", "uv")]
    places += [os.path.join(home, ".cargo", "bin", "uv"), OWN_UV]
    for path in places:
        if path and output(path, "--version"):
            return path
    return None


def obtain_uv(python):
    """Install uv by pip into .cache/uv, a tenth of the wait for pip; None where that fails."""
    if not KREG_UV:
        return None
    by = python.path if python and python.has_pip else sys.executable
    folder = os.path.dirname(os.path.dirname(OWN_UV))
    shutil.rmtree(folder, ignore_errors=True)
    what = ["-m", "pip", "install", "--retries", "1", "--disable-pip-version-check"]
    what += ["--require-hashes", "-r", os.path.join(".ci", "requirements-uv.txt")]
    made, _ = logged([by, "-m", "venv", folder])
    if not (made and logged([os.path.join(folder, "bin", "python"), *what])[0]):
        logged([by, *what, "--target", folder])
    return OWN_UV if output(OWN_UV, "--version") else None


def fetch_python(uv):
    """Let uv download a Python, into uv's own folder and nowhere else."""
    say("no Python 3.12 to 3.14 here: letting uv fetch Python %s" % FETCHED)
    fetched, text = logged([uv, "python", "install", FETCHED], {"UV_PYTHON_INSTALL_BIN": "0"})
    found = output(uv, "python", "find", "--managed-python", "--no-python-downloads", FETCHED)
    python = probe(found.strip(), "fetched by uv") if fetched and found else None
    if python is None:
        reason = "no network" if NO_NETWORK.search(text) else "see .cache/setup.log"
        raise SetupError(
            "there is no Python >= 3.12 on PATH, under pyenv or in uv, and uv could not fetch one"
            " (%s). " % reason + ADVICE
        )
    return python
