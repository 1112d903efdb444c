r"""Attention in memory linear in length: the dense computation on blocks of queries, one at a time.

The backward pass forms each block again, but not its thresholds, which are saved.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kreg import reference
from kreg.problem import Problem
from kreg.stats import Stats
from kreg.threshold import THRESHOLD

# A block has at least this many queries, enough to keep a matrix product busy, and more where
# keys are few: its scores then take about this many bytes.
_LEAST_ROWS = 128
_BLOCK_BYTES = 2 * 2**20


def attend(problem: Problem) -> tuple[Float[Array, "B T N V"], Stats | None]:
    """Attends block by block."""
    queries, block = problem.sizes["t"], _block(problem)
    if queries <= block:
        return reference.attend(problem)
    problem = alive(problem)
    save = jax.checkpoint_policies.save_only_these_names(THRESHOLD)
    parts, join = _split(problem, block)

    def body(part):
        whole = join(part)
        return reference.attend_rows(whole, reference.admissible(whole))

    out, stats = jax.lax.map(jax.checkpoint(body, policy=save), parts)
    return jax.tree.map(lambda x: _unsplit(x, queries), (out, stats))


def alive(problem: Problem) -> Problem:
    """Zeroes queries without keys and keys without queries: NaN there must not leak."""
    if reference.sees_all(problem):
        return problem
    return reference.without_dead(problem, *_alive(problem, _block(problem)))


def _block(problem: Problem) -> int:
    sizes = problem.sizes
    row = sizes["b"] * sizes["n"] * sizes["s"] * problem.dtype.itemsize
    return max(_LEAST_ROWS, _BLOCK_BYTES // row // _LEAST_ROWS * _LEAST_ROWS)


def _alive(problem: Problem, block: int) -> tuple[Bool[Array, "#B #N T"], Bool[Array, "#B S #K"]]:
    """Finds the queries that see a key and the keys that a query sees, without a T x S array."""
    parts, join = _split(problem, block)

    def body(seen, part):
        whole = join(part)
        where = reference.admissible(whole)
        rows = problem.split.any(where)[..., 0]
        return seen | reference.seen_keys(whole, where), jnp.swapaxes(rows, 1, 2)

    first, _ = body(False, [x[0] for x in parts])
    # Of the type that it stays, on every mesh; nothing of it is computed.
    seen, rows = jax.lax.scan(body, first & False, parts)
    return jnp.swapaxes(_unsplit(rows, problem.sizes["t"]), 1, 2), seen


def _split(problem: Problem, block: int) -> tuple[list[Array], Callable[[list[Array]], Problem]]:
    """Cuts the arrays with one row a query into blocks, on a new leading axis; pads the last.

    Also returns what makes a problem of one block's arrays.
    """
    queries = problem.sizes["t"]
    leaves, tree = jax.tree.flatten(problem)
    places = [names.find("t") for names in jax.tree.leaves(problem.axes())]
    cut = [at >= 0 and x.shape[at] == queries for x, at in zip(leaves, places, strict=True)]
    parts = [_blocks(x, at, block) for x, at, c in zip(leaves, places, cut, strict=True) if c]

    def join(part: list[Array]) -> Problem:
        fresh = iter(part)
        return jax.tree.unflatten(
            tree, [next(fresh) if c else x for x, c in zip(leaves, cut, strict=True)]
        )

    return parts, join


def _blocks(x: Array, axis: int, block: int) -> Array:
    count = -(-x.shape[axis] // block)
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, count * block - x.shape[axis])
    # Edge values: padded rows are real rows again, their results dropped, so that none is special.
    x = jnp.pad(x, pad, mode="edge")
    x = x.reshape(*x.shape[:axis], count, block, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def _unsplit(x: Array, queries: int) -> Array:
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :queries]
