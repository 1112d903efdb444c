"""Attention of all queries, of whatever batch entry, to the same few keys, over a mesh."""

import dataclasses
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from kreg import implementations
from kreg.canonical import Options, canonical
from kreg.sharding.places import Layout, Places


def to_shared_keys(
    query: Float[Array, "B T N H"],
    key: Float[Array, "S N H"],
    value: Float[Array, "S N V"],
    layout: Layout,
    **options: Unpack[Options],
) -> Float[Array, "B T N V"]:
    r"""Computes `kreg.attention`, $p_j \propto [z_j - t]_+^r$, batch and time one axis of queries.

    Keys and values are whole on every device; queries are split as the layout says, and nothing is
    sent but gradients of the keys. Dropout draws as on one device.

    Args:
        query: queries.
        key: keys that all queries see.
        value: their values.
        layout: axes of the mesh of `jax.set_mesh`; heads are not split.
        **options: of `kreg.attention`, but for masks and biases.

    Examples:
        >>> import jax.numpy as jnp
        >>> import kreg
        >>> with jax.set_mesh(jax.make_mesh((1,), ("data",))):
        ...     layout = kreg.sharding.Layout(batch="data")
        ...     out = kreg.sharding.to_shared_keys(
        ...         jnp.ones((2, 3, 1, 4)), jnp.ones((5, 1, 4)), jnp.ones((5, 1, 2)), layout
        ...     )
        >>> out.shape
        (2, 3, 1, 2)
    """
    given: dict[str, Any] = dict(options)
    implementation = given.pop("implementation", None)
    implementations.check(implementation)
    places = Places.of(None, layout._replace(heads=None))
    places.check({"b": query.shape[0]})
    whole_batch, length = query.shape[:2]
    query = jnp.pad(query, ((0, 0), (0, -length % places.size("t")), (0, 0), (0, 0)))

    def body(query, key, value, arrays):
        batch, steps = query.shape[:2]
        entries = _numbers(places, "b", batch, whole_batch)
        times = _numbers(places, "t", steps, length)
        rows = (entries[:, None] * length + times[None]).reshape(-1)
        flat = query.reshape(1, -1, *query.shape[2:])
        problem = canonical(flat, key[None], value[None], return_stats=False, **given, **arrays)
        problem = dataclasses.replace(problem, draws=(rows, problem.columns))
        return implementations.run(problem, implementation)[0].reshape(*query.shape[:3], -1)

    split = places.spec(query.shape, "bt..")
    whole = PartitionSpec()
    arrays = {name: given.pop(name) for name in ("bandwidth", "dropout_key") if name in given}
    specs = split, whole, whole, jax.tree.map(lambda _: whole, arrays)
    return places.run(body, specs, split, (query, key, value, arrays), checks=False)[:, :length]


def _numbers(places: Places, letter: str, size: int, whole: int) -> Array:
    """Numbers of a device's part of an axis in the whole of it; an axis of size 1 is not split."""
    if whole == 1:
        return jnp.arange(size)
    part = jnp.zeros((), jnp.int32)
    for axis in places.axes[letter]:
        part = part * lax.axis_size(axis) + lax.axis_index(axis)
    return part * size + jnp.arange(size)
