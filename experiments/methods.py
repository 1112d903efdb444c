"""The names of the methods: the paper's, and any kernel@rule.

A method is a kernel and a bandwidth rule. The library knows both as objects; command lines, folders
and tables know them by the names that this file, and no other, turns into objects.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import kreg

PAPER = {
    "softmax": "gaussian@adaptive",
    "triweight": "triweight@adaptive",
    "biweight": "biweight@adaptive",
    "epanechnikov": "epanechnikov@adaptive",
    "norm_relu": "epanechnikov@fixed",
    "relumax": "epanechnikov@anchored",
}
KERNELS = ("box", "epanechnikov", "biweight", "triweight", "gaussian")
RULES = {"adaptive": kreg.Adaptive, "fixed": kreg.Fixed, "anchored": kreg.Anchored}
KNOWN = (
    f"{', '.join(PAPER)}, topK_softmax, topK_uniform (K = 1, 2, ...: top16_softmax), entmax:ALPHA "
    f"(ALPHA >= 1: entmax:1.25), and KERNEL@RULE with KERNEL one of {', '.join(KERNELS)}, "
    f"entmax:ALPHA and RULE one of {', '.join(RULES)}, nearest:K (biweight@nearest:8)"
)


class Method(NamedTuple):
    """A kernel, and a factory that makes its bandwidth rule from h."""

    kernel: kreg.Kernel
    bandwidth: Callable[[Any], Any]


@functools.cache
def method(name: str) -> Method:
    """Return the kernel and the bandwidth factory that a name stands for.

    Raises:
        ValueError: the name is unknown (the message lists what is known), or the two do not go
            together (a box under a rule other than fixed and nearest).

    >>> method("relumax") == method("epanechnikov@anchored")
    True
    >>> method("top16_softmax").bandwidth(1.0).k
    16
    """
    kernel_name, rule_name = pair(name)
    kernel, rule = _kernel(kernel_name), _rule(rule_name)
    if kernel is None or rule is None:
        raise ValueError(f"method: unknown name {name!r}; known are {KNOWN}")
    if kernel_name == "box" and rule_name in ("adaptive", "anchored"):
        raise ValueError(f"method: box takes the rules fixed and nearest:K, got {name!r}")
    return Method(kernel, rule)


# Every kernel under every rule, each function once (a Gaussian is the softmax under three rules),
# by the paper's name where there is one.
PRODUCT = (
    *PAPER,
    "biweight@fixed",
    "triweight@fixed",
    "box@fixed",
    "biweight@anchored",
    "triweight@anchored",
    "epanechnikov@nearest:16",
    "biweight@nearest:16",
    "triweight@nearest:16",
    "top16_softmax",
    "top16_uniform",
)


def expand(names: Sequence[str]) -> tuple[str, ...]:
    """Put the whole product of kernels and rules in the place of `all`.

    >>> expand(["softmax", "all", "entmax:1.25"])[-2:]
    ('top16_uniform', 'entmax:1.25')
    """
    if "all" not in names:
        return tuple(names)
    return (*PRODUCT, *(name for name in names if name != "all" and name not in PRODUCT))


def folder_name(name: str) -> str:
    """Return a method's name as a folder's name: without the colon, which some systems refuse.

    >>> folder_name("entmax:1.25")
    'entmax-1.25'
    """
    return name.replace(":", "-")


def rank(name: str) -> tuple[int, str]:
    """Return a key that sorts methods: the paper's in its order, then the others by name."""
    names = list(PAPER)
    return (names.index(name), name) if name in names else (len(names), name)


def pair(name: str) -> tuple[str, str]:
    """Return the names of a method's kernel and rule.

    >>> pair("norm_relu"), pair("top16_softmax"), pair("entmax:1.25")
    (('epanechnikov', 'fixed'), ('gaussian', 'nearest:16'), ('entmax:1.25', 'adaptive'))
    """
    kernel, _, rule = _product(name).partition("@")
    return kernel, rule


def _product(name: str) -> str:
    """The name in the form kernel@rule."""
    if top := re.fullmatch(r"top(\d+)_(softmax|uniform)", name):
        kernel = {"softmax": "gaussian", "uniform": "box"}[top[2]]
        return f"{kernel}@nearest:{top[1]}"
    if name.startswith("entmax:") and "@" not in name:
        return f"{name}@adaptive"
    return PAPER.get(name, name)


def _kernel(name: str) -> kreg.Kernel | None:
    if name in KERNELS:
        return getattr(kreg, name)
    family, _, alpha = name.partition(":")
    if family != "entmax" or not re.fullmatch(r"\d+(\.\d+)?", alpha) or float(alpha) < 1:
        return None
    return kreg.rectified_polynomial(1 / (float(alpha) - 1)) if float(alpha) > 1 else kreg.gaussian


@functools.cache
def _rule(name: str) -> Callable[[Any], Any] | None:
    # Cached, so that two models of one method hold the same factory and share one compilation.
    if count := re.fullmatch(r"nearest:([1-9]\d*)", name):
        return functools.partial(kreg.Nearest, int(count[1]))
    return RULES.get(name)
