"""Threshold and average of every query that has few keys, its scores formed once and kept on chip.

A program has a block of queries and one or two warpgroups, which take turns at the tiles of keys.
Each forms the scores of its tiles and keeps them, the first few in registers and the others in
shared memory; thresholds are found by the steps of `solver.search` on sums over all, exchanged
through shared memory; then each averages the values of its tiles that have weight, and the parts
are added up in a fixed order.

No sum or maximum over rows is taken across the warps of a warpgroup: the compiler gives all
warpgroups the same memory for that. Numbers of rows become one for all threads by `_largest`.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from kreg.bandwidth import Adaptive, Anchored, Fixed
from pallas_kernels.mosaic_gpu.forward import (
    FOUND,
    ROWS_GIVEN,
    Found,
    Given,
    Program,
    launch,
)
from pallas_kernels.mosaic_gpu.plan import TILE, Plan, stages, words
from pallas_kernels.mosaic_gpu.tiles import (
    COLUMNS,
    GRID,
    ROWS,
    across,
    add_product,
    filled,
    operand,
    rounded,
    staged,
    staging,
    zeros,
)
from pallas_kernels.solver import LOWEST, integer, inverse, power, powers, search

MOST_KEYS = 1024
# Tiles of one warpgroup that works alone, and those whose scores a warpgroup keeps in registers.
_TILES_ALONE = 4
_TILES_IN_REGISTERS = 4
# Columns of the two averages that registers hold at once beside those scores.
_COLUMNS_AT_ONCE = 64
_SCORES = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))


def declined(plan: Plan) -> str | None:
    """Says why the kernel does not take a call, None where it does."""
    reasons = {
        f"more than {MOST_KEYS:,} keys": plan.keys > MOST_KEYS,
        "float32, whose parts leave no registers for scores": plan.parts > 1,
        "heads wider than 128": max(plan.width, plan.value_width) > 2 * TILE,
    }
    found = [what for what, is_so in reasons.items() if is_so]
    if found:
        return found[0]
    try:
        stages(functools.partial(_shared, plan))
    except NotImplementedError as error:
        return str(error)
    return None


def forward(plan: Plan, query, key, value, rows, limits, draws) -> Found:
    """Runs the kernel: arguments and results are those of `forward.forward`."""
    groups = _groups(plan)
    arrays = query, key, value, rows, *limits, *draws
    return launch(plan, _Program, functools.partial(_shared, plan), Given(*arrays), groups)


def _groups(plan: Plan) -> int:
    """Warpgroups of a program."""
    return 1 if plan.tiles <= _TILES_ALONE else 2


def _tiles(plan: Plan) -> int:
    """Tiles of a warpgroup, at most."""
    return -(-plan.tiles // _groups(plan))


def _held(plan: Plan) -> int:
    """Tiles of a warpgroup whose scores are in registers; those of others are in shared memory."""
    less = (1 + (plan.by_key or plan.drops)) * (plan.value_width > _COLUMNS_AT_ONCE)
    return min(_tiles(plan), _TILES_IN_REGISTERS - less)


def _shared(plan: Plan, stages: int) -> dict[str, Any]:
    """Shared memory of a program."""
    groups, tiles, slots = _groups(plan), _tiles(plan), _groups(plan) * stages
    shared = {
        "query": operand(plan, plan.width),
        "key": operand(plan, plan.width, slots),
        "row": plgpu.SMEM((len(ROWS_GIVEN), TILE), jnp.float32),
        "limit": plgpu.SMEM((4, TILE), jnp.int32),
        "found": plgpu.SMEM((len(FOUND), TILE), jnp.float32),
        "words": plgpu.SMEM((words(plan.tiles),), jnp.int32),
        "work": plgpu.SMEM((4,), jnp.int32),
        # Of every warpgroup: best scores of its tiles, numbers of rows on their way to all threads,
        # its tiles with weight, and what it says of its work.
        "top": plgpu.SMEM((groups * tiles, TILE), jnp.float32),
        "told": plgpu.SMEM((groups, TILE), jnp.float32),
        "list": plgpu.SMEM((groups * tiles,), jnp.int32),
        "said": plgpu.SMEM((groups * 3,), jnp.int32),
        "ready": plgpu.Barrier(num_arrivals=plan.parts + 2 + plan.drops),
        "key_ready": plgpu.Barrier(num_arrivals=plan.parts + plan.by_key, num_barriers=slots),
        "value_ready": plgpu.Barrier(num_arrivals=plan.parts, num_barriers=slots),
    }
    if plan.value_width != plan.width:
        shared["value"] = operand(plan, plan.value_width, slots)
    if plan.drops:
        shared["drawn"] = plgpu.SMEM((TILE,), jnp.int32)
    if plan.by_key:
        shared["by_key"] = plgpu.SMEM((slots, 3, TILE), jnp.int32)
    if tiles > _held(plan):
        shape = groups * (tiles - _held(plan)), TILE, TILE
        shared["score"] = plgpu.SMEM(shape, jnp.float32, transforms=_SCORES)
    if groups > 1:
        shared["part"] = plgpu.SMEM((2, groups, 4 + plan.sums_rounded, TILE), jnp.float32)
        shared["parted"] = plgpu.Barrier(num_arrivals=groups)
        shared["sum"] = plgpu.SMEM((TILE, 2 * TILE), jnp.float32, transforms=_SCORES)
        shared["summed"] = plgpu.Barrier(num_barriers=2)
    return shared | staging(plan, groups)


def _nothing() -> Float[Array, "64 64"]:
    """Scores of a tile that is not there."""
    return plgpu.layout_cast(jnp.full((TILE, TILE), -jnp.inf, jnp.float32), GRID)


def _bit(i) -> Array:
    return lax.shift_left(integer(1), integer(i))


class _Program(Program):
    """One or two warpgroups, which keep the scores of their tiles."""

    def __init__(self, plan: Plan, stages: int, refs, shared: dict[str, Any]):
        super().__init__(plan, stages, refs, shared)
        self.groups, self.tiles, self.held = _groups(plan), _tiles(plan), _held(plan)
        self.group = lax.axis_index("warpgroup") if self.groups > 1 else integer(0)
        self.values = getattr(self.shared, "value", self.shared.key)
        # Whether registers hold one average at once, and numbers above the thresholds for both.
        self.above = plan.value_width > _COLUMNS_AT_ONCE

    def run(self) -> None:
        self._load()
        top = self._score()
        turn, best, passes, seen = integer(0), filled(-1.0), integer(0), integer(0)
        if self.plan.rule is Fixed:
            cut = plgpu.load(self.shared.row.at[1], layout=ROWS)
        else:
            turn, top = self._joined(turn, jnp.maximum, top)
            cut = jnp.maximum(top - 1, LOWEST)
        if self.plan.rule is Anchored:
            turn, best = self._joined(turn, jnp.maximum, self._best(top))
        if self.plan.rule is Adaptive:
            passes, cut, turn, seen = search(
                self.plan.order, self.plan.parts > 1, cut, self._sums, self._largest, (turn, seen)
            )
        self._average(turn, cut, best, passes, seen)

    def _copy(self) -> None:
        self._only(0, super()._copy)

    def _only(self, group: int, do: Callable[[], None]) -> None:
        """Does something in one warpgroup."""
        if self.groups == 1:
            do()
        else:
            pl.when(self.group == group)(do)

    def _own(self, i: int, of: int) -> Array:
        """Index of a warpgroup's own i-th thing, of so many each."""
        return self.group * of + i

    def _slot(self, i) -> Array:
        """Where the i-th tile of all that a warpgroup fetches goes."""
        return self.group * self.stages + lax.rem(integer(i), integer(self.stages))

    def _tile(self, i: int) -> Array:
        """The i-th tile of a warpgroup; they take turns, from the nearest on."""
        return self._nearest(i * self.groups + self.group)

    def _score(self) -> Array:
        """Forms and keeps the scores of all tiles; returns the best of every row."""
        total = jnp.maximum(self.stop - self.first, 0)
        self.total = lax.div(total + (self.groups - 1) - self.group, integer(self.groups))
        self.kept, self.seen, best = [], filled(0.0), filled(-jnp.inf)
        counts = self.plan.rule is Fixed and self.plan.with_support

        def begin(i):
            pl.when(i < self.total)(lambda: self._fetch_keys(self._tile(i), self._slot(i)))

        def scores(i):
            y = self._scores(self._tile(i), self._slot(i))
            # All four warps have read the slot before it is filled again.
            plgpu.commit_smem()
            begin(i + self.stages)
            return y

        def note(i, y, best, seen):
            top = jnp.max(y, axis=1)
            self.shared.top.at[self._own(i, self.tiles)][...] = top
            if counts:
                seen = seen + jnp.sum(jnp.where(y > -jnp.inf, 1.0, 0.0), axis=1)
            return jnp.maximum(best, top), seen

        def spill(i, carry):
            y = scores(i)
            self._spilled(i)[...] = y
            return note(i, y, *carry)

        for i in range(min(self.stages, self.tiles)):
            begin(i)
        carry = filled(-jnp.inf), filled(0.0)
        for i in range(self.held):
            y = lax.cond(i < self.total, functools.partial(scores, i), _nothing)
            self.kept.append(y)
            carry = note(i, y, *carry)
        best, self.seen = self._over_spilled(spill, carry)
        return best

    def _over_spilled(self, do: Callable, carry):
        """Walks over the tiles whose scores are in shared memory, where there are any."""
        if self.tiles == self.held:
            return carry
        return lax.fori_loop(integer(self.held), self.total, do, carry)

    def _spilled(self, i):
        return self.shared.score.at[self._own(i - self.held, self.tiles - self.held)]

    def _over_tiles(self, do: Callable, *carry):
        """Walks over a warpgroup's tiles; do: (i, scores of the i-th when called, *carry)."""
        for i, y in enumerate(self.kept):
            carry = do(i, lambda y=y: y, *carry)

        def spilled(i, carry):
            return do(i, lambda: plgpu.load(self._spilled(i), layout=GRID), *carry)

        return self._over_spilled(spilled, carry)

    def _best(self, top) -> Array:
        """The last key with the best score of every row, -1 where there is none."""

        def look(i, y, best):
            keys = plgpu.broadcasted_iota(jnp.int32, (TILE, TILE), 1, layout=GRID)
            keys = (keys + self._tile(i) * TILE).astype(jnp.float32)
            found = jnp.max(jnp.where(y() == across(top), keys, -1.0), axis=1)
            return (jnp.maximum(best, found),)

        (best,) = self._over_tiles(look, filled(-1.0))
        return jnp.where(top > -jnp.inf, best, -1.0)

    def _tell(self, rows) -> None:
        self.shared.told.at[self.group][...] = rows

    def _heard(self) -> Array:
        """Numbers of rows as all threads have them, after `_tell`."""
        return plgpu.load(self.shared.told.at[self.group], layout=COLUMNS)

    def _largest(self, rows) -> Array:
        """The greatest number, the same for all threads of both warpgroups if they are."""
        self._tell(rows)
        return jnp.max(self._heard())

    def _live(self, i: int, floor) -> Array:
        """Whether the i-th tile has a score above; NaN counts as above."""
        top = plgpu.load(self.shared.top.at[self._own(i, self.tiles)], layout=COLUMNS)
        return ~(jnp.max(top - floor) <= 0)

    def _sums(self, cut, floor, turn, seen):
        """Sums of powers over all tiles, of both warpgroups; see `solver.search`."""
        self._tell(floor)
        floor, exponents = self._heard(), powers(self.plan.order)

        def visit(i, y, seen, *sums):
            def add(seen, *sums):
                x = jnp.maximum(y() - across(cut), 0)
                new = (jnp.sum(power(x, m), axis=1) for m in exponents)
                return seen + 1, *(a + b for a, b in zip(sums, new, strict=True))

            return lax.cond(self._live(i, floor), add, lambda *carry: carry, seen, *sums)

        seen, *sums = self._over_tiles(visit, seen, *(filled(0.0) for _ in exponents))
        turn, *sums = self._joined(turn, operator.add, *sums)
        return turn, seen, *sums

    def _joined(self, turn, join: Callable, *rows):
        """Joins numbers of rows of both warpgroups in a fixed order; returns turn and numbers.

        Every turn has one of two places: who writes it again knows that the other has read it.
        """
        if self.groups == 1:
            return turn, *rows
        place = self.shared.part.at[lax.rem(turn, integer(2))]
        for i, x in enumerate(rows):
            place.at[self.group, i][...] = x
        plgpu.barrier_arrive(self.shared.parted)
        plgpu.barrier_wait(self.shared.parted)
        parts = (
            [plgpu.load(place.at[group, i], layout=ROWS) for group in range(self.groups)]
            for i in range(len(rows))
        )
        return turn + 1, *(functools.reduce(join, x) for x in parts)

    def _average(self, turn, cut, best, passes, seen) -> None:
        """Averages the values above the thresholds, and writes all that is found."""
        plan = self.plan
        live, bits, count = self._weighed(cut)
        for i, x in enumerate((bits, seen, count)):
            self.shared.said[self._own(i, 3)] = integer(x)
        rounds = [[plan.order, plan.order - 1]]
        if self.above:
            # Formed once for both rounds.
            rounds = [[m] for m in rounds[0]]
            self.kept = [jnp.maximum(y - across(cut), 0) for y in self.kept]
        found: list[Array] = []
        for exponents in rounds:
            if found:
                # Nothing is added, but the compiler does not know: powers that it has formed once
                # it would keep for the other round, and has no registers for them.
                self._tell(filled(0.0))
                nothing = plgpu.load(self.shared.told.at[self.group], layout=ROWS)
                self.kept = [x + across(nothing) for x in self.kept]
            first = len(found)
            sums, weights, averages = self._weigh(cut, live, count, exponents, first)
            turn, *joined = self._joined(turn, operator.add, *weights, *sums)
            weights, sums = joined[: len(weights)], joined[len(weights) :]
            self._store(first, averages, [*weights, *sums[len(weights) : len(averages)]])
            found += sums
        # After the sums of two powers those of the last round's keys, where they are counted.
        total, slope, support, visible = (*found, *[filled(0.0)] * (4 - len(found)))
        counts = plan.rule is Fixed and plan.with_support
        self._store_rows(passes, cut, total, slope, visible if counts else best, support)

    def _weighed(self, cut):
        """Lists a warpgroup's tiles with weight, also as bits of its own and of all; counts."""
        self._tell(cut)
        cut = self._heard()

        def note(i, _, live, bits, count):
            def add(live, bits, count):
                self.shared.list[self._own(count, self.tiles)] = integer(i)
                return live | _bit(i), bits | _bit(self._tile(i)), count + 1

            return lax.cond(self._live(i, cut), add, lambda *carry: carry, live, bits, count)

        return self._over_tiles(note, integer(0), integer(0), integer(0))

    def _weigh(self, cut, live, count, exponents: list[float], turn: int):
        """Sums powers over a warpgroup's tiles with weight: of rows, and times values.

        Between the two come sums of the first power as it multiplies the values, where there are.
        turn: how often the values have been fetched before. In the last round, when registers have
        room, keys with weight are counted too, and those that are seen come along.
        """
        plan, number = self.plan, len(exponents)
        counts = plan.with_support and exponents[-1] != plan.order

        def begin(t):
            i = self.shared.list[self._own(t, self.tiles)]
            slot = self._slot(turn * count + t)
            ready = self.shared.value_ready
            self._fetch(self.given.values, self._tile(i), slot, self.values, ready)

        def add(i, y, t, sums, by, averages, support):
            slot = self._slot(turn * count + t)
            values = self.values.at[slot]
            x = y()
            if not (self.above and isinstance(i, int)):
                x = jnp.maximum(x - across(cut), 0)
            plgpu.barrier_wait(self.shared.value_ready.at[slot])
            sums, by, averages = list(sums), list(by), list(averages)
            for n, m in enumerate(exponents):
                weights = power(x, m)
                sums[n] = sums[n] + jnp.sum(weights, axis=1)
                if n < len(by):
                    weights = rounded(plan, weights)
                    by[n] = by[n] + jnp.sum(weights, axis=1)
                weights = self._dropped(weights, self._tile(i))
                averages[n] = add_product(plan, averages[n], weights, values, self._staged)
            if counts:
                support = support + jnp.sum(power(x, 0), axis=1)
            plgpu.commit_smem()
            pl.when(t + self.stages < count)(lambda: begin(t + self.stages))
            return t + 1, sums, by, averages, support

        def visit(i, y, *carry):
            has = (live & _bit(i)) != 0
            return lax.cond(has, functools.partial(add, i, y), lambda *carry: carry, *carry)

        for t in range(min(self.stages, self.tiles)):
            pl.when(t < count)(functools.partial(begin, integer(t)))
        sums = [filled(0.0)] * number
        averages = [zeros(plan.value_width)] * number
        by = [filled(0.0)] if plan.sums_rounded else []
        carry = integer(0), sums, by, averages, filled(0.0)
        _, sums, by, averages, support = self._over_tiles(visit, *carry)
        return [*sums, *[support, self.seen] * counts], by, averages

    @property
    def _staged(self):
        through = staged(self.shared)
        return through if through is None or self.groups == 1 else through.at[self.group]

    def _store_rows(self, passes, *rows) -> None:
        """Writes what is found of every row, the work, and which tiles have weight."""

        def write():
            at = self.batch, self.head, self.block
            for i, x in enumerate(rows):
                self.shared.found.at[i][...] = x
            bits, looked, listed = (
                functools.reduce(
                    operator.add, (self.shared.said[group * 3 + i] for group in range(self.groups))
                )
                for i in range(3)
            )
            self.shared.words[0] = bits
            for i, work in enumerate((self.stop - self.first, looked, listed, passes)):
                self.shared.work[i] = integer(work)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(self.shared.found, self.to.rows.at[at])
            plgpu.copy_smem_to_gmem(self.shared.words, self.to.live.at[at])
            plgpu.copy_smem_to_gmem(self.shared.work, self.to.work.at[at])
            plgpu.wait_smem_to_gmem(0)

        self._only(0, write)

    def _store(self, first: int, sums, weights) -> None:
        """Adds up the two warpgroups' averages from the first on; one of them writes each."""
        found = list(enumerate(zip(sums, weights, strict=True), first))
        if self.groups > 1:
            for i, (x, _) in found:
                self._only(1 - i, functools.partial(self._give, i, x))
        for i, (x, weight) in found:
            self._only(i, functools.partial(self._take, i, x, weight))

    def _half(self, i: int):
        """Where the i-th average of one warpgroup is for the other; wide ones come in turn."""
        first = i * TILE if self.plan.value_width == TILE else 0
        return self.shared.sum.at[:, pl.ds(first, self.plan.value_width)]

    def _give(self, i: int, x) -> None:
        self._half(i)[...] = x
        plgpu.barrier_arrive(self.shared.summed.at[i])

    def _take(self, i: int, x, weight) -> None:
        if self.groups > 1:
            plgpu.barrier_wait(self.shared.summed.at[i])
        weight, to = inverse(weight), (self.to.out, self.to.lower)[i]
        # Through memory of values, all of which are used up.
        through = self.values.at[self._slot(0), 0]
        for first in range(0, self.plan.value_width, TILE):
            columns = pl.ds(first, TILE)
            some = x[:, first : first + TILE]
            if self.groups > 1:
                some = some + plgpu.load(self._half(i).at[:, columns], layout=GRID)
            through.at[:, columns][...] = (some * across(weight)).astype(through.dtype)
        plgpu.commit_smem()
        rows = pl.ds(self.block * TILE, TILE)
        plgpu.copy_smem_to_gmem(through, to.at[self.batch, rows, self.head])
        plgpu.wait_smem_to_gmem(0)
