"""Which blocks of queries meet which keys, from the part of a mask that is known when tracing."""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kreg.problem import Problem
from kreg.rowwise import Powers

# Rows that a product is given at once, more where keys are few; scores of a block of one group of
# heads, in bytes: in cache, and where they fit two heads, a product for each core; blocks that are
# written out one by one, each with keys of its own, fewer where each is a loop over powers that are
# no products (more cost compile time, the more so the longer a row's code is; fewer cost work on
# keys that nobody sees).
_ROWS = 256
_BLOCK_BYTES = 4 * 2**20
_LARGEST_BYTES = 8 * 2**20
_MOST_BLOCKS = 8
_MOST_LOOPS = 6
_FEW_BLOCKS = 3
# Where the mask is known only when running: tiles of keys that are looked at, and the widths, in
# parts of all keys, that code exists for.
_TILE = 128
_PARTS = 8
_SHARES = (1, 2, 4, 6, 8)
# Rows from this length on are worth the code that looks for the keys that were given weight, and
# the part of the keys that it takes.
_LONG = 8192
_NARROW = (2,)


class Block(NamedTuple):
    """Blocks of queries, one after the other, that meet equally many keys.

    start: the first query.
    rows: queries in a block.
    count: how many blocks.
    low: first key, for the first block.
    keys: how many keys each block meets.
    slides: whether the first key moves with the block, kept inside [0, last].
    last: the greatest first key.
    mixed: ranges (first, size) of these keys that need the mask.
    widths: where the mask is known only when running, how many keys may be enough, ascending.
    """

    start: int
    rows: int
    count: int
    low: int
    keys: int
    slides: bool
    last: int
    mixed: tuple[tuple[int, int], ...]
    widths: tuple[int, ...] = ()

    def narrowed(self, keys: int) -> "Block":
        """The same queries with that many keys, all of them masked."""
        return self._replace(keys=keys, mixed=((0, keys),))

    def first(self, start):
        """First key of the block that begins with query `start`."""
        if not self.slides:
            return self.low
        low = self.low + (start - self.start)
        if isinstance(low, int):
            return min(max(low, 0), self.last)
        return low.clip(0, self.last)


def blocks(problem: Problem) -> list[Block]:
    """Plans the blocks; queries that see no key by the band are left out."""
    sizes = problem.sizes
    queries, keys = sizes["t"], sizes["s"]
    rows = _rows(problem)
    lower, upper = (
        x if isinstance(x, int) else None for x in (problem.mask.lower, problem.mask.upper)
    )
    static = problem.mask.is_static
    if not static and problem.bias is None and keys >= _PARTS * _TILE:
        return _searching(0, queries, rows, keys, _SHARES)
    first = 0 if upper is None else min(max(0, -upper), queries)
    stop = queries if lower is None else max(min(queries, keys - lower), first)
    if lower is not None and upper is not None:
        span = rows + upper - lower
        if 2 * span <= keys:
            return _sliding(first, stop, rows, lower, span, keys)
    plan: list[Block] = []
    step = stop - first
    if lower is not None or upper is not None:
        most = _most(Powers.of(problem.kernel, problem.rule), stop - first > _MOST_BLOCKS * rows)
        step = max(rows, -(-(stop - first) // (most * rows)) * rows)
    for start in range(first, stop, max(step, 1)):
        end = min(start + step, stop)
        low = 0 if lower is None else min(max(0, start + lower), keys)
        high = keys if upper is None else min(keys, end + upper)
        mixed = ((0, high - low),)
        if static:
            mixed = _mixed(start, end, low, high, lower, upper)
        for run in _runs(start, end, rows):
            plan.append(Block(*run, low, high - low, False, low, mixed))
    return plan


def _most(powers: Powers | None, in_loops: bool) -> int:
    """How many blocks are written out: fewer where their code is longer."""
    if powers is None:
        return _FEW_BLOCKS
    is_long = in_loops and powers.order not in (1, 2, 3, 4, math.inf)
    return _MOST_LOOPS if is_long else _MOST_BLOCKS


def _runs(start: int, stop: int, rows: int) -> list[tuple[int, int, int]]:
    """Start, rows and count of the full blocks of [start, stop), and of what is left over."""
    whole, rest = divmod(stop - start, rows)
    runs = [(start, rows, whole), (stop - rest, rest, 1)]
    return [run for run in runs if run[1] and run[2]]


def _searching(start: int, stop: int, rows: int, keys: int, shares) -> list[Block]:
    """Plans blocks that look, when running, where their keys are: packing, padding, prefixes."""
    widths = tuple(sorted({-(-keys * i // _PARTS) for i in shares}))
    runs = _runs(start, stop, rows)
    return [Block(*run, 0, keys, False, 0, ((0, keys),), widths) for run in runs]


def narrow(problem: Problem, plan: list[Block]) -> list[Block] | None:
    """Plans the backward pass of the same queries for heads that gave weight to few keys.

    Only these keys have a part in it. None where they are not looked for: for short rows, for
    windows and for the Gaussian.
    """
    powers = Powers.of(problem.kernel, problem.rule)
    keys = problem.sizes["s"]
    dense = powers is None or powers.order == math.inf
    if not plan or dense or plan[0].slides or keys < _LONG:
        return None
    stop = plan[-1].start + plan[-1].rows * plan[-1].count
    return _searching(plan[0].start, stop, plan[0].rows, keys, _NARROW)


def fits(plan: list[Block], found: Int[Array, "2 B K I"], entry, head) -> Bool[Array, ""]:
    """True where the plan's widths hold all keys that a place's blocks gave weight."""
    return jnp.all(found[1, entry, head] <= plan[0].widths[-1])


def span(p: Float[Array, "k G C L"], first, keys: int) -> Int[Array, "2"]:
    """First key, and keys from there on, in whole tiles, that hold all with weight."""
    live = jnp.max(p, axis=(0, 1, 2)) > 0
    low = (first + jnp.argmax(live)) // _TILE * _TILE
    end = first + live.size - jnp.argmax(live[::-1])
    high = jnp.minimum(-(-end // _TILE) * _TILE, keys)
    return jnp.where(jnp.any(live), jnp.stack([low, high - low]), 0)


def spans(problem: Problem, plan: list[Block]) -> Int[Array, "2 B K I"]:
    """What `span` finds goes here, by batch entry, first key head of a place, and block."""
    sizes = problem.sizes
    blocks = 1 if not plan else -(-sizes["t"] // plan[0].rows) + 1
    return jnp.zeros((2, sizes["b"], sizes["k"], blocks), jnp.int32)


def reach(problem: Problem, plan: list[Block]) -> Int[Array, "2 #B 1 I"] | None:
    """First key, and keys from there on, that hold all that each block sees."""
    if not plan or not plan[0].widths:
        return None
    sizes = problem.sizes
    tiles = problem.mask.tiles(sizes["t"], sizes["s"], plan[0].rows, _TILE)
    live = jnp.any(tiles > 0, axis=1)
    count = live.shape[-1]
    first = jnp.argmax(live, axis=-1)
    last = count - 1 - jnp.argmax(live[..., ::-1], axis=-1)
    low, high = first * _TILE, jnp.minimum((last + 1) * _TILE, sizes["s"])
    return jnp.stack([low, jnp.where(jnp.any(live, axis=-1), high - low, 0)])[:, :, None]


def _sliding(first: int, stop: int, rows: int, lower: int, span: int, keys: int) -> list[Block]:
    """Plans blocks whose keys move along with them, for windows much shorter than the keys."""
    return [
        Block(*run, run[0] + lower, span, True, keys - span, ((0, span),))
        for run in _runs(first, stop, rows)
    ]


def _mixed(start: int, end: int, low: int, high: int, lower, upper) -> tuple[tuple[int, int], ...]:
    """Ranges of the keys [low, high) that only some of the queries [start, end) see."""
    left = low if lower is None else min(max(low, end - 1 + lower), high)
    right = high if upper is None else max(min(high, start + upper + 1), low)
    if left >= right:
        return ((0, high - low),)
    return tuple((a - low, b - a) for a, b in ((low, left), (right, high)) if b > a)


def _rows(problem: Problem) -> int:
    sizes = problem.sizes
    share = sizes["n"] // sizes["k"]
    row = share * sizes["s"] * problem.dtype.itemsize
    wanted = _ROWS // 2 if sizes["t"] <= 1024 else _ROWS
    wanted = min(max(wanted // share, 16), sizes["t"])
    return max(min(wanted, _LARGEST_BYTES // row), 1)


def group_size(problem: Problem) -> int:
    """How many key heads are worked on together."""
    sizes = problem.sizes
    share = sizes["n"] // sizes["k"]
    block = _rows(problem) * share * sizes["s"] * problem.dtype.itemsize
    most = max(1, _BLOCK_BYTES // block)
    return max(n for n in range(1, sizes["k"] + 1) if sizes["k"] % n == 0 and n <= most)
