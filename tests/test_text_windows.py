"""Rows: what is random is fixed, what is packed or evaluated is there once; losses by position."""

import itertools

import flax.nnx as nnx
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kreg.nn
from experiments.text import (
    IGNORED_LABEL,
    EvaluationWindows,
    LossByPosition,
    PackedDocuments,
    RandomWindows,
    Tokens,
    document_positions,
)
from experiments.text.packing import pack
from kreg.training import batches

END = 99


def numbered(lengths, first: int = 0) -> Tokens:
    """Documents of so many tokens, their ends included, in which no token occurs twice."""
    number = itertools.count(100 + first)
    documents = [[next(number) for _ in range(length - 1)] for length in lengths]
    return Tokens.of(documents, vocab_size=2**16, end=END)


def check_types(row, size, names):
    assert list(row) == names
    for array in row.values():
        assert array.shape == (size,) and array.dtype == np.int32


# Random windows


def test_random_windows():
    tokens = numbered([30, 20, 14])
    rows = RandomWindows(tokens, 8, rows=600, seed=3)
    starts = []
    for index in range(len(rows)):
        row = rows[index]
        check_types(row, 8, ["tokens", "labels"])
        (place,) = (
            start
            for start in range(len(tokens) - 8)
            if np.array_equal(tokens.ids[start : start + 8], row["tokens"])
        )
        np.testing.assert_array_equal(tokens.ids[place + 1 : place + 9], row["labels"])
        starts.append(place)
    # Uniform over all of the 56 places, the first and the last too.
    counts = np.bincount(starts, minlength=56)
    assert len(counts) == 56 and counts.min() > 0
    assert np.sum((counts - 600 / 56) ** 2) / (600 / 56) < 55 + 4 * np.sqrt(110)


def test_random_windows_are_functions_of_seed_and_index():
    tokens = numbered([500])
    rows = RandomWindows(tokens, 4, rows=50, seed=0)
    again = RandomWindows(tokens, 4, rows=10_000, seed=0)
    other = RandomWindows(tokens, 4, rows=50, seed=1)
    same = [np.array_equal(rows[i]["tokens"], again[i]["tokens"]) for i in reversed(range(50))]
    assert all(same)
    assert sum(np.array_equal(rows[i]["tokens"], other[i]["tokens"]) for i in range(50)) < 5


def test_a_long_run_is_resumed_in_the_middle():
    # So many rows that a list of their numbers would not fit into memory.
    rows = RandomWindows(numbered([500]), 4, rows=2**50, seed=0)
    first = batches(rows, 3, seed=0, shuffle=False)
    taken = [next(first) for _ in range(3)]
    state = first.get_state()
    expected = [next(first) for _ in range(2)]
    first.close()
    second = batches(rows, 3, seed=0, shuffle=False)
    second.set_state(state)
    for batch in expected:
        np.testing.assert_array_equal(next(second)["tokens"], batch["tokens"])
    second.close()
    np.testing.assert_array_equal(taken[1]["labels"][0], rows[3]["labels"])


def test_a_window_as_long_as_the_text():
    tokens = numbered([5])
    row = RandomWindows(tokens, 4, rows=1, seed=0)[0]
    assert [*row["tokens"], row["labels"][-1]] == tokens.ids.tolist()
    with pytest.raises(ValueError, match="size: expected less than 5 tokens, got 5"):
        RandomWindows(tokens, 5, rows=1, seed=0)


# Evaluation


@pytest.mark.parametrize("size", [1, 3, 5, 12, 100])
def test_evaluation_covers_everything_once(size):
    tokens = numbered([5, 1, 4, 2])
    rows = EvaluationWindows(tokens, size)
    found = [rows[index] for index in range(len(rows))]
    for row in found:
        check_types(row, size, ["tokens", "labels"])
    labels = np.concatenate([row["labels"] for row in found])
    inputs = np.concatenate([row["tokens"] for row in found])
    assert labels[: len(tokens)].tolist() == tokens.ids.tolist()
    assert np.all(labels[len(tokens) :] == IGNORED_LABEL)
    assert inputs[: len(tokens)].tolist() == [END, *tokens.ids[:-1].tolist()]
    assert len(labels) - len(tokens) < size


# Packing


def segments(row):
    """Inputs and labels of the documents in a row, and what is left over."""
    count = row["segment_ids"].max()
    parts = [row["segment_ids"] == number for number in range(1, count + 1)]
    return [(row["tokens"][part].tolist(), row["labels"][part].tolist()) for part in parts]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 20))
def test_packing_loses_nothing(lengths, size):
    tokens = numbered(lengths)
    expected = []
    for start, stop in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True):
        document = [END, *tokens.ids[start:stop].tolist()]
        for place in range(0, len(document) - 1, size):
            piece = document[place : place + size + 1]
            expected.append((piece[:-1], piece[1:]))
    rows = PackedDocuments(tokens, size)
    found = []
    for index in range(len(rows)):
        row = rows[index]
        check_types(row, size, ["tokens", "labels", "segment_ids"])
        # Segments are numbered from 1, in runs, and the filling comes last.
        used = np.count_nonzero(row["segment_ids"])
        assert used > 0 and np.all(row["segment_ids"][used:] == 0)
        assert np.all(np.isin(np.diff(row["segment_ids"][:used]), (0, 1)))
        assert row["segment_ids"][0] == 1
        assert np.all(row["labels"][used:] == IGNORED_LABEL)
        assert np.all(row["tokens"][used:] == END)
        found += segments(row)
    assert sorted(found) == sorted(expected)
    again = PackedDocuments(tokens, size)
    for name in ("starts", "lengths", "bounds"):
        np.testing.assert_array_equal(getattr(again, name), getattr(rows, name))


def best_fit_decreasing(lengths, size) -> list[int]:
    """Room left in the rows, one piece at a time."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        enough = [room for room in rooms if room >= length]
        if enough:
            rooms[rooms.index(min(enough))] -= length
        else:
            rooms.append(size - length)
    return sorted(rooms)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40), st.data())
def test_pack_is_best_fit_decreasing(size, data):
    lengths = np.array(data.draw(st.lists(st.integers(1, size), max_size=80)), np.int64)
    order, bounds = pack(lengths, size)
    assert sorted(order) == list(range(len(lengths)))
    rows = [lengths[order[a:b]] for a, b in itertools.pairwise(bounds)]
    assert sorted(size - row.sum() for row in rows) == best_fit_decreasing(lengths, size)


def test_pack_is_tight_and_quick():
    lengths = np.random.default_rng(0).integers(20, 400, 200_000)
    order, bounds = pack(lengths, 512)
    assert len(order) == 200_000
    assert lengths.sum() > 0.98 * 512 * (len(bounds) - 1)


def test_pack_refuses_what_does_not_fit():
    for lengths in ([3, 6], [0]):
        with pytest.raises(ValueError, match="lengths: expected 1 to 5"):
            pack(np.array(lengths), 5)


def test_packed_documents_are_read_as_if_alone():
    tokens = Tokens.of([[1, 2, 3], [4, 5], [6]], vocab_size=8, end=7)
    config = kreg.nn.MosaicConfig(8, num_layers=2, num_heads=2, embed_dim=8, memory_size=3)
    model = kreg.nn.MemoryMosaic(config, rngs=nnx.Rngs(0))

    def logits(rows):
        row = {name: jnp.asarray(array)[None] for name, array in rows[0].items()}
        found = model(row["tokens"], segment_ids=row["segment_ids"])[0]
        labels = rows[0]["labels"]
        return {int(label): found[place] for place, label in enumerate(labels) if label in wanted}

    wanted = {1, 2, 3}
    packed = PackedDocuments(tokens, 10)
    assert len(packed) == 1 and packed[0]["segment_ids"].max() == 3
    together = logits(packed)
    alone = logits(PackedDocuments(Tokens.of([[1, 2, 3]], vocab_size=8, end=7), 10))
    assert together.keys() == alone.keys() == wanted
    for label in wanted:
        np.testing.assert_allclose(together[label], alone[label], rtol=1e-5, atol=1e-6)


# Mistakes


def test_mistakes():
    tokens = numbered([9])
    for make in (EvaluationWindows, PackedDocuments):
        with pytest.raises(ValueError, match="size: expected at least 1, got 0"):
            make(tokens, 0)
    with pytest.raises(ValueError, match="rows: expected at least 1, got 0"):
        RandomWindows(tokens, 2, rows=0, seed=0)
    with pytest.raises(ValueError, match="seed: expected 0 or more, got -1"):
        RandomWindows(tokens, 2, rows=1, seed=-1)
    sources = [RandomWindows(tokens, 2, rows=5, seed=0), EvaluationWindows(tokens, 2)]
    for rows in (*sources, PackedDocuments(tokens, 2)):
        for index in (-1, len(rows)):
            with pytest.raises(IndexError, match=f"index: expected 0 to 4, got {index}"):
                rows[index]


# Losses by position


def test_losses_by_position():
    rng = np.random.default_rng(0)
    losses = rng.exponential(size=(7, 12)).astype(np.float32)
    labels = np.where(rng.random((7, 12)) < 0.3, IGNORED_LABEL, 5)
    labels[:, 4] = IGNORED_LABEL
    losses[labels == IGNORED_LABEL] = np.nan
    total = LossByPosition.of(losses[:3], labels[:3]) + LossByPosition.of(losses[3:], labels[3:])
    for place in range(12):
        here = losses[:, place][labels[:, place] != IGNORED_LABEL]
        expected = here.mean() if len(here) else np.nan
        assert total.mean[place] == pytest.approx(expected, rel=1e-6, nan_ok=True)
    assert total.loss == pytest.approx(np.nanmean(losses), rel=1e-6)
    bins = total.binned([0, 1, 4, 5, 12])
    parts = [losses[:, a:b] for a, b in itertools.pairwise([0, 1, 4, 5, 12])]
    expected = [np.nan if np.all(np.isnan(part)) else np.nanmean(part) for part in parts]
    np.testing.assert_allclose(bins, expected, rtol=1e-6)
    np.testing.assert_allclose(total.binned([2, 4]), [np.nanmean(losses[:, 2:4])], rtol=1e-6)


def test_wrong_losses():
    found = LossByPosition.of(np.ones((2, 3)), np.ones((2, 3), int))
    with pytest.raises(ValueError, match="losses: expected the labels'"):
        LossByPosition.of(np.ones((2, 3)), np.ones((2, 4), int))
    with pytest.raises(ValueError, match="other: expected 3 positions, got 2"):
        found + LossByPosition(np.ones(2), np.ones(2, int))
    for edges in ([0], [0, 4], [2, 1], [1, 1], [-1, 2]):
        with pytest.raises(ValueError, match="edges: expected"):
            found.binned(edges)


def test_positions_in_documents():
    rows = PackedDocuments(numbered([4, 3, 2]), 10)
    assert document_positions(rows[0]["segment_ids"][None]).tolist() == [
        [0, 1, 2, 3, 0, 1, 2, 0, 1, 0]
    ]
