r"""Attention in memory linear in length: the dense computation on blocks of queries, one at a time.

The backward pass forms each block again, but not its thresholds, which are saved.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kreg import masks, reference
from kreg.problem import Problem
from kreg.threshold import THRESHOLD
from kreg.weights import Stats

# A block has at least this many queries, enough to keep a matrix product busy, and more where
# keys are few: its scores then take about this many bytes.
_LEAST_ROWS = 128
_BLOCK_BYTES = 2 * 2**20


def attend(problem: Problem) -> tuple[Float[Array, "B T N V"], Stats]:
    """Attends block by block."""
    batch, queries, heads, _ = problem.query.shape
    row = batch * heads * problem.key.shape[1] * problem.dtype.itemsize
    block = max(_LEAST_ROWS, _BLOCK_BYTES // row // _LEAST_ROWS * _LEAST_ROWS)
    if queries <= block:
        return reference.attend(problem)
    marks = problem.per_query()
    count = -(-queries // block)
    if not masks.plain(problem):
        problem = reference.without_dead(problem, *_alive(problem, marks, block, count))
    save = jax.checkpoint_policies.save_only_these_names(THRESHOLD)

    def body(part):
        whole = _join(part, problem, marks)
        return reference.attend_rows(whole, masks.admissible(whole))

    parts = _split(problem, marks, block, count)
    out, stats = jax.lax.map(jax.checkpoint(body, policy=save), parts)
    return jax.tree.map(lambda x: _unsplit(x, queries), (out, stats))


def _alive(
    problem: Problem, marks: Problem, block: int, count: int
) -> tuple[Bool[Array, "#B #N T"], Bool[Array, "#B S #K"]]:
    """Finds the queries that see a key and the keys that a query sees, without a T x S array."""

    def body(seen, part):
        whole = _join(part, problem, marks)
        where = masks.admissible(whole)
        return seen | reference.seen_keys(whole, where), jnp.swapaxes(jnp.any(where, axis=-1), 1, 2)

    parts = _split(problem, marks, block, count)
    first = jax.tree.map(lambda x: x[0], parts)
    shape = jax.eval_shape(lambda part: body(False, part)[0], first)
    seen, rows = jax.lax.scan(body, jnp.zeros(shape.shape, bool), parts)
    return jnp.swapaxes(_unsplit(rows, problem.query.shape[1]), 1, 2), seen


def _split(problem: Problem, marks: Problem, block: int, count: int) -> list[Array]:
    """Cuts the fields with one row a query into blocks, on a new leading axis; pads the last."""
    leaves, flags = jax.tree.leaves(problem), jax.tree.leaves(marks)
    return [_blocks(x, at, block, count) for x, at in zip(leaves, flags, strict=True) if at >= 0]


def _blocks(x: Array, axis: int, block: int, count: int) -> Array:
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, count * block - x.shape[axis])
    # Edge values: padded rows are real rows again, their results dropped, so that none is special.
    x = jnp.pad(x, pad, mode="edge")
    x = x.reshape(*x.shape[:axis], count, block, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def _join(parts: list[Array], problem: Problem, marks: Problem) -> Problem:
    """Makes the problem of one block of queries."""
    leaves, tree = jax.tree.flatten(problem)
    fresh = iter(parts)
    flags = jax.tree.leaves(marks)
    return jax.tree.unflatten(
        tree, [next(fresh) if at >= 0 else x for x, at in zip(leaves, flags, strict=True)]
    )


def _unsplit(x: Array, queries: int) -> Array:
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :queries]
