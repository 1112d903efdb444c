r"""Nadaraya-Watson regression in its own terms: any vectors, true distances."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kreg.bandwidth import Adaptive, Rule, check_bandwidth
from kreg.kernels import Kernel, check_kernel
from kreg.shapes import broadcasts_to
from kreg.weights import weigh


def nadaraya_watson(
    queries: Float[Array, "*B T D"],
    keys: Float[Array, "*B S D"],
    values: Float[Array, "*B S V"],
    *,
    kernel: Kernel,
    bandwidth: Rule = Adaptive(),  # noqa: B008 - immutable
    mask: Bool[Array, "*#B #T #S"] | None = None,
) -> Float[Array, "*B T V"]:
    r"""Estimates values, $\sum_j K(d_j/h) v_j / \sum_j K(d_j/h)$ with distances $d_j = |q - k_j|$.

    `Fixed(h)` takes h as it stands; `Anchored(h)` takes H^2 = d_min^2 + 2 r h^2; `Nearest(k)` the
    distance of the next key after the k nearest; `Adaptive(h)` the H at which the weights are
    alpha-entmax(-d^2 / (2 h^2)), alpha = 1 + 1/r. With the Gaussian the first three are
    exp(-d^2 / (2 h^2)), normalised.

    Args:
        queries: points at which to estimate.
        keys: points at which values are known.
        values: the known values.
        kernel: K.
        bandwidth: the rule for h; an array h broadcasts to [..., T, 1].
        mask: True where a query may use a key.

    Returns:
        The estimates; 0 for a query without keys, the mean of all its keys' values where `Fixed`
        finds none within h. Distances are formed by differences, so far-off origins cost nothing.

    Raises:
        ValueError: an argument of the wrong shape or value, named.

    Examples:
        >>> import jax.numpy as jnp
        >>> import kreg
        >>> x = jnp.array([[0.0], [1.0], [2.0]])
        >>> kreg.nadaraya_watson(
        ...     jnp.array([[0.5]]), x, x, kernel=kreg.epanechnikov, bandwidth=kreg.Fixed(1.0)
        ... ).tolist()
        [[0.5]]

    References:
        Nadaraya, `On Estimating Regression <https://doi.org/10.1137/1109020>`_, 1964;
        Watson, `Smooth Regression Analysis <https://www.jstor.org/stable/25049340>`_, 1964.
    """
    queries, keys, values = jnp.asarray(queries), jnp.asarray(keys), jnp.asarray(values)
    _check_points(queries, keys, values)
    check_kernel(kernel)
    check_bandwidth(bandwidth, kernel, queries.ndim)
    dtype = jnp.promote_types(jnp.result_type(queries, keys, values), jnp.float32)
    shape = (*queries.shape[:-1], keys.shape[-2])
    where = jnp.ones(shape, bool) if mask is None else _mask(mask, shape)
    live, seen = jnp.any(where, axis=-1)[..., None], jnp.any(where, axis=-2)[..., None]
    queries = jnp.where(live, queries.astype(dtype), 0)
    keys = jnp.where(seen, keys.astype(dtype), 0)
    known = jnp.where(seen, values.astype(dtype), 0)
    distance2 = jnp.sum(jnp.square(queries[..., :, None, :] - keys[..., None, :, :]), axis=-1)
    h = jnp.asarray(bandwidth.h, dtype)
    z = jnp.where(where, -distance2, 0) / (2 * jnp.square(h))
    weights, _ = weigh(z, where, kernel, bandwidth, -0.5)
    estimate = jnp.einsum("...ts,...sv->...tv", weights, known, precision="highest")
    return estimate.astype(values.dtype)


def _check_points(queries: Array, keys: Array, values: Array) -> None:
    batch = queries.shape[:-2]
    for name, x in (("queries", queries), ("keys", keys), ("values", values)):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name}: expected a floating type, got {x.dtype}")
        if x.ndim < 2 or x.shape[:-2] != batch:
            raise ValueError(
                f"{name}: expected [..., points, width], batch as the queries', got {x.shape}"
            )
    if keys.shape[-1] != queries.shape[-1] or not keys.shape[-2]:
        raise ValueError(f"keys: expected [..., S, {queries.shape[-1]}], got shape {keys.shape}")
    if values.shape[-2] != keys.shape[-2]:
        raise ValueError(f"values: expected [..., {keys.shape[-2]}, V], got shape {values.shape}")


def _mask(mask, shape: tuple[int, ...]) -> Bool[Array, "*B T S"]:
    mask = jnp.asarray(mask)
    if mask.dtype != bool:
        raise ValueError(f"mask: expected a boolean mask, got {mask.dtype}")
    if not broadcasts_to(mask.shape, shape):
        raise ValueError(f"mask: expected a shape that broadcasts to {shape}, got {mask.shape}")
    return jnp.broadcast_to(mask, shape)
