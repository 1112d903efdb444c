"""The package from outside: its names, what importing it brings along, its layers, its wheel."""

import ast
import importlib
import inspect
import json
import pkgutil
import subprocess
import sys
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import kreg

ROOT = Path(__file__).resolve().parent.parent

PUBLIC = [
    "Adaptive",
    "Anchored",
    "Fixed",
    "Kernel",
    "Mask",
    "Nearest",
    "attention",
    "biweight",
    "box",
    "budget",
    "entmax",
    "entmax15",
    "entmax15_loss",
    "entmax_loss",
    "epanechnikov",
    "explain_implementation",
    "gaussian",
    "nadaraya_watson",
    "normalized_relu",
    "normmax",
    "normmax_loss",
    "rectified_polynomial",
    "relumax",
    "softmax",
    "sparsemax",
    "sparsemax_loss",
    "topk_softmax",
    "topk_uniform",
    "triweight",
]

HEAVY = [
    "flax",
    "optax",
    "orbax",
    "grain",
    "chex",
    "pallas_kernels",
    "matplotlib",
    "tyro",
    "kreg.nn",
]
OPTIONAL = [
    "beartype",
    "grain",
    "matplotlib",
    "tiktoken",
    "tyro",
]  # absent where only jax and Flax are

# What a layer may import at the top of a file, and what only within a function; jax brings numpy.
LAYERS = {
    "kreg": ({"jax", "jaxtyping", "numpy", "kreg"}, {"pallas_kernels"}),
    "kreg.nn": ({"jax", "jaxtyping", "numpy", "flax", "kreg", "kreg.nn"}, set()),
    "kreg.training": (
        {"jax", "jaxtyping", "numpy", "flax", "optax", "orbax", "kreg", "kreg.nn", "kreg.training"},
        {"grain"},
    ),
    "experiments": (
        {"jax", "jaxtyping", "numpy", "flax", "optax", "kreg", "kreg.nn", "kreg.training"}
        | {"experiments"},
        {"grain", "matplotlib", "multivolumefile", "py7zr", "tiktoken", "tyro", "pallas_kernels"},
    ),
    "pallas_kernels": ({"jax", "jaxtyping", "numpy", "kreg", "pallas_kernels"}, set()),
}


def layer(module: str) -> str:
    """The layer that a module belongs to; a foreign module stands for its top-level name."""
    for name in ("kreg.nn", "kreg.training"):
        if module == name or module.startswith(name + "."):
            return name
    return module.partition(".")[0]


def imports(file: Path) -> Iterator[tuple[str, bool]]:
    """Every module a file imports, and whether that happens while the file itself is imported."""
    package = file.relative_to(ROOT).parent.parts

    def visit(node: ast.AST, eager: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            eager = False
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            eager = False
        if isinstance(node, ast.Import):
            yield from ((alias.name, eager) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join([*base, *filter(None, [node.module])])
            # The name itself may be a module: `from kreg import nn`.
            yield from ((f"{source}.{alias.name}", eager) for alias in node.names)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, eager)

    yield from visit(ast.parse(file.read_text(), str(file)), True)


def forbidden(file: Path) -> list[str]:
    """The imports of a file that its layer may not make."""
    own = layer(".".join(file.relative_to(ROOT).parent.parts))
    always, lazily = LAYERS[own]
    found = []
    for module, eager in imports(file):
        target = layer(module)
        known = target in always or (target in lazily and not eager)
        if not known and target not in sys.stdlib_module_names:
            found.append(f"{file.relative_to(ROOT)} imports {module}")
    return found


def python(program: str, *arguments: str, options: tuple[str, ...] = (), cwd: Path = ROOT) -> str:
    """The output of a program in a fresh interpreter."""
    command = [sys.executable, *options, "-c", program, *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


BLOCK = """
import json, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

BLOCKED = json.loads(sys.argv[1])
sys.meta_path.insert(0, Absent())
"""


def test_public_names():
    names = [name for name in vars(kreg) if not name.startswith("_")]
    public = [name for name in names if not isinstance(getattr(kreg, name), types.ModuleType)]
    assert sorted(public) == PUBLIC


def test_version():
    text = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {kreg.__version__}\n" in text


@pytest.mark.parametrize("name", ["kreg", "kreg.nn", "kreg.training"])
def test_docstrings(name):
    found = vars(importlib.import_module(name)).items()
    names = {key: x for key, x in found if not key.startswith("_")}
    public = {key: x for key, x in names.items() if not isinstance(x, types.ModuleType)}
    # Not inspect.getdoc, which gives a class without a docstring that of its base.
    assert [key for key, x in public.items() if ">>>" not in (x.__doc__ or "")] == []
    members = [
        (f"{key}.{member}", inspect.getdoc(getattr(owner, member)))
        for key, owner in public.items()
        if isinstance(owner, type)
        for member, x in vars(owner).items()
        if not member.startswith("_") and member not in ("tree_flatten", "tree_unflatten")
        if inspect.isroutine(x) or isinstance(x, property)
    ]
    assert [member for member, text in members if not text] == []


@pytest.mark.core
def test_import_is_light():
    loaded = json.loads(python("import json, sys, kreg; print(json.dumps(list(sys.modules)))"))
    assert "kreg.attention" in loaded
    assert [name for name in HEAVY if name in loaded] == []


@pytest.mark.parametrize("name", LAYERS)
def test_arrows_point_down(name):
    files = [
        file
        for file in (ROOT / name.partition(".")[0]).rglob("*.py")
        if layer(".".join(file.relative_to(ROOT).parent.parts)) == name
    ]
    assert files or name == "pallas_kernels"
    assert [line for file in files for line in forbidden(file)] == []


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("kreg", "import flax"),
        ("kreg", "from kreg import nn"),
        ("kreg", "from . import training"),
        ("kreg", "import pallas_kernels"),
        ("kreg/nn", "def f():\n    import optax"),
        ("kreg/nn", "from ..training import train"),
        ("kreg/training", "import grain"),
        ("kreg/training", "from experiments import methods"),
        ("experiments", "if True:\n    import matplotlib.pyplot"),
    ],
)
def test_upward_arrows_are_seen(where, line, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    file = tmp_path / where / "some.py"
    file.parent.mkdir(parents=True)
    file.write_text(line)
    assert len(forbidden(file)) == 1


def test_modules_import_without_the_optional_packages():
    packages = ["kreg", "experiments"]
    paths = [str(ROOT / name) for name in packages]
    modules = [
        found.name
        for name, path in zip(packages, paths, strict=True)
        for found in pkgutil.walk_packages([path], name + ".")
        if not found.name.endswith(".__main__")
    ]
    assert {"kreg.training", "experiments.in_context"} < set(modules)
    program = BLOCK + "import importlib\nfor name in sys.argv[2:]: importlib.import_module(name)"
    python(program, json.dumps(OPTIONAL), *modules)


WHEEL = (
    BLOCK
    + """
sys.path[:0] = [sys.argv[2]]
sys.path += sys.argv[3:]
import jax, jax.numpy as jnp, kreg

query, key = jax.random.normal(jax.random.key(0), (2, 1, 6, 2, 4))
value = jnp.broadcast_to(jnp.eye(6)[None, :, None], (1, 6, 2, 6))
weights = kreg.attention(query, key, value, kernel=kreg.biweight, is_causal=True)
print(json.dumps([kreg.__file__, weights.tolist()]))
"""
)


def test_wheel_works_with_jax_and_jaxtyping_alone(tmp_path):
    pytest.importorskip("hatchling", reason="building the wheel needs hatchling (group test)")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:  # all that installing a pure wheel without scripts does
        archive.extractall(site)
    tops = {path.name for path in site.iterdir()}
    assert tops == {"kreg", "pallas_kernels", f"kreg-{kreg.__version__}.dist-info"}

    # -S: no .pth file is read, so the repository's own editable installation is out of sight.
    packages = [path for path in sys.path if path.endswith("-packages")]
    blocked = json.dumps([*HEAVY, *OPTIONAL, "experiments"])
    options = ("-I", "-S", "-X", "utf8")
    printed = python(WHEEL, blocked, str(site), *packages, options=options, cwd=tmp_path)
    file, weights = json.loads(printed)
    assert Path(file).is_relative_to(site)
    for t, rows in enumerate(weights[0]):
        for row in rows:
            assert sum(row) == pytest.approx(1, abs=1e-6)
            assert row[t + 1 :] == [0] * (5 - t)
