r"""Kernels: the rectified polynomials K_r(u) = [1 - u^2]_+^r and their limit, the Gaussian.

A kernel of order r weighs by the power r, which is alpha-entmax with alpha = 1 + 1/r. Inside the
library an order that may be traced is carried as its excess a = alpha - 1 = 1/r, which is finite at
the Gaussian (a = 0), so that one compiled function serves all orders and is differentiable there.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float


@jax.tree_util.register_pytree_node_class
class Kernel:
    r"""A compact kernel $K_r(u) = [1 - u^2]_+^r$, or the Gaussian $e^{-u^2/2}$ for $r = \infty$.

    The order is static when it is a Python number, and a leaf of the pytree when it is an array
    (per head: shape [1, N, 1, 1]), so that a traced order compiles once for all its values.
    Values are checked by the functions that take a kernel, when they are concrete.

    Args:
        order: r >= 0; 0 is the box, 1 Epanechnikov, 2 biweight, 3 triweight, infinity the Gaussian.

    Examples:
        >>> import kreg
        >>> kreg.biweight.order, kreg.biweight.alpha
        (2, 1.5)
        >>> float(kreg.epanechnikov(0.5))
        0.75

    References:
        Santos et al., `Sparse Attention as Compact Kernel Regression
        <https://arxiv.org/abs/2601.22766>`_, 2026.
    """

    __slots__ = ("_excess", "_order")

    # One of the two is None: a static order, or an array of excesses.
    _order: float | None
    _excess: Any

    def __init__(self, order: float | ArrayLike):
        if isinstance(order, (int, float, np.generic)):
            self._order = _as_python(order)
            self._excess = None
        else:
            self._order = None
            self._excess = 1 / jnp.asarray(order)

    @classmethod
    def from_alpha(cls, alpha: float | ArrayLike) -> "Kernel":
        """Makes the kernel whose attention is alpha-entmax, r = 1 / (alpha - 1).

        Unlike `Kernel(1 / (alpha - 1))` this is differentiable in alpha at alpha = 1.

        Examples:
            >>> import kreg
            >>> kreg.Kernel.from_alpha(1.5) == kreg.biweight
            True
        """
        if isinstance(alpha, (int, float, np.generic)):
            return cls(_order_of(float(alpha)))
        kernel = object.__new__(cls)
        kernel._order, kernel._excess = None, jnp.asarray(alpha) - 1
        return kernel

    @classmethod
    def learned(cls, raw: Float[ArrayLike, "..."]) -> "Kernel":
        r"""Makes the kernel of $\alpha = 1 + \sigma(raw)$, between softmax and sparsemax.

        raw is a free parameter, such as one a head of shape [1, N, 1, 1]; alpha stays in [1, 2],
        and in (1, 2) where the sigmoid does not round.

        Examples:
            >>> import jax.numpy as jnp
            >>> import kreg
            >>> float(kreg.Kernel.learned(jnp.array(0.0)).alpha)
            1.5

        References:
            Correia et al., `Adaptively Sparse Transformers
            <https://arxiv.org/abs/1909.00015>`_, 2019.
        """
        kernel = object.__new__(cls)
        kernel._order, kernel._excess = None, jax.nn.sigmoid(jnp.asarray(raw))
        return kernel

    @property
    def is_static(self) -> bool:
        """True where the order is a Python number, known when the function is traced."""
        return self._order is not None

    @property
    def is_gaussian(self) -> bool:
        """True where the kernel is known to be the Gaussian when the function is traced."""
        return self._order == math.inf

    @property
    def order(self) -> float | Array:
        """The exponent r."""
        return 1 / self._excess if self._order is None else self._order

    @property
    def static_order(self) -> float | None:
        """The exponent where it is a Python number, None where it is an array."""
        return self._order

    @property
    def alpha(self) -> float | Array:
        """The entmax parameter 1 + 1/r."""
        return 1 + self.excess

    @property
    def excess(self) -> float | Array:
        """The number a = 1/r = alpha - 1."""
        if self._order is None:
            return self._excess
        return math.inf if self._order == 0 else 1 / self._order

    def __call__(self, u: Float[ArrayLike, "..."]) -> Float[Array, "..."]:
        """Evaluates the profile K(u) at distances u, in units of the bandwidth."""
        u = jnp.asarray(u)
        if self._order == math.inf:
            return jnp.exp(-u * u / 2)
        if self._order == 0:
            return jnp.where(u * u <= 1, 1.0, 0.0).astype(jnp.result_type(u, float))
        inside = u * u < 1
        return jnp.where(inside, jnp.where(inside, 1 - u * u, 1) ** self.order, 0)

    def tree_flatten(self):
        return ((self._excess,), None) if self._order is None else ((), self._order)

    @classmethod
    def tree_unflatten(cls, order, children):
        kernel = object.__new__(cls)
        kernel._order = order
        kernel._excess = children[0] if children else None
        return kernel

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Kernel):
            return NotImplemented
        if self.is_static and other.is_static:
            return self._order == other._order
        return self._excess is other._excess and self._order == other._order

    def __hash__(self) -> int:
        return hash((Kernel, self._order if self._excess is None else id(self._excess)))

    def __repr__(self) -> str:
        return f"Kernel(order={self._order if self._excess is None else self.order})"


def rectified_polynomial(order: float | ArrayLike) -> Kernel:
    r"""Makes the kernel $K_r(u) = [1 - u^2]_+^r$ of any real order r > 0, number or array.

    Examples:
        >>> import kreg
        >>> kreg.rectified_polynomial(4).alpha
        1.25
    """
    return Kernel(order)


def check_kernel(kernel: Kernel) -> None:
    """Raises ValueError where the order is concrete and negative or not a number."""
    if not isinstance(kernel, Kernel):
        raise ValueError(f"kernel: expected a kreg.Kernel such as kreg.biweight, got {kernel!r}")
    order = kernel._order
    if order is not None and not order >= 0:
        raise ValueError(f"kernel: expected an order r >= 0 (alpha >= 1), got order {order}")
    excess = kernel._excess
    if excess is not None and not isinstance(excess, jax.core.Tracer):
        if not bool(np.all(np.asarray(excess, np.float64) >= 0)):
            raise ValueError(
                f"kernel: expected orders r > 0 (alpha >= 1), got alpha {np.asarray(excess) + 1}"
            )


def _as_python(number) -> int | float:
    number = float(number)
    return int(number) if number.is_integer() else number


def _order_of(alpha: float) -> float:
    """Order 1 / (alpha - 1), snapped to the integer it is within rounding (4/3 gives 3)."""
    if alpha == 1:
        return math.inf
    order = 1 / (alpha - 1)
    nearest = round(order)
    return nearest if nearest and abs(order - nearest) <= 1e-12 * nearest**2 else order


box = Kernel(0)
epanechnikov = Kernel(1)
biweight = Kernel(2)
triweight = Kernel(3)
gaussian = Kernel(math.inf)
