"""Where attention in blocks works: one batch entry and a group of heads, block by block.

What is cut out of the arrays for a place, the loops over places and blocks, and what is put back.
Inside a place heads come first: k key heads, G queries' heads each.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

from kreg.bands import Block, group_size
from kreg.dropout import keep_mask
from kreg.problem import Problem
from kreg.rowwise import Rows


class Place(NamedTuple):
    """Which heads are being worked on: a batch entry and `count` key heads from `first` on."""

    entry: Array
    first: Array
    count: int


def over_groups(problem: Problem, body, carry):
    """Runs the body over batch entries and groups of heads, one at a time."""
    sizes = problem.sizes
    count = group_size(problem)
    each = sizes["k"] // count

    def step(index, carry):
        return body(Place(index // each, index % each * count, count), carry)

    return lax.fori_loop(0, sizes["b"] * each, step, carry)


def over_blocks(plan: list[Block], where, place: Place, compute, store, carry, sums):
    """Computes and stores block by block, one after the other.

    compute: (block, start, first, sums) -> (sums, found); store: (carry, found, block, start,
    first) -> carry. `where` is what `reach` or `span` found.
    """

    def one(state, block: Block, start):
        carry, sums = state
        if block.widths:
            first, sums, found = _searched(plan, where, place, compute, block, start, sums)
        else:
            first = block.first(start)
            sums, found = compute(block, start, first, sums)
        return store(carry, found, block, start, first), sums

    state = carry, sums
    for block in plan:
        # All that a block reads is cut at its start, which waits for the block before: XLA would
        # form the scores of all blocks first, far more than a cache holds. Not a constant either,
        # so that blocks share the code that cuts and stores.
        state, start = lax.optimization_barrier((state, jnp.asarray(block.start)))
        if block.count == 1:
            state = one(state, block, start)
        else:

            def step(i, state, block=block, start=start):
                return one(state, block, start + i * block.rows)

            state = lax.fori_loop(0, block.count, step, state)
    return state


def _searched(plan, where, place: Place, compute, block: Block, start, sums):
    """Computes a block with the narrowest width that holds all of its keys."""
    number = start // plan[0].rows
    entry, head = (
        i if n > 1 else 0 for i, n in zip((place.entry, place.first), where.shape[1:3], strict=True)
    )
    low, need = where[0, entry, head, number], where[1, entry, head, number]
    widths = jnp.asarray(block.widths)
    choice = jnp.sum(need > widths)
    first = jnp.minimum(low, block.keys - widths[choice])

    def narrow(width: int):
        return lambda sums: compute(block.narrowed(width), start, first, sums)

    sums, found = lax.switch(choice, [narrow(width) for width in block.widths], sums)
    return first, sums, found


@dataclasses.dataclass(frozen=True)
class Local:
    """The arrays of one place, heads first, in the type of the scores."""

    problem: Problem  # one batch entry, the place's heads
    scale: Float[Array, "#k #G #T 1"]
    key: Float[Array, "k S H"]
    value: Float[Array, "k S V"]

    @classmethod
    def cut(cls, problem: Problem, scale: Array, place: Place) -> "Local":
        sizes = problem.sizes
        share = sizes["n"] // sizes["k"]
        part = problem.part(
            b=(place.entry, 1),
            n=(place.first * share, place.count * share),
            k=(place.first, place.count),
        )
        dtype = problem.dtype
        key, value = (jnp.swapaxes(x[0], 0, 1).astype(dtype) for x in (part.key, part.value))
        # One copy each, not one a block.
        key, value = lax.optimization_barrier([in_order(x) for x in (key, value)])
        return cls(part, cut_scale(scale, place, share), key, value)

    def rows(self, x: Float[Array, "T n W"], block: Block, start) -> Float[Array, "k G C W"]:
        """Cuts a block of rows, heads first."""
        part = lax.dynamic_slice_in_dim(x, start, block.rows, axis=0).astype(self.problem.dtype)
        return queries_first(part, part.shape[1] // self.key.shape[0])

    def queries(self, block: Block, start) -> tuple[Float[Array, "k G C H"], Array]:
        """Cuts a block of queries, and their scales."""
        scale = self.scale
        if scale.shape[2] > 1:
            scale = lax.dynamic_slice_in_dim(scale, start, block.rows, axis=2)
        return self.rows(self.problem.query[0], block, start), scale

    def part(self, block: Block, start, first) -> Problem:
        return self.problem.part(t=(start, block.rows), s=(first, block.keys))

    def row_part(self, arrays, block: Block, start):
        """Cuts [#k, #G, #C, 1] for a block from the place's part of arrays of rows."""

        def cut(x):
            x = x if x.shape[2] == 1 else lax.dynamic_slice_in_dim(x, start, block.rows, axis=2)
            heads = self.key.shape[0]
            return _by_group(x, heads, self.problem.query.shape[2] // heads)

        return jax.tree.map(cut, arrays)

    def dropped(
        self, p: Float[Array, "k G C L"], block: Block, start, first
    ) -> Float[Array, "k G C L"]:
        """Drops weights, or what flows back to them, and scales the others up."""
        words, rate = self.problem.dropout_key, self.problem.dropout_rate
        if words is None:
            return p
        part = self.part(block, start, first)
        keep = keep_mask(words, rate, part.pairs, *part.drawn)
        return jnp.where(_by_group(keep, *p.shape[:2]), p / (1 - rate), 0)

    def scores(
        self, query: Float[Array, "k G C H"], block: Block, start, first
    ) -> Float[Array, "k G C L"]:
        """Scores of a block of queries with its keys, -inf where inadmissible."""
        heads, share, rows, width = query.shape
        key = along(self.key, 1, first, block.keys)
        z = product(query.reshape(heads, -1, width), key, 2, 2, self.problem.precision)
        z = z.reshape(heads, share, rows, -1)
        part = self.part(block, start, first)
        if part.bias is not None:
            z = z + _by_group(part.bias, heads, share)
        for at, size in block.mixed:
            some = part.part(s=(at, size))
            where = _by_group(some.mask.admissible(some.rows, some.columns), heads, share)
            if size == block.keys:
                z = jnp.where(where, z, -jnp.inf)
            else:
                # Or XLA copies the scores before it updates them.
                z = lax.optimization_barrier(z)
                # Or it masks number by number while it updates, in twice the time.
                some = lax.optimization_barrier(jnp.where(where, z[..., at : at + size], -jnp.inf))
                z = lax.dynamic_update_slice_in_dim(z, some, at, axis=3)
        return z


def in_order(x: Array) -> Array:
    """Stores an array in the order of its axes, once.

    Transposed without this, it would be read out of order, number by number, by all who read it.
    """
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))


def product(a: Array, b: Array, i: int, j: int, precision) -> Array:
    """Multiplies two batches of matrices, contracting axis i of a with axis j of b."""
    return lax.dot_general(a, b, (((i,), (j,)), ((0,), (0,))), precision=precision)


def along(x: Array, axis: int, start, size: int) -> Array:
    """Cuts an axis to (start, size); the start may be traced."""
    if isinstance(start, int):
        return lax.slice_in_dim(x, start, start + size, axis=axis)
    return lax.dynamic_slice_in_dim(x, start, size, axis=axis)


def _by_group(x: Array, heads: int, share: int) -> Array:
    """Splits an axis of heads [1, #N, C, L] into key heads and their groups [#k, #G, C, L]."""
    x = x[0]
    return x[None] if x.shape[0] == 1 else x.reshape(heads, share, *x.shape[1:])


def queries_first(x: Float[Array, "T N H"], share: int) -> Float[Array, "k G T H"]:
    """Brings heads first, split into key heads and their groups."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(-1, share, *x.shape[1:])


def cut_heads(x: Float[Array, "B T N H"], place: Place, share: int) -> Float[Array, "T n H"]:
    """Cuts out the place's heads."""
    x = lax.dynamic_index_in_dim(x, place.entry, 0, keepdims=False)
    return lax.dynamic_slice_in_dim(x, place.first * share, place.count * share, axis=1)


def put_heads(x: Array, part: Float[Array, "k G C H"], place: Place, start) -> Array:
    """Puts a block of rows of the place's heads back."""
    share, count = part.shape[1:3]
    part = in_order(jnp.moveaxis(part, 2, 0).reshape(1, count, -1, part.shape[3])).astype(x.dtype)
    return lax.dynamic_update_slice(x, part, (place.entry, start, place.first * share, 0))


def put_rows(into: Float[Array, "n B K G T"], rows, place: Place, start) -> Array:
    """Puts a block's row values, [k, G, C] each, into those of all rows."""
    part = jnp.stack(rows)[:, None].astype(into.dtype)
    return lax.dynamic_update_slice(into, part, (0, place.entry, place.first, 0, start))


def take_rows(kept: Float[Array, "n B K G T"], place: Place, start, size: int) -> Rows:
    """Takes a block's row values out again."""
    shape = (kept.shape[0], 1, place.count, kept.shape[3], size)
    part = lax.dynamic_slice(kept, (0, place.entry, place.first, 0, start), shape)
    return Rows(*part[:, 0])


def add(x: Array, part: Array, at: tuple) -> Array:
    """Adds a part to an array at a position."""
    return lax.dynamic_update_slice(x, lax.dynamic_slice(x, at, part.shape) + part, at)


def add_scores(into, part: Float[Array, "k G C L"], place: Place, start, first, share: int):
    """Adds a block's part of a gradient [#B, #N, #T, #S], summed over the axes of size 1."""
    part = part.reshape(1, -1, *part.shape[2:])
    small = tuple(i for i in (1, 2, 3) if into.shape[i] == 1)
    part = jnp.sum(part, axis=small, keepdims=True)
    at = (place.entry, place.first * share, start, first)
    return add(into, part, tuple(0 if n == 1 else a for n, a in zip(into.shape, at, strict=True)))


def cut_rows(arrays, place: Place, share: int):
    """The place's part of arrays of rows [#B, #N, #T, 1]: [1, #n, #T, 1]."""

    def cut(x):
        if x.shape[0] > 1:
            x = lax.dynamic_slice_in_dim(x, place.entry, 1, axis=0)
        if x.shape[1] > 1:
            x = lax.dynamic_slice_in_dim(x, place.first * share, place.count * share, axis=1)
        return x

    return jax.tree.map(cut, arrays)


def cut_scale(scale: Float[Array, "#B #T #N 1"], place: Place, share: int) -> Array:
    """The place's part, [#k, #G, #T, 1]."""
    if scale.shape[0] > 1:
        scale = lax.dynamic_slice_in_dim(scale, place.entry, 1, axis=0)
    if scale.shape[2] == 1:
        return jnp.moveaxis(scale, 2, 1)
    part = lax.dynamic_slice_in_dim(scale, place.first * share, place.count * share, axis=2)
    return queries_first(part[0], share)


def add_scale(dscale, part: Float[Array, "k G C"], place: Place, start) -> Array:
    """Adds a block's part of the scale's gradient, summed over the axes of size 1."""
    share, count = part.shape[1:]
    part = part.reshape(1, -1, count, 1).swapaxes(1, 2)
    small = tuple(i for i in (1, 2) if dscale.shape[i] == 1)
    at = (place.entry, start, place.first * share, 0)
    at = tuple(0 if n == 1 else a for n, a in zip(dscale.shape, at, strict=True))
    return add(dscale, jnp.sum(part, axis=small, keepdims=True), at)
