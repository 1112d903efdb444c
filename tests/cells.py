"""Every cell of the table kernel x bandwidth rule, as kreg's objects and as the oracle's."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import oracle

import kreg

KERNELS: dict[str, tuple[Any, float]] = {
    "box": (kreg.box, 0),
    "epanechnikov": (kreg.epanechnikov, 1),
    "biweight": (kreg.biweight, 2),
    "triweight": (kreg.triweight, 3),
    "order1.5": (kreg.rectified_polynomial(1.5), 1.5),
    "order4": (kreg.rectified_polynomial(4), 4.0),
    "order0.7": (kreg.rectified_polynomial(0.7), 0.7),  # alpha > 2: the bracketed solve
    "order40": (kreg.rectified_polynomial(40.0), 40.0),
    "gaussian": (kreg.gaussian, oracle.INFINITE),
}

RULES: dict[str, Callable[..., Any]] = {
    "adaptive": lambda h, k: kreg.Adaptive(h),
    "anchored": lambda h, k: kreg.Anchored(h),
    "fixed": lambda h, k: kreg.Fixed(h),
    "nearest": lambda h, k: kreg.Nearest(k, h),
}


@dataclass(frozen=True)
class Cell:
    """A kernel under a rule. `h` and `k` say how wide; both forms are built from them."""

    kernel_name: str
    rule_name: str
    h: Any = 0.8
    k: int = 4

    @property
    def order(self) -> float:
        return KERNELS[self.kernel_name][1]

    @property
    def rule(self) -> oracle.Rule:
        return oracle.Rule(self.rule_name, self.h, self.k)

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments kernel= and bandwidth= of kreg's functions."""
        bandwidth = RULES[self.rule_name](self.h, self.k)
        return {"kernel": KERNELS[self.kernel_name][0], "bandwidth": bandwidth}

    def __str__(self) -> str:
        return f"{self.kernel_name}@{self.rule_name}"


# One cell of each rule, with four kernels: what a test runs where every cell would be too many.
FOUR = (
    Cell("biweight", "adaptive"),
    Cell("epanechnikov", "anchored"),
    Cell("triweight", "fixed"),
    Cell("gaussian", "nearest"),
)


def cells(*kernel_names: str, h: Any = 0.8, k: int = 4) -> list[Cell]:
    """Return every allowed cell of the named kernels (of all, if none is named)."""
    return [
        Cell(kernel, rule, h, k)
        for kernel in kernel_names or KERNELS
        for rule in RULES
        if not (kernel == "box" and rule in ("adaptive", "anchored"))
    ]
