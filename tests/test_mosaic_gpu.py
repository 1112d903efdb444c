"""The kernels for Hopper, run by Pallas' interpreter on CPU: the contract, and what they decline.

The interpreter simulates copies and barriers and detects races; memory that nobody has written
holds NaN. It takes seconds a case, so shapes are of one to three blocks of 64 queries and tiles of
64 keys. They are too few for the kernel of any length, which is taken all the same; the one for few
keys has tests of its own.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from attention_inputs import Shape, rounded
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
from kernel_contract import DECLINED, Interpreted, average_of_ones, drawn
from nightly import NIGHTLY
from test_contract import CAUSAL, Structure

import kreg
from kreg.canonical import canonical
from pallas_kernels.mosaic_gpu import ATTENTION, short

interpreted = functools.partial(
    plgpu.force_gpu_interpret_mode, plgpu.InterpretGPUParams(detect_races=True)
)
SMALL = {"B": 1, "N": 2, "K": 1, "H": 16, "V": 16}
STRUCTURES = {
    "biweight": Structure(Shape(T=70, S=140, **SMALL), dtype="bfloat16"),
    "causal": Structure(Shape(T=140, S=140, **SMALL), dtype="bfloat16", options=CAUSAL),
    "float32": Structure(Shape(T=70, S=70, **SMALL), options=CAUSAL | {"causal_offset": -1}),
    "sparsemax": Structure(Shape(T=70, S=140, **SMALL), "epanechnikov", dtype="float16"),
    "anchored": Structure(Shape(T=70, S=140, **SMALL), "epanechnikov", "anchored"),
    "fixed": Structure(Shape(T=70, S=140, **SMALL), "biweight", "fixed"),
}
MORE = {
    "triweight": Structure(
        Shape(B=2, T=63, S=129, N=4, K=2, H=64, V=128), "triweight", dtype="bfloat16"
    ),
    "order 4": Structure(Shape(T=65, S=65, **SMALL), "order4", dtype="bfloat16", options=CAUSAL),
    "order 1.5": Structure(Shape(T=65, S=65, **SMALL), "order1.5"),
    "window": Structure(
        Shape(T=150, S=150, **SMALL), "biweight", options={"local_window_size": (9, 4)}
    ),
    "anchored biweight": Structure(
        Shape(T=65, S=65, **SMALL), "biweight", "anchored", "float16", CAUSAL
    ),
    "fixed causal": Structure(Shape(T=65, S=65, **SMALL), "epanechnikov", "fixed", options=CAUSAL),
    "width 128": Structure(Shape(B=1, T=66, S=66, N=1, K=1, H=128, V=40), dtype="bfloat16"),
    "width 256": Structure(Shape(B=1, T=66, S=66, N=1, K=1, H=256, V=256), dtype="bfloat16"),
    "one key": Structure(Shape(B=2, T=3, S=1, N=1, K=1)),
}
ALL = STRUCTURES | MORE


@pytest.fixture(autouse=True)
def any_length(monkeypatch):
    monkeypatch.setattr(short, "MOST_KEYS", 0)


CONTRACT = Interpreted("mosaic_gpu", interpreted, ALL, widest=64)
check = CONTRACT.check


def one_of(names, chosen):
    """A case takes seconds: one is for every run and the oldest jax, the others for the night."""
    return [pytest.param(n, marks=pytest.mark.core if n == chosen else NIGHTLY) for n in names]


@pytest.mark.parametrize("name", one_of(STRUCTURES, "causal"))
def test_kernels_keep_the_contract(name):
    check(name, drawn(STRUCTURES[name], 1, 2.0, parts=32))


@pytest.mark.nightly
@pytest.mark.parametrize("parts", [0, 4, 8 + 16, 63], ids=["plain", "ranges", "by key", "all"])
@pytest.mark.parametrize("name", ALL)
def test_kernels_keep_the_contract_under_every_mask(name, parts):
    for spread, ties in [(0.0, False), (1.0, True), (30.0, False)]:
        check(name, drawn(ALL[name], 2, spread, parts, ties), ties)


# Without looking for races, which shorter rows do: 2,048 tiles a row take minutes as it is.
LONG = Interpreted(
    "mosaic_gpu",
    functools.partial(plgpu.force_gpu_interpret_mode, plgpu.InterpretGPUParams()),
    {
        name: Structure(Shape(B=1, T=3, S=2**17, N=1, K=1, H=16, V=16), name, dtype="bfloat16")
        for name in ("epanechnikov", "biweight", "triweight")
    },
)


@pytest.mark.nightly
@pytest.mark.parametrize("spread", [0.0, 1e-3], ids=["flat", "nearly"])
@pytest.mark.parametrize("name", LONG.structures)
def test_flat_rows_of_128k_keys(name, spread):
    """All scores equal, or all but: what fixed numbers of steps get wrong most."""
    LONG.check(name, drawn(LONG.structures[name], 3, spread))


def searched(query, key, value, **options):
    """What the forward kernel finds, and the oracle, in float64 on the same inputs."""
    problem = canonical(*(jnp.asarray(x, "bfloat16") for x in (query, key, value)), **options)
    with interpreted():
        return jax.tree.map(np.asarray, ATTENTION.found(problem))


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("clusters", 1),
        *(
            pytest.param(*case, marks=NIGHTLY)
            for case in [("apart", 2), ("flat", 3), ("clusters", 2), ("flat", 2)]
        ),
    ],
)
def test_skipped_tiles_hold_no_key_with_weight(name, order):
    """Every key of every row: those with weight are in live tiles, and one pass sees all tiles."""
    length, width = 256, 16
    rng = np.random.default_rng(0)
    topics = np.repeat(rng.normal(size=(length // 32, width)), 32, axis=0)
    topics *= {"apart": 0.0, "clusters": 6.0, "flat": 0.0}[name]
    query, key, value = rng.normal(size=(3, 1, length, 1, width)) * (name != "flat")
    arrays = [
        rounded(x, "bfloat16") for x in (query + topics[:, None], key + topics[:, None], value)
    ]
    found = searched(*arrays, kernel=kreg.Kernel(order), is_causal=True)
    where = np.tril(np.ones((length, length), bool))[None, None]
    bias = np.zeros((1, 1, length, length))
    want = oracle.attention(*arrays, bias, where, order=order, rule=oracle.Rule("adaptive", 1.0, 0))
    tiles = length // 64
    weight = (want.rows.p > 1e-7)[0, 0].reshape(tiles, 64, tiles, 64).any((1, 3))
    live = (found.live[0, 0, :, :1].astype(np.uint32) >> np.arange(tiles, dtype=np.uint32)) & 1
    assert not np.any(weight & (live == 0))
    first, refined, last, passes = np.moveaxis(found.work[0, 0], -1, 0)
    np.testing.assert_array_equal(first, np.arange(1, tiles + 1))  # all keys are met once
    assert np.all(refined <= passes * first) and np.all(last <= first)
    assert np.all(live.sum(1) <= last) and passes.max() <= (4 if order > 1 else 8)
    if name == "clusters":
        assert live.sum() < first.sum()  # something was skipped
    if name == "flat":
        assert passes.max() == 1  # exact after one pass: the other finds nothing to do


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["causal", "float32"])
def test_two_runs_agree_bit_by_bit(name):
    case = drawn(ALL[name], 3, 1.0, 63)
    jax.tree.map(
        np.testing.assert_array_equal, CONTRACT.computed(name, case), CONTRACT.computed(name, case)
    )


@pytest.mark.nightly
@pytest.mark.parametrize("bandwidth", [kreg.Adaptive(), kreg.Anchored()])
def test_dropout_is_that_of_the_reference(bandwidth):
    keys = jax.random.split(jax.random.key(0), 4)
    sizes = (70, 2), (66, 1), (66, 1), (70, 2)
    arrays = [jax.random.normal(k, (2, *s, 16)) for k, s in zip(keys, sizes, strict=True)]

    @functools.partial(jax.jit, static_argnums=0)
    def both(implementation, *inputs, cotangent):
        def attend(query, key, value):
            return kreg.attention(
                query, key, value, bandwidth=bandwidth, implementation=implementation,
                dropout_rate=0.3, dropout_key=jax.random.key(1),
            )  # fmt: skip

        out, pull = jax.vjp(attend, *inputs)
        return out, *pull(cotangent)

    with interpreted():
        found = jax.tree.map(np.asarray, both("mosaic_gpu", *arrays[:3], cotangent=arrays[3]))
    wanted = jax.tree.map(np.asarray, both("reference", *arrays[:3], cotangent=arrays[3]))
    for x, y in zip(found, wanted, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5 * np.abs(y).max(), rtol=0)


def test_what_all_weights_of_a_row_are_off_by_cancels():
    with interpreted():
        assert np.all(average_of_ones("mosaic_gpu", keys=140) == 1)


def test_a_query_of_nan_spoils_no_other():
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(x, "bfloat16") for x in rng.normal(size=(3, 1, 140, 1, 16)))
    spoilt = query.at[0, 70].set(jnp.nan)
    with interpreted():
        outs = [
            np.asarray(kreg.attention(x, key, value, implementation="mosaic_gpu"), np.float32)
            for x in (query, spoilt)
        ]
    others = np.arange(140) != 70
    np.testing.assert_array_equal(outs[0][:, others], outs[1][:, others])
    assert np.all(np.isnan(outs[1][0, 70]))


@pytest.mark.parametrize(
    ("what", "arguments"),
    [
        *DECLINED,
        ("types", {"dtype": jnp.float64}),
        ("float16", {"dtype": jnp.float16, "bandwidth": kreg.Fixed(1.0), "scale": 1.0}),
    ],
)
def test_what_is_declined_is_named(what, arguments):
    arguments = dict(arguments)
    width, dtype = arguments.pop("width", 8), arguments.pop("dtype", jnp.bfloat16)
    with jax.enable_x64(dtype == jnp.float64):
        x = jnp.ones((1, 4, 1, width), dtype)
        with pytest.raises(NotImplementedError, match=what):
            kreg.attention(x, x, x, implementation="mosaic_gpu", **arguments)


@pytest.mark.parametrize("device", ["NVIDIA A100-SXM4-80GB", "NVIDIA B200"])
def test_other_devices_are_declined_and_the_portable_path_goes_on(device):
    x = jnp.ones((1, 128, 1, 64), jnp.bfloat16)
    with on(device):
        with pytest.raises(NotImplementedError, match=device):
            kreg.attention(x, x, x, implementation="mosaic_gpu")
        assert "mosaic_gpu" not in kreg.explain_implementation(x, x, x)


def test_hopper_takes_kernels_where_they_take_the_inputs():
    x = jnp.ones((1, 128, 1, 64), jnp.bfloat16)
    with on("NVIDIA H200"):
        assert kreg.explain_implementation(x, x, x).startswith("mosaic_gpu: kernels for NVIDIA")
        assert "Gaussian" in kreg.explain_implementation(x, x, x, kernel=kreg.gaussian)
        assert "128 keys" in kreg.explain_implementation(x[:, :1], x, x)


def on(device: str):
    """Programs traced inside are meant for the device."""
    kind = AbstractDevice(device_kind=device, num_cores=None, platform="gpu")
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=kind))


@pytest.mark.nightly
def test_several_runs_side_by_side_are_each_alone():
    """vmap over all arguments, the dropout's key too, as several seeds in one program need it."""
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=(2, 1, 70, 1, 16)), "bfloat16") for _ in range(3)]
    keys = jax.random.split(jax.random.key(0), 2)

    def gradients(query, key, value, dropout_key):
        def loss(query, key, value):
            out = kreg.attention(
                query, key, value, is_causal=True, causal_offset=-1, dropout_rate=0.1,
                dropout_key=dropout_key, implementation="mosaic_gpu",
            )  # fmt: skip
            return out.astype("float32").sum()

        return jax.value_and_grad(loss, argnums=(0, 1, 2))(query, key, value)

    with interpreted():
        both = jax.jit(jax.vmap(gradients))(*arrays, keys)
        for i in range(2):
            one = jax.jit(gradients)(*(x[i] for x in arrays), keys[i])
            jax.tree.map(lambda x, y, i=i: np.testing.assert_array_equal(x[i], y), both, one)
