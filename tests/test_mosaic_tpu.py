"""The kernels for TPUs, interpreted on CPU: the contract, and what they decline.

Most tests turn kernels into operations of XLA (mode True), which is quick but clamps what is out of
bounds and knows no races. A few go through the interpreter that simulates memories and copies:
what nobody has written is NaN there, reads out of bounds and races raise.
"""

import collections
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from attention_inputs import Shape, rounded
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
from kernel_contract import DECLINED, Interpreted, average_of_ones, drawn
from nightly import NIGHTLY
from test_contract import CAUSAL, Structure

import kreg
from kreg.canonical import canonical
from pallas_kernels.mosaic_tpu import ATTENTION, attention, sizes, tiles

SMALL = {"B": 1, "N": 2, "K": 1, "H": 16, "V": 16}
SIMULATED = {
    "biweight": Structure(Shape(T=140, S=270, **SMALL), dtype="bfloat16", options=CAUSAL),
    # Three tiles and three blocks: what has been read is written again.
    "anchored": Structure(
        Shape(B=1, T=260, S=520, N=1, K=1, H=16, V=16), "epanechnikov", "anchored"
    ),
    "fixed": Structure(Shape(T=140, S=70, **SMALL), "biweight", "fixed", "bfloat16"),
}
WIDE = {
    "plain": Structure(Shape(B=2, T=63, S=300, N=4, K=2, H=64, V=40), dtype="bfloat16"),
    "causal": Structure(Shape(T=300, S=300, **SMALL), options=CAUSAL | {"causal_offset": -1}),
    "many keys": Structure(Shape(T=150, S=600, **SMALL), "triweight", options={"is_causal": True}),
    "sparsemax": Structure(Shape(T=200, S=130, **SMALL), "epanechnikov", dtype="bfloat16"),
    "anchored": Structure(Shape(T=200, S=300, **SMALL), "biweight", "anchored", options=CAUSAL),
    "fixed": Structure(Shape(T=150, S=300, **SMALL), "epanechnikov", "fixed", options=CAUSAL),
    "order 1.5": Structure(Shape(T=65, S=140, **SMALL), "order1.5"),
    "order 4": Structure(Shape(T=140, S=140, **SMALL), "order4", dtype="bfloat16"),
    "window": Structure(Shape(T=400, S=400, **SMALL), options={"local_window_size": (9, 4)}),
    "width 256": Structure(Shape(B=1, T=66, S=140, N=1, K=1, H=256, V=128), dtype="bfloat16"),
    "one key": Structure(Shape(B=2, T=3, S=1, N=1, K=1)),
}
FIRST = ("many keys",)  # in simulated memory the rules have their own
MASKS = {"plain": 0, "ranges": 4, "by key": 8 + 16, "all": 63}

simulated = functools.partial(
    pltpu.force_tpu_interpret_mode, pltpu.InterpretParams(detect_races=True)
)
as_xla = functools.partial(pltpu.force_tpu_interpret_mode, True)
QUICK, SLOW = (
    Interpreted("mosaic_tpu", as_xla, WIDE),
    Interpreted("mosaic_tpu", simulated, SIMULATED),
)


def over(form: str) -> Interpreted:
    """The kernels on three devices, with queries or keys split."""
    mesh = jax.make_mesh((3,), ("sequence",), devices=jax.devices()[:3])
    op = functools.partial(kreg.sharding.attention, mesh=mesh, sequence="sequence", form=form)
    return Interpreted("mosaic_tpu", as_xla, WIDE, op)


SPLIT = {form: over(form) for form in ("gather", "keys")}


@pytest.mark.nightly
@pytest.mark.parametrize("form", SPLIT)
@pytest.mark.parametrize("name", WIDE)
def test_kernels_keep_the_contract_over_a_mesh(name, form):
    """Ragged parts, masks of all kinds, devices without a key of a row."""
    SPLIT[form].check(name, drawn(WIDE[name], 0, 1.0, MASKS["all"]))
    SPLIT[form].check(name, drawn(WIDE[name], 1, 4.0, MASKS["all"]))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("biweight", marks=NIGHTLY),
        pytest.param("anchored", marks=pytest.mark.core),
        pytest.param("fixed", marks=NIGHTLY),
    ],
)
def test_kernels_keep_the_contract_in_simulated_memory(name, capfd):
    SLOW.check(name, drawn(SIMULATED[name], 1, 2.0, parts=32 if name != "anchored" else 8 + 16))
    # Older interpreters only print what newer ones raise.
    assert "RACE DETECTED" not in capfd.readouterr().out


def simulating(**options) -> Interpreted:
    """Another interpreter that simulates memories."""
    parameters = pltpu.InterpretParams(detect_races=True, **options)
    mode = functools.partial(pltpu.force_tpu_interpret_mode, parameters)
    return Interpreted("mosaic_tpu", mode, SIMULATED)


SIMULATORS = {
    "two cores": simulating(num_cores_or_threads=2),
    "two cores, in any order": simulating(num_cores_or_threads=2, random_seed=0),
    "copies at once": simulating(dma_execution_mode="eager"),
    "two cores, copies at once": simulating(num_cores_or_threads=2, dma_execution_mode="eager"),
}


@pytest.mark.nightly
@pytest.mark.parametrize("name", SIMULATED)
@pytest.mark.parametrize("simulator", SIMULATORS)
def test_programs_run_side_by_side_and_copies_when_they_will(simulator, name, capfd):
    """v4 and v5p share a grid between two cores; a copy is done at any time until it is waited for.

    What the cores find is what one finds, to the last bit.
    """
    case = drawn(SIMULATED[name], 1, 2.0, parts=63)
    SIMULATORS[simulator].check(name, case)
    assert "RACE DETECTED" not in capfd.readouterr().out
    found, one = (x.computed(name, case) for x in (SIMULATORS[simulator], SLOW))
    jax.tree.map(np.testing.assert_array_equal, found, one)


@pytest.mark.parametrize(
    "name",
    [
        *FIRST,
        *(pytest.param(x, marks=NIGHTLY) for x in WIDE if x not in FIRST),
    ],
)
def test_kernels_keep_the_contract(name):
    for seed, spread in enumerate([1.0, 4.0]):
        QUICK.check(name, drawn(WIDE[name], seed, spread, MASKS["all"]))


@pytest.mark.nightly
@pytest.mark.parametrize("parts", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("name", WIDE)
def test_kernels_keep_the_contract_under_every_mask(name, parts):
    for seed in range(10):
        for spread, ties in [(0.0, False), (1.0, True), (30.0, False), (300.0, False)]:
            QUICK.check(name, drawn(WIDE[name], seed, spread, parts, ties), ties)


# Whether h differs by batch entry, head and query.
BANDWIDTHS = {"heads": (0, 1, 0), "queries": (0, 0, 1), "all": (1, 1, 1)}


@pytest.mark.parametrize(
    ("name", "of"),
    [
        pytest.param(*case, marks=pytest.mark.slow if case == ("causal", "heads") else NIGHTLY)
        for case in itertools.product(("causal", "many keys", "anchored", "fixed"), BANDWIDTHS)
    ],
)
def test_bandwidths_of_heads_and_queries(name, of):
    """And the gradient of each."""
    shape = WIDE[name].shape
    sizes = np.where(BANDWIDTHS[of], (shape.B, shape.N, shape.T), 1)
    h = np.random.default_rng(0).uniform(0.75, 1.5, (*sizes, 1)).astype("float32")
    QUICK.check(name, drawn(WIDE[name], 0, 1.0, MASKS["all"]), h=h)


def topics(length: int, width: int, seed: int = 0):
    """Queries, keys and values in runs of 128 that have to do with each other, but for the last."""
    rng = np.random.default_rng(seed)
    topics = np.repeat(rng.normal(size=(length // 128, width)), 128, axis=0)[:, None] * 6
    topics[-128:] = 0
    query, key, value = rng.normal(size=(3, 1, length, 1, width))
    return [rounded(x, "bfloat16") for x in (query + topics, key + topics, value)]


def bits(live) -> np.ndarray:
    """By block of queries, which pieces are live, of one head."""
    apart = np.asarray(live[0, 0, :, 0])[..., None] >> np.arange(2) & 1
    return apart.reshape(len(apart), -1)


@pytest.mark.parametrize(
    ("name", "order", "kept"),
    [
        ("topics", 2, True),
        pytest.param("topics", 1, False, marks=NIGHTLY),
        pytest.param("flat", 3, False, marks=NIGHTLY),
    ],
)
def test_pieces_without_weight_are_skipped_and_no_others(monkeypatch, name, order, kept):
    """Every key of every row: those with weight are in live pieces, and one pass sees all."""
    length, piece = 640, 128
    given = sizes.sizes_of("cpu")._replace(scores=2**30 if kept else 0)
    monkeypatch.setattr(attention, "sizes_of", lambda device: given)
    arrays = [x * (name != "flat") for x in topics(length, 16)]
    inputs = [jnp.asarray(x, "bfloat16") for x in arrays]
    with as_xla():
        jax.clear_caches()
        options = {"kernel": kreg.Kernel(order), "is_causal": True}
        found = jax.jit(lambda *x: ATTENTION.found(canonical(*x, **options)))(*inputs)
    where = np.tril(np.ones((length, length), bool))[None, None]
    bias = np.zeros((1, 1, length, length))
    want = oracle.attention(*arrays, bias, where, order=order, rule=oracle.Rule("adaptive", 1.0, 0))
    pieces = length // piece
    weight = (want.rows.p > 1e-7)[0, 0].reshape(pieces, piece, pieces, piece).any((1, 3))
    live, work = bits(found.live)[:, :pieces], np.asarray(found.work[0, 0, :, 0])
    assert not np.any(weight & (live == 0))
    first, refined, last, passes = work.T
    np.testing.assert_array_equal(first, np.arange(1, pieces + 1))  # all keys are met once
    assert np.all(refined <= passes * first) and np.all(last <= first)
    assert np.all(live.sum(1) <= last) and passes.max() <= (4 if order > 1 else 8)
    if name == "topics":  # all but the last block see their own topic alone
        np.testing.assert_array_equal(live.sum(1)[:-1], 1)
        np.testing.assert_array_equal(last[:-1], 1)
    else:
        assert passes.max() == 1  # exact after one pass: the other finds nothing to do


def with_weight(density: float, blocks: int = 8, pieces: int = 20, size: int = 128):
    """Which pieces have weight for which blocks of queries, and queries, keys and values."""
    rng = np.random.default_rng(0)
    live = np.arange(pieces) == rng.integers(0, pieces, (blocks, 1))
    others = rng.permutation(np.flatnonzero(~live))
    live.flat[others[: round(density * live.size) - blocks]] = True
    noise = [rng.normal(size=(n * size, 8)) for n in (blocks, pieces, pieces)]
    query = np.concatenate([np.repeat(8.0 * live, size, 0), noise[0]], axis=1)
    key = np.concatenate([np.repeat(8.0 * np.eye(pieces), size, 0), noise[1]], axis=1)
    return live, [jnp.asarray(x[None, :, None], "bfloat16") for x in (query, key, noise[2])]


@pytest.mark.slow
def test_products_are_as_many_as_pieces_with_weight(monkeypatch):
    """Counted where they are formed; scores in the passes that search are in the work, too."""
    counter, form = collections.Counter(), tiles._dot

    def counted(plan, left, right, contracted):
        jax.debug.callback(lambda: counter.update([contracted]))
        return form(plan, left, right, contracted)

    monkeypatch.setattr(tiles, "_dot", counted)

    @jax.jit
    def attend(query, key, value):
        return ATTENTION.found(canonical(query, key, value, kernel=kreg.biweight, scale=1.0))

    @jax.jit
    def pull(query, key, value):
        def attend(query, key, value):
            return kreg.attention(query, key, value, scale=1.0, implementation="mosaic_tpu")

        return jax.grad(lambda *inputs: attend(*inputs).sum(), (0, 1, 2))(query, key, value)

    def run(function, *inputs):
        counter.clear()
        found = jax.block_until_ready(function(*inputs))
        jax.effects_barrier()
        return found, [counter[x] for x in (tiles._DOWN, tiles._INNER, tiles._LAST)]

    for density in (0.05, 0.15, 0.42, 1.0):
        live, arrays = with_weight(density)
        n = live.sum()
        with as_xla():
            found, (scores, averages, _) = run(attend, *arrays)
            _, of_both = run(pull, *arrays)
        np.testing.assert_array_equal(bits(found.live)[:, : live.shape[1]], live)
        first, refined, last, _ = np.asarray(found.work[0, 0, :, 0]).sum(0)
        assert (first, last) == (live.size, n) and refined <= 3 * live.size
        # Every piece is scored once, then what is left on the list; two averages of what is live.
        assert scores == first + refined + last and averages == 2 * n
        # Of a live piece scores and what flows back, in both kernels, then dq; dk and dv.
        assert [x - y for x, y in zip(of_both, (scores, averages, 0), strict=True)] == [
            4 * n,
            n,
            2 * n,
        ]


def test_two_runs_agree_and_rows_do_not_depend_on_others():
    query, key, value = (jnp.asarray(x, "bfloat16") for x in topics(384, 16))
    spoilt = query.at[0, 70].set(jnp.nan)

    @jax.jit
    def run(query):
        return kreg.attention(query, key, value, implementation="mosaic_tpu")

    with as_xla():
        first, again, other = (np.asarray(run(x), np.float32) for x in (query, query, spoilt))
    np.testing.assert_array_equal(first, again)
    rest = np.arange(384) != 70
    np.testing.assert_array_equal(first[:, rest], other[:, rest])
    assert np.all(np.isnan(other[0, 70]))


def test_what_all_weights_of_a_row_are_off_by_cancels():
    with as_xla():
        assert np.all(average_of_ones("mosaic_tpu", keys=300) == 1)


@pytest.mark.nightly
@pytest.mark.parametrize(("queries", "keys"), [(140, 140), (300, 700)])
@pytest.mark.parametrize("bandwidth", [kreg.Adaptive(), kreg.Anchored()])
def test_several_runs_side_by_side_drop_what_each_drops_alone(bandwidth, queries, keys):
    """vmap over all arguments, the dropout's key too; the reference draws the same."""
    rng = np.random.default_rng(0)
    sizes = (queries, 2), (keys, 1), (keys, 1)
    arrays = [jnp.asarray(rng.normal(size=(2, 1, *size, 16)), "float32") for size in sizes]
    dropout_keys = jax.random.split(jax.random.key(0), 2)

    def gradients(implementation, query, key, value, dropout_key):
        def loss(query, key, value):
            out = kreg.attention(
                query, key, value, bandwidth=bandwidth, is_causal=True,
                causal_offset=keys - queries, dropout_rate=0.3, dropout_key=dropout_key,
                implementation=implementation,
            )  # fmt: skip
            return jnp.sum(jnp.sin(3 * out))

        return jax.grad(loss, argnums=(0, 1, 2))(query, key, value)

    def both(implementation):
        return jax.jit(jax.vmap(functools.partial(gradients, implementation)))(
            *arrays, dropout_keys
        )

    with as_xla():
        found = both("mosaic_tpu")
    for x, y in zip(found, both("reference"), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5 * np.abs(y).max(), rtol=0)


@pytest.mark.parametrize(
    ("what", "arguments"),
    [
        *DECLINED,
        ("types", {"dtype": jnp.float16}),
    ],
)
def test_what_is_declined_is_named(what, arguments):
    arguments = dict(arguments)
    width, dtype = arguments.pop("width", 8), arguments.pop("dtype", jnp.bfloat16)
    x = jnp.ones((1, 4, 1, width), dtype)
    with pytest.raises(NotImplementedError, match=what):
        kreg.attention(x, x, x, implementation="mosaic_tpu", **arguments)


def test_scalar_memory_that_does_not_suffice_is_named():
    """Bits of tiles by block of queries, for all heads that share a key head."""

    def shapes(length, heads):
        query = jax.ShapeDtypeStruct((1, length, heads, 64), jnp.bfloat16)
        key = jax.ShapeDtypeStruct((1, length, 1, 64), jnp.bfloat16)
        return query, key, key

    def run(query, key, value):
        return kreg.attention(query, key, value, is_causal=True, implementation="mosaic_tpu")

    with on("TPU v5 lite"):
        jax.eval_shape(run, *shapes(2**20, 8))
        with pytest.raises(NotImplementedError, match="lists of tiles"):
            jax.eval_shape(run, *shapes(2**20, 64))


@pytest.mark.parametrize("device", ["TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x"])
def test_tpus_take_kernels_where_they_take_the_inputs(device):
    x = jnp.ones((1, 128, 1, 64), jnp.bfloat16)
    with on(device):
        assert kreg.explain_implementation(x, x, x).startswith("mosaic_tpu: kernels for TPU")
        assert "Gaussian" in kreg.explain_implementation(x, x, x, kernel=kreg.gaussian)
        assert "128 keys" in kreg.explain_implementation(x[:, :1], x, x)


def test_older_tpus_are_declined_and_the_portable_path_goes_on():
    x = jnp.ones((1, 128, 1, 64), jnp.bfloat16)
    with on("TPU v3"):
        with pytest.raises(NotImplementedError, match="TPU v3, only for TPUs from v4"):
            kreg.attention(x, x, x, implementation="mosaic_tpu")
        assert "mosaic_tpu" not in kreg.explain_implementation(x, x, x)


def on(device: str):
    """Programs traced inside are meant for the device."""
    kind = AbstractDevice(device_kind=device, num_cores=None, platform="tpu")
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=kind))
