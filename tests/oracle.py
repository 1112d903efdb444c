"""The oracle: every kernel under every bandwidth rule in float64 NumPy, from the formulas alone.

Nothing here imports jax or kreg. Thresholds come from a sort and a closed form (orders 1 and 2) or
from bisection (other orders), in extended precision where rows are short. Axes: B batch, T queries,
S keys, N heads, K key heads, H key width, V value width; G = N / K. Scores are [..., S]; `where`
marks the admissible keys; z = scores / h^2.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

INFINITE = float("inf")
LONG_ROW = 4096  # above this width float64 replaces the (slow) extended precision


@dataclass(frozen=True)
class Rule:
    """Say which rule: `name` is adaptive, anchored, fixed or nearest; `h` broadcasts to scores."""

    name: str
    h: Any = 1.0
    k: int = 0


ADAPTIVE = Rule("adaptive")


def profile(order: float, u2: np.ndarray) -> np.ndarray:
    """Evaluate [1 - u^2]_+^r at u^2; r = 0 gives 1[u^2 <= 1], r = inf gives exp(-u^2/2)."""
    if order == INFINITE:
        return np.exp(-u2 / 2)
    if order == 0:
        return (u2 <= 1).astype(np.float64)
    return np.maximum(1 - u2, 0) ** order


def _power(base: np.ndarray, order: float) -> np.ndarray:
    """Raise to r with [x]_+^0 = 1[x > 0]; by multiplication where r is a small integer."""
    base = np.maximum(base, 0)
    if order == 0:
        return (base > 0).astype(base.dtype)
    if order == int(order) and order <= 8:
        result = base
        for _ in range(int(order) - 1):
            result = result * base
        return result
    positive = base > 0
    return np.where(positive, np.exp(order * np.log(np.where(positive, base, 1))), 0)


def _sorted_root(y: np.ndarray, order: float) -> np.ndarray:
    """Solve sum [y - tau]_+^r = 1 for r = 1 or 2 on rows with maximum 0 by sorting."""
    clipped = np.maximum(y, -1.5)  # below max - 1, hence outside every support
    ordered = -np.sort(-clipped, axis=-1)
    count = np.arange(1, y.shape[-1] + 1)
    mean = np.cumsum(ordered, axis=-1) / count
    if order == 1:
        candidates = mean - 1 / count.astype(y.dtype)
    else:
        spread = np.cumsum(ordered**2, axis=-1) - count * mean**2
        candidates = mean - np.sqrt(np.maximum(1 - spread, 0) / count)
    size = np.sum(ordered > candidates, axis=-1, keepdims=True)
    return np.take_along_axis(candidates, size - 1, axis=-1)


def _bisected_root(y: np.ndarray, order: float) -> np.ndarray:
    """Solve sum [y - tau]_+^r = 1 on rows with maximum 0 by bisection until nothing moves."""
    low = np.full((*y.shape[:-1], 1), -1, y.dtype)
    high = np.zeros_like(low)
    for _ in range(200):
        middle = (low + high) / 2
        above = _power(y - middle, order).sum(-1, keepdims=True) >= 1
        new_low, new_high = np.where(above, middle, low), np.where(above, high, middle)
        if np.array_equal(new_low, low) and np.array_equal(new_high, high):
            break
        low, high = new_low, new_high
    return low


def entmax_threshold(z: np.ndarray, order: float) -> np.ndarray:
    """Return t = r tau, sum [z/r - tau]_+^r = 1, [..., 1]; z is -inf at inadmissible keys."""
    extended = np.longdouble if z.shape[-1] <= LONG_ROW else np.float64
    top = z.max(-1, keepdims=True)
    y = (z.astype(extended) - top) / extended(order)
    root = _sorted_root(y, order) if order in (1, 2) else _bisected_root(y, order)
    return top.astype(extended) + extended(order) * root


def _kth_largest(z: np.ndarray, k: int) -> np.ndarray:
    """Return the k-th largest of each row, repeats counted, -inf if there are fewer, [..., 1]."""
    if k > z.shape[-1]:
        return np.full((*z.shape[:-1], 1), -INFINITE)
    return -np.sort(-z, axis=-1)[..., k - 1 : k]


def threshold(z: np.ndarray, order: float, rule: Rule, fixed: Any) -> np.ndarray:
    """Return the threshold t of each row in z units, [..., 1]; `fixed` is the one of Fixed(h)."""
    if rule.name == "nearest":
        return _kth_largest(z, rule.k if order in (0, INFINITE) else rule.k + 1)
    if order == INFINITE:
        return np.full((*z.shape[:-1], 1), -INFINITE)
    if rule.name == "fixed":
        return np.broadcast_to(np.asarray(fixed, np.float64), (*z.shape[:-1], 1))
    if rule.name == "anchored":
        return z.max(-1, keepdims=True) - order
    return entmax_threshold(z, order)


@dataclass(frozen=True)
class Rows:
    """Weights p, slopes u = d(raw weight)/dz, z, `where`: [..., S]; t, `uniform`: [..., 1]."""

    p: np.ndarray
    u: np.ndarray
    z: np.ndarray
    t: np.ndarray
    where: np.ndarray
    uniform: np.ndarray

    @property
    def support(self) -> np.ndarray:
        """Count the keys with weight, [...]."""
        return (self.p > 0).sum(-1)

    @property
    def margin(self) -> float:
        """Return how far the nearest score is from its row's threshold: the distance to a kink."""
        gap = np.abs(np.where(self.where & np.isfinite(self.t), self.z - self.t, INFINITE))
        return float(np.min(gap[gap > 0], initial=INFINITE))

    @property
    def slope(self) -> float:
        """Return max(1, the largest dp/dz): what an error of a score does to its weight.

        At most 1 under Adaptive (r >= 1) and for the Gaussian. Fixed and Nearest may put the
        threshold just below the best score and orders below 1 are steep: there is no bound there.
        """
        return float(np.max(self.u, initial=1.0))

    @property
    def largest_score(self) -> float:
        """Return max |z| over the admissible keys."""
        return float(np.max(np.abs(self.z[self.where]), initial=0.0))


def rows(
    scores: np.ndarray, where: np.ndarray, order: float, rule: Rule, fixed: Any = None
) -> Rows:
    """Weigh the keys of each row: p = [z - t]_+^r / sum, the limits r = 0, inf, the fall-backs.

    `fixed` overrides Fixed's threshold 1/h^2 - 1/2 (scores that are not cosines).
    """
    scores = np.asarray(scores, np.float64)
    where = np.broadcast_to(where, scores.shape) & (scores > -INFINITE)
    h2 = np.asarray(rule.h, np.float64) ** 2
    empty = ~where.any(-1, keepdims=True)
    where_or_all = where | empty  # rows without keys are solved on zeros and cleared at the end
    z = np.where(where_or_all, np.where(where, scores, 0) / h2, -INFINITE)
    t = threshold(z, order, rule, 1 / h2 - 0.5 if fixed is None else fixed)
    w, u = _raw(z, t, order, rule)
    total = w.sum(-1, keepdims=True)
    uniform = (total == 0) & ~empty
    if rule.name == "nearest" and order not in (0, INFINITE):
        uniform |= (where.sum(-1, keepdims=True) <= rule.k) & ~empty
        chosen = where_or_all & (z >= _kth_largest(z, rule.k))
    else:
        chosen = where
    w, u = np.where(uniform, chosen, w), np.where(uniform, 0, u)
    total = w.sum(-1, keepdims=True)
    p = np.where(empty, 0, w / np.where(total == 0, 1, total)).astype(np.float64)
    u = np.where(empty, 0, u / np.where(total == 0, 1, total)).astype(np.float64)
    t = np.where(empty, INFINITE, t)
    return Rows(p, u, np.where(where, z, -INFINITE), t, where, uniform | empty)


def _raw(z: np.ndarray, t: np.ndarray, order: float, rule: Rule) -> tuple[np.ndarray, np.ndarray]:
    """Return the unnormalised weights and their derivatives with respect to z."""
    if order == INFINITE:
        kept = z >= t if rule.name == "nearest" else z > -INFINITE
        w = np.where(kept, np.exp(z - z.max(-1, keepdims=True)), 0)
        return w, w
    if order == 0:
        w = ((z >= t) & (z > -INFINITE)).astype(np.float64)
        return w, np.zeros_like(w)
    t = np.where(np.isfinite(t), t, 0)  # fewer than k + 1 keys: the caller falls back
    base = np.maximum(z - t, 0)
    if rule.name == "adaptive":
        return _power(base / order, order), _power(base / order, order - 1)
    widest = base.max(-1, keepdims=True)  # cancels in p; keeps large orders in range
    widest = np.where(widest > 0, widest, 1)
    return _power(base / widest, order), order / widest * _power(base / widest, order - 1)


def rows_vjp(
    rows_: Rows, cotangent: np.ndarray, order: float, rule: Rule
) -> tuple[np.ndarray, np.ndarray]:
    """Pull a cotangent of p back to z and to Fixed's t.

    Adaptive: J = diag(u) - u u^T / sum u; otherwise the quotient rule. Ties at the maximum
    (Anchored) or at the (k+1)-th key (Nearest) share the derivative; tests keep away from them.
    """
    p, u = rows_.p, rows_.u
    if rule.name == "adaptive" and order != INFINITE:
        total = u.sum(-1, keepdims=True)
        mean = (u * cotangent).sum(-1, keepdims=True) / np.where(total == 0, 1, total)
        return u * (cotangent - mean), np.zeros_like(total)
    d_z = u * (cotangent - (p * cotangent).sum(-1, keepdims=True))
    d_t = -d_z.sum(-1, keepdims=True)
    if order in (0, INFINITE):
        return np.where(rows_.uniform, 0, d_z), np.zeros_like(d_t)
    if rule.name in ("anchored", "nearest"):
        top = rows_.z.max(-1, keepdims=True)
        at = rows_.z == (top if rule.name == "anchored" else rows_.t)
        at = at & ~rows_.uniform
        d_z = d_z + np.where(at, d_t / np.maximum(at.sum(-1, keepdims=True), 1), 0)
        d_t = np.zeros_like(d_t)
    return np.where(rows_.uniform, 0, d_z), np.where(rows_.uniform, 0, d_t)


def entmax_alpha_derivative(x: np.ndarray, where: np.ndarray, alpha: float) -> np.ndarray:
    """Return dp/dalpha; at alpha = 1 its limit -(p log^2 p - p sum p log^2 p) / 2."""
    if alpha == 1:
        p = rows(x, where, INFINITE, ADAPTIVE).p
        square = np.where(p > 0, p * np.log(np.where(p > 0, p, 1)) ** 2, 0)
        return -(square - p * square.sum(-1, keepdims=True)) / 2
    order = 1 / (np.longdouble(alpha) - 1)
    z = np.where(where, x, -INFINITE).astype(np.longdouble)
    top = z.max(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        log_base = np.log1p(np.maximum((z - _shifted_root(z - top, order) - top) / order, -1))
    alive = log_base > -INFINITE
    log_base = np.where(alive, log_base, 0)
    p, u = (np.where(alive, np.exp(power * log_base), 0) for power in (order, order - 1))
    entropy = p * order * log_base
    u = u / u.sum(-1, keepdims=True)
    first = (p - u) * order**2
    return (first - (entropy - u * entropy.sum(-1, keepdims=True)) * order).astype(np.float64)


def _shifted_root(depth: np.ndarray, order: np.longdouble) -> np.ndarray:
    """Solve sum [1 + (depth - s) / r]_+^r = 1 for s = t + r - max, accurate as r grows.

    The derivative in alpha multiplies errors of p by r^2: adding r to z would cost too many digits.
    """
    low = np.zeros((*depth.shape[:-1], 1), np.longdouble)
    high = low + np.log(np.longdouble(depth.shape[-1]))
    for _ in range(80):
        middle = (low + high) / 2
        with np.errstate(divide="ignore"):
            log_base = np.log1p(np.maximum((depth - middle) / order, -1))
        above = np.exp(order * log_base).sum(-1, keepdims=True) >= 1
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return low


def squared_distances(queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Return |q - k|^2 from the differences themselves, [..., T, S]."""
    difference = queries[..., :, None, :].astype(np.float64) - keys[..., None, :, :]
    return (difference**2).sum(-1)


def effective_bandwidth2(d2: np.ndarray, where: np.ndarray, order: float, rule: Rule) -> np.ndarray:
    """Return the squared bandwidth H(q)^2 with which K_r(d / H) / sum are the weights, [..., 1]."""
    h2 = np.asarray(rule.h, np.float64) ** 2
    near = np.where(where, d2, INFINITE)
    if rule.name == "nearest" and order != INFINITE:
        return -_kth_largest(-near, rule.k + (order > 0))
    if rule.name == "fixed" or order == INFINITE:
        return np.broadcast_to(h2, (*d2.shape[:-1], 1))
    if rule.name == "anchored":
        return near.min(-1, keepdims=True) + 2 * order * h2
    return -2 * h2 * entmax_threshold(-near / (2 * h2), order).astype(np.float64)


def nadaraya_watson(
    queries: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    order: float,
    rule: Rule,
    mask: Any = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Return sum_j K_r(d_j / H) v_j / sum_j K_r(d_j / H) from true distances, and the weights."""
    d2 = squared_distances(queries, keys)
    where = np.broadcast_to(mask, d2.shape)
    empty = ~where.any(-1, keepdims=True)
    bandwidth2 = effective_bandwidth2(d2, where | empty, order, rule)
    chosen = where
    if rule.name == "nearest":
        chosen = where & (d2 <= -_kth_largest(-np.where(where | empty, d2, INFINITE), rule.k))
    bandwidth2 = np.where(np.isfinite(bandwidth2) & (bandwidth2 > 0), bandwidth2, 1)
    u2 = d2 / bandwidth2
    if order == INFINITE:
        u2 = u2 - np.where(chosen | empty, u2, INFINITE).min(-1, keepdims=True)
    w = np.where(chosen, profile(order, u2), 0)
    if rule.name == "nearest" and order == 0:
        w = chosen.astype(np.float64)
    fall_back = w.sum(-1, keepdims=True) == 0
    if rule.name == "nearest" and order not in (0, INFINITE):  # too few for a (k+1)-th distance
        fall_back |= where.sum(-1, keepdims=True) <= rule.k
    w = np.where(fall_back, chosen, w)
    p = w / np.maximum(w.sum(-1, keepdims=True), 1e-300)
    return p @ values.astype(np.float64), p


@dataclass(frozen=True)
class Attention:
    """The output [B, T, N, V], its rows and scores [B, N, T, S], and what the gradient needs."""

    output: np.ndarray
    rows: Rows
    scores: np.ndarray
    inputs: dict[str, Any]


def admissible(
    shape: tuple[int, ...],
    mask: Any,
    is_causal: bool = False,
    causal_offset: Any = 0,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
) -> np.ndarray:
    """Return the boolean [B, N, T, S] of mask, j <= i + offset, and query and key lengths."""
    batch, _, queries, keys = shape
    i, j = np.arange(queries)[:, None], np.arange(keys)[None, :]
    where = np.broadcast_to(True if mask is None else mask, shape).copy()
    if is_causal:
        where &= j <= i + np.broadcast_to(causal_offset, (batch,))[:, None, None, None]
    for length, position in ((query_seq_lengths, i), (key_value_seq_lengths, j)):
        if length is not None:
            where &= position < np.asarray(length)[:, None, None, None]
    return where


def attention(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    bias: Any = None,
    mask: Any = None,
    *,
    order: float,
    rule: Rule = ADAPTIVE,
    scale: float | None = None,
    **visible: Any,
) -> Attention:
    """Attend densely: p of scale q.k + bias times the values; `visible` goes to `admissible`."""
    batch, queries, heads, width = query.shape
    scale = width**-0.5 if scale is None else scale
    grouped = (query, *(np.repeat(x, heads // x.shape[2], axis=2) for x in (key, value)))
    wide = [np.asarray(x, np.float64) for x in grouped]
    with np.errstate(invalid="ignore"):
        scores = scale * np.einsum("btnh,bsnh->bnts", wide[0], wide[1])
        scores = scores if bias is None else scores + np.asarray(bias, np.float64)
    where = admissible((batch, heads, queries, key.shape[1]), mask, **visible)
    scores = np.where(where, scores, -INFINITE)
    rows_ = rows(scores, where, order, rule)
    used = rows_.where.any((1, 2))[..., None, None]
    wide[1:] = [np.where(used, x, 0) for x in wide[1:]]
    output = np.einsum("bnts,bsnv->btnv", rows_.p, wide[2])
    inputs = {"wide": wide, "scale": scale, "kv_heads": key.shape[2], "order": order, "rule": rule}
    return Attention(output, rows_, scores, inputs)


def attention_vjp(forward: Attention, cotangent: np.ndarray) -> dict[str, np.ndarray]:
    """Pull dO back: query, key, value, scores (= dense bias) [B, N, T, S], h [B, N, T, 1]."""
    query, key, value = forward.inputs["wide"]
    scale, order, rule = (forward.inputs[name] for name in ("scale", "order", "rule"))
    d_p = np.einsum("btnv,bsnv->bnts", cotangent.astype(np.float64), value)
    d_z, d_t = rows_vjp(forward.rows, d_p, order, rule)
    h = np.asarray(rule.h, np.float64)
    d_scores = d_z / h**2
    finite = np.where(forward.rows.where, forward.scores, 0)
    terms = d_z * finite * -2 / h**3
    d_h = terms.sum(-1, keepdims=True)
    if rule.name == "fixed":
        d_h = d_h + d_t * -2 / h**3
    groups = (forward.inputs["kv_heads"], -1)
    d_key = scale * np.einsum("bnts,btnh->bsnh", d_scores, query)
    d_value = np.einsum("bnts,btnv->bsnv", forward.rows.p, cotangent)
    d_key, d_value = (
        x.reshape(*x.shape[:2], *groups, x.shape[-1]).sum(3) for x in (d_key, d_value)
    )
    d_query = scale * np.einsum("bnts,bsnh->btnh", d_scores, key)
    return {
        "query": d_query,
        "key": d_key,
        "value": d_value,
        "scores": d_scores,
        "h": d_h,
        "h_terms": np.abs(terms),
    }
