"""Golden cases of the entmax package: its maps of scores to weights, and their derivatives.

Groups, functions, shapes, axes and parameters are read from the files. One thing is left out, row
by row: derivatives of rows that lie within 1e-9 of a kink (`vjp_fragile_rows` in the json), where
one-sided derivatives differ.
"""

import functools
import re

import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nightly import NIGHTLY

import kreg

FILE = "entmax_activations"


@functools.partial(jax.jit, static_argnames=("name", "axis"))
def with_parameter(name, x, cot, parameter, axis):
    """Return entmax, normmax or budget and its pull-backs to x and to the parameter."""
    map_ = getattr(kreg, name)
    y, pull = jax.vjp(lambda x, parameter: map_(x, parameter, axis=axis), x, parameter)
    return y, *pull(cot)


@functools.partial(jax.jit, static_argnames=("name", "axis"))
def named(name, x, cot, axis):
    """Return sparsemax or entmax15 and its pull-back."""
    y, pull = jax.vjp(lambda x: getattr(kreg, name)(x, axis=axis), x)
    return y, *pull(cot)


def allowed(function: str, parameter: float, scale: float = 0.0) -> dict[str, float]:
    """Return the absolute errors of golden/README.md, section 6."""
    if function.startswith("budget"):
        return {"y": 1e-11 if scale >= 80 else 1e-12, "vjp_x": 1e-11}
    return {
        "y": 1e-12 if parameter < 2.5 else 1e-11,
        "vjp_x": 1e-11 if parameter <= 2 else 1e-8,
        "vjp_alpha": 1e-8,
    }


def compare(what: str, got, golden: np.ndarray, tolerance: float, keep=...) -> None:
    assert got.shape == golden.shape, f"{what}: {got.shape} instead of {golden.shape}"
    error = np.max(np.abs(np.asarray(got) - golden)[keep], initial=0.0)
    assert error <= tolerance, f"{what}: off by {error:.2e}, allowed {tolerance:.0e}"


def check_function(group, function: str, x: np.ndarray, cot: np.ndarray) -> int:
    """Compare one function of one group; return how many arrays were compared."""
    info = group.info["funcs"][function]
    axis = info.get("dim", group.info.get("axis", -1))
    parameter = float(info["parameter"])
    tolerance = allowed(function, parameter, group.info.get("scale", 0.0))
    if match := re.match(r"(entmax|normmax|budget)_bisect", function):
        shape = list(x.shape)
        shape[axis] = 1
        results = with_parameter(match[1], x, cot, jnp.full(shape, parameter), axis)
    else:
        results = named(re.match(r"sparsemax|entmax15", function)[0], x, cot, axis)
    robust = np.setdiff1d(np.arange(x.shape[0]), info.get("vjp_fragile_rows", []))
    compared = 0
    for name, got in zip(("y", "vjp_x", "vjp_alpha"), results, strict=False):
        if f"{function}/{name}" in group:
            keep = ... if name == "y" else robust
            golden = group[f"{function}/{name}"]
            compare(f"{group.name}/{function}/{name}", got, golden, tolerance[name], keep)
            compared += 1
    return compared


def check_given_alpha(group, x: np.ndarray, cot: np.ndarray) -> int:
    """Compare a group that brings its own alpha, a scalar or an array that broadcasts."""
    alpha = group["alpha"]
    tolerance = allowed("entmax", float(alpha.max()))
    results = with_parameter("entmax", x, cot, jnp.asarray(alpha), -1)
    for name, got in zip(("y", "vjp_x", "vjp_alpha"), results, strict=True):
        compare(f"{group.name}/{name}", got, group[name], tolerance[name])
    return len(results)


def check_bisections(group, function: str, x: np.ndarray, cot: np.ndarray) -> int:
    """Compare with n bisections that were not renormalised: 2^-n in tau costs 2 r 2^-n in p."""
    alpha, steps = re.fullmatch(r"entmax_bisect_a([\d.]+)_niter(\d+)_nosum", function).groups()
    y, *_ = with_parameter("entmax", x, cot, jnp.asarray(float(alpha)), -1)
    order = 1 / (float(alpha) - 1)
    assert order >= 1
    what = f"{group.name}/{function}"
    tolerance = max(2 * order * 2.0 ** -int(steps), 1e-12)
    compare(what, y, group[f"{function}/y"], tolerance)
    return 1


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=NIGHTLY if name.endswith(("_d64", "_d1000", "_neg")) else ())
        for name in golden_files.group_names(FILE)
    ],
)
def test_golden_entmax(name):
    group = golden_files.open_group(FILE, name)
    with jax.enable_x64(True):
        x, cot = group["x"], group["cot"]
        count = check_given_alpha(group, x, cot) if "alpha" in group else 0
        for function in group.members("y"):
            check = check_bisections if "_niter" in function else check_function
            count += check(group, function, x, cot)
    group.finish(count)
