"""The set-up: what counts as a Python and as a finished environment, and what the pins hold."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CI = ROOT / ".ci"


@pytest.fixture
def setup(monkeypatch, tmp_path):
    """The set-up's modules, working on an empty folder."""
    monkeypatch.syspath_prepend(str(CI))
    import bootstrap
    import pythons

    for module in (bootstrap, pythons):
        monkeypatch.setattr(module, "ROOT", str(tmp_path))
        monkeypatch.setattr(module, "CACHE", str(tmp_path / ".cache"))
        monkeypatch.setattr(module, "KREG_PYTHON", "")
    monkeypatch.setattr(pythons, "LOG", str(tmp_path / "log"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PYENV_ROOT", raising=False)
    (tmp_path / ".ci").mkdir()
    for path in [ROOT / "pyproject.toml", *CI.glob("requirements*.txt")]:
        (tmp_path / path.relative_to(ROOT)).write_bytes(path.read_bytes())
    return bootstrap, pythons, tmp_path


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("name", [path.name for path in sorted(CI.glob("requirements*.txt"))])
def test_pins_have_hashes_and_no_addresses(name):
    text = (CI / name).read_text()
    assert "http" not in text and "://" not in text and "--index" not in text
    requirements = re.split(r"\n(?! )", text.strip())
    assert requirements
    for requirement in requirements:
        assert re.match(r"[a-z0-9.-]+==[0-9]", requirement)
        assert "--hash=sha256:" in requirement


def test_pins_of_the_two_jax_differ_in_jax_alone():
    def versions(name):
        return dict(re.findall(r"^([a-z0-9.-]+)==(\S+)", (CI / name).read_text(), re.MULTILINE))

    newest, oldest = versions("requirements.txt"), versions("requirements-oldest.txt")
    assert {name for name in newest if newest[name] != oldest.get(name)} == {"jax", "jaxlib"}
    assert oldest["jax"] == "0.11.2"


def test_python_under_pyenv_is_found_where_the_shim_refuses(setup, monkeypatch):
    _, pythons, folder = setup
    program(
        folder / "shims" / "python3.12", "echo 'pyenv: python3.12: command not found' >&2; exit 127"
    )
    program(folder / "shims" / "python3", "printf '3.11.7\\ncpython\\n/old\\n1\\n'")
    real = folder / "home" / ".pyenv" / "versions" / "3.12.1" / "bin" / "python3"
    real.parent.mkdir(parents=True)
    real.symlink_to(sys.executable)
    monkeypatch.setenv("PATH", str(folder / "shims"))
    python = pythons.find_python(None)
    assert python.origin == "pyenv"
    assert python.version == sys.version_info[:3]


def test_python_too_new_for_the_pins_comes_last(setup, monkeypatch):
    _, pythons, folder = setup
    program(folder / "bin" / "python3", "printf '3.99.0\\ncpython\\n/new\\n1\\n'")
    monkeypatch.setenv("PATH", str(folder / "bin"))
    assert pythons.find_python(None).version == (3, 99, 0)
    program(folder / "bin" / "python", "printf '3.13.0\\ncpython\\n/good\\n1\\n'")
    assert pythons.find_python(None).version == (3, 13, 0)


@pytest.mark.parametrize("answer", ["3.11.9\\ncpython\\n/x\\n1", "3.12.0\\npypy\\n/x\\n1", "what?"])
def test_unfit_pythons_are_refused(setup, answer):
    _, pythons, folder = setup
    assert pythons.probe(str(program(folder / "python", f"printf '{answer}\\n'")), "PATH") is None


def test_an_unfinished_environment_is_not_ready(setup):
    bootstrap, _, folder = setup
    environment = bootstrap.ENVIRONMENTS["user"]
    place = str(folder / environment.folder)
    key = bootstrap.wanted_key(environment)
    bootstrap.clear(place)
    program(folder / environment.folder / "bin" / "python", "exit 0")
    assert not bootstrap.is_ready(place, key)
    bootstrap.write_stamp(place, {"ready": key})
    assert bootstrap.is_ready(place, key)
    with open(folder / environment.folder / bootstrap.STAMP, "r+") as stamp:
        stamp.truncate(10)
    assert not bootstrap.is_ready(place, key)
    bootstrap.write_stamp(place, {"ready": key})
    (folder / "pyproject.toml").write_text("[project]\n")
    assert not bootstrap.is_ready(place, bootstrap.wanted_key(environment))
    bootstrap.clear(place)
    assert os.listdir(place) == [bootstrap.STAMP]


def test_a_foreign_environment_is_left_alone(setup, capsys):
    bootstrap, _, folder = setup
    mine = folder / ".venv" / "mine"
    mine.parent.mkdir()
    mine.write_text("precious")
    assert bootstrap.main(["user"]) == 1
    assert ".venv exists and was not made by this set-up" in capsys.readouterr().err
    assert mine.read_text() == "precious"
    assert os.listdir(mine.parent) == ["mine"]


@pytest.mark.parametrize(
    ("failure", "tried", "message"),
    [
        ("resolution impossible", ["uv 1", "uv 0", "pip 1", "pip 0"], "resolution impossible"),
        ("dns error", ["uv 1", "pip 1"], "no package index could be reached"),
        ("No space left on device", ["uv 1"], "no space left"),
        ("Hash mismatch for numpy", ["uv 1"], "hash mismatch"),
    ],
)
def test_every_way_to_install_is_tried_once(setup, monkeypatch, capsys, failure, tried, message):
    bootstrap, pythons, _ = setup
    python = pythons.Interpreter(sys.executable, (3, 12, 1), "PATH", True)
    monkeypatch.setattr(bootstrap, "KREG_PINS", True)
    monkeypatch.setattr(bootstrap, "choose", lambda: (python, "uv"))
    attempts = []

    def install(environment, uv, python, pinned):
        attempts.append(f"{uv or 'pip'} {pinned:d}")
        return "empty", failure

    monkeypatch.setattr(bootstrap, "install", install)
    assert bootstrap.main(["user"]) == 1
    assert attempts == tried
    lines = capsys.readouterr().err.strip().split("\n")
    assert len(lines) == len(tried) + 1
    assert message in lines[-1]


def test_make_alone_explains():
    done = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for target in ("demo", "test", "lint", "figures", "hardware", "clean"):
        assert f"make {target}" in done.stdout
