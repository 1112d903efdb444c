r"""Fenchel-Young losses of the maps: $L(x, y) = \langle p - y, x \rangle + H(p) - H(y)$.

p is the map of the logits x and H the entropy that it maximises together with the score, so that
the gradient is p - y, the loss is never negative and it is 0 where p = y alone.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Num

from kreg.arguments import as_scores, check_values, is_number, per_row
from kreg.constrained import normmax
from kreg.maps import entmax


def sparsemax_loss(
    logits: Float[ArrayLike, "*rows n"], labels: Num[ArrayLike, "..."]
) -> Float[Array, "*rows"]:
    r"""Measures how far sparsemax is from the labels; its gradient is sparsemax(x) - y.

    Args:
        logits: scores; the classes are the last axis. -inf excludes a class.
        labels: classes (integers) or distributions over them (floats), which must sum to 1.

    Examples:
        >>> import jax.numpy as jnp
        >>> import kreg
        >>> kreg.sparsemax_loss(jnp.array([[2.0, 0.0], [0.0, 0.0]]), jnp.array([0, 0])).tolist()
        [0.0, 0.25]

    References:
        Martins and Astudillo, `From Softmax to Sparsemax
        <https://arxiv.org/abs/1602.02068>`_, 2016.
    """
    return _loss(entmax, _tsallis_entropy, logits, labels, 2.0)


def entmax15_loss(
    logits: Float[ArrayLike, "*rows n"], labels: Num[ArrayLike, "..."]
) -> Float[Array, "*rows"]:
    r"""Measures how far 3/2-entmax is from the labels; its gradient is entmax15(x) - y.

    Args:
        logits: scores; the classes are the last axis. -inf excludes a class.
        labels: classes (integers) or distributions over them (floats), which must sum to 1.

    Examples:
        >>> import jax.numpy as jnp
        >>> import kreg
        >>> kreg.entmax15_loss(jnp.array([[2.0, 0.0], [0.0, 0.0]]), jnp.array([0, 0])).tolist()
        [0.0, 0.3905]

    References:
        Peters et al., `Sparse Sequence-to-Sequence Models
        <https://arxiv.org/abs/1905.05702>`_, 2019.
    """
    return _loss(entmax, _tsallis_entropy, logits, labels, 1.5)


def entmax_loss(
    logits: Float[ArrayLike, "*rows n"],
    labels: Num[ArrayLike, "..."],
    alpha: float | Float[ArrayLike, "..."] = 1.5,
) -> Float[Array, "*rows"]:
    r"""Measures how far alpha-entmax is from the labels; its gradient is entmax(x, alpha) - y.

    H is Tsallis' entropy $(1 - \sum_j p_j^\alpha) / (\alpha (\alpha - 1))$, Shannon's at alpha = 1,
    where the loss is the cross entropy of integer labels and the divergence KL(y, p) of others.

    Args:
        logits: scores; the classes are the last axis. -inf excludes a class.
        labels: classes (integers) or distributions over them (floats), which must sum to 1. A
            class outside the range gives NaN.
        alpha: >= 1, as in `entmax`: a number, or an array of the logits' rank with size 1 along the
            classes; differentiable.

    Raises:
        ValueError: a concrete alpha below 1, or labels or an alpha of the wrong shape.

    Examples:
        >>> import jax.numpy as jnp
        >>> import kreg
        >>> kreg.entmax_loss(jnp.array([0.0, 0.0]), jnp.array(0), alpha=1.0).tolist()
        0.6931

    References:
        Peters et al., `Sparse Sequence-to-Sequence Models
        <https://arxiv.org/abs/1905.05702>`_, 2019;
        Blondel, Martins and Niculae, `Learning with Fenchel-Young Losses
        <https://arxiv.org/abs/1901.02324>`_, 2020.
    """
    check_values("alpha", alpha, lambda a: a >= 1, "values >= 1")
    return _loss(entmax, _tsallis_entropy, logits, labels, alpha)


def normmax_loss(
    logits: Float[ArrayLike, "*rows n"],
    labels: Num[ArrayLike, "..."],
    alpha: float | Float[ArrayLike, "..."] = 2.0,
) -> Float[Array, "*rows"]:
    r"""Measures how far normmax is from the labels; its gradient is normmax(x, alpha) - y.

    H is the norm entropy $1 - \|p\|_\alpha$.

    Args:
        logits: scores; the classes are the last axis. -inf excludes a class.
        labels: classes (integers) or distributions over them (floats), which must sum to 1. A
            class outside the range gives NaN.
        alpha: > 1, as in `normmax`: a number, or an array of the logits' rank with size 1 along the
            classes; differentiable.

    Raises:
        ValueError: a concrete alpha of 1 or below, or labels or an alpha of the wrong shape.

    Examples:
        >>> import jax.numpy as jnp
        >>> import kreg
        >>> kreg.normmax_loss(jnp.array([0.0, 0.0]), jnp.array(0)).tolist()
        0.2929

    References:
        Blondel, Martins and Niculae, `Learning with Fenchel-Young Losses
        <https://arxiv.org/abs/1901.02324>`_, 2020.
    """
    check_values("alpha", alpha, lambda a: a > 1, "values > 1")
    return _loss(normmax, _norm_entropy, logits, labels, alpha)


def _loss(weigh: Callable, entropy: Callable, logits, labels, alpha) -> Float[Array, "*rows"]:
    logits, labels = as_scores("logits", logits, -1), jnp.asarray(labels)
    integer = jnp.issubdtype(labels.dtype, jnp.integer)
    if not integer and not jnp.issubdtype(labels.dtype, jnp.floating):
        raise ValueError(f"labels: expected integers or floats, got {labels.dtype}")
    wanted = logits.shape[:-1] if integer else logits.shape
    if labels.shape != wanted:
        kind = "integers" if integer else "floats"
        raise ValueError(f"labels: expected {kind} of shape {wanted}, got shape {labels.shape}")
    dtype = logits.dtype if integer else jnp.promote_types(logits.dtype, labels.dtype)
    wide = jnp.promote_types(dtype, jnp.float32)
    logits, labels = logits.astype(wide), labels if integer else labels.astype(wide)
    if is_number(alpha):
        loss = _fenchel_young(weigh, entropy, float(alpha), logits, labels, None)
    else:
        alpha = per_row("alpha", alpha, logits, -1)
        loss = _fenchel_young(weigh, entropy, None, logits, labels, alpha)
    return loss.astype(dtype)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _fenchel_young(
    weigh: Callable,
    entropy: Callable,
    number: float | None,
    logits: Float[Array, "*rows n"],
    labels: Num[Array, "..."],
    alpha: Float[Array, "..."] | None,
) -> Float[Array, "*rows"]:
    """Evaluates the loss for an alpha that is either static (`number`) or an array."""
    best = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    x = logits - jnp.where(best == -jnp.inf, 0, best)
    p = weigh(x, number if alpha is None else alpha)
    conjugate = _conjugate(entropy, number, x, p, alpha)
    if jnp.issubdtype(labels.dtype, jnp.integer):
        loss = conjugate - _score_of_class(x, labels)
    else:
        excluded = (labels == 0) & (x == -jnp.inf)
        score = jnp.sum(labels * jnp.where(excluded, 0, x), axis=-1)
        loss = conjugate - score - entropy(labels, number if alpha is None else alpha)
    # Below 0 by rounding alone; the gradient stays p - y.
    return loss - jax.lax.stop_gradient(jnp.minimum(loss, 0))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _conjugate(
    entropy: Callable,
    number: float | None,
    x: Float[Array, "*rows n"],
    p: Float[Array, "*rows n"],
    alpha: Float[Array, "..."] | None,
) -> Float[Array, "*rows"]:
    """Evaluates <p, x> + H(p) at its maximum p, where it does not change with p."""
    score = jnp.sum(jnp.where(p == 0, 0, p * x), axis=-1)
    return score + entropy(p, number if alpha is None else alpha)


@_conjugate.defjvp
def _conjugate_jvp(entropy, number, primals, tangents):
    _, p, alpha = primals
    dx, _, dalpha = tangents
    change = jnp.sum(p * dx, axis=-1)
    if alpha is not None:
        change += jax.jvp(functools.partial(entropy, p), (alpha,), (dalpha,))[1]
    return _conjugate(entropy, number, *primals), change


def _score_of_class(x: Float[Array, "*rows n"], labels: Num[Array, "*rows"]) -> Array:
    """Picks the class's score, NaN where there is no such class."""
    if jnp.iinfo(labels.dtype).bits < 32:
        labels = labels.astype(jnp.int32)
    valid = (labels >= 0) & (labels < x.shape[-1])
    index = jnp.where(valid, labels, 0)[..., None]
    return jnp.where(valid, jnp.take_along_axis(x, index, axis=-1)[..., 0], jnp.nan)


def _tsallis_entropy(p: Float[Array, "*rows n"], alpha) -> Float[Array, "*rows"]:
    r"""Evaluates $(1 - \sum p^\alpha) / (\alpha (\alpha - 1))$, smooth in alpha at 1 too."""
    log = _log(p)
    return -jnp.sum(p * log * _expm1_quotient((alpha - 1) * log) / alpha, axis=-1)


def _norm_entropy(p: Float[Array, "*rows n"], alpha) -> Float[Array, "*rows"]:
    r"""Evaluates $1 - \|p\|_\alpha$, in units of the largest entry so that powers do not vanish."""
    most = jax.lax.stop_gradient(jnp.max(p, axis=-1, keepdims=True))
    share = p / jnp.where(most > 0, most, 1)
    total = jnp.sum(share * jnp.exp((alpha - 1) * _log(share)), axis=-1, keepdims=True)
    return 1 - (most * jnp.where(total > 0, total, 1) ** (1 / alpha))[..., 0]


def _log(p: Float[Array, "..."]) -> Float[Array, "..."]:
    """Evaluates log p, at 0 the log of the smallest number: finite, and so are its products."""
    return jnp.log(jnp.maximum(p, jnp.finfo(p.dtype).tiny))


def _expm1_quotient(t: Float[Array, "..."]) -> Float[Array, "..."]:
    r"""Evaluates $(e^t - 1) / t$, with the value 1 at 0; its series where |t| < 1/2."""
    near = jnp.abs(t) < 0.5
    small, large = jnp.where(near, t, 0), jnp.where(near, 1, t)
    series = jnp.ones_like(t)
    for k in range(16, 1, -1):
        series = 1 + small * series / k
    return jnp.where(near, series, jnp.expm1(large) / large)
