r"""Attention with its batch, heads or sequence split over a mesh.

Batch and heads need no messages. A sequence has two forms. *gather*: each device holds a part of
the queries and is brought all keys and values; under causality it takes an early and a late part,
so that all have alike to do. *keys*: keys and values stay where they are, all queries meet them
there, and what a row needs goes around: the search for its threshold is a sum of two numbers a row
a round, since the root over any part of the keys bounds that over all.
"""

import dataclasses
from typing import Any, Literal, Unpack

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float

from kreg import implementations
from kreg.canonical import Options, canonical
from kreg.masks import Mask
from kreg.problem import Problem
from kreg.sharding import zigzag
from kreg.sharding.places import Axes, Layout, Places
from kreg.sharding.traffic import Traffic
from kreg.split import Split
from kreg.stats import Stats

type Form = Literal["gather", "keys"]


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    bias: Float[Array, "..."] | None = None,
    mask: Bool[Array, "..."] | Mask | None = None,
    *,
    batch: Axes = None,
    heads: Axes = None,
    sequence: str | None = None,
    form: Form | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    return_stats: bool = False,
    **options: Unpack[Options],
) -> Float[Array, "B T N V"] | tuple[Float[Array, "B T N V"], Stats]:
    r"""Computes `kreg.attention` of arrays split over a mesh, $p_j \propto [z_j - t]_+^r$.

    All arrays are whole: how they are split is up to `jax.jit`, or to their explicit types, and
    what is not yet split as the form needs it is brought there first. Works under `jax.jit`,
    derivatives in both modes, and meshes with auto or explicit axes.

    Args:
        query: queries.
        key: keys.
        value: values.
        bias: as in `kreg.attention`.
        mask: as in `kreg.attention`.
        batch: axis or axes of the mesh that the batch is split over. Along axes that are named
            nowhere, devices hold copies and do the same.
        heads: axis or axes that heads are split over; key heads too, unless there is one.
        sequence: axis that queries ("gather") or keys ("keys") are split over.
        form: None takes what sends fewer bytes; `explain` says which, and how many.
        mesh: that of `jax.set_mesh` where None.
        return_stats: as in `kreg.attention`.
        **options: all others of `kreg.attention`. With "keys" kernels take no dropout.

    Returns:
        What `kreg.attention` returns; split over `sequence` with "gather", whole with "keys".
        Lengths that the axis does not divide are padded, which moves arrays once more.

    Raises:
        ValueError: an axis that the mesh does not have, or that does not divide batch or heads.
        NotImplementedError: the named implementation does not take these inputs.

    Examples:
        >>> import jax
        >>> import kreg
        >>> q = k = v = jax.random.normal(jax.random.key(0), (1, 6, 2, 4))
        >>> mesh = jax.make_mesh((1,), ("sequence",))
        >>> options = dict(mesh=mesh, sequence="sequence", form="keys")
        >>> out = jax.jit(lambda *qkv: kreg.sharding.attention(*qkv, **options))(q, k, v)
        >>> bool(jax.numpy.allclose(out, kreg.attention(q, k, v), atol=1e-6))
        True
    """
    given: dict[str, Any] = dict(options)
    implementation = given.pop("implementation", None)
    implementations.check(implementation)
    places = Places.of(mesh, Layout(batch, heads, sequence))
    problem = canonical(query, key, value, bias, mask, return_stats=return_stats, **given)
    places.check(problem.sizes)
    form, _ = _choose(problem, places, form)
    run = (_KeysStay if form == "keys" else _Gathered)(places, implementation)
    queries = problem.sizes["t"]
    problem = _padded(problem, run.parts(problem))
    outs = PartitionSpec(*places.spec(problem.query.shape, "btn.", run.rows)[:3])
    of_stats: Any = (outs,) * 3
    found = outs, Stats(*of_stats) if return_stats else None
    # Kernels do not say what of their results differs from device to device.
    kinds = implementations.device_kind(), places.device_kind
    checks = form == "keys" and not implementations.may_run_kernels(implementation, *kinds)
    out, stats = places.run(run, (run.specs(problem),), found, (problem,), checks)
    if problem.sizes["t"] > queries:
        # Along explicit axes only what is whole can be cut.
        whole = PartitionSpec(*places.spec(problem.query.shape, "btn.", "bn")[:3])
        out, stats = jax.tree.map(lambda x: places.placed(x, whole)[:, :queries], (out, stats))
    if query.ndim == 3:
        out, stats = out[0], jax.tree.map(lambda x: x[0], stats)
    return out if stats is None else (out, lax.stop_gradient(stats))


def explain(
    *args: Any,
    batch: Axes = None,
    heads: Axes = None,
    sequence: str | None = None,
    form: Form | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    implementation: str | None = None,
    **options: Any,
) -> str:
    """Says which form `attention` takes for the same arguments, and why; on any implementation.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> import kreg
        >>> q, k = jnp.zeros((1, 1, 2, 64)), jnp.zeros((1, 4096, 2, 64))
        >>> mesh = jax.sharding.AbstractMesh((8,), ("sequence",))
        >>> kreg.sharding.explain(q, k, k, mesh=mesh, sequence="sequence")
        'keys: a device sends 0.0 MB, with gather 7.3'
    """
    places = Places.of(mesh, Layout(batch, heads, sequence))
    return ": ".join(_choose(canonical(*args, **options), places, form))


@dataclasses.dataclass(frozen=True)
class _Gathered:
    """Each device has a part of the queries, and is brought all keys."""

    places: Places
    implementation: str | None
    rows = "btn"

    def parts(self, problem: Problem) -> dict[str, int]:
        """What lengths are to be multiples of."""
        size = self.places.size("t")
        pads = problem.sizes["t"] % size > 0
        return {"t": 2 * size if pads and _is_causal(problem) else size, "s": size}

    def specs(self, problem: Problem) -> Problem:
        def split(letters: str):
            return lambda x, names: self.places.spec(x.shape, names, letters)

        axes = problem.axes()
        specs = jax.tree.map(split("bnkt"), problem, axes)
        key, value = (
            jax.tree.map(split("bks"), x, y)
            for x, y in ((problem.key, axes.key), (problem.value, axes.value))
        )
        return dataclasses.replace(specs, key=key, value=value)

    def __call__(self, problem: Problem) -> tuple[Array, Stats | None]:
        axis = self.places.sequence
        if axis is None:
            return self._run(problem, 0)
        key, value = (
            lax.all_gather(x, axis, axis=1, tiled=True) if self.places.size("s") > 1 else x
            for x in (problem.key, problem.value)
        )
        problem = dataclasses.replace(problem, key=key, value=value)
        here, devices, queries = lax.axis_index(axis), lax.axis_size(axis), problem.sizes["t"]
        if devices == 1 or queries % 2 or not _is_causal(problem):
            return self._run(problem, here * queries)
        early, late = zigzag.dealt(problem, axis)
        half, last = queries // 2, 2 * devices - 1
        found = self._run(early, here * half), self._run(late, (last - here) * half)
        return zigzag.returned(*found, axis)

    def _run(self, problem: Problem, first) -> tuple[Array, Stats | None]:
        return implementations.run(_part(problem, first, 0), self.implementation)


@dataclasses.dataclass(frozen=True)
class _KeysStay:
    """Each device has a part of the keys, and all queries."""

    places: Places
    implementation: str | None
    rows = "bn"

    def parts(self, problem: Problem) -> dict[str, int]:
        return {"t": 1, "s": self.places.size("s")}

    def specs(self, problem: Problem) -> Problem:
        return jax.tree.map(
            lambda x, names: self.places.spec(x.shape, names, "bnks"), problem, problem.axes()
        )

    def __call__(self, problem: Problem) -> tuple[Array, Stats | None]:
        axis = self.places.sequence
        first = lax.axis_index(axis) * problem.sizes["s"]
        problem = dataclasses.replace(problem, split=Split(axis))
        return implementations.run(_part(problem, 0, first), self.implementation)


def _is_causal(problem: Problem) -> bool:
    return problem.mask.upper is not None


def _part(problem: Problem, row, column) -> Problem:
    """A problem whose arrays are parts of larger ones: its queries and keys count from 0."""
    sizes = problem.sizes
    return dataclasses.replace(
        problem,
        mask=problem.mask.seen_from(row, column),
        rows=jnp.arange(sizes["t"]),
        columns=jnp.arange(sizes["s"]),
        draws=problem.drawn,
    )


def _choose(problem: Problem, places: Places, form: Form | None) -> tuple[Form, str]:
    if form not in (None, "gather", "keys"):
        raise ValueError(f'form: expected None, "gather" or "keys", got {form!r}')
    if places.sequence is None:
        if form == "keys":
            raise ValueError('sequence: expected an axis of the mesh with form="keys", got None')
        return "gather", "no sequence is split"
    traffic = Traffic.of(problem, {letter: places.size(letter) for letter in "bnks"})
    sent = {"gather": traffic.gather / 1e6, "keys": traffic.keys / 1e6}
    taken: Form = form or ("gather" if traffic.gather <= traffic.keys else "keys")
    (other,) = sent.keys() - {taken}
    why = f"a device sends {sent[taken]:.1f} MB, with {other} {sent[other]:.1f}"
    return taken, "named by the caller" if form else why


def _padded(problem: Problem, parts: dict[str, int]) -> Problem:
    """Lengthens queries and keys to whole parts; nobody sees what is added."""
    for letter, count in parts.items():
        length = problem.sizes[letter]
        if length % count:
            limit = jnp.full(problem.sizes["b"], length)
            of_queries, of_keys = (limit, None) if letter == "t" else (None, limit)
            seen = Mask(query_seq_lengths=of_queries, key_value_seq_lengths=of_keys)
            problem = dataclasses.replace(problem, mask=problem.mask & seen)
            problem = problem.lengthened(letter, -length % count)
    return problem
