"""Who is timed: kreg's implementations and kernels, and `jax.nn.dot_product_attention`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array

import kreg

KERNELS = {
    "gaussian": (kreg.gaussian, kreg.Adaptive()),
    "epanechnikov": (kreg.epanechnikov, kreg.Adaptive()),
    "biweight": (kreg.biweight, kreg.Adaptive()),
    "triweight": (kreg.triweight, kreg.Adaptive()),
    "relumax": (kreg.epanechnikov, kreg.Anchored()),
}
BASELINES = ("jax xla", "jax cudnn")


@dataclass(frozen=True)
class Group:
    """What is compared with each other: one shape, type and direction, causal.

    B batch, T queries and keys, N heads, H width.
    """

    B: int
    T: int
    N: int
    H: int
    dtype: str
    backward: bool

    def __str__(self) -> str:
        direction = "forward+backward" if self.backward else "forward"
        return f"B{self.B} T{self.T} N{self.N} H{self.H} {self.dtype} {direction}"

    def inputs(self) -> list[Array]:
        """Draw query, key, value and the output's cotangent, normal."""
        shape = (self.B, self.T, self.N, self.H)
        keys = jax.random.split(jax.random.key(0), 4)
        return [jax.random.normal(key, shape, self.dtype) for key in keys]

    def contestants(self) -> dict[str, Callable[..., Any]]:
        """Return functions of the inputs; the order is the order of timing."""
        attentions: dict[str, Callable[..., Any]] = {
            f"jax {name}": _baseline(name) for name in ("xla", "cudnn")
        }
        if self.dtype == "float32":
            # kreg's products are exact to float32; jax.nn's default is less on accelerators.
            attentions["jax xla highest"] = _baseline("xla", precision="highest")
        for implementation in ("xla", "reference"):
            for kernel in KERNELS:
                attentions[f"kreg {implementation} {kernel}"] = _kreg(implementation, kernel)
        turn = _forward_and_backward if self.backward else _forward
        return {name: turn(attention) for name, attention in attentions.items()}


def _baseline(implementation: Any, precision: str | None = None) -> Callable[..., Array]:
    def attend(query, key, value):
        with jax.default_matmul_precision(precision):
            return jax.nn.dot_product_attention(
                query, key, value, is_causal=True, implementation=implementation
            )

    return attend


def _kreg(implementation: str, name: str) -> Callable[..., Any]:
    kernel, rule = KERNELS[name]

    def attend(query, key, value):
        options = {"kernel": kernel, "bandwidth": rule, "implementation": implementation}
        return kreg.attention(query, key, value, is_causal=True, **options)

    return attend


def _forward(attention: Callable[..., Array]) -> Callable[..., Any]:
    return lambda query, key, value, cotangent: attention(query, key, value)


def _forward_and_backward(attention: Callable[..., Array]) -> Callable[..., Any]:
    def both(query, key, value, cotangent):
        output, pull = jax.vjp(attention, query, key, value)
        return output, pull(cotangent)

    return both
