r"""Maps from scores to weights: softmax, entmax and their sparse relatives, along one axis.

All are the one formula with a kernel and a rule. Inputs may be any float type; the arithmetic is in
float32 or wider and the result has the input's type. `where` is a boolean mask: entries outside it,
and scores of -inf, get weight 0 and may hold anything; a row with no entry left gets weights 0.
"""

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from kreg.arguments import along_last, as_scores, check_values, is_number, per_row
from kreg.bandwidth import Adaptive, Anchored, Fixed, Nearest, Rule
from kreg.kernels import Kernel, biweight, box, epanechnikov, gaussian
from kreg.weights import weigh


def softmax(
    x: Float[ArrayLike, "..."], axis: int = -1, where: Bool[ArrayLike, "..."] | None = None
) -> Float[Array, "..."]:
    r"""Maps scores to $p_j \propto e^{x_j}$: the Gaussian kernel.

    Unlike `jax.nn.softmax`, a row with nothing admissible gives 0, not NaN.

    Examples:
        >>> import jax.numpy as jnp
        >>> import kreg
        >>> kreg.softmax(jnp.array([0.0, 0.0])).tolist()
        [0.5, 0.5]
    """
    return _map(x, axis, where, gaussian, Adaptive())


def sparsemax(
    x: Float[ArrayLike, "..."], axis: int = -1, where: Bool[ArrayLike, "..."] | None = None
) -> Float[Array, "..."]:
    r"""Projects scores onto the simplex, $p_j = [x_j - \tau]_+$: Epanechnikov, adaptive bandwidth.

    Examples:
        >>> import jax.numpy as jnp
        >>> import kreg
        >>> kreg.sparsemax(jnp.array([1.0, 0.5, -1.0])).tolist()
        [0.75, 0.25, 0.0]

    References:
        Martins and Astudillo, `From Softmax to Sparsemax
        <https://arxiv.org/abs/1602.02068>`_, 2016.
    """
    return _map(x, axis, where, epanechnikov, Adaptive())


def entmax15(
    x: Float[ArrayLike, "..."], axis: int = -1, where: Bool[ArrayLike, "..."] | None = None
) -> Float[Array, "..."]:
    r"""Maps scores to $p_j = [x_j/2 - \tau]_+^2$: biweight, adaptive bandwidth.

    Examples:
        >>> import jax.numpy as jnp
        >>> import kreg
        >>> kreg.entmax15(jnp.array([1.0, 1.0, -2.0])).tolist()
        [0.5, 0.5, 0.0]

    References:
        Peters et al., `Sparse Sequence-to-Sequence Models
        <https://arxiv.org/abs/1905.05702>`_, 2019.
    """
    return _map(x, axis, where, biweight, Adaptive())


def entmax(
    x: Float[ArrayLike, "..."],
    alpha: float | Float[ArrayLike, "..."] = 1.5,
    axis: int = -1,
    where: Bool[ArrayLike, "..."] | None = None,
) -> Float[Array, "..."]:
    r"""Maps scores to $p_j = [(\alpha-1) x_j - \tau]_+^{1/(\alpha-1)}$, $\sum_j p_j = 1$.

    Args:
        x: scores.
        alpha: >= 1; softmax at 1, sparsemax at 2. A number, or an array of x's rank with size 1
            along `axis`. Differentiable, at 1 too. A traced value below 1 gives NaN.
        axis: the axis that sums to 1.
        where: admissible entries.

    Raises:
        ValueError: a concrete alpha below 1, or an alpha of the wrong shape.

    Examples:
        >>> import jax.numpy as jnp
        >>> import kreg
        >>> kreg.entmax(jnp.array([1.0, 0.5, -1.0]), alpha=2.0).tolist()
        [0.75, 0.25, 0.0]

    References:
        Peters et al., `Sparse Sequence-to-Sequence Models
        <https://arxiv.org/abs/1905.05702>`_, 2019;
        Correia et al., `Adaptively Sparse Transformers <https://arxiv.org/abs/1909.00015>`_, 2019.
    """
    check_values("alpha", alpha, lambda a: a >= 1, "values >= 1")
    if is_number(alpha):
        return _map(x, axis, where, Kernel.from_alpha(alpha), Adaptive())
    x = as_scores("x", x, axis)
    alpha = per_row("alpha", alpha, x, axis)
    alpha = jnp.where(alpha >= 1, alpha, jnp.nan)
    return _map(x, axis, where, Kernel.from_alpha(alpha), Adaptive())


def relumax(
    x: Float[ArrayLike, "..."], axis: int = -1, where: Bool[ArrayLike, "..."] | None = None
) -> Float[Array, "..."]:
    r"""Maps scores to $p_j \propto [x_j - \max x + 1]_+$: Epanechnikov anchored on the best key.

    Examples:
        >>> import jax.numpy as jnp
        >>> import kreg
        >>> kreg.relumax(jnp.array([1.0, 0.5, -1.0])).tolist()
        [0.667, 0.333, 0.0]

    References:
        Santos et al., `Sparse Attention as Compact Kernel Regression
        <https://arxiv.org/abs/2601.22766>`_, 2026.
    """
    return _map(x, axis, where, epanechnikov, Anchored())


def normalized_relu(
    x: Float[ArrayLike, "..."],
    threshold: float | Float[ArrayLike, "..."] = 0.0,
    axis: int = -1,
    where: Bool[ArrayLike, "..."] | None = None,
) -> Float[Array, "..."]:
    r"""Maps scores to $p_j \propto [x_j - t]_+$, equal weights where no score exceeds t.

    Args:
        x: scores.
        threshold: t, a number or an array of x's rank with size 1 along `axis`; differentiable.
        axis: the axis that sums to 1.
        where: admissible entries.

    Examples:
        >>> import jax.numpy as jnp
        >>> import kreg
        >>> kreg.normalized_relu(jnp.array([3.0, 1.0, -1.0])).tolist()
        [0.75, 0.25, 0.0]
    """
    x = as_scores("x", x, axis)
    threshold = per_row("threshold", threshold, x, axis)
    return _map(x, axis, where, epanechnikov, Fixed(1.0), fixed=threshold)


def topk_softmax(
    x: Float[ArrayLike, "..."], k: int, axis: int = -1, where: Bool[ArrayLike, "..."] | None = None
) -> Float[Array, "..."]:
    r"""Applies softmax to the scores $x_j \ge x_{(k)}$, ties included: a truncated Gaussian.

    Examples:
        >>> import jax.numpy as jnp
        >>> import kreg
        >>> kreg.topk_softmax(jnp.array([1.0, 1.0, 0.0]), k=2).tolist()
        [0.5, 0.5, 0.0]
    """
    return _map(x, axis, where, gaussian, Nearest(k))


def topk_uniform(
    x: Float[ArrayLike, "..."], k: int, axis: int = -1, where: Bool[ArrayLike, "..."] | None = None
) -> Float[Array, "..."]:
    r"""Weighs the scores $x_j \ge x_{(k)}$ equally, ties included: kNN regression.

    Examples:
        >>> import jax.numpy as jnp
        >>> import kreg
        >>> kreg.topk_uniform(jnp.array([3.0, 2.0, 0.0]), k=2).tolist()
        [0.5, 0.5, 0.0]
    """
    return _map(x, axis, where, box, Nearest(k))


def _map(x, axis, where, kernel: Kernel, rule: Rule, fixed=0.0) -> Array:
    x = as_scores("x", x, axis)
    if isinstance(rule, Nearest) and not (isinstance(rule.k, (int, np.integer)) and rule.k >= 1):
        raise ValueError(f"k: expected an integer >= 1, got {rule.k!r}")
    if where is None:
        z = jnp.moveaxis(x.astype(jnp.promote_types(x.dtype, jnp.float32)), axis, -1)
        weights, _ = weigh(z, None, kernel, rule, fixed, many=True)
    else:
        weights, _ = weigh(*along_last(x, axis, where), kernel, rule, fixed, many=True)
    return jnp.moveaxis(weights, -1, axis).astype(x.dtype)
