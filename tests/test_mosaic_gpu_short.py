"""The kernel for few keys, run by Pallas' interpreter: the contract, and the other one's results.

Up to 256 keys a program is one warpgroup, then two; above 512 (384 for values wider than 64) some
scores are in shared memory, where nothing has been written but NaN.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_mosaic_gpu as mosaic
from attention_inputs import Shape
from kernel_contract import average_of_ones, drawn
from nightly import NIGHTLY
from test_contract import CAUSAL, Structure

import kreg
from kreg.canonical import canonical
from kreg.inputs import separate
from pallas_kernels.attention import Rows
from pallas_kernels.mosaic_gpu import ATTENTION, short

SMALL = {"B": 1, "N": 2, "K": 1, "H": 16, "V": 16}
STRUCTURES = {
    "one warpgroup": Structure(
        Shape(T=70, S=141, **SMALL), dtype="bfloat16", options=CAUSAL | {"causal_offset": 50}
    ),
    "two warpgroups": Structure(
        Shape(T=70, S=330, **SMALL), dtype="bfloat16", options=CAUSAL | {"causal_offset": 270}
    ),
}
MORE = {
    "anchored with two": Structure(
        Shape(T=66, S=330, **SMALL), "epanechnikov", "anchored", "float16", CAUSAL
    ),
    "fixed with two": Structure(Shape(T=66, S=300, **SMALL), "biweight", "fixed", "bfloat16"),
    "in shared memory": Structure(Shape(T=66, S=660, **SMALL), "triweight", dtype="float16"),
    "the most keys": Structure(Shape(T=64, S=1024, **SMALL), "epanechnikov", dtype="bfloat16"),
    "wide values": Structure(
        Shape(B=2, T=40, S=270, N=2, K=1, H=64, V=128), "triweight", dtype="bfloat16"
    ),
    "all wide": Structure(Shape(B=1, T=66, S=450, N=1, K=1, H=128, V=100), dtype="float16"),
    "order 1.5": Structure(Shape(T=65, S=270, **SMALL), "order1.5", dtype="bfloat16"),
}
mosaic.ALL.update(STRUCTURES | MORE)


@pytest.fixture(autouse=True)
def few_keys():
    """Another test may have compiled the same call for the other kernel."""
    assert short.MOST_KEYS == 1024


@pytest.mark.parametrize("name", mosaic.one_of(STRUCTURES, "two warpgroups"))
def test_the_contract_is_kept(name):
    mosaic.check(name, drawn(STRUCTURES[name], 1, 2.0, parts=32))


@pytest.mark.nightly
@pytest.mark.parametrize("parts", [0, 4, 8 + 16, 63], ids=["plain", "ranges", "by key", "all"])
@pytest.mark.parametrize("name", STRUCTURES | MORE)
def test_the_contract_is_kept_under_every_mask(name, parts):
    for spread, ties in [(0.0, False), (1.0, True), (30.0, False)]:
        mosaic.check(name, drawn(mosaic.ALL[name], 2, spread, parts, ties), ties)


def both(monkeypatch, queries, keys, width=16, seed=0, segments=False, **options):
    """Output and all else that is found by this kernel, twice, and by the other."""
    rng = np.random.default_rng(seed)
    query, key, value = (
        jnp.asarray(rng.normal(size=(1, n, heads, width)), "bfloat16")
        for n, heads in ((queries, 2), (keys, 1), (keys, 1))
    )
    if segments:
        pairs = (jnp.sort(jnp.asarray(rng.integers(0, 4, (1, n)))) for n in (queries, keys))
        options["segment_ids"] = tuple(pairs)
    problem = canonical(query, key, value, return_stats=True, **options)
    assert short.declined(ATTENTION.plan(*separate(problem))) is None

    def run():
        with mosaic.interpreted():
            return jax.tree.map(np.asarray, ATTENTION.found(problem))

    first, again = run(), run()
    monkeypatch.setattr(short, "MOST_KEYS", 0)
    return first, again, run()


@pytest.mark.parametrize(
    ("queries", "keys", "options"),
    [
        (70, 190, {"kernel": kreg.epanechnikov, "is_causal": True}),
        pytest.param(66, 400, {"is_causal": True, "causal_offset": 330}, marks=NIGHTLY),
        pytest.param(64, 600, {"local_window_size": (500, 20)}, marks=NIGHTLY),
        pytest.param(64, 300, {"bandwidth": kreg.Anchored(), "is_causal": True}, marks=NIGHTLY),
        pytest.param(64, 300, {"bandwidth": kreg.Fixed(2.0), "scale": 0.2}, marks=NIGHTLY),
        pytest.param(64, 300, {"segments": True, "is_causal": True}, marks=NIGHTLY),
        pytest.param(64, 450, {"width": 128, "kernel": kreg.triweight}, marks=NIGHTLY),
        pytest.param(64, 1024, {"kernel": kreg.epanechnikov}, marks=NIGHTLY),
        pytest.param(
            64,
            400,
            {"dropout_rate": 0.3, "dropout_key": jax.random.key(1)},
            marks=NIGHTLY,
        ),
    ],
    ids=str,
)
@pytest.mark.nightly
def test_the_other_kernel_finds_the_same(monkeypatch, queries, keys, options):
    """All that the gradients need: averages, numbers of rows, bits of tiles; and twice the same."""
    found, again, want = both(monkeypatch, queries, keys, **options)
    jax.tree.map(np.testing.assert_array_equal, found, again)
    np.testing.assert_array_equal(found.live, want.live)
    for name in ("out", "lower"):
        x, y = (getattr(f, name).astype(np.float32) for f in (found, want))
        np.testing.assert_allclose(x, y, atol=2**-8 * np.abs(y).max(), rtol=0)
    for name, x, y in zip(Rows._fields, found.rows, want.rows, strict=True):
        # Whole numbers: the best key, how many are seen and how many have weight.
        off = 0 if name in ("best", "support") else 2e-4
        np.testing.assert_allclose(x, y, rtol=off, atol=off, err_msg=name)


def test_scores_are_formed_once_and_tiles_without_weight_are_left_out():
    length, width = 384, 16
    rng = np.random.default_rng(0)
    topics = np.repeat(rng.normal(size=(length // 64, width)), 64, axis=0) * 6
    query, key, value = rng.normal(size=(3, 1, length, 1, width)) + topics[:, None]
    found = mosaic.searched(query, key, value, is_causal=True)
    first, refined, last, passes = np.moveaxis(found.work[0, 0], -1, 0)
    tiles = np.arange(1, length // 64 + 1)
    np.testing.assert_array_equal(first, tiles)
    live = found.live[0, 0, :, 0]
    np.testing.assert_array_equal(last, [int(x).bit_count() for x in live])
    assert np.all(live >> tiles == 0) and np.all((live >> (tiles - 1)) & 1)
    assert np.all(passes <= 5) and np.all(refined <= passes * first)
    assert last.sum() < first.sum() and refined.sum() < (passes * first).sum()


def test_what_all_weights_of_a_row_are_off_by_cancels():
    with mosaic.interpreted():
        assert np.all(average_of_ones("mosaic_gpu", keys=300) == 1)


def test_a_query_of_nan_spoils_no_other():
    rng = np.random.default_rng(0)
    query, key, value = (
        jnp.asarray(rng.normal(size=(1, n, 1, 16)), "bfloat16") for n in (70, 300, 300)
    )
    outs = []
    for x in (query, query.at[0, 5].set(jnp.nan)):
        with mosaic.interpreted():
            out = kreg.attention(x, key, value, implementation="mosaic_gpu")
        outs.append(np.asarray(out, np.float32))
    others = np.arange(70) != 5
    np.testing.assert_array_equal(outs[0][:, others], outs[1][:, others])
    assert np.all(np.isnan(outs[1][0, 5]))


@pytest.mark.parametrize(
    ("keys", "width", "dtype", "reason"),
    [
        (1025, 64, "bfloat16", "more than 1,024 keys"),
        (128, 64, "float32", "float32"),
        (128, 136, "bfloat16", "wider than 128"),
        (1024, 128, "bfloat16", "bytes of shared memory"),
        (1024, 64, "float16", None),
        (768, 128, "bfloat16", None),
    ],
)
def test_what_is_left_to_the_other_kernel(keys, width, dtype, reason):
    x = jnp.zeros((1, keys, 1, width), dtype)
    found = short.declined(ATTENTION.plan(*separate(canonical(x, x, x))))
    assert found is reason if reason is None else reason in found
