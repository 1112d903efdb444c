"""A check of the contract: what it found, against what it may find at most."""

import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from experiments.hardware.report import one_line


@dataclass(frozen=True)
class Finding:
    """The worst error of one promise and its bound; `problem` where the check itself broke."""

    name: str
    error: float
    bound: float
    problem: str = ""

    @property
    def passed(self) -> bool:
        # Written so that NaN fails.
        return not self.problem and bool(self.error <= self.bound)

    def __str__(self) -> str:
        verdict = "ok  " if self.passed else "FAIL"
        found = self.problem or f"{self.error:.2e}, at most {self.bound:.2e}"
        return f"{verdict} {self.name}: {found}"

    def as_json(self) -> dict[str, Any]:
        error = None if self.problem else self.error
        content = {"name": self.name, "worst_error": error, "bound": self.bound}
        content["passed"] = self.passed
        return content | ({"problem": self.problem} if self.problem else {})


@dataclass(frozen=True)
class Check:
    """A name, and the generator of the findings with its arguments."""

    name: str
    find: Callable[..., Iterator[Finding]]
    arguments: tuple[Any, ...] = ()

    @property
    def kind(self) -> str:
        return self.find.__name__

    def run(self) -> list[Finding]:
        """Return what was found; an exception is a finding, too."""
        findings: list[Finding] = []
        try:
            findings += self.find(*self.arguments)
        # Whatever the device or its compiler throws: the other checks still have to run.
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            problem = f"{one_line(error)} ({where.filename.rsplit('/', 1)[-1]}:{where.lineno})"
            findings.append(Finding(self.name, float("nan"), 0.0, problem))
        return findings


def wide(x: jax.Array) -> np.ndarray:
    """Return the values of a device's array, exactly, as float64."""
    # NumPy has no bfloat16 of its own.
    array = x if x.dtype in (np.float32, np.float64) else x.astype("float32")
    return np.asarray(array).astype(np.float64)


def largest(*arrays: Any) -> float:
    """Return the largest magnitude in the arrays; NaN where one holds NaN."""
    return float(np.max([np.max(np.abs(np.asarray(a, np.float64)), initial=0.0) for a in arrays]))


def apart(got: jax.Array, want: np.ndarray) -> float:
    """Return the largest difference."""
    return largest(wide(got) - want)


def worst_row(name: str, errors: np.ndarray, bounds: np.ndarray) -> Finding:
    """Return the row that comes nearest to its bound, or goes furthest beyond."""
    errors, bounds = np.broadcast_arrays(errors, bounds)
    ratios = np.where(np.isnan(errors), np.inf, errors / np.maximum(bounds, 1e-300))
    row = int(np.argmax(ratios))
    return Finding(name, float(errors[row]), float(bounds[row]))
