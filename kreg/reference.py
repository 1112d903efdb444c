r"""Attention, dense: the definition, one line a step, on the whole score matrix."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt32

from kreg.bandwidth import Fixed
from kreg.dropout import keep_mask
from kreg.problem import Problem
from kreg.stats import Stats
from kreg.weights import weigh

_PIECE = 2048


def attend(problem: Problem) -> tuple[Float[Array, "B T N V"], Stats | None]:
    """Attends with all scores in memory."""
    where = admissible(problem)
    if not sees_all(problem):
        rows = problem.split.any(where)[..., 0]
        problem = without_dead(problem, rows, seen_keys(problem, where))
    return attend_rows(problem, where)


def attend_rows(
    problem: Problem, where: Bool[Array, "#B #N T S"]
) -> tuple[Float[Array, "B T N V"], Stats | None]:
    """Scores, weighs and averages for the problem's queries; keys nobody sees must be finite."""
    z, shift = scores(problem, where)
    weights, stats = _weigh(problem, z, jnp.broadcast_to(where, z.shape), shift)
    stats = stats._replace(threshold=stats.threshold + shift[..., 0].astype(jnp.float32))
    if problem.dropout_key is not None:
        weights = _drop(problem, problem.dropout_key, weights)
    values = problem.value.astype(problem.dtype)
    heads = values.shape[2]
    weights = weights.reshape(z.shape[0], heads, -1, *z.shape[2:])
    (out,) = problem.split.joined(_mix(weights, values, problem.precision))
    out = out.reshape(*problem.query.shape[:3], -1).astype(problem.value.dtype)
    if not problem.with_stats:
        return out, None
    return out, certified(problem, Stats(*(jnp.swapaxes(x, 1, 2) for x in stats)))


def certified(problem: Problem, stats: Stats) -> Stats:
    """Adds to the residuals what rounding inside q.k may have moved the scores by."""
    norm = jnp.linalg.norm
    query = norm(problem.query.astype(jnp.float32), axis=-1)
    key = norm(problem.key.astype(jnp.float32), axis=-1)
    key = jnp.swapaxes(problem.split.max(jnp.swapaxes(key, 1, 2)), 1, 2)
    key = jnp.repeat(key, query.shape[-1] // key.shape[-1], axis=-1)
    h = jnp.swapaxes(jnp.asarray(problem.rule.h, jnp.float32), 1, 2)[..., 0]
    largest = query * key * jnp.abs(problem.scale.astype(jnp.float32)) / jnp.square(h)
    rounding = jnp.finfo(jnp.float32).eps * (4 + problem.query.shape[-1] / 16) * largest
    residual = jnp.where(stats.residual > 0, stats.residual + rounding, 0)
    return stats._replace(residual=jax.lax.stop_gradient(residual))


def admissible(problem: Problem) -> Bool[Array, "#B #N T S"]:
    """Joins the mask and biases of -inf."""
    where = problem.mask.admissible(problem.rows, problem.columns)
    return where if problem.bias is None else where & (problem.bias != -jnp.inf)


def sees_all(problem: Problem) -> bool:
    """True where every query may see every key, known when the function is traced."""
    mask = problem.mask
    return mask.is_static and mask.lower is None and mask.upper is None and problem.bias is None


def _weigh(
    problem: Problem,
    z: Float[Array, "B N T S"],
    where: Bool[Array, "B N T S"],
    shift: Float[Array, "#B #N #T 1"],
) -> tuple[Float[Array, "B N T S"], Stats]:
    """Weighs the scores; a null score is one more key, whose weight goes nowhere."""
    kernel, rule, fixed, split = problem.kernel, problem.rule, -0.5, problem.split
    if problem.null is None:
        return weigh(z, where, kernel, rule, fixed, split=split)
    null = problem.null / jnp.square(jnp.asarray(rule.h, z.dtype)) - shift
    null = jnp.broadcast_to(null, (*z.shape[:-1], 1))
    # One of all keys, wherever they are.
    where = jnp.concatenate([where, jnp.ones_like(null, bool) & split.is_first], axis=-1)
    z = jnp.concatenate([z, null], axis=-1)
    weights, stats = weigh(z, where, kernel, rule, fixed, split=split)
    taken = split.count(weights[..., -1:] > 0)[..., 0]
    return weights[..., :-1], stats._replace(support=stats.support - taken)


def _mix(
    weights: Float[Array, "B K G T S"], values: Float[Array, "B S K V"], precision
) -> Float[Array, "B T K G V"]:
    """Averages the values; long rows in pieces, for a running sum loses 5e-6 over 65,536 keys."""
    keys = values.shape[1]
    if keys <= 2 * _PIECE:
        return jnp.einsum("bkgts,bskv->btkgv", weights, values, precision=precision)
    even = keys // _PIECE * _PIECE
    cut = weights[..., :even].reshape(*weights.shape[:-1], -1, _PIECE)
    pieces = values[:, :even].reshape(values.shape[0], -1, _PIECE, *values.shape[2:])
    parts = jnp.einsum("bkgtps,bpskv->pbtkgv", cut, pieces, precision=precision)
    rest = jnp.einsum(
        "bkgts,bskv->btkgv", weights[..., even:], values[:, even:], precision=precision
    )
    return jnp.sum(parts, axis=0) + rest


def scores(
    problem: Problem, where: Bool[Array, "#B #N T S"]
) -> tuple[Float[Array, "B N T S"], Float[Array, "#B #N #T 1"]]:
    r"""Scores z = softcap(scale q.k + bias) / h^2, 0 where inadmissible, less a shift of each row.

    The shift is 0 but for `Fixed`, where it is 1/h^2: what is left is -d^2 / (2 h^2), cut at -1/2,
    and the gradient of h is a sum of small terms, not a difference of large ones.
    """
    batch, queries, heads, width = problem.query.shape
    dtype = problem.dtype
    squeeze = 1 / jnp.square(jnp.asarray(problem.rule.h, dtype))
    query = problem.query
    # Scaling the queries is cheaper than scaling the scores, and so is its gradient; but it must
    # not round a half-precision query, and the cap is on scores at h = 1.
    is_fixed = isinstance(problem.rule, Fixed)
    early = query.dtype == dtype and problem.soft_cap is None and not is_fixed
    if early:
        query = query * problem.scale.astype(dtype) * jnp.swapaxes(squeeze, 1, 2)
    query = query.reshape(batch, queries, problem.key.shape[2], -1, width)
    s = jnp.einsum(
        "btkgh,bskh->bkgts",
        query,
        problem.key,
        precision=problem.precision,
        preferred_element_type=dtype,
    )
    s = s.reshape(batch, heads, queries, -1)
    if early:
        if problem.bias is not None:
            s = s + jnp.where(where, problem.bias.astype(dtype), 0) * squeeze
        return jnp.where(where, s, 0), jnp.zeros_like(squeeze)
    s = s * problem.scale.astype(dtype)
    if problem.bias is not None:
        s = s + problem.bias.astype(dtype)
    if problem.soft_cap is not None:
        s = problem.soft_cap * jnp.tanh(s / problem.soft_cap)
    # Before the division, whose gradient multiplies by the scores.
    s = jnp.where(where, s - 1 if is_fixed else s, 0)
    return s * squeeze, squeeze if is_fixed else jnp.zeros_like(squeeze)


def without_dead(
    problem: Problem, rows: Bool[Array, "#B #N T"], seen: Bool[Array, "#B S #K"]
) -> Problem:
    """Zeroes queries without keys and keys without queries: NaN there must not leak."""
    live = jnp.swapaxes(rows, 1, 2)[..., None]
    seen = seen[..., None]
    return dataclasses.replace(
        problem,
        query=jnp.where(live, problem.query, 0),
        key=jnp.where(seen, problem.key, 0),
        value=jnp.where(seen, problem.value, 0),
    )


def seen_keys(problem: Problem, where: Bool[Array, "#B #N T S"]) -> Bool[Array, "#B S #K"]:
    """Finds the keys that some query of the block sees, through any head of their group."""
    seen = jnp.any(where, axis=2)
    if seen.shape[1] > 1:
        seen = seen.reshape(seen.shape[0], problem.key.shape[2], -1, seen.shape[-1])
        seen = jnp.any(seen, axis=2)
    return jnp.swapaxes(seen, 1, 2)


def _drop(
    problem: Problem, words: UInt32[Array, " 2"], weights: Float[Array, "B N T S"]
) -> Float[Array, "B N T S"]:
    rate = problem.dropout_rate
    keep = keep_mask(words, rate, problem.pairs, *problem.drawn)
    return jnp.where(keep, weights / (1 - rate), 0)
