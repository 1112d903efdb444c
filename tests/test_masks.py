"""kreg.Mask: what it admits, joined, and what it says of tiles; the blocks of static bands."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kreg
from kreg.bands import blocks
from kreg.canonical import canonical

T, S, B = 11, 13, 2
Q = jnp.ones((1, 3, 1, 2))
RNG = np.random.default_rng(0)
ROW, COL = np.arange(T)[:, None], np.arange(S)[None]
STOP = RNG.integers(0, S + 1, (B, T))
SEGMENTS = np.sort(RNG.integers(0, 3, (B, T))), np.sort(RNG.integers(0, 3, (B, S)))
ARRAY = RNG.random((B, 1, T, S)) < 0.5
PARTS = {
    "array": (kreg.Mask(ARRAY), ARRAY),
    "key_start": (kreg.Mask(key_start=3), COL >= 3),
    "key_stop": (kreg.Mask(key_stop=STOP), COL < STOP[:, None, :, None]),
    "query_start": (kreg.Mask(query_start=COL[0] // 2), ROW >= COL // 2),
    "query_stop": (kreg.Mask(query_stop=5), ROW < 5),
    "causal": (kreg.Mask(is_causal=True, causal_offset=2), COL <= ROW + 2),
    "causal a batch": (
        kreg.Mask(is_causal=True, causal_offset=jnp.array([2, -3])),
        COL <= ROW + np.array([2, -3])[:, None, None, None],
    ),
    "window": (kreg.Mask(local_window_size=(2, 1)), (COL >= ROW - 2) & (COL <= ROW + 1)),
    "segments": (
        kreg.Mask(segment_ids=SEGMENTS),
        SEGMENTS[0][:, None, :, None] == SEGMENTS[1][:, None, None, :],
    ),
    "lengths": (
        kreg.Mask(query_seq_lengths=jnp.array([3, 9]), key_value_seq_lengths=jnp.array([13, 0])),
        (ROW < np.array([3, 9])[:, None, None, None])
        & (COL < np.array([13, 0])[:, None, None, None]),
    ),
}


def dense(mask: kreg.Mask) -> np.ndarray:
    return np.broadcast_to(mask.dense(T, S), (B, 1, T, S))


@pytest.mark.parametrize("name", PARTS)
def test_what_a_part_admits(name):
    mask, want = PARTS[name]
    np.testing.assert_array_equal(dense(mask), np.broadcast_to(want, (B, 1, T, S)))


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations_with_replacement(PARTS, 2)))
def test_both_parts_admit(one, other):
    (a, x), (b, y) = PARTS[one], PARTS[other]
    np.testing.assert_array_equal(dense(a & b), np.broadcast_to(x & y, (B, 1, T, S)))


def test_three_bands_and_two_segmentations():
    causal, window, segments = (PARTS[name] for name in ("causal", "window", "segments"))
    other = kreg.Mask(segment_ids=(jnp.arange(T) // 4, jnp.arange(S) // 4))
    joined = causal[0] & window[0] & segments[0] & other & kreg.Mask(is_causal=True)
    want = causal[1] & window[1] & segments[1] & (ROW // 4 == COL // 4) & (COL <= ROW)
    np.testing.assert_array_equal(dense(joined), np.broadcast_to(want, (B, 1, T, S)))


JOINED = {(name,): mask for name, (mask, _) in PARTS.items()} | {
    (one, other): PARTS[one][0] & PARTS[other][0]
    for one, other in (("causal", "segments"), ("array", "window"))
}


@functools.cache
def tiles_of_all(rows, columns):
    """What each mask says of tiles; one program, since there are so many small ones in it."""
    return jax.jit(lambda masks: [mask.tiles(T, S, rows, columns) for mask in masks])(
        list(JOINED.values())
    )


@pytest.mark.parametrize(("rows", "columns"), [(4, 5), (1, 1), (11, 13), (3, 20)])
@pytest.mark.parametrize("names", JOINED)
def test_tiles(names, rows, columns):
    """Empty and full are proven; a part that stands alone finds all of them."""
    found = tiles_of_all(rows, columns)[list(JOINED).index(names)]
    tiles = np.broadcast_to(found, (B, 1, -(-T // rows), -(-S // columns)))
    where = dense(JOINED[names])
    for b, i, j in np.ndindex(B, *tiles.shape[2:]):
        tile = where[b, 0, i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
        said = tiles[b, 0, i, j]
        assert said != 0 or not tile.any(), (names, b, i, j)
        assert said != 2 or tile.all(), (names, b, i, j)
        if len(names) == 1 and names[0] not in ("lengths", "segments"):
            assert said == (2 if tile.all() else 1 if tile.any() else 0), (names, b, i, j)


@pytest.mark.parametrize(
    ("queries", "keys", "lower", "upper"),
    [
        (40, 40, None, 0), (40, 40, None, -1), (900, 900, None, 0), (300, 700, None, 400),
        (700, 300, None, -50), (700, 700, -20, 10), (5000, 5000, -30, 0), (700, 700, -300, None),
        (50, 50, 3, 1), (300, 20, None, None), (2100, 2100, -64, -3), (257, 100, -500, 30),
    ],
)  # fmt: skip
def test_blocks_leave_out_nothing_that_is_admissible(queries, keys, lower, upper):
    """Exhaustive: every admissible pair lies in exactly one block, masked wherever it must be."""
    problem = canonical(jnp.zeros((1, queries, 2, 4)), *(jnp.zeros((1, keys, 1, 4)),) * 2)
    problem.mask.lower, problem.mask.upper = lower, upper
    i, j = np.arange(queries)[:, None], np.arange(keys)[None]
    where = np.ones((queries, keys), bool)
    where &= (j - i >= lower) if lower is not None else True
    where &= (j - i <= upper) if upper is not None else True
    met = np.zeros((queries, keys), int)
    for block in blocks(problem):
        for number in range(block.count):
            start = block.start + number * block.rows
            first = int(block.first(start))
            assert 0 <= first <= keys - block.keys and start + block.rows <= queries
            rows = slice(start, start + block.rows)
            met[rows, first : first + block.keys] += 1
            masked = np.zeros(block.keys, bool)
            for low, size in block.mixed:
                masked[low : low + size] = True
            assert np.all(where[rows, first : first + block.keys][:, ~masked]), block
    assert np.all(met[where] == 1) and met.max(initial=0) <= 1


def test_a_causal_mask_costs_little_more_than_half():
    problem = canonical(*(jnp.zeros((1, 4096, 1, 64)),) * 3, is_causal=True)
    work = sum(block.rows * block.count * block.keys for block in blocks(problem))
    assert work <= 0.57 * 4096**2


def test_static_parts_stay_static_through_jit_and_the_rest_is_traced():
    @jax.jit
    def through(mask):
        assert mask.upper == 2 and not isinstance(mask.key_stop, np.ndarray)
        return mask & kreg.Mask(local_window_size=1)

    mask = through(kreg.Mask(is_causal=True, causal_offset=2, key_stop=5))
    assert (mask.lower, mask.upper) == (-1, 1)
    assert kreg.Mask(is_causal=True).is_static and not mask.is_static


@pytest.mark.parametrize(
    ("name", "given", "make"),
    [
        ("mask", "float32", lambda: kreg.Mask(jnp.ones((3, 3)))),
        ("mask", "(1, 1, 1, 3, 3)", lambda: kreg.Mask(jnp.ones((1, 1, 1, 3, 3), bool))),
        ("key_start", "float32", lambda: kreg.Mask(key_start=jnp.ones(3))),
        ("segment_ids", "(1, 1, 3)", lambda: kreg.Mask(segment_ids=jnp.ones((1, 1, 3), int))),
        ("causal_offset", "1", lambda: kreg.Mask(causal_offset=1)),
        ("local_window_size", "-1", lambda: kreg.Mask(local_window_size=-1)),
        (
            "key_stop",
            "(1, 4)",
            lambda: kreg.attention(Q, Q, Q, mask=kreg.Mask(key_stop=jnp.ones(4, int))),
        ),
    ],
)  # fmt: skip
def test_errors_name_the_part(name, given, make):
    with pytest.raises(ValueError, match=name) as error:
        make()
    assert given in str(error.value)
